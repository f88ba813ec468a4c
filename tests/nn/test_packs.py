"""Packs: made once for each forward, but for steps of one token without grad.

Gradients of packs must reach the adapter in every order of forwards and backwards.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import itertools
import weakref
from unittest import mock

import bitsandbytes
import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import rasa_ext
import rasa_ext.peft
from rasa_ext import ops
from rasa_ext.nn import packs as module_of_packs
from tests.helpers import experts, oracle, peft
from tests.helpers.adapters import adapters, gradients, patched, plain_model, trainable_copies
from tests.helpers.models import LLAMA
from tests.helpers.oracle import Adapter
from tests.helpers.threads import run_in_threads

CONFIGS = [rasa_ext.RasaConfig(rank=4, k=k) for k in (0, 1, 4)]
X = [torch.randn(3, 6, generator=torch.Generator().manual_seed(i)).double() for i in range(3)]


@pytest.fixture
def packs(monkeypatch) -> list:
    """A list that gets an entry for every packing of a group or of stacked experts."""
    made = []

    def counting(direct, *args):
        pack = direct(*args)
        made.append(weakref.ref(pack[0]))
        return pack

    for name in ("pack_group", "differentiable_pack"):
        monkeypatch.setattr(ops, name, functools.partial(counting, getattr(ops, name)))
    return made


def chain(config=CONFIGS[1], layers: int = 3) -> tuple[nn.Module, nn.Module, dict[str, Adapter]]:
    """Return a group's layers, the official formula over copies of adapters, and the copies."""
    base = nn.Sequential(*(nn.Linear(6, 6) for _ in range(layers))).double()
    options = {"rank": config.rank, "k": config.k, "adapter_dtype": torch.float64}
    model = patched(base, config=rasa_ext.RasaConfig(**options)).train()
    copies = trainable_copies(adapters(model))
    return model, plain_model(base, copies), copies


def parameters(found: dict[str, Adapter]) -> list[Tensor]:
    """Return the tensors that are trained: the ones with elements."""
    tensors = (t for each in found.values() for t in each if t is not None and t.numel())
    return list({id(t): t for t in tensors}.values())


def loss(y: Tensor) -> Tensor:
    return y.square().sum()


def accumulated(model, _):
    for x in X:
        loss(model(x)).backward()


def two_forwards(model, _):
    first, second = loss(model(X[0])), loss(model(X[1]))
    second.backward()
    first.backward()


def one_of_two(model, _):
    loss(model(X[0]))
    loss(model(X[1])).backward()


def twice_in_a_forward(model, _):
    loss(model(model(X[0]))).backward()


def some_layers(model, _):
    loss(model[1](X[0])).backward()
    loss(model[2](model[0](X[1]))).backward()


def other_layers_each_time(model, _):
    loss(model[0](model[1](X[0]))).backward()
    loss(model[2](model[1](X[1]))).backward()


def part_by_part(model, _):
    """Run two backwards over the graph of one forward."""
    middle = model[0](X[0])
    leaf = middle.detach().requires_grad_()
    loss(model[2](model[1](leaf))).backward()
    middle.backward(leaf.grad)


def retained(model, _):
    y = loss(model(X[0]))
    y.backward(retain_graph=True)
    y.backward()


def an_evaluation_between(model, _):
    y = model(X[0])
    with torch.no_grad():
        model(X[1])
        model.eval()(X[1])
    model.train()
    loss(y).backward()


def a_copy_between(model, _):
    y = model(X[0])
    loss(copy.deepcopy(model)(X[1])).backward()
    loss(y).backward()


def an_exception_within(model, _):
    loss(model(X[0])).backward()
    model[0](X[1])
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        model[1](torch.randn(3, 5).double())
    loss(model(X[2])).backward()


def checkpointed(model, _, use_reentrant=False):
    x = X[0].clone().requires_grad_()
    for layer in model:
        x = checkpoint(layer, x, use_reentrant=use_reentrant)
    loss(x).backward()


checkpointed_reentrant = functools.partial(checkpointed, use_reentrant=True)


def checkpointed_and_accumulated(model, _):
    checkpointed(model, _)
    loss(model(X[1])).backward()
    checkpointed_reentrant(model, _)


