"""Random walks over what users do with an adapted model, in any order, against the formula.

After every operation that computes, the output and all gradients equal the formula over the
parameters of that moment. ``pytest tests/walks --walks 2000`` walks further.
"""

import copy
import tempfile
from collections.abc import Sequence

import bitsandbytes
import pytest
import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    precondition,
    rule,
    run_state_machine_as_test,
)
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

import rasa_ext
from rasa_ext import ops
from rasa_ext.peft import RasaConfig
from tests.helpers.adapters import through_file
from tests.walks.formula import BLOCKS, LINEARS, Copies, Net, Part, formula, network

EXACT = 3e-5
"""The largest error over the largest value: float32's rounding through three blocks."""

OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.05),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.01),
    "AdamW, foreach": lambda p: torch.optim.AdamW(p, lr=0.01, foreach=True),
    "AdamW, fused": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
    "Adafactor": lambda p: torch.optim.Adafactor(p, lr=0.01),
    "Lion, 8 bit": lambda p: bitsandbytes.optim.Lion8bit(p, lr=0.01, min_8bit_size=0),
}
WAYS = ("in order", "in parts", "retained", "stepped", "evaluated", "copied", "left", "failed")
"""How a backward runs, or what happens between the forward and it."""
WRITES = ("in place", "data, in place", "data, assigned", "replaced", "loaded", "loaded, assigned")
SEEDS = st.integers(0, 3)
LAYERS = [(index, name) for index in range(BLOCKS) for name in LINEARS]
LATER = [[1], [2, 1], [1, 1, 2]]
CHOSEN = st.sampled_from([range(BLOCKS), range(BLOCKS), [0], [0, 2], *LATER])


def step_alone(parameter: Tensor) -> None:
    torch.optim.Adam([parameter], lr=0.01).step()


