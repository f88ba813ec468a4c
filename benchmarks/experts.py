"""One layer of stacked experts: a training step of the frozen layer, PEFT's LoRA and ours.

    python -m benchmarks.experts [--dtype float32 bfloat16] [--rounds 30] [--json FILE]
                                 [--experts 32 --hidden 256 --intermediate 512 --tokens 512
                                  --choices 4] [--seconds S] [--quick]

All variants use the same weights, from transformers' ``Qwen3MoeExperts``, and take turns in a
random order in one process. Results are medians with quartiles. All variants have the same
effective rank R, except PEFT r=4, which has as many parameters as "slot":

- PEFT: ``target_parameters`` over both weights, with parameters in the weights' dtype;
- slot, layer, shared: r = 4, k = 1, one layer of a group with as many layers as experts;
- pool only: "shared" with k = r = 1, in a group with enough layers for the same R.

Frozen and PEFT run with both of transformers' implementations, "grouped_mm" and "eager"; ratios are
to the faster one. ``saved`` is the bytes that a forward stores for the backward, without the
weights and the adapter. ``peak`` is the most that a step allocates at a time, with gradients, also
of a whole group's pool. ``extra`` is the peak above the peak of the frozen layer with "grouped_mm".
Before timing, each of ours is checked, with gradients, against the layer with W + dW.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import math
import os
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

import rasa_ext
from benchmarks import harness, records
from benchmarks.block import cpu_peak_bytes
from rasa_ext import ops
from rasa_ext.base_layers.experts import expert_shape, expert_weight_names
from rasa_ext.methods import LayerSpec
from rasa_ext.nn.packs import PackSet
from rasa_ext.nn.rasa_experts import RasaExperts, RasaExpertWeight

RANK, K = 4, 1
IMPLEMENTATIONS = ("grouped_mm", "eager")
QUICK = {"experts": 5, "hidden": 16, "intermediate": 24, "tokens": 12, "choices": 2}


@dataclasses.dataclass(frozen=True)
class Shape:
    """The sizes of one layer of experts and of the input."""

    experts: int = 32
    hidden: int = 256
    intermediate: int = 512
    tokens: int = 512
    choices: int = 4


class Case:
    """Inputs, upstream gradient and variants of a layer in one dtype."""

    def __init__(self, shape: Shape, dtype: torch.dtype) -> None:
        torch.manual_seed(0)
        self.shape, self.dtype = shape, dtype
        self.base = self._frozen()
        x = torch.randn(shape.tokens, shape.hidden, dtype=dtype)
        scores = torch.randn(shape.tokens, shape.experts).softmax(-1)
        weights, self.index = scores.topk(shape.choices)
        weights = (weights / weights.sum(-1, keepdim=True)).to(dtype)
        self.x, self.weights = x.requires_grad_(), weights.requires_grad_()
        self.grad = torch.randn(shape.tokens, shape.hidden, dtype=dtype)

    @property
    def R(self) -> int:
        """The effective rank of all variants but PEFT r = 4. A group has one layer per expert."""
        return RANK - K + self.shape.experts * K

    def variants(self) -> dict[str, nn.Module]:
        """Build frozen and PEFT layers with both implementations, and ours."""
        made: dict[str, nn.Module] = {}
        for name in IMPLEMENTATIONS:
            made[f"frozen, {name}"] = self._by(name)
        for name in IMPLEMENTATIONS:
            made[f"PEFT r={self.R}, {name}"] = self._peft(self.R, name)
        made[f"PEFT r={RANK}, {IMPLEMENTATIONS[0]}"] = self._peft(RANK, IMPLEMENTATIONS[0])
        for grouping in ("slot", "layer", "shared"):
            made[grouping] = self._ours(grouping, RANK, K, self.shape.experts)
        made["shared, pool only"] = self._ours("shared", 1, 1, self.R)
        return made

    def step(self, module: nn.Module) -> Callable[[], None]:
        """Return a function that runs forward and backward.

        Gradients are dropped first, except the gradients of a pool, which add up.
        """
        pools = [stack.pool for stack in _stacks(module)]
        kept = {id(t) for pool in pools if pool is not None for t in pool.parameters()}
        trained = [p for p in module.parameters() if p.requires_grad and id(p) not in kept]
        trained += [self.x, self.weights]

        def run() -> None:
            for tensor in trained:
                tensor.grad = None
            module(self.x, self.index, self.weights).backward(self.grad)

        return run

    def drop_gradients(self, module: nn.Module) -> None:
        """Reset gradients to None, as before the first step."""
        for tensor in (self.x, self.weights, *module.parameters()):
            tensor.grad = None

    def saved_bytes(self, module: nn.Module) -> int:
        """Return the bytes that a forward stores for the backward, without parameters."""
        own = {p.untyped_storage().data_ptr() for p in module.parameters()}
        kept: dict[int, int] = {}

        def keep(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            out = module(self.x, self.index, self.weights)
        del out
        return sum(kept.values())

    def peak_bytes(self, module: nn.Module) -> int:
        """Return the most bytes that a first step allocates at a time."""
        run = self.step(module)
        run()
        self.drop_gradients(module)
        return cpu_peak_bytes(run)

    def verify(self, name: str, module: nn.Module) -> None:
        """Raise RuntimeError if one of ours differs from W + dW, in values or gradients."""
        dense = self._merged(module)
        limit = 2e-5 if self.dtype == torch.float32 else 3e-2
        for what, mine, theirs in zip(
            ("out", "dx", "dweights"), self._answers(module), self._answers(dense), strict=True
        ):
            if not (error := harness.relative_error(mine, theirs)) <= limit:
                raise RuntimeError(f"{name} differs from W + dW in {what} by {error:.2e}.")

    def _answers(self, module: nn.Module) -> list[Tensor]:
        self.drop_gradients(module)
        out = module(self.x, self.index, self.weights)
        out.backward(self.grad)
        found = [t.detach().clone() for t in (out, self.x.grad, self.weights.grad)]
        self.drop_gradients(module)
        return found

    def _merged(self, module: nn.Module) -> nn.Module:
        dense = copy.deepcopy(self._by("eager"))
        with torch.no_grad():
            for name in expert_weight_names(dense):
                factors = module.stacks()[name].adapter().factors()
                Ap, Bp = ops.differentiable_pack(factors, torch.float32)
                weight = getattr(dense, name)
                weight.copy_((weight.float() + Bp.mT @ Ap).to(weight.dtype))
        return dense

    def _frozen(self) -> nn.Module:
        from transformers import Qwen3MoeConfig
        from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

        s = self.shape
        config = Qwen3MoeConfig(
            hidden_size=s.hidden,
            moe_intermediate_size=s.intermediate,
            num_experts=s.experts,
            num_experts_per_tok=s.choices,
        )
        experts = Qwen3MoeExperts(config)
        with torch.no_grad():
            for weight in experts.parameters():
                weight.normal_().div_(weight.shape[-1] ** 0.5)
        return experts.to(self.dtype).requires_grad_(False)

    def _by(self, implementation: str) -> nn.Module:
        """Return the base with one of transformers' implementations, over the same weights."""
        made = copy.deepcopy(self.base, {id(p): p for p in self.base.parameters()})
        made.config._experts_implementation = implementation
        return made

    def _peft(self, rank: int, implementation: str) -> nn.Module:
        import peft

        holder = nn.Module()
        holder.experts = self._by(implementation)
        config = peft.LoraConfig(
            r=rank,
            lora_alpha=rank,
            target_modules=[],
            target_parameters=[f"experts.{name}" for name in expert_weight_names(self.base)],
        )
        made = peft.inject_adapter_in_model(config, holder)
        return _lively(made.experts)

    def _ours(self, grouping: str, rank: int, k: int, layers: int) -> nn.Module:
        """Build one layer of a group of ``layers`` layers (for "layer", of a group of one)."""
        config = rasa_ext.RasaConfig(rank=rank, k=k, experts=grouping)
        base, layers = self._by(IMPLEMENTATIONS[0]), 1 if grouping == "layer" else layers
        stacks = {}
        for name in expert_weight_names(base):
            experts, out, width = expert_shape(base, name)
            spec = LayerSpec(0, layers, out, width, getattr(base, name).device, name, experts)
            pool = config.group_tensors([dataclasses.replace(spec, index=i) for i in range(layers)])
            stack = RasaExpertWeight(config, spec, rasa_ext.nn.RasaPool(pool), PackSet())
            stack.add_module("own_pool", stack.pool)  # no model has it
            stacks[name] = stack
        return _lively(RasaExperts(base, stacks))