def frozen_between(model, tensors):
    loss(model(X[0])).backward()
    for tensor in tensors[::2]:
        tensor.requires_grad_(False)
    loss(model(X[1])).backward()
    for tensor in tensors:
        tensor.requires_grad_()
    loss(model(X[2])).backward()


def written_through_data(model, tensors):
    """Update through ``.data``, like training loops without an optimizer."""
    for x in X:
        for tensor in tensors:
            tensor.grad = None
        loss(model(x)).backward()
        for tensor in tensors:
            tensor.data -= 0.01 * tensor.grad


def written_in_place(model, tensors):
    for x in X:
        for tensor in tensors:
            tensor.grad = None
        loss(model(x)).backward()
        with torch.no_grad():
            for tensor in tensors:
                tensor -= 0.01 * tensor.grad


def swapped(model, tensors):
    """Swap weights through ``.data`` for an evaluation in training mode, like weight averaging."""
    loss(model(X[0])).backward()
    kept = [tensor.detach().clone() for tensor in tensors]
    for tensor in tensors:
        tensor.data.mul_(0.5)
    with torch.no_grad():
        model(X[1])
    for tensor, value in zip(tensors, kept, strict=True):
        tensor.data.copy_(value)
    loss(model(X[2])).backward()


def stepped_in_the_backward(model, tensors):
    hooks = []
    for tensor in tensors:
        step = torch.optim.SGD([tensor], lr=0.01).step
        hooks.append(tensor.register_post_accumulate_grad_hook(lambda _, step=step: step()))
    for x in X:
        for tensor in tensors:
            tensor.grad = None
        loss(model(x)).backward()
    for hook in hooks:
        hook.remove()


