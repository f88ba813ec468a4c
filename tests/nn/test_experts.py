"""Adapted experts agree with a loop over tokens and experts, and with the model's own forward."""

import copy
import functools
from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from rasa_ext.nn.rasa_experts import RasaExperts
from tests.helpers import experts, oracle
from tests.helpers.adapters import FLOOR, Errors, excesses
from tests.helpers.experts import EXPERTS, FAMILIES, GROUPINGS, TOP, UNLIKE, stack_adapters
from tests.helpers.oracle import Adapter

RANK = 3
EXACT = 1e-12


def base_tensors(module: RasaExperts) -> dict[str, Tensor]:
    """Return the stacked weights and biases of the base, by name."""
    base = module.base_layer
    names = [*experts.weight_names(base)]
    names += [f"{name}_bias" for name in names if getattr(base, "has_bias", False)]
    return {name: getattr(base, name) for name in names}


def leaves_of(module: RasaExperts) -> dict[str, Tensor]:
    """Return every tensor of the module's adapters once, and what is trained of the base."""
    found = {name: t for name, t in base_tensors(module).items() if t.requires_grad}
    for name, adapter in stack_adapters(module).items():
        for field, tensor in adapter._asdict().items():
            if tensor is not None:
                found[f"{name}.{field}"] = tensor
    return found


def naive(module: RasaExperts, leaves: Mapping[str, Tensor], x, chosen, shares) -> Tensor:
    """Compute the output by the loop, with ``leaves`` in the place of trained tensors."""
    base, parts = module.base_layer, []
    values = {n: leaves.get(n, t.detach()).double() for n, t in base_tensors(module).items()}
    for name in experts.weight_names(base):
        weight = values[name]
        weight = weight.transpose(1, 2) if base.is_transposed else weight
        fields = [leaves.get(f"{name}.{field}") for field in Adapter._fields]
        if fields[0] is not None:
            weight = oracle.stacked_weight(weight, Adapter(*fields))
        parts.append((weight, values.get(f"{name}_bias")))
    act = base._apply_gate if base.has_gate else base.act_fn
    norm = base.post_expert_norm if base.has_post_expert_norm else lambda z: z
    return oracle.experts(x, chosen, shares, *parts, act, norm)


