"""Parameters and gradients are contiguous, and results do not change with other strides."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable

import bitsandbytes
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import prune

import rasa_ext
from tests.helpers.adapters import (
    adapted_layers,
    adapters,
    check_step,
    patched,
    same_adapters,
    through_file,
)
from tests.helpers.models import LLAMA, SEQUENTIAL
from tests.helpers.operators import columns


def is_contiguous(model: nn.Module) -> bool:
    assert adapters(model)
    return all(map(torch.Tensor.is_contiguous, model.state_dict().values()))


def by_columns(tensor: torch.Tensor) -> torch.Tensor:
    """Store a matrix by columns, as older versions stored B."""
    return columns(tensor) if tensor.dim() > 1 else tensor


def turned(model: nn.Module) -> nn.Module:
    for parameter in rasa_ext.adapter_parameters(model):
        parameter.data = by_columns(parameter.data)
    return model


def flattened(model: nn.Module) -> nn.Module:
    """Make parameters pieces of one buffer, as under ZeRO."""
    parameters = rasa_ext.adapter_parameters(model)
    flat = torch.cat([torch.zeros(1), *(p.detach().reshape(-1) for p in parameters)])
    at = 1  # so that no piece is aligned
    for parameter in parameters:
        parameter.data = flat[at : at + parameter.numel()].view(parameter.shape)
        at += parameter.numel()
    return model


def with_gaps(model: nn.Module) -> nn.Module:
    for parameter in rasa_ext.adapter_parameters(model):
        parameter.data = torch.stack([parameter.data] * 2, -1)[..., 0]
    return model


def assigned(model: nn.Module) -> nn.Module:
    """Replace parameters by tensors from a state dict."""
    model.load_state_dict(turned(copy.deepcopy(model)).state_dict(), assign=True)
    model.requires_grad_(False)
    for parameter in rasa_ext.adapter_parameters(model):
        parameter.requires_grad_(True)
    return model


CHANGES = (turned, flattened, with_gaps, assigned)


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("entry", [SEQUENTIAL, LLAMA], ids=lambda entry: entry.name)
def test_any_strides_train_alike_and_run_alike(entry, change):
    base = entry.build()
    model = patched(base)
    twin = change(copy.deepcopy(model))
    assert is_contiguous(model)
    assert is_contiguous(twin) == (change is flattened)
    check_step(entry, base, twin)
    inputs = entry.inputs(1)
    with torch.no_grad():
        assert torch.equal(entry.loss(model, inputs)[0], entry.loss(twin, inputs)[0])
    if change is not with_gaps:
        for t in rasa_ext.adapter_parameters(twin):
            assert min(t.shape) < 2 or t.grad.stride() == t.stride()


@pytest.mark.parametrize("entry", [SEQUENTIAL, LLAMA], ids=lambda entry: entry.name)
def test_gradients_are_contiguous(entry):
    """Those that hooks see, too, before autograd adds them to a parameter's."""
    model = patched(entry.build())
    seen: list[torch.Tensor] = []
    parameters = rasa_ext.adapter_parameters(model)
    for parameter in parameters:
        parameter.register_hook(seen.append)
    entry.loss(model, entry.inputs(0))[1].backward()
    assert len(seen) == len(parameters)
    assert all(map(torch.Tensor.is_contiguous, (*seen, *(p.grad for p in parameters))))


def test_a_compiled_model_takes_other_strides():
    torch._dynamo.reset()
    base = SEQUENTIAL.build()
    model = patched(base)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    check_step(SEQUENTIAL, base, model, compiled)
    for seed, change in enumerate(CHANGES[:3], 1):
        change(model)
        check_step(SEQUENTIAL, base, model, compiled, seed=seed)