RUNS = (
    accumulated,
    two_forwards,
    one_of_two,
    twice_in_a_forward,
    some_layers,
    other_layers_each_time,
    part_by_part,
    retained,
    an_evaluation_between,
    a_copy_between,
    an_exception_within,
    checkpointed,
    checkpointed_reentrant,
    checkpointed_and_accumulated,
    frozen_between,
    written_through_data,
    written_in_place,
    swapped,
    stepped_in_the_backward,
)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: f"k={config.k}")
@pytest.mark.parametrize("run", RUNS, ids=lambda run: getattr(run, "__name__", "reentrant"))
def test_gradients_and_values_are_those_of_the_formula(run, config):
    """Gradients and values equal the formula's, whatever happens between forward and backward."""
    model, simple, copies = chain(config)
    run(model, parameters(adapters(model)))
    run(simple, parameters(copies))
    expected = gradients(copies)
    for name, value in gradients(adapters(model)).items():
        torch.testing.assert_close(value, expected[name], msg=name)
    for mine, theirs in zip(parameters(adapters(model)), parameters(copies), strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("frozen", [("A",), ("B",), ("d",), ("A_pool", "B_pool"), ("A", "A_pool")])
def test_what_is_frozen_gets_no_gradient(frozen):
    model, simple, copies = chain()
    for each in (adapters(model), copies):
        for layer in each.values():
            for name in frozen:
                getattr(layer, name).requires_grad_(False)
    for each in (model, simple):
        loss(each(X[0])).backward()
    for mine, theirs in zip(parameters(adapters(model)), parameters(copies), strict=True):
        assert (mine.grad is None) == (not mine.requires_grad)
        if mine.grad is not None:
            torch.testing.assert_close(mine.grad, theirs.grad)


def test_gradients_of_a_part_of_the_tensors():
    model, simple, copies = chain()
    for names in (("A",), ("B_pool", "d"), ("A_pool", "B")):
        found = [
            torch.autograd.grad(
                loss(each(X[0])), [getattr(a, n) for n in names for a in (list(its.values())[1],)]
            )
            for each, its in ((model, adapters(model)), (simple, copies))
        ]
        torch.testing.assert_close(*found)


@pytest.mark.parametrize("field", Adapter._fields)
def test_a_write_between_forward_and_backward_is_refused(field):
    model, *_ = chain()
    y = loss(model(X[0]))
    with torch.no_grad():
        getattr(adapters(model)["1"], field).mul_(1.0)
    with pytest.raises(RuntimeError, match="expected an adapter that is unchanged"):
        y.backward()
    loss(model(X[0])).backward()


def test_a_write_to_a_layer_that_takes_no_part_is_not():
    model, *_ = chain()
    y = loss(model[0](X[0]))
    with torch.no_grad():
        model[1].B.mul_(2)
    y.backward()
    assert model[0].B.grad is not None


def test_functional_call_reads_the_given_tensors():
    model, simple, copies = chain()
    loss(model(X[0])).backward()
    for tensor in parameters(copies):
        tensor.data.mul_(1.5)
    given = {n: (1.5 * p.detach()).requires_grad_() for n, p in model.named_parameters()}
    given |= {n: p for n, p in model.named_parameters() if not p.requires_grad}
    y = torch.func.functional_call(model, given, (X[1],))
    torch.testing.assert_close(y, simple(X[1]))
    loss(y).backward()
    loss(simple(X[1])).backward()
    torch.testing.assert_close(given["1.B"].grad, copies["1"].B.grad)
    torch.testing.assert_close(given["rasa_pool_0_A"].grad, copies["0"].A_pool.grad)


@pytest.mark.parametrize("use_reentrant", [None, False, True])
def test_a_group_is_packed_once_a_forward(use_reentrant, packs):
    """Each training step packs a group once; recomputation in a checkpoint reuses the packs."""
    model = patched(LLAMA.build()).train()
    groups = len({id(layer.pool) for layer in model.modules() if hasattr(layer, "pool")})
    if use_reentrant is not None:
        model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    optimizer = torch.optim.SGD(rasa_ext.adapter_parameters(model), lr=0.01)
    for step in range(1, 4):
        LLAMA.loss(model, LLAMA.inputs(0))[1].backward()
        assert len(packs) == groups * step
        optimizer.step()
    assert groups == 7


def test_layers_that_are_called_in_pairs_do_not_pack_in_pairs(packs):
    """Two inputs that pass each layer in turn, such as two towers, pack every layer twice."""
    model, simple, copies = chain(layers=5)
    for each in (model, simple):
        a, b = X[0], X[1]
        for layer in each:
            a, b = layer(a), layer(b)
        loss(a + b).backward()
    # The first layer packs the group in both calls. From the second layer's second call, layers
    # pack only themselves.
    assert len(packs) == 2 + 1 + 3 * 2
    with torch.no_grad():
        model(X[2])
    assert len(packs) == 2 + 1 + 3 * 2 + 1
    expected = gradients(copies)
    for name, value in gradients(adapters(model)).items():
        torch.testing.assert_close(value, expected[name], msg=name)


def test_without_grad_a_group_is_packed_once_a_forward(packs):
    model = patched(LLAMA.build()).eval()
    for forward in range(1, 4):
        with torch.set_grad_enabled(forward == 2):
            LLAMA.loss(model, LLAMA.inputs(0))
        assert len(packs) == 7 * forward


@pytest.mark.parametrize("beams", [1, 2])
def test_steps_of_generate_pack_nothing(beams, packs):
    """Only the forward over the prompt packs the groups."""
    model = patched(LLAMA.build()).eval()
    prompt = LLAMA.inputs(0)["input_ids"]
    model.generate(prompt, max_new_tokens=5, num_beams=beams, use_cache=True, pad_token_id=0)
    assert len(packs) == 7


@pytest.mark.parametrize("by_peft", [False, True])
@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe"])
def test_steps_of_generate_pack_no_experts(family, by_peft, packs):
    """Nor what else sees the tokens of all rows as one batch, such as a shared expert."""
    base = experts.model(family).eval()
    if by_peft:
        config = rasa_ext.peft.RasaConfig(r=3, rasa_experts="slot")
        model = get_peft_model(base, config)
    else:
        model = rasa_ext.patch_model(base, 3, experts="slot")
    options = {"use_cache": True, "pad_token_id": 0, "min_new_tokens": 1}
    prompt = torch.randint(1, 32, (3, 4))
    model.generate(input_ids=prompt, max_new_tokens=1, **options)
    first = len(packs)
    model.generate(input_ids=prompt, max_new_tokens=4, **options)
    assert len(packs) == 2 * first > 0


def test_a_model_is_watched_as_long_as_it_is_adapted():
    base = LLAMA.build()
    hooks = base._forward_pre_hooks, base._forward_hooks
    before = [list(each) for each in hooks]
    rasa_ext.unpatch(rasa_ext.patch_model(base))
    assert [list(each) for each in hooks] == before
    get_peft_model(base, rasa_ext.peft.RasaConfig()).unload()
    assert [list(each) for each in hooks] == before


def test_packs_of_past_forwards_are_freed_at_once(packs):
    """Packs, also an evaluation's, are freed without waiting for the garbage collector."""
    model, *_ = chain()
    with torch.no_grad():
        model(X[0])
    for x in X:
        loss(model(x)).backward()
    assert [each() is None for each in packs] == [True, True, True, False]
    loss(model(X[0]))
    model.eval()
    assert all(each() is None for each in packs)
    gone = weakref.ref(model)
    del model
    assert gone() is None


def test_threads_that_serve_one_model():
    model, simple, _ = chain()
    model.eval()
    with torch.no_grad():
        expected, found = simple(X[0]), []

    def serve(_: int) -> None:
        with torch.no_grad():
            for _ in range(20):
                found.append(model(X[0]))
                model[0].drop_pack()

    run_in_threads(4, serve)
    assert len(found) == 80
    for y in found:
        torch.testing.assert_close(y, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_gradients_in_half_precision_err_less_than_the_formulas(dtype):
    """In half precision, gradients of A, B, d and the pool have smaller errors than the formula's.

    Errors are summed over the layers of a group and four draws.
    """
    errors: dict[str, list[float]] = {}
    for seed in range(4):
        torch.manual_seed(seed)
        base = nn.Sequential(*(nn.Linear(96, 96) for _ in range(8))).to(dtype)
        model = patched(base, 4, 1, seed=seed)
        copies = trainable_copies(adapters(model))
        xs, grads = ([torch.randn(48, 96).to(dtype) for _ in base] for _ in range(2))
        for each in (model, plain_model(base, copies)):
            outputs = [layer(x) for layer, x in zip(each, xs, strict=True)]
            torch.autograd.backward(outputs, grads)
        expected: dict[tuple[str, str], Tensor] = {}
        for i, (name, adapter) in enumerate(copies.items()):
            found = oracle.linear_grads(grads[i], xs[i], base[i].weight, adapter)
            for field in Adapter._fields:
                key = ("0" if "pool" in field else name, field)
                expected[key] = found[field] + expected.get(key, 0)
        for (name, field), value in expected.items():
            for which, found in enumerate((adapters(model), copies)):
                difference = getattr(found[name], field).grad.double() - value
                sums = errors.setdefault(field, [0.0, 0.0])
                sums[which] += (difference.norm() / value.norm()).item() ** 2
    assert errors.keys() == set(Adapter._fields)
    assert all(ours < theirs for ours, theirs in errors.values())


def layers(config, hooked=False, frozen=False) -> nn.Sequential:
    """Return two layers of one group.

    With ``hooked``, the base has a forward hook; with ``frozen``, A and the pool's A are buffers.
    """
    model = patched(nn.Sequential(nn.Linear(9, 7), nn.Linear(9, 7)), config=config)
    for layer in model:
        if hooked:
            layer.base_layer.register_forward_hook(lambda module, args, y: y)
        if frozen:
            for owner in (layer, layer.pool) if layer.spec.index == 0 and layer.pool else (layer,):
                tensors = dict(owner.tensors())
                owner.replace({**tensors, "A": tensors["A"].data})
    return model.eval()


def decode(module) -> None:
    """Tell a module that is called alone what the model's forward tells: one token for each row."""
    for adapter in module.adapters():
        adapter.packs._decoding.now = True


def assert_writes_are_seen(module, inputs, sources, packs, times) -> None:
    """Assert that a step of one token packs the group after a write to a source, and only then."""
    decode(module)
    for source in sources:
        before = module(*inputs)
        packs.clear()
        assert torch.equal(module(*inputs), before)
        assert not packs
        if not source.numel():
            continue
        source.mul_(1.5)
        after = module(*inputs)
        made = len(packs)
        assert made == times
        assert torch.equal(module(*inputs), after)
        assert len(packs) == made
        assert not torch.allclose(after, before)
        assert torch.equal(after, copy.deepcopy(module)(*inputs))


def every_layer(model, x):
    return model(x)


def in_pairs(model, x):
    for layer in model:
        x = layer(layer(x))
    return x


def all_but_the_first(model, x):
    return model[2](model[1](x))


def the_last(model, x):
    return model[2](x)


@pytest.mark.parametrize("write", ["copied", "assigned"])
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize(
    ("first", "second"),
    [
        *itertools.product((every_layer, in_pairs), (every_layer, in_pairs)),
        *((every_layer, part) for part in (all_but_the_first, the_last)),
        *((part, every_layer) for part in (all_but_the_first, the_last)),
    ],
)
def test_a_forward_sees_writes_through_data(first, second, grad, write):
    """Weight averages, evolution strategies and line searches write so, between two forwards."""
    model, simple, copies = chain()
    x = X[0][:, None] if grad else X[0]  # without grad, steps of one token do not see writes
    with torch.set_grad_enabled(grad):
        first(model, x)
        for each in (parameters(adapters(model)), parameters(copies)):
            for tensor in each:
                if write == "copied":
                    tensor.data.copy_(1.5 * tensor.data)
                else:
                    tensor.data = 1.5 * tensor.data
        torch.testing.assert_close(second(model, x), second(simple, x))


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpoint_recomputes_with_the_packs_of_its_own_forward(reentrant):
    """A frozen adapter is written to; then one of the group's later layers runs."""
    model, simple, copies = chain()
    model.requires_grad_(False)
    model(X[0])
    for tensor in (*parameters(adapters(model)), *parameters(copies)):
        tensor.data.mul_(1.5)
    xs = [X[1].clone().requires_grad_() for _ in range(2)]
    for each, x in zip((model, simple), xs, strict=True):
        loss(checkpoint(each[1], x, use_reentrant=reentrant)).backward()
    torch.testing.assert_close(xs[0].grad, xs[1].grad)


def test_a_backward_makes_the_packs_of_other_layers_stale():
    """A loop without an optimizer writes through ``.data``; the next forward runs another layer."""
    model, simple, copies = chain()
    loss(model[0](X[0])).backward()
    for tensor in (*parameters(adapters(model)), *parameters(copies)):
        tensor.data.mul_(1.5)
    torch.testing.assert_close(model[1](X[1]), simple[1](X[1]))


def test_a_layer_that_is_trained_again_gets_a_gradient():
    """It was frozen while another layer's forward packed the group."""
    model, simple, copies = chain()
    for trained in (False, True):
        for tensor in (*parameters({"1": adapters(model)["1"]}), *parameters({"1": copies["1"]})):
            tensor.requires_grad_(trained)
        if not trained:
            model[0](X[0])
    for each in (model, simple):
        loss(each[1](X[1])).backward()
    expected = gradients({"1": copies["1"]})
    for name, value in gradients({"1": adapters(model)["1"]}).items():
        torch.testing.assert_close(value, expected[name], msg=name)


def test_packs_of_a_cast_adapter_are_not_trained():
    """A forward with grad restores the dtype, though another layer's packed the group before."""
    model = patched(nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))).bfloat16().eval()
    x = X[0].bfloat16()
    with torch.no_grad():
        model[0](x)
    with pytest.warns(UserWarning, match="adapter_dtype"):
        model[1](x)
    assert {p.dtype for p in rasa_ext.adapter_parameters(model)} == {torch.float32}


