"""TF32 follows torch's flag; autocast works over float32 bases."""

from collections.abc import Iterator

import pytest
import torch
from torch import nn

import rasa_ext
from tests.gpu.steps import Case, check_model
from tests.helpers import oracle
from tests.helpers.adapters import Errors, adapter_of, excesses, patched
from tests.helpers.models import BERT, LLAMA, ids
from tests.helpers.operators import floor

# Geometric mean of the rounding errors of TF32 (11 bits) and float32 (24 bits).
BETWEEN = (2**-11 * 2**-24) ** 0.5


# torch has two names for the flag, the second since 2.9.
FLAGS = [("allow_tf32", False), ("allow_tf32", True)]
FLAGS += [("fp32_precision", "ieee"), ("fp32_precision", "tf32")]


@pytest.fixture(params=FLAGS, ids=lambda param: f"{param[0]}={param[1]}")
def tf32(request: pytest.FixtureRequest) -> Iterator[bool]:
    """Whether TF32 is allowed for products on a GPU, by either flag."""
    (name, value), flags = request.param, torch.backends.cuda.matmul
    before = getattr(flags, name)
    setattr(flags, name, value)
    yield value in (True, "tf32")
    setattr(flags, name, before)


def rounds_to_tf32(device: str, tf32: bool) -> bool:
    """Return whether products use TF32; on the CPU they never do."""
    return tf32 and device == "cuda" and torch.cuda.get_device_capability() >= (8, 0)


def test_tf32_in_a_layer(device, tf32):
    """If TF32 is allowed, the errors of y and dx show its use; otherwise no error does."""
    sizes = (512, 512, 1024, 8, 32) if device == "cuda" else (64, 64, 128, 8, 32)
    ours, theirs = Errors(), Errors()
    for _ in range(2):
        case = Case(sizes, torch.float32, device)
        reference = case.reference()
        ours.add(case.ours(), reference)
        theirs.add(case.plain(), reference)
    assert not excesses(ours, theirs, floor(torch.float32))[0]
    for name in ("y", "quiet", "x"):
        assert (ours.relative()[name] > BETWEEN) == rounds_to_tf32(device, tf32), name
    if not tf32:
        assert max(ours.relative().values()) < BETWEEN


def test_merging_is_in_float32_whatever_is_allowed(device, tf32):
    width, out = (512, 384) if device == "cuda" else (48, 32)
    stack = nn.Sequential(*(nn.Linear(width, out) for _ in range(3))).to(device)
    model = patched(stack, 32, 8)
    rasa_ext.merge(model)
    for base, layer in zip(stack, model, strict=True):
        expected = oracle.merged_weight(base, adapter_of(layer))
        error = (layer.base_layer.weight.double() - expected).norm() / expected.norm()
        assert error < BETWEEN


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("entry", [LLAMA, BERT], ids=ids)
def test_autocast(entry, dtype, device, fused):
    """Outputs have autocast's dtype and errors like plain PyTorch's; gradients are float32."""
    base = entry.build().to(device)
    for observed in check_model(entry, base, patched(base).train(), autocast=dtype):
        assert observed.pop("logits").dtype == dtype
        assert {grad.dtype for grad in observed.values()} == {torch.float32}