class Walk(RuleBasedStateMachine):
    """What all walks do: forwards, backwards, steps, writes, modes and copies."""

    model: nn.Module
    seen = True
    """Whether all writes so far are seen by any forward."""
    last: Sequence[int] = ()
    """The blocks of the last forward."""
    spent = False
    """Whether a backward has gone through every pack since the last forward."""

    def parts(self, index: int, name: str) -> list[Part]:
        """Return the parameters that the forward adds to a layer."""
        raise NotImplementedError

    @property
    def merged(self) -> bool:
        raise NotImplementedError

    def formula(self, x: Tensor, chosen, copies: Copies) -> Tensor:
        return formula(
            x,
            chosen,
            lambda index, name: [tuple(map(copies, part)) for part in self.parts(index, name)],
        )

    def check(self, found: Tensor, expected: Tensor, bound: float = EXACT) -> None:
        if expected.numel():  # k = r leaves layers without ranks of their own
            error = (found.detach().double() - expected.detach()).abs().max()
            most = expected.abs().max().clamp(min=0.1)
            assert error <= bound * most, f"the error is {error / most:.1e}"

    def before(self, chosen) -> None:
        """Drop packs if a write through ``.data`` may be missed, as ``PackSet`` says."""
        if not (self.seen or self.spent or chosen[0] == 0 or chosen[0] in self.last):
            rasa_ext.drop_packs(self.model)
        self.seen, self.spent, self.last = True, False, chosen

    def changed(self, model: nn.Module) -> None:
        """Go on with another model, which has no packs."""
        self.model, self.seen, self.last = model, True, ()

    @rule(seed=SEEDS, chosen=CHOSEN, inference=st.booleans())
    def evaluate(self, seed, chosen, inference):
        self.before(chosen)
        x = self.inputs(seed)
        with torch.inference_mode() if inference else torch.no_grad():
            y = self.model(x, chosen)
        self.check(y.clone(), self.formula(x, chosen, Copies()))

    @rule(seed=SEEDS)
    def one_token(self, seed):
        """Run a step of ``generate``, which misses writes through ``.data``."""
        if not self.seen:
            rasa_ext.drop_packs(self.model)
        self.seen, self.last = True, range(BLOCKS)
        x = self.inputs(seed, tokens=1)
        with torch.no_grad():
            self.check(self.model(x), self.formula(x, range(BLOCKS), Copies()))

    @rule(seed=SEEDS)
    def autocast(self, seed):
        """Err at most three times as much as dense weights do, over a hundredth of the output."""
        self.before(range(BLOCKS))
        x, dense = self.inputs(seed), network()
        with torch.no_grad():
            for index, name in LAYERS:
                for A, A_pool, B, B_pool, d in self.parts(index, name):
                    down = A if A_pool is None else torch.cat([A, A_pool])
                    up = B if B_pool is None else torch.cat([B, B_pool], 1)
                    getattr(dense.blocks[index], name).weight += (up * d) @ down
            with torch.autocast("cpu", torch.bfloat16):
                found, plain = self.model(x), dense(x)
            expected = self.formula(x, range(BLOCKS), Copies())
            errors = [(each.double() - expected).norm() for each in (found, plain)]
            assert errors[0] <= 3 * errors[1] + 0.01 * expected.norm()

    @rule(
        seeds=st.lists(SEEDS, min_size=1, max_size=2),
        chosen=CHOSEN,
        reentrant=st.sampled_from([None, None, False, True]),
        fused=st.booleans(),
        way=st.sampled_from(["in reverse", "in reverse", *WAYS]),
    )
    def backward(self, seeds, chosen, reentrant, fused, way):
        """Run one or two forwards, then the backwards, in reverse unless they are "in order"."""
        if self.merged:
            if self.model.training:
                with pytest.raises(RuntimeError, match="merged"):
                    self.model(self.inputs(0))
            return
        self.before(chosen)
        net, old = self.net(), ops.fuse_projections
        hooks = []
        if way == "stepped":
            seeds, reentrant = seeds[:1], None  # a step between two backwards is refused
        for parameter in self.parameters():
            parameter.grad = None
            if way == "stepped" and parameter.requires_grad:
                hooks.append(parameter.register_post_accumulate_grad_hook(step_alone))
        net.reentrant, ops.fuse_projections = reentrant, (lambda *_: True) if fused else old
        try:
            runs = []
            for seed in seeds:
                x, copies = self.inputs(seed).requires_grad_(), Copies()
                wide = x.detach().double().requires_grad_()
                first = middle = x
                if way == "in parts":
                    first = self.model(x, chosen[:1])
                    middle = first.detach().requires_grad_()
                y = self.model(middle, chosen[1:] if way == "in parts" else chosen)
                expected = self.formula(wide, chosen, copies)
                self.check(y, expected)
                runs.append((y, expected, first, middle, x, wide, copies))
            self.last = self.between(way, chosen)
            for run in runs if way == "in order" else reversed(runs):
                y, expected, first, middle, x, wide, _ = run
                for each in (y, expected):
                    loss = each.square().sum()
                    if way == "retained":
                        loss.backward(retain_graph=True)
                    loss.backward()
                if way == "in parts":
                    first.backward(middle.grad)
                self.check(x.grad, wide.grad, 10 * EXACT)
        finally:
            net.reentrant, ops.fuse_projections = None, old
            for hook in hooks:
                hook.remove()
        all_trained = all(parameter.requires_grad for parameter in self.parameters())
        self.spent = all_trained and way not in ("evaluated", "left", "failed")
        gradients: dict[int, Tensor] = {}
        for *_, copies in runs:
            for parameter, leaf in copies.pairs():
                if leaf.grad is not None:
                    gradients[id(parameter)] = gradients.get(id(parameter), 0) + leaf.grad
        for parameter in self.parameters():
            expected = gradients.get(id(parameter))
            if expected is None:
                assert parameter.grad is None or parameter.requires_grad
                assert parameter.grad is None or not parameter.grad.any()
            else:
                self.check(parameter.grad, expected, 10 * EXACT)

    @precondition(lambda self: not self.merged)
    @rule(
        trained=st.tuples(st.booleans(), st.booleans()),
        blocks=st.tuples(st.sampled_from([[0], range(BLOCKS)]), st.sampled_from(LATER)),
        way=st.sampled_from([None, "data, in place", "data, assigned"]),
        reentrant=st.sampled_from([None, False, True]),
    )
    def in_turns(self, trained, blocks, way, reentrant):
        """Run blocks, write to or unfreeze the parameters, and run later blocks of the groups."""
        self.freeze(1, trained[0])
        self.backward([0], blocks[0], None, False, "in reverse")
        if way:
            self.written(way, 1, 1)
        self.freeze(1, trained[1])
        self.backward([1], blocks[1], reentrant, False, "in reverse")

    def between(self, what: str, chosen) -> Sequence[int]:
        """Do ``what`` between a forward and its backward; return the blocks of the last forward."""
        x, mode = self.inputs(1).requires_grad_(), self.model.training
        if what == "evaluated":
            with torch.no_grad():
                self.model(x)
                self.model.eval()(x)
            self.model.train(mode)
        elif what == "copied":
            copy.deepcopy(self.model)(x).sum().backward()
        elif what == "left":
            self.model(x)
        elif what == "failed":
            with pytest.raises(TypeError):
                self.model(x, [0, None])
            return [0]
        return range(BLOCKS) if what in ("evaluated", "left") else chosen

    @precondition(lambda self: not self.merged)
    @rule(kind=st.sampled_from(sorted(OPTIMIZERS)), generating=st.booleans())
    def step(self, kind, generating):
        """Take a step, also between two tokens of ``generate``, as in reinforcement learning."""
        if generating:
            self.one_token(0)
        if trained := [p for p in self.parameters() if p.requires_grad and p.numel()]:
            torch.nn.utils.clip_grad_norm_(trained, 1.0)  # a walk must not diverge
            OPTIMIZERS[kind](trained).step()
        if generating:
            self.one_token(0)

    @precondition(lambda self: not self.merged)
    @rule(way=st.sampled_from(WRITES), seed=SEEDS, share=st.sampled_from([1, 2]))
    def write(self, way, seed, share):
        self.written(way, seed, share)

    def written(self, way, seed, share):
        """Write to all, or every second, of the parameters."""
        generator = torch.Generator().manual_seed(seed)
        state = {}
        for name, parameter in self.named()[::share]:
            noise = torch.randn(parameter.shape, generator=generator)
            value = 0.9 * parameter.detach() + 0.05 * noise  # does not grow with every write
            if way == "in place":
                with torch.no_grad():
                    parameter.copy_(value)
            elif way == "data, in place":
                parameter.data.copy_(value)
            elif way == "data, assigned":
                parameter.data = value
            elif way == "replaced":
                module, _, key = name.rpartition(".")
                new = nn.Parameter(value, parameter.requires_grad)
                self.model.get_submodule(module)._parameters[key] = new
            else:
                state[name] = value
        if state:
            assign = way == "loaded, assigned"
            self.model.load_state_dict(state, strict=False, assign=assign)
        self.seen = self.seen and not way.startswith("data")

    @rule(seed=SEEDS, training=st.booleans())
    def train(self, seed, training):
        """Switch the mode of the model, or of one block."""
        module = self.model if seed else self.net().blocks[1]
        module.train(training)

    @rule(every=st.sampled_from([1, 2, 3]), trained=st.booleans(), start=st.integers(0, 2))
    def freeze(self, every, trained, start=0):
        for parameter in self.parameters()[start::every]:
            parameter.requires_grad_(trained)

    @rule(way=st.sampled_from(["copied", "pickled"]))
    def copied(self, way):
        self.changed((copy.deepcopy if way == "copied" else through_file)(self.model))

    def named(self) -> list[tuple[str, nn.Parameter]]:
        """Return the adapters' parameters, trained or frozen."""
        layers = [m for m in self.model.modules() if isinstance(m, rasa_ext.nn.AdaptedModule)]
        known = {id(t) for layer in layers for each in layer.adapters() for t in each.sources()}
        return [(name, p) for name, p in self.model.named_parameters() if id(p) in known]

    def parameters(self) -> list[nn.Parameter]:
        return [p for _, p in self.named()]

    def inputs(self, seed: int, tokens: int = 3) -> Tensor:
        return torch.randn(2, tokens, 8, generator=torch.Generator().manual_seed(seed))

    def net(self) -> Net:
        return self.model