@torch.no_grad()
def test_a_replica_of_data_parallel_reads_its_own_tensors():
    """It has not joined the group."""
    model, simple, copies = chain()
    model(X[0])
    replica = model[1]._replicate_for_data_parallel()
    replica.A, replica.B, replica.d = model[1].A.clone(), 2 * model[1].B, model[1].d.clone()
    torch.testing.assert_close(model[1](X[1]), simple[1](X[1]))
    copies["1"].B.mul_(2)
    torch.testing.assert_close(replica(X[1]), simple[1](X[1]))


@torch.no_grad()
@pytest.mark.parametrize("hooked", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: f"k={config.k}")
def test_a_layer_sees_writes_to_every_source(config, frozen, hooked, packs):
    """A layer sees writes to its own and the group's tensors, trained or frozen."""
    layer = layers(config, hooked, frozen)[1]
    sources = layer.adapter().sources()
    assert len(sources) == (3 if config.k == 0 else 5)
    assert {t.requires_grad for t in sources} == {True, False} if frozen else {True}
    assert_writes_are_seen(layer, [torch.randn(3, 1, 9)], sources, packs, 1)


@torch.no_grad()
@pytest.mark.parametrize("k", [0, 1, 3])
@pytest.mark.parametrize("grouping", experts.GROUPINGS)
@pytest.mark.parametrize("family", ["mixtral", "nemotron_h"])
def test_experts_see_writes_to_every_source(family, grouping, k, packs):
    model = experts.patched(experts.model(family), grouping, 3, k).eval()
    module, inputs = experts.adapted(model)[1], experts.inputs(1, dtype=torch.float32)
    for stack in module.stacks().values():
        sources = stack.adapter().sources()
        assert len(sources) == (3 if k == 0 else 5)
        times = 1 if grouping == "layer" else 2  # layers in a group
        assert_writes_are_seen(module, inputs, sources, packs, times)


