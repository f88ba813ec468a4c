"""TRL's own sync with a vLLM server: merge, send every weight, unmerge, at every step."""

import pytest
import torch
from torch import Tensor

from tests.helpers import oracle
from tests.helpers.adapters import randomize, same_bits
from tests.helpers.peft import named, tiny
from tests.helpers.tiny_lm import make_model

pytest.importorskip("trl", reason="TRL is not installed")
from accelerate import Accelerator
from trl.distributed import DistributedBackend
from trl.generation.vllm_generation import VLLMGeneration


class Client:
    """A client that records weights and checks them against the metadata sent beforehand."""

    def __init__(self):
        self.syncs = []

    def update_named_params(self, metadata, params):
        got: dict[str, Tensor] = {}
        for (name, dtype, shape), (came, tensor) in zip(metadata, params, strict=True):
            assert (came, str(tensor.dtype), list(tensor.shape)) == (name, f"torch.{dtype}", shape)
            got[name] = tensor.clone()
        self.syncs.append(got)

    def reset_prefix_cache(self):
        self.syncs.append("reset")


def generation(model) -> tuple[VLLMGeneration, Client]:
    """Return TRL's VLLMGeneration with a recording client, skipping __init__, which needs vLLM."""
    made = VLLMGeneration.__new__(VLLMGeneration)
    made.model, made.mode, made.accelerator = model, "server", Accelerator(cpu=True)
    made._dist = DistributedBackend(made.accelerator)
    made.vllm_client, made._weight_metadata = Client(), None
    return made, made.vllm_client


def plain_weights(model) -> dict[str, Tensor]:
    """Return W + dW of each layer in float64 and all other weights, under the base's names."""
    expected = {name: p.detach().clone() for name, p in make_model().named_parameters()}
    for name, adapter in named(model, "default").items():
        weight = expected[f"{name}.weight"].to(model.dtype)
        expected[f"{name}.weight"] = weight.double() + oracle.delta(adapter)
    return expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_weight_is_sent_merged_and_comes_back(dtype):
    model = tiny(modules_to_save=["lm_head"])
    for parameter in model.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)
    with torch.no_grad():
        model.get_base_model().lm_head.modules_to_save["default"].weight.mul_(2)
        small(model)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    sync, client = generation(model)
    for step in range(2):
        sync.sync_weights()
        got, reset = client.syncs[-2:]
        assert reset == "reset"
        expected = plain_weights(model)
        expected["lm_head.weight"] *= 2  # the trained copy, not the original
        assert got.keys() == expected.keys()
        for name, weight in got.items():
            wanted = expected[name].to(weight.dtype)
            assert torch.equal(weight, wanted) or near(weight, wanted), name
        for name, parameter in model.named_parameters():
            assert same_bits(parameter.detach(), before[name]), name
        if step == 0:  # stands for a training step between syncs
            randomize(model, 4)
            small(model)
            before = {name: p.detach().clone() for name, p in model.named_parameters()}


@torch.no_grad()
def small(model) -> None:
    """Make the weight changes small relative to the weights, as in training."""
    for adapter in named(model, "default").values():
        adapter.d.mul_(1e-3)


def near(weight: Tensor, wanted: Tensor) -> bool:
    """Check equality up to the last place, since float32 sums near a tie may round either way."""
    one = torch.finfo(weight.dtype).eps * wanted.abs().clamp(min=2**-20)
    return bool(((weight.double() - wanted.double()).abs() <= one.double()).all())