def part(adapter) -> Part:
    own, pool = adapter.own, adapter.pool
    return own["A"], pool.get("A"), own["B"], pool.get("B"), own["d"]


class Patched(Walk):
    """Walks after ``patch_model``."""

    @initialize(
        k=st.sampled_from([0, 1, 2]), names=st.sampled_from(["all-linear", ("q", "v", "down")])
    )
    def patch(self, k, names):
        model = rasa_ext.patch_model(network(), 2, k, target_modules=names)
        self.changed(model)
        self.disabled = False
        self.written("in place", 3, 1)

    @property
    def merged(self) -> bool:
        return self.model.blocks[0].q.merged_base is not None

    def parts(self, index, name):
        layer = getattr(self.model.blocks[index], name)
        return [] if self.disabled or isinstance(layer, nn.Linear) else [part(layer.adapter())]

    @rule()
    def merge(self):
        (rasa_ext.unmerge if self.merged else rasa_ext.merge)(self.model)

    @rule(seed=SEEDS, grad=st.booleans())
    def disable(self, seed, grad):
        x = self.inputs(seed)
        with rasa_ext.disable_adapter(self.model), torch.set_grad_enabled(grad):
            self.check(self.model(x), formula(x, range(BLOCKS), lambda *_: []))

    @precondition(lambda self: not self.merged)
    @rule(into=st.sampled_from(["a new base", "itself"]))
    def saved(self, into):
        with tempfile.TemporaryDirectory() as folder:
            rasa_ext.save_adapter(self.model, folder)
            if into == "itself":
                self.written("in place", 1, 1)
                rasa_ext.load_adapter(self.model, folder)
            else:
                self.changed(rasa_ext.load_adapter(network(), folder))