WAYS = ("grad", "train", "eval", "to", "dtype", "replaced")


@pytest.mark.parametrize(
    ("kind", "way"),
    [*itertools.product(("linear", "experts"), WAYS), ("linear", "autocast")],
)
def test_what_packs_are_forgotten_by(kind, way, packs):
    """A step of one token misses a write through .data, unless one of these drops the pack."""
    if kind == "linear":
        owner = module = layers(CONFIGS[1])[1]
        inputs = [torch.randn(3, 1, 9)]
    else:
        module = experts.adapted(experts.patched(experts.model(), "shared"))[1]
        owner, inputs = module.down_proj, experts.inputs(1, dtype=torch.float32)
    decode(module)
    with torch.no_grad():
        module(*inputs)
        owner.B.data.mul_(2)
    if way == "grad":
        module(*inputs)
    elif way in ("train", "eval"):
        getattr(module, way)()
    elif way == "to":
        module.to("cpu")
    elif way == "dtype":
        module = module.double()
        inputs = [t.double() if t.is_floating_point() else t for t in inputs]
    elif way == "replaced":
        owner.d = nn.Parameter(owner.d.clone())
    packs.clear()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=way == "autocast"):
        found = module(*inputs)
        # With grad, the forward before packed already.
        both = kind == "experts" and way != "replaced"
        assert len(packs) == (0 if way == "grad" else 2 if both else 1)
        assert torch.equal(found, copy.deepcopy(module)(*inputs))