def _stacks(module: nn.Module) -> list[RasaExpertWeight]:
    return [each for each in module.modules() if isinstance(each, RasaExpertWeight)]


def _lively(module: nn.Module) -> nn.Module:
    """Give adapters values as in training; zeros would be a special case."""
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.add_(0.02 * torch.randn_like(parameter))
    return module


def measure(case: Case, rounds: int, at_most: float) -> list[dict]:
    """Measure all variants, and return a row for each."""
    variants = case.variants()
    for name, module in variants.items():
        if _stacks(module):
            case.verify(name, module)
    saved = {name: case.saved_bytes(module) for name, module in variants.items()}
    peak = {name: case.peak_bytes(module) for name, module in variants.items()}
    steps = {name: case.step(module) for name, module in variants.items()}
    seconds = harness.interleaved(steps, rounds, at_most=at_most)
    took = {name: harness.quartiles(values) for name, values in seconds.items()}
    frozen = _faster(took, [f"frozen, {name}" for name in IMPLEMENTATIONS])
    peft = _faster(took, [f"PEFT r={case.R}, {name}" for name in IMPLEMENTATIONS])
    floor, above = f"frozen, {IMPLEMENTATIONS[0]}", f"PEFT r={case.R}, {IMPLEMENTATIONS[0]}"
    extra = {name: peak[name] - peak[floor] for name in variants}
    rows = []
    for name, module in variants.items():
        ours = bool(_stacks(module))
        rows.append(
            {
                "variant": name,
                "dtype": str(case.dtype).removeprefix("torch."),
                "ms": tuple(1e3 * value for value in took[name]),
                "/ frozen": took[name][1] / took[frozen][1],
                "/ PEFT": took[name][1] / took[peft][1],
                "saved, MiB": saved[name] / 2**20,
                "peak, MiB": peak[name] / 2**20,
                "extra, MiB": extra[name] / 2**20,
                "extra / PEFT's": extra[name] / extra[above] if ours else None,
                "rounds": len(seconds[name]),
            }
        )
    return rows