class Peft(Walk):
    """Walks under PEFT, with two adapters of different rank, k and layers."""

    SECOND = RasaConfig(r=3, rasa_k=2, target_modules=["q", "up"], init_weights=False)

    @initialize(k=st.sampled_from([0, 1, 2]))
    def patch(self, k):
        config = RasaConfig(r=2, rasa_k=k, target_modules=list(LINEARS))
        model = get_peft_model(network(), config)
        model.add_adapter("second", copy.deepcopy(self.SECOND))
        self.active = ["default"]
        self.changed(model)
        self.written("in place", 3, 1)

    @property
    def merged(self) -> bool:
        return bool(self.net().blocks[0].q.merged)

    def net(self):
        return self.model.base_model.model

    def parts(self, index, name):
        layer = getattr(self.net().blocks[index], name)
        return [part(layer.named(each)) for each in self.active if each in layer.configs]

    @precondition(lambda self: not self.merged)
    @rule(names=st.sampled_from([["default"], ["second"], ["default", "second"]]))
    def activate(self, names):
        self.model.base_model.set_adapter(names)
        self.active, self.last = names, ()

    @rule()
    def merge(self):
        (self.model.unmerge_adapter if self.merged else self.model.merge_adapter)()

    @precondition(lambda self: not self.merged)
    @rule(seed=SEEDS)
    def disable(self, seed):
        x = self.inputs(seed)
        with self.model.disable_adapter():
            self.check(self.model(x), formula(x, range(BLOCKS), lambda *_: []))

    @precondition(lambda self: not self.merged)
    @rule(names=st.permutations(["default", "second"]), seed=SEEDS)
    def rows(self, names, seed):
        """Run two rows, each through an adapter of its own."""
        self.model.eval()
        self.before(range(BLOCKS))
        x, active = self.inputs(seed), self.active
        y = self.model(x, adapter_names=list(names))
        for row, name in enumerate(names):
            self.active = [name]
            self.check(y[row], self.formula(x[row], range(BLOCKS), Copies()))
        self.active = active

    @precondition(lambda self: not self.merged and self.active == ["default"])
    @rule()
    def made_again(self):
        self.model.delete_adapter("second")
        self.model.add_adapter("second", copy.deepcopy(self.SECOND))

    @precondition(lambda self: not self.merged)
    @rule(trainable=st.booleans())
    def saved(self, trainable):
        with tempfile.TemporaryDirectory() as folder:
            self.model.save_pretrained(folder)
            model = PeftModel.from_pretrained(network(), folder, is_trainable=trainable)
            model.load_adapter(f"{folder}/second", "second")
        model.base_model.set_adapter(self.active)
        self.changed(model)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("walk", [Patched, Peft])
def test_random_walks(walk, request):
    run_state_machine_as_test(
        walk,
        settings=settings(
            max_examples=request.config.getoption("walks"),
            stateful_step_count=25,
            deadline=None,
            database=None,
            derandomize=True,
            phases=[Phase.generate],  # to shrink an example would take minutes
            suppress_health_check=list(HealthCheck),
        ),
    )