def test_a_stream_that_did_not_make_a_pack_waits_for_it_and_the_memory_for_the_stream(monkeypatch):
    """Otherwise a stream could read a pack before it is written, or after its memory is reused."""
    maker, reader, made = mock.Mock(), mock.Mock(), mock.Mock()
    current = [maker]
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current[0])
    model, *_ = chain()
    model.eval()
    pack = mock.Mock(), mock.Mock()
    with torch.no_grad():
        model(X[0])
        (found,) = model[0].packs._caches.values()
        found.made, found.entries[0].pack = (maker, made), pack
        decode(model[0])
        assert model[0].adapter().pack(torch.float64) is pack
        assert not any(each.record_stream.called for each in pack)
        maker.wait_event.assert_not_called()
        current[0] = reader
        assert model[0].adapter().pack(torch.float64) is pack
    reader.wait_event.assert_called_once_with(made)
    for each in pack:
        each.record_stream.assert_called_once_with(reader)


def test_a_capture_packs_each_layer_and_neither_reads_nor_keeps(monkeypatch, packs):
    model, *_ = chain()
    model.eval()
    x = X[0][:, None]
    with torch.no_grad():
        expected = model(x)
        monkeypatch.setattr(module_of_packs, "_is_capturing", lambda device: True)
        assert torch.equal(model(x), expected)
        assert len(packs) == 1 + 3
        monkeypatch.setattr(module_of_packs, "_is_capturing", lambda device: False)
        assert torch.equal(model(x), expected)
        assert len(packs) == 1 + 3