@pytest.mark.parametrize("use", ["vector", "lbfgs", "prune"])
def test_torch_can_view_parameters_as_vectors(use):
    base = SEQUENTIAL.build()
    model = patched(base)
    parameters = rasa_ext.adapter_parameters(model)
    inputs = SEQUENTIAL.inputs(0)
    if use == "vector":
        vector = torch.nn.utils.parameters_to_vector(parameters)
        torch.nn.utils.vector_to_parameters(vector * 0.5, parameters)
        assert torch.equal(torch.nn.utils.parameters_to_vector(parameters), vector * 0.5)
    elif use == "lbfgs":
        optimizer = torch.optim.LBFGS(parameters, lr=0.01)

        def closure() -> torch.Tensor:
            optimizer.zero_grad()
            loss = SEQUENTIAL.loss(model, inputs)[1]
            loss.backward()
            return loss

        before = optimizer.step(closure)
        assert SEQUENTIAL.loss(model, inputs)[1] < before
    else:
        layer = next(iter(adapted_layers(model).values()))
        dense = layer.B.detach().clone()
        prune.l1_unstructured(layer, "B", 0.5)
        assert torch.equal(layer.adapter().factors().B, dense * layer.B_mask)
        assert (layer.B_mask == 0).sum() == dense.numel() // 2
    if use != "prune":
        check_step(SEQUENTIAL, base, model)


def loaded(model: nn.Module) -> nn.Module:
    state = model.state_dict()
    model.load_state_dict({key: by_columns(value) for key, value in state.items()})
    return model


@pytest.mark.parametrize(
    "way",
    [copy.deepcopy, through_file, loaded, lambda m: m.double().float(), lambda m: m.half().float()],
)
def test_copies_casts_and_files_are_contiguous(way):
    base = SEQUENTIAL.build()
    model = way(patched(base))
    assert is_contiguous(model)
    check_step(SEQUENTIAL, way(base), model)


def optimized(model: nn.Module, make: Callable, steps: int = 3) -> list[torch.Tensor]:
    parameters = rasa_ext.adapter_parameters(getattr(model, "module", model))
    optimizer = make(parameters)
    for seed in range(steps):
        for part in (0, 1):  # accumulated gradients have the first one's strides
            SEQUENTIAL.loss(model, SEQUENTIAL.inputs(2 * seed + part))[1].backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return [p.detach() for p in parameters]


OPTIMIZERS = {
    "SGD": lambda p, **options: torch.optim.SGD(p, 0.01, momentum=0.9, **options),
    "AdamW": lambda p, **options: torch.optim.AdamW(p, 0.01, **options),
}


@pytest.mark.parametrize("change", [lambda model: model, turned, flattened])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers_step_alike(name, change):
    """Plain, foreach and fused optimizers take the same steps with any strides."""
    model = patched(SEQUENTIAL.build())
    before = [p.detach().clone() for p in rasa_ext.adapter_parameters(model)]
    make = OPTIMIZERS[name]
    expected = optimized(copy.deepcopy(model), lambda p: make(p, foreach=False))
    assert not any(map(torch.equal, before, expected))
    for options in ({"foreach": True}, {"fused": True}):
        twin = change(copy.deepcopy(model))
        strides = [p.stride() for p in rasa_ext.adapter_parameters(twin)]
        found = optimized(twin, lambda p, o=options: make(p, **o))
        for mine, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)
        assert [p.stride() for p in rasa_ext.adapter_parameters(twin)] == strides


def test_an_8_bit_optimizer_steps_alike():
    """Errors stay small with other strides, which put other elements in a quantization block."""

    def make(parameters):
        return bitsandbytes.optim.AdamW8bit(parameters, 0.01, min_8bit_size=0)

    model = patched(SEQUENTIAL.build())
    exact = optimized(copy.deepcopy(model), lambda p: torch.optim.AdamW(p, 0.01))
    before = [p.detach().clone() for p in rasa_ext.adapter_parameters(model)]
    for change in (lambda model: model, turned):
        found = optimized(change(copy.deepcopy(model)), make)
        for mine, theirs, start in zip(found, exact, before, strict=True):
            assert (mine - theirs).norm() < 0.1 * (theirs - start).norm()


@pytest.fixture
def group(tmp_path):
    """A process group of one process."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("view", [False, True])
def test_buckets_of_ddp(view, group):
    """DDP's buckets work without a warning of strides that do not match."""
    model = patched(SEQUENTIAL.build())
    expected = optimized(copy.deepcopy(model), OPTIMIZERS["AdamW"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        wrapped = DistributedDataParallel(model, gradient_as_bucket_view=view)
        found = optimized(wrapped, OPTIMIZERS["AdamW"])
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


def test_safetensors_takes_a_state_dict(tmp_path):
    model = patched(SEQUENTIAL.build())
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    again = patched(SEQUENTIAL.build(), seed=4)
    assert not same_adapters(again, model)
    again.load_state_dict(load_file(tmp_path / "model.safetensors"))
    assert same_adapters(again, model)