def _faster(took: dict[str, tuple[float, float, float]], names: list[str]) -> str:
    return min(names, key=lambda name: took[name][1])


def load() -> str:
    """Say whether other programs keep the machine busy, which makes figures unreliable."""
    others = os.getloadavg()[0]
    busy = "UNDER LOAD, not for the record" if others > 0.5 else "quiet"
    return f"load before the run {others:.1f} on {os.cpu_count()} cores: {busy}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--seconds", type=float, default=math.inf, help="time limit for all rounds")
    parser.add_argument("--json", metavar="FILE", type=Path)
    parser.add_argument("--quick", action="store_true", help="tiny shapes, to test the benchmark")
    for field in dataclasses.fields(Shape):
        parser.add_argument(f"--{field.name}", type=int, default=field.default)
    given = parser.parse_args()
    sizes = {field.name: getattr(given, field.name) for field in dataclasses.fields(Shape)}
    shape = Shape(**(QUICK if given.quick else sizes))
    busy = load()
    harness.pin_allocator()
    budget, rows = records.Budget(given.seconds), []
    for left, dtype in zip(range(len(given.dtype), 0, -1), given.dtype, strict=True):
        case = Case(shape, getattr(torch, dtype))
        rows += measure(case, given.rounds, budget.share(left))
        if given.json:
            head = {**records.environment("cpu"), "load": busy, "shape": vars(shape)}
            records.write_json(given.json, {"machine": head, "rows": rows})
    print(f"{shape}, R = {case.R}, {harness.machine()}; {busy}")
    print(records.table(rows))


if __name__ == "__main__":
    main()