def gradients(call, x, chosen, shares, leaves: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the output, and gradients of x, the shares and all leaves for a fixed probe."""
    x, shares = x.clone().requires_grad_(), shares.clone().requires_grad_()
    y = call(x, chosen, shares)
    probe = torch.randn(y.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    wanted = {"x": x, "shares": shares, **{n: leaf for n, leaf in leaves.items() if leaf.numel()}}
    grads = torch.autograd.grad((y * probe.to(y.dtype)).sum(), list(wanted.values()))
    return {"y": y.detach(), **dict(zip(wanted, grads, strict=True))}


def assert_close(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Assert equality within 1e-12 (1 + the largest element)."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        scale = value.abs().max().item() if value.numel() else 0.0
        torch.testing.assert_close(found[name], value, rtol=0, atol=EXACT * (1 + scale), msg=name)


def check(module: RasaExperts, x: Tensor, chosen: Tensor, shares: Tensor) -> dict[str, Tensor]:
    """Compare the module's output and every gradient with the loop, and return the module's."""
    leaves = leaves_of(module)
    found = gradients(module, x, chosen, shares, leaves)
    wide = {name: t.detach().double().requires_grad_() for name, t in leaves.items()}
    expected = gradients(functools.partial(naive, module, wide), x, chosen, shares, wide)
    assert_close(found, expected)
    with torch.no_grad():
        assert_close({"y": module(x, chosen, shares)}, {"y": expected["y"]})
    return found


def doubles(family: str, grouping: str, k: int = 1, **options) -> list[RasaExperts]:
    """Return the adapted experts of a tiny two-layer model, in float64."""
    base = experts.normed_stack() if family == "normed" else experts.model(family)
    options.setdefault("adapter_dtype", torch.float64)
    return experts.adapted(experts.patched(base.double(), grouping, RANK, k, **options))


@pytest.mark.parametrize("k", [0, 1, RANK])
@pytest.mark.parametrize("grouping", GROUPINGS)
@pytest.mark.parametrize("family", [*FAMILIES, "normed"])
def test_output_and_gradients(family, grouping, k):
    """Output and gradients agree with the loop.

    No token chooses expert 1, so gradients of this expert's own tensors are zero.
    """
    for module in doubles(family, grouping, k):
        found = check(module, *experts.inputs())
        for name, grad in found.items():
            field = name.rpartition(".")[2]
            if field in ("A", "B", "d") or (grad.ndim == 3 and grouping == "slot"):
                assert not grad[1].any(), name
                assert grad[0].any() or not grad[0].numel(), name


@pytest.mark.parametrize("grouping", GROUPINGS)
@pytest.mark.parametrize("family", UNLIKE)
def test_a_base_that_is_trained_too(family, grouping):
    """Gradients of stacked base weights and biases agree with the loop."""
    _, module = doubles(family, grouping)
    trained = base_tensors(module)
    for tensor in trained.values():
        tensor.requires_grad_()
    found = check(module, *experts.inputs())
    assert all(found[name].any() for name in trained)


@pytest.mark.parametrize(("tokens", "top"), [(7, 1), (7, EXPERTS), (1, TOP), (1, 1)])
@pytest.mark.parametrize("grouping", GROUPINGS)
@pytest.mark.parametrize("family", [*UNLIKE, "normed"])
def test_numbers_of_tokens_and_choices(family, grouping, tokens, top):
    _, module = doubles(family, grouping)
    check(module, *experts.inputs(tokens, top))


@pytest.mark.parametrize("grouping", GROUPINGS)
@pytest.mark.parametrize("family", [*UNLIKE, "normed"])
def test_no_token(family, grouping):
    _, module = doubles(family, grouping)
    x, chosen, shares = experts.inputs(tokens=0)
    leaves = leaves_of(module)
    found = gradients(module, x, chosen, shares, leaves)
    assert found["y"].shape == (0, experts.HIDDEN)
    for name, tensor in {"x": x, "shares": shares, **leaves}.items():
        assert found[name].shape == tensor.shape
        assert not found[name].any(), name
    with torch.no_grad():
        assert module(x, chosen, shares).shape == x.shape


@pytest.mark.parametrize("grouping", ["slot", "shared"])
def test_choices_that_no_router_makes(grouping):
    """Outputs are also right if all tokens choose one expert, or a token chooses one twice."""
    _, module = doubles("mixtral", grouping)
    x, chosen, shares = experts.inputs(top=1)
    check(module, x, torch.full_like(chosen, EXPERTS - 1), shares)
    x, chosen, shares = experts.inputs()
    chosen[2] = chosen[2, 0]
    check(module, x, chosen, shares)


@pytest.mark.parametrize("grouping", GROUPINGS)
@pytest.mark.parametrize(
    ("kind", "tokens"), [("Llama4TextExperts", 6), ("Llama4TextExperts", 0), ("Step3p7Experts", 6)]
)
def test_experts_without_marks(kind, grouping, tokens):
    """Undecorated experts agree with their own forward with weights W + dW."""
    base = experts.unmarked_stack(kind).double()
    model = experts.patched(copy.deepcopy(base), grouping, RANK, adapter_dtype=torch.float64)
    module = experts.adapted(model)[0]
    plain = base["layers"][0]["experts"]
    turned = kind == "Llama4TextExperts"
    inputs = [torch.randn(EXPERTS * tokens, experts.HIDDEN, dtype=torch.float64)]
    if not turned:
        inputs += experts.inputs(EXPERTS * tokens)[1:]
    leaves = leaves_of(module)

    def expected(x):
        found = {}
        for name, adapter in stack_adapters(module).items():
            weight = getattr(plain, name).detach()
            changed = oracle.stacked_weight(weight.mT if turned else weight, adapter)
            found[name] = changed.mT if turned else changed
        return torch.func.functional_call(plain, found, (x, *inputs[1:]))

    shares = torch.ones(1, dtype=torch.float64, requires_grad=True)
    given = inputs[0], None, shares, leaves
    found = gradients(lambda x, _, w: module(x, *inputs[1:]) * w, *given)
    wanted = gradients(lambda x, _, w: expected(x) * w, *given)
    assert_close(found, wanted)
    with torch.no_grad():
        assert_close({"y": module(*inputs)}, {"y": wanted["y"]})
        module.disabled = True
        assert torch.equal(module(*inputs), plain(*inputs))


def plain(module: RasaExperts, x: Tensor, chosen: Tensor, shares: Tensor) -> Tensor:
    """Compute the forward in plain PyTorch in x's dtype, expert by expert."""
    base, out = module.base_layer, torch.zeros_like(x)
    adapters = {name: oracle.of_experts(each) for name, each in stack_adapters(module).items()}
    names = experts.weight_names(base)
    for e in range(EXPERTS):
        tokens, places = torch.where(chosen == e)
        rows = x[tokens]
        for name in names:
            weight, (A, A_pool, B, B_pool, d) = getattr(base, name)[e], adapters[name][e]
            if A_pool is not None:
                A, B = torch.cat([A, A_pool]), torch.cat([B, B_pool], 1)
            y = rows @ (weight if base.is_transposed else weight.T)
            y = y + ((rows @ A.to(x.dtype).T) * d.to(x.dtype)) @ B.to(x.dtype).T
            y = y + getattr(base, f"{name}_bias")[e] if base.has_bias else y
            last = name == names[1]
            rows = y if last else (base._apply_gate(y) if base.has_gate else base.act_fn(y))
        out = out.index_add(0, tokens, (rows * shares[tokens, places, None]).to(out.dtype))
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("grouping", GROUPINGS)
@pytest.mark.parametrize("family", UNLIKE)
def test_rounding(family, grouping, dtype, figure):
    """Errors are at most twice plain PyTorch's. Router weights are float32, as in models."""
    ours, theirs = Errors(), Errors()
    model = experts.patched(experts.model(family).to(dtype), grouping, RANK, 1)
    module = experts.adapted(model)[0]
    for seed in range(16):
        x, chosen, shares = experts.inputs(32, seed=seed, dtype=torch.float32)
        x = x.to(dtype)
        leaves = leaves_of(module)
        wide = {name: t.detach().double().requires_grad_() for name, t in leaves.items()}
        exact = functools.partial(naive, module, wide)
        expected = gradients(exact, x.double(), chosen, shares.double(), wide)
        for errors, run in ((ours, module), (theirs, functools.partial(plain, module))):
            found = gradients(run, x, chosen, shares, leaves)
            assert found["y"].dtype == x.dtype
            errors.add(found, expected)
    bad, worst = excesses(ours, theirs, FLOOR.get(dtype, 0.0))
    figure(f"experts of {family}, {grouping}, {dtype}: worst ratio to plain PyTorch {worst:.2f}")
    assert not bad


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
@pytest.mark.parametrize("family", FAMILIES)
def test_disabled_it_is_the_base(family, implementation):
    """Disabled experts give bit-identical logits to the base in every implementation."""
    entry = experts.entry(family)
    base = entry.build()
    model = experts.patched(entry.build(), "slot", RANK, 1)
    inputs = entry.inputs(0)
    for each in (base, model):
        each.config._experts_implementation = implementation
    with torch.no_grad():
        expected = entry.call(base, **inputs)
        assert not torch.equal(entry.call(model, **inputs), expected)
        for module in experts.adapted(model):
            module.disabled = True
        assert torch.equal(entry.call(model, **inputs), expected)