def test_the_packs_own_device_is_asked_whether_it_captures(monkeypatch):
    """A graph is captured on device 1, then on device 0, while device 0 is current."""
    current, capturing = [0], 1

    @contextlib.contextmanager
    def entered(device):
        current.append(device.index)
        yield
        current.pop()

    ask = module_of_packs._is_capturing
    monkeypatch.setattr(torch.cuda, "device", entered)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: current[-1] == capturing)
    asked = {index: ask(torch.device("cuda", index)) for index in (0, 1)}
    assert asked == {0: False, 1: True}
    capturing = 0
    assert ask(torch.device("cuda", 0))
    assert not ask(torch.device("cuda", 1))
    assert not ask(torch.device("cpu"))
    assert current == [0]


def test_inference_tensors_have_no_version_and_are_not_kept(packs):
    model, *_ = chain()
    with torch.inference_mode():
        created = copy.deepcopy(model).eval()
        for _ in range(2):
            created(X[0])
    assert len(packs) == 2 * 3


def test_a_pack_of_an_evaluation_in_inference_mode_serves_later_ones(packs):
    model, *_ = chain()
    model.eval()
    x = X[0][:, None]
    with torch.inference_mode():
        expected = model(x)
    with torch.no_grad():
        assert torch.equal(model(x), expected)
    assert len(packs) == 1
    loss(model(X[0])).backward()


def _linears():
    model = patched(nn.Sequential(nn.Linear(96, 96), nn.Linear(96, 96)))
    return model, lambda each: each(torch.ones(3, 96))


def _peft():
    return peft.tiny(), lambda each: each(peft.TOKENS).logits


def _experts():
    config = rasa_ext.RasaConfig(rank=4, k=1, experts="shared")
    tokens = torch.arange(6).view(2, 3)
    return patched(experts.model(), config=config), lambda each: each(tokens).logits


# Optimizers whose kernels do not raise a tensor's version. transformers' Trainer uses the first.
UNSEEN = {
    "fused": functools.partial(torch.optim.AdamW, lr=0.1, fused=True),
    "8-bit": functools.partial(bitsandbytes.optim.Lion8bit, lr=0.1, min_8bit_size=0),
    "32-bit": functools.partial(bitsandbytes.optim.AdamW32bit, lr=0.1),
}


@pytest.mark.parametrize("optimizer", UNSEEN)
@pytest.mark.parametrize("make", [_linears, _peft, _experts])
def test_a_step_that_raises_no_version_is_seen(make, optimizer):
    """In eval mode, an optimizer's step drops packs; otherwise the old policy would answer."""
    model, run = make()
    model.eval()
    trained = [p for p in model.parameters() if p.requires_grad]
    step = UNSEEN[optimizer](trained).step
    run(model).square().mean().backward()
    with torch.no_grad():
        before, versions = run(model), [p._version for p in trained]
        step()
        assert [p._version for p in trained] == versions
        after = run(model)
        assert not torch.allclose(after, before)
        assert torch.equal(after, run(copy.deepcopy(model)))


@pytest.mark.parametrize("make", [_linears, _peft, _experts])
def test_packs_dropped_by_hand(make):
    """drop_packs makes writes visible that PyTorch cannot see, such as those of a collective."""
    model, run = make()
    model.eval()
    with torch.no_grad():
        before = run(model)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data.mul_(1.5)
        rasa_ext.drop_packs(model)
        after = run(model)
        assert not torch.allclose(after, before)
        assert torch.equal(after, run(copy.deepcopy(model)))


def test_packs_of_what_has_none():
    with pytest.raises(ValueError, match="model: expected a model with adapters of rasa_ext"):
        rasa_ext.drop_packs(nn.Linear(2, 2))
    with pytest.raises(TypeError, match=r"model: expected a torch\.nn\.Module, got str"):
        rasa_ext.drop_packs("model")


def test_a_compiled_optimizer_steps():
    """The hook that detects an optimizer's step does not prevent compiling the step."""
    model, run = _linears()
    optimizer = torch.optim.SGD(rasa_ext.adapter_parameters(model), lr=0.1)
    run(model).square().mean().backward()
    with torch.no_grad():
        before = run(model)
        torch.compile(optimizer.step, backend="eager")()
        after = run(model)
        assert not torch.allclose(after, before)
        assert torch.equal(after, run(copy.deepcopy(model)))
