"""Adapted experts against a loop over tokens and experts, and against the model's own forwards."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from rasa_ext.nn.rasa_experts import RasaExperts
from tests.helpers import experts, oracle
from tests.helpers.experts import EXPERTS, FAMILIES, GROUPINGS, TOP, UNLIKE, bank_adapters
from tests.helpers.oracle import Adapter

RANK = 3
EXACT = 1e-12


def leaves_of(module: RasaExperts) -> dict[str, Tensor]:
    """Every tensor of its adapters once, by name."""
    found = {}
    for name, adapter in bank_adapters(module).items():
        for field, tensor in adapter._asdict().items():
            if tensor is not None:
                found[f"{name}.{field}"] = tensor
    return found


def naive(module: RasaExperts, leaves: Mapping[str, Tensor], x, chosen, shares) -> Tensor:
    """The output by the loop, over leaves that may be others than the module's."""
    base = module.base_layer
    parts = []
    for name in experts.weight_names(base):
        weight = getattr(base, name).detach().double()
        weight = weight.transpose(1, 2) if base.is_transposed else weight
        fields = [leaves.get(f"{name}.{field}") for field in Adapter._fields]
        if fields[0] is not None:
            weight = oracle.stacked_weight(weight, Adapter(*fields))
        bias = getattr(base, f"{name}_bias").detach().double() if base.has_bias else None
        parts.append((weight, bias))
    act = base._apply_gate if base.has_gate else base.act_fn
    norm = base.post_expert_norm if base.has_post_expert_norm else lambda z: z
    return oracle.experts(x, chosen, shares, *parts, act, norm)


def gradients(call, x: Tensor, shares: Tensor, leaves: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Output and gradients of x, the shares and all leaves under one probe."""
    x, shares = x.clone().requires_grad_(), shares.clone().requires_grad_()
    y = call(x, shares)
    probe = torch.randn(y.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    wanted = {"x": x, "shares": shares, **leaves}
    grads = torch.autograd.grad((y * probe.to(y.dtype)).sum(), list(wanted.values()))
    return {"y": y.detach(), **dict(zip(wanted, grads, strict=True))}


def assert_close(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """To 1e-12 of the largest element."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        scale = value.abs().max().item() if value.numel() else 0.0
        torch.testing.assert_close(found[name], value, rtol=0, atol=EXACT * (1 + scale), msg=name)


def check(module: RasaExperts, x: Tensor, chosen: Tensor, shares: Tensor) -> dict[str, Tensor]:
    """Output and every gradient of the module against the loop; gives the module's."""
    leaves = leaves_of(module)
    found = gradients(lambda x, w: module(x, chosen, w), x, shares, leaves)
    wide = {name: t.detach().double().requires_grad_() for name, t in leaves.items()}
    expected = gradients(lambda x, w: naive(module, wide, x, chosen, w), x, shares, wide)
    assert_close(found, expected)
    with torch.no_grad():
        assert_close({"y": module(x, chosen, shares)}, {"y": expected["y"]})
    return found


def doubles(family: str, grouping: str, k: int = 1, **options) -> list[RasaExperts]:
    """The adapted experts of a tiny model of two layers, in float64."""
    base = experts.normed_stack() if family == "normed" else experts.model(family)
    options.setdefault("adapter_dtype", torch.float64)
    return experts.adapted(experts.patched(base.double(), grouping, RANK, k, **options))


@pytest.mark.parametrize("k", [0, 1, RANK])
@pytest.mark.parametrize("grouping", GROUPINGS)
@pytest.mark.parametrize("family", [*FAMILIES, "normed"])
def test_output_and_gradients(family, grouping, k):
    """Expert 1 is chosen by no token: its own tensors have zeros for gradients."""
    for module in doubles(family, grouping, k):
        found = check(module, *experts.inputs())
        for name, grad in found.items():
            field = name.rpartition(".")[2]
            if field in ("A", "B", "d") or (grad.ndim == 3 and grouping == "slot"):
                assert not grad[1].any(), name
                assert grad[0].any() or not grad[0].numel(), name


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
    found = gradients(lambda x, w: module(x, chosen, w), x, shares, leaves)
    assert found["y"].shape == (0, experts.HIDDEN)
    for name, tensor in {"x": x, "shares": shares, **leaves}.items():
        assert found[name].shape == tensor.shape
        assert not found[name].any(), name
    with torch.no_grad():
        assert module(x, chosen, shares).shape == x.shape


@pytest.mark.parametrize("rank", [1, 2, 3, 4])
def test_every_k(rank):
    for k in range(rank + 1):
        for grouping in GROUPINGS:
            base = experts.model("gpt_oss").double()
            model = experts.patched(base, grouping, rank, k, adapter_dtype=torch.float64)
            check(experts.adapted(model)[1], *experts.inputs())


def test_one_expert_that_every_token_chooses():
    _, module = doubles("mixtral", "slot")
    x, chosen, shares = experts.inputs(top=1)
    check(module, x, torch.full_like(chosen, EXPERTS - 1), shares)


def test_a_token_that_chooses_one_expert_twice():
    """No router does, but the sum over choices says what it means."""
    _, module = doubles("mixtral", "shared")
    x, chosen, shares = experts.inputs()
    chosen[2] = chosen[2, 0]
    check(module, x, chosen, shares)
