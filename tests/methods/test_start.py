"""Where a diagonal starts: RaSA begins as the LoRA that it replaces."""

import copy

import peft
import pytest
import torch
from torch import nn

import rasa_ext
from rasa_ext.methods import LoraConfig
from rasa_ext.peft import RasaConfig as PeftRasaConfig
from tests.helpers import experts, oracle
from tests.helpers.adapters import RANK, adapted_layers
from tests.helpers.expert_files import TOKENS, stacks
from tests.helpers.tiny_lm import make_model

ALPHA = 3.0


class Lion(torch.optim.Optimizer):
    """Lion (arXiv 2302.06675) without weight decay."""

    def __init__(self, parameters, lr):
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                mean = self.state[p].setdefault("mean", torch.zeros_like(p))
                p -= group["lr"] * torch.sign(0.9 * mean + 0.1 * p.grad)
                mean.mul_(0.99).add_(p.grad, alpha=0.01)


OPTIMIZERS = {"AdamW": torch.optim.AdamW, "SGD": torch.optim.SGD, "Lion": Lion}


def given(layer, row: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Return A (r, in) and B (out, r) of the ranks that a layer, or an expert, has or gave."""
    adapter = layer.adapter()
    A, A_pool, B, B_pool, _ = adapter.factors()
    k, giver = adapter.config.k, adapter.spec.index
    if row is not None:
        A, B = A[row], B[row]
        A_pool, B_pool = (A_pool[row], B_pool[row]) if A_pool.dim() == 3 else (A_pool, B_pool)
        giver = row if adapter.config.experts == "layer" else giver
    at = slice(giver * k, giver * k + k)
    return torch.cat([A, A_pool[at]]), torch.cat([B, B_pool[:, at]], 1)


@torch.no_grad()
def only_own(model: nn.Module) -> None:
    """Freeze every d, with 0 on the ranks that others gave."""
    for owner in (*adapted_layers(model).values(), *stacks(model).values()):
        d = owner.adapter().own["d"]
        d[(d - ALPHA / RANK).abs() > 1e-6] = 0
        d.requires_grad_(False)


def train(models: list[nn.Module], optimizer: type, tokens: torch.Tensor) -> None:
    for model in models:
        parameters = [p for p in model.parameters() if p.requires_grad]
        steps = optimizer(parameters, lr=1.0 if optimizer is torch.optim.SGD else 0.02)
        for step in range(6):
            steps.zero_grad()
            logits = model(input_ids=(tokens + step) % 30).logits
            nn.functional.cross_entropy(logits.flatten(0, 1), tokens.flatten()).backward()
            steps.step()


@pytest.mark.parametrize("front", ["patch", "peft"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("k", [1, RANK])
def test_without_the_ranks_of_others_it_trains_as_a_lora(k, optimizer, front):
    base = make_model().double()
    options = {"adapter_dtype": torch.float64}
    if front == "patch":
        model = rasa_ext.patch_model(copy.deepcopy(base), RANK, k, alpha=ALPHA, **options)
    else:
        config = PeftRasaConfig(r=RANK, rasa_k=k, rasa_alpha=ALPHA, **options)
        model = peft.get_peft_model(copy.deepcopy(base), config)
    config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear")
    lora = peft.get_peft_model(copy.deepcopy(base), config).double()
    only_own(model)
    layers = adapted_layers(model.get_base_model() if front == "peft" else model)
    theirs = {name: lora.base_model.model.get_submodule(name) for name in layers}
    with torch.no_grad():
        for name, layer in layers.items():
            theirs[name].lora_A["default"].weight.copy_(given(layer)[0])
    train([model, lora], OPTIMIZERS[optimizer], torch.arange(24).view(2, 12))
    for name, layer in layers.items():
        A, B = given(layer)
        assert B.abs().max() > 1e-3
        pairs = (A, theirs[name].lora_A), (B, theirs[name].lora_B)
        for ours, other in pairs:
            torch.testing.assert_close(ours, other["default"].weight, rtol=0, atol=1e-7)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("grouping", ["slot", "layer"])
def test_experts_train_as_a_lora_for_each(grouping, optimizer):
    base = experts.model("mixtral").double()
    wide = {"adapter_dtype": torch.float64, "target_modules": r".*\.experts\.\w+_proj"}
    model, lora = (
        rasa_ext.patch_model(copy.deepcopy(base), config=config)
        for config in (
            rasa_ext.RasaConfig(rank=RANK, k=2, alpha=ALPHA, experts=grouping, **wide),
            LoraConfig(rank=RANK, alpha=ALPHA, experts="own", **wide),
        )
    )
    only_own(model)
    pairs = list(zip(stacks(model).values(), stacks(lora).values(), strict=True))
    with torch.no_grad():
        for ours, theirs in pairs:
            for row, A in enumerate(theirs.A):
                A.copy_(given(ours, row)[0])
    train([model, lora], OPTIMIZERS[optimizer], TOKENS)
    for ours, theirs in pairs:
        assert theirs.B.abs().max() > 1e-3
        for row, pair in enumerate(zip(theirs.A, theirs.B, strict=True)):
            torch.testing.assert_close(given(ours, row), pair, rtol=0, atol=1e-7)


@pytest.mark.parametrize("grouping", ["slot", "layer", "shared"])
def test_where_the_diagonals_of_experts_start(grouping):
    model = rasa_ext.patch_model(experts.model("mixtral"), RANK, 1, alpha=ALPHA, experts=grouping)
    count = {"slot": 2, "shared": 2}  # layers; else experts of a layer
    for stack in stacks(model).values():
        for row, d in enumerate(stack.d):
            giver = stack.spec.index if grouping in count else row
            givers = count.get(grouping, len(stack.d))
            expected = oracle.initial_d(RANK, 1, givers, giver, ALPHA)
            torch.testing.assert_close(d.double(), expected, rtol=1e-6, atol=0)


def test_a_layers_own_rank_sets_its_scale():
    model = make_model()
    config = rasa_ext.RasaConfig(rank=4, k=2, alpha=ALPHA, rank_pattern={"q_proj": 6})
    for name, layer in adapted_layers(rasa_ext.patch_model(model, config=config)).items():
        rank = 6 if "q_proj" in name else 4
        expected = oracle.initial_d(rank, 2, 2, layer.spec.index, ALPHA)
        torch.testing.assert_close(layer.d.double(), expected, rtol=1e-6, atol=0)
