"""What several test files share: patching with lively adapters, reading them, comparing models."""

from __future__ import annotations

import copy
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import oracle
import plain
import pytest
import torch
from oracle import Adapter
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from zoo import Entry

import rasa_ext
from rasa_ext.nn.adapted_linear import AdaptedLinear

RANK = 4


def patched(base: nn.Module, *args, seed: int = 3, **options) -> nn.Module:
    """A patched copy of ``base`` whose adapters are far from their initial zeros."""
    default = () if "config" in options else (RANK, 1)
    model = rasa_ext.patch_model(copy.deepcopy(base), *(args or default), **options)
    randomize(model, seed)
    return model


def randomize(model: nn.Module, seed: int) -> None:
    """Draws every adapter tensor, such that dW is about as large as the zoo's W."""
    randomize_adapters(adapters(model), seed)


def randomize_adapters(found: Mapping[str, Adapter], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for adapter in found.values():
            width, rank = adapter.A.shape[1], adapter.d.numel()
            drawn = [(adapter.A, width), (adapter.B, 4 * rank), (adapter.d, 9)]
            if adapter.A_pool is not None:
                drawn += [(adapter.A_pool, width), (adapter.B_pool, 4 * rank)]
            for parameter, fan in drawn:
                noise = torch.randn(parameter.shape, generator=generator) * fan**-0.5
                parameter.copy_(noise + (parameter.ndim == 1))


def adapted_layers(model: nn.Module) -> dict[str, AdaptedLinear]:
    return {n: m for n, m in model.named_modules() if isinstance(m, AdaptedLinear)}


def adapter_of(layer: AdaptedLinear) -> Adapter:
    return Adapter(*layer.adapter().factors())


def adapters(model: nn.Module) -> dict[str, Adapter]:
    """The live parameters of every adapted layer, under its name in the plain model."""
    return {name: adapter_of(layer) for name, layer in adapted_layers(model).items()}


def gradients(found: Mapping[str, Adapter]) -> dict[str, Tensor]:
    """Gradients keyed as the oracle keys them; each pool once, under its first layer."""
    result, pools = {}, set()
    for name, adapter in found.items():
        for field in ("A", "B", "d"):
            result[f"{name}.{field}"] = getattr(adapter, field).grad
        if adapter.A_pool is not None and id(adapter.A_pool) not in pools:
            pools.add(id(adapter.A_pool))
            for field in ("A_pool", "B_pool"):
                result[f"{name}.{field}"] = getattr(adapter, field).grad
    return result


def clear_gradients(found: Mapping[str, Adapter]) -> None:
    for adapter in found.values():
        adapter.map(lambda t: setattr(t, "grad", None))


def observe(model: nn.Module, found: Mapping[str, Adapter], entry: Entry, inputs) -> dict:
    """Logits and adapter gradients of one training step of any model over ``found``."""
    clear_gradients(found)
    logits, loss = entry.loss(model, inputs)
    loss.backward()
    return {"logits": logits.detach(), **gradients(found)}


class Errors:
    """Root mean square errors relative to the reference, pooled over draws, per quantity.

    With ``by_kind`` the quantities are only logits, A, B, d and the pool's, each over all layers:
    what a single draw needs, which says little of the error to expect of one small tensor.
    """

    def __init__(self, by_kind: bool = False):
        self.by_kind = by_kind
        self.error = defaultdict(float)
        self.scale = defaultdict(float)

    def add(self, found: Mapping[str, Tensor], reference: Mapping[str, Tensor]) -> None:
        assert found.keys() == reference.keys()
        for name, expected in reference.items():
            got = found[name]
            assert got.shape == expected.shape, name
            key = name.rpartition(".")[2] if self.by_kind else name
            self.error[key] += (got.detach().cpu().double() - expected.cpu()).square().sum().item()
            self.scale[key] += expected.square().sum().item()

    def relative(self) -> dict[str, float]:
        return {k: (e / self.scale[k]) ** 0.5 if e else 0.0 for k, e in self.error.items()}


def excesses(ours: Errors, plain_: Errors, floor: float) -> tuple[dict[str, str], float]:
    """Quantities worse than max(floor, 2 x plain PyTorch's error), and the worst ratio."""
    bad, worst, theirs = {}, 0.0, plain_.relative()
    for key, error in ours.relative().items():
        if not error <= max(floor, 2 * theirs[key]):
            bad[key] = f"{error:.2e} against plain PyTorch's {theirs[key]:.2e}"
        if theirs[key]:
            worst = max(worst, error / theirs[key])
    return bad, worst


FLOOR = {torch.float32: 1e-6, torch.float64: 1e-12}


def assert_matches_oracle(
    entry: Entry, base: nn.Module, model: nn.Module, observed: Mapping[str, Tensor], inputs
) -> None:
    """One observation of ``model`` against the oracle, measured by the official formula."""
    found = plain.leaves(adapters(model))
    reference = oracle.run_model(base, found, lambda dense: entry.loss(dense, wide(inputs)))
    ours, theirs = Errors(by_kind=True), Errors(by_kind=True)
    ours.add(observed, reference)
    theirs.add(observe(plain.plain_model(base, found), found, entry, inputs), reference)
    bad, _ = excesses(ours, theirs, FLOOR.get(next(base.parameters()).dtype, 0.0))
    assert not bad


def check_step(entry, base, model, run=None, seed=0):
    """One step of ``run`` (the model unless given, say compiled) against the oracle."""
    inputs = entry.inputs(seed, next(base.parameters()).dtype)
    observed = observe(model if run is None else run, adapters(model), entry, inputs)
    assert_matches_oracle(entry, base, model, observed, inputs)


def wide(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}


_traced: set[tuple] = set()


def opcheck(operator: torch._ops.OpOverload, args: tuple) -> None:
    """torch.library.opcheck, but one trace under dynamic shapes for calls of one form.

    That trace is nine tenths of the time. It sees neither sizes nor dtypes, only which arguments
    are given, of how many dimensions, whether they are empty, and flags. What the fake kernel says
    of sizes, strides and dtypes, and the schema, are checked of every call.
    """
    checks = ["test_schema", "test_autograd_registration", "test_faketensor"]
    traced = (operator, _form(args))
    if traced not in _traced:
        checks.append("test_aot_dispatch_dynamic")
    torch.library.opcheck(operator, args, test_utils=checks)
    _traced.add(traced)  # only now: it has passed


def _form(value: object) -> object:
    if isinstance(value, Tensor):
        return value.ndim, value.numel() == 0
    if isinstance(value, list | tuple):
        return tuple(map(_form, value))
    return value if isinstance(value, bool) else type(value)


class LargestTensor(TorchDispatchMode):
    """While entered: the elements of the largest tensor that any operation made."""

    numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        sizes = [t.numel() for t in tree_leaves(result) if isinstance(t, Tensor)]
        self.numel = max(self.numel, *sizes, 0)
        return result


class Snapshot:
    """Everything about a model that a refused call must leave alone."""

    def __init__(self, model: nn.Module):
        self.model = model
        self.modules = {name: id(module) for name, module in named_modules(model)}
        self.parameters = named_flags(model)
        self.values = {key: value.clone() for key, value in model.state_dict().items()}
        self.training = model.training
        self.hooks = hook_counts(model)

    def assert_unchanged(self) -> None:
        assert {name: id(module) for name, module in named_modules(self.model)} == self.modules
        assert named_flags(self.model) == self.parameters
        state = self.model.state_dict()
        assert state.keys() == self.values.keys()
        for key, value in state.items():
            assert same_bits(value, self.values[key]), key
        assert self.model.training == self.training
        assert hook_counts(self.model) == self.hooks


def refused(call: Callable, model: nn.Module, *said: str, kind=(ValueError, TypeError)) -> None:
    """The call raises, its message holds every part, and the model is what it was."""
    before = Snapshot(model)
    with pytest.raises(kind) as caught:
        call()
    for part in said:
        assert re.search(part, str(caught.value)), (part, str(caught.value))
    before.assert_unchanged()


def named_modules(model: nn.Module) -> Iterable[tuple[str, nn.Module]]:
    return model.named_modules(remove_duplicate=False)


def named_flags(model: nn.Module) -> dict[str, tuple[int, bool]]:
    named = model.named_parameters(remove_duplicate=False)
    return {name: (id(parameter), parameter.requires_grad) for name, parameter in named}


def hook_counts(model: nn.Module) -> dict[str, int]:
    return {
        name: len(module._forward_hooks) + len(module._forward_pre_hooks)
        for name, module in named_modules(model)
    }


def same_bits(left: Tensor, right: Tensor) -> bool:
    return (left.dtype, left.shape) == (right.dtype, right.shape) and torch.equal(
        left.reshape(-1).clone().view(torch.uint8), right.reshape(-1).clone().view(torch.uint8)
    )


def same_adapters(left: nn.Module, right: nn.Module) -> bool:
    a, b = left.state_dict(), right.state_dict()
    return a.keys() == b.keys() and all(same_bits(a[key], b[key]) for key in a)


def content(directory: Path) -> dict[str, bytes]:
    """The bytes of every file of a directory, hidden ones included."""
    return {path.name: path.read_bytes() for path in directory.iterdir()}
