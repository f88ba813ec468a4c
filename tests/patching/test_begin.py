"""PiSSA, a method from outside that begins with the base's weights: a LoRA and a RaSA."""

import copy
import dataclasses
from typing import ClassVar

import accelerate
import peft
import pytest
import torch
from torch import Tensor

import rasa_ext
import rasa_ext.peft
from rasa_ext import methods
from rasa_ext.methods import Factors
from tests.helpers import experts, quantized
from tests.helpers.adapters import adapted_layers, same_adapters, same_bits
from tests.helpers.peft import TOKENS, logits
from tests.helpers.refusals import refused
from tests.helpers.tiny_lm import make_model

TARGETS = ["q_proj", "down_proj"]


def largest(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return A and B of the largest ``rank`` singular values, whose roots both have."""
    U, S, V = torch.linalg.svd(weight, full_matrices=False)
    root = S[:rank].sqrt()
    return root[:, None] * V[:rank], U[:, :rank] * root


class Minus:
    """Tensors that do not train, and B A - B_0 A_0."""

    def layer_tensors(self, spec) -> dict[str, Tensor]:
        own = super().layer_tensors(spec)
        return own | {f"{name}_0": torch.zeros_like(own[name].detach()) for name in "AB"}

    def difference(self, own) -> tuple[Tensor, Tensor]:
        return torch.cat([own["A"], own["A_0"]]), torch.cat([own["B"], -own["B_0"]], 1)


@dataclasses.dataclass(frozen=True)
class PissaConfig(Minus, methods.LoraConfig):
    """PiSSA (arXiv 2404.02948): dW = s (B A - B_0 A_0), which begins at 0."""

    method: ClassVar[str] = "pissa"

    def begin(self, own, pool, spec, weight) -> None:
        A, B = largest(weight, self.rank)
        for name, value in (("A", A), ("B", B)):
            value = value / self.scale**0.5
            own[name].copy_(value)
            own[f"{name}_0"].copy_(value)

    def factors(self, own, pool, spec) -> Factors:
        A, B = self.difference(own)
        return Factors(A, None, B, None, A.new_full((len(A),), self.scale))


@dataclasses.dataclass(frozen=True)
class PissaRasaConfig(Minus, rasa_ext.RasaConfig):
    """RaSA whose private ranks begin as PiSSA's."""

    method: ClassVar[str] = "pissa_rasa"

    def begin(self, own, pool, spec, weight) -> None:
        A, B = largest(weight, self.rank - self.k)
        own["A"].copy_(A)
        own["B"].copy_(B / own["d"][: len(A)])
        own["A_0"].copy_(A)
        own["B_0"].copy_(B)

    def factors(self, own, pool, spec) -> Factors:
        A, B = self.difference(own)
        mine, shared = own["d"].split([len(own["A"]), len(own["d"]) - len(own["A"])])
        d = torch.cat([mine, torch.ones_like(mine), shared])
        return Factors(A, pool.get("A"), B, pool.get("B"), d)


CONFIGS = {
    "lora": PissaConfig(rank=4, alpha=8.0, target_modules=TARGETS),
    "rasa": PissaRasaConfig(rank=4, k=1, target_modules=TARGETS),
}


@pytest.fixture(params=CONFIGS)
def config(request) -> methods.AdapterConfig:
    return CONFIGS[request.param]


def under_peft(config: methods.AdapterConfig, base: torch.nn.Module) -> peft.PeftModel:
    given = {"rasa_k": config.k} if isinstance(config, rasa_ext.RasaConfig) else {}
    given |= {"r": config.rank, "rasa_method": config.method, "rasa_alpha": config.alpha}
    return peft.get_peft_model(base, rasa_ext.peft.RasaConfig(**given, target_modules=TARGETS))


def train(model: torch.nn.Module, steps: int = 5) -> torch.nn.Module:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3)
    for _ in range(steps):
        model(TOKENS, labels=TOKENS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


@pytest.mark.parametrize("front", ["ours", "peft"])
def test_a_lora_equals_pissa_of_peft(front):
    config = CONFIGS["lora"]
    options = {"r": 4, "lora_alpha": 8, "target_modules": TARGETS, "init_lora_weights": "pissa"}
    theirs = train(peft.get_peft_model(make_model(), peft.LoraConfig(**options)))
    if front == "ours":
        ours = train(rasa_ext.patch_model(make_model(), config=config))
    else:
        ours = train(under_peft(config, make_model()))
    expected = logits(theirs)
    moved = (expected - logits(make_model())).norm() / expected.norm()
    assert moved > 1e-2
    assert (logits(ours) - expected).norm() / expected.norm() < 1e-5


def test_training_begins_at_the_base_with_its_largest_ranks(config):
    base = make_model()
    model = rasa_ext.patch_model(copy.deepcopy(base), config=config)
    torch.testing.assert_close(logits(model), logits(base), atol=1e-4, rtol=1e-4)
    weights = dict(base.named_parameters())
    for name, layer in adapted_layers(model).items():
        A, B = layer.A, layer.B
        scale = layer.d[: len(A)] if "d" in layer.own_tensors() else config.scale
        U, S, V = torch.linalg.svd(weights[f"{name}.weight"].double(), full_matrices=False)
        best = U[:, : len(A)] * S[: len(A)] @ V[: len(A)]
        torch.testing.assert_close((B * scale @ A).double(), best, atol=1e-5, rtol=1e-4)


def test_save_load_merge_export_and_unpatch_are_exact(config, tmp_path):
    base = make_model()
    model = train(rasa_ext.patch_model(copy.deepcopy(base), config=config))
    expected = logits(model)
    rasa_ext.save_adapter(model, tmp_path / "adapter")
    loaded = rasa_ext.load_adapter(copy.deepcopy(base), tmp_path / "adapter")
    assert same_adapters(loaded, model)
    assert torch.equal(logits(loaded), expected)
    by_peft = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "adapter")
    torch.testing.assert_close(logits(by_peft), expected, atol=1e-4, rtol=1e-4)
    rasa_ext.export_lora(model, tmp_path / "lora")
    lora = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "lora")
    torch.testing.assert_close(logits(lora), expected, atol=1e-4, rtol=1e-4)
    merged = rasa_ext.merge_and_unload(copy.deepcopy(model))
    torch.testing.assert_close(logits(merged), expected, atol=1e-4, rtol=1e-4)
    rasa_ext.unpatch(model)
    assert all(map(same_bits, model.state_dict().values(), base.state_dict().values()))


def test_a_loaded_adapter_does_not_read_the_weights(config, tmp_path, monkeypatch):
    rasa_ext.save_adapter(rasa_ext.patch_model(make_model(), config=config), tmp_path)
    monkeypatch.setattr(torch.linalg, "svd", None)
    rasa_ext.load_adapter(make_model(), tmp_path)
    peft.PeftModel.from_pretrained(make_model(), tmp_path)


def test_a_quantized_base_is_read_dequantized(config):
    model = quantized.make_model()
    for layer in model.model.layers:
        layer.mlp.down_proj = quantized.bits4(layer.mlp.down_proj)
    plain = rasa_ext.patch_model(copy.deepcopy(model), target_modules=TARGETS)  # B is 0
    before = logits(plain)
    model = rasa_ext.patch_model(model, config=config)
    torch.testing.assert_close(logits(model), before, atol=1e-3, rtol=1e-3)
    assert adapted_layers(model)["model.layers.0.mlp.down_proj"].B_0.any()


def test_weights_that_are_elsewhere_are_refused(config):
    model = accelerate.cpu_offload(make_model(), execution_device=torch.device("cpu"))
    with pytest.raises(ValueError, match=r"config: .*model\.layers\.0\.self_attn\.q_proj"):
        rasa_ext.patch_model(model, config=config)
    assert not any("rasa_pool" in name for name, _ in model.named_parameters())


def test_a_model_on_meta_is_planned():
    with torch.device("meta"):
        model = make_model()
    rasa_ext.patch_model(model, config=CONFIGS["lora"])


@dataclasses.dataclass(frozen=True)
class RowsConfig(methods.LoraConfig):
    """A LoRA whose A begins as the weight's first rows."""

    method: ClassVar[str] = "rows"

    def begin(self, own, pool, spec, weight) -> None:
        own["A"].copy_(weight[..., : self.rank, :])


@pytest.mark.parametrize("kind", ["dense", "quantized", "experts"])
def test_a_merged_base_is_read_as_it_was(kind, tmp_path):
    """A second adapter, and a third loaded for training, begin as they do before a merge."""
    base = {"dense": make_model, "quantized": quantized.make_model, "experts": experts.model}[
        kind
    ]()
    base = quantized.quantized(base, "nf4") if kind == "quantized" else base
    given = {"r": 2, "rasa_method": "rows", "target_modules": "all-linear"}
    given |= {"rasa_experts": "own"} if kind == "experts" else {}
    model = peft.get_peft_model(base, rasa_ext.peft.RasaConfig(**given))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.01)
    model.save_pretrained(tmp_path)
    expected = copy.deepcopy(model)
    model.merge_adapter()
    for each in (expected, model):
        each.add_adapter("second", copy.deepcopy(each.peft_config["default"]))
        each.load_adapter(tmp_path, "third", is_trainable=True)
    theirs = {n: p for n, p in expected.named_parameters() if ".second" in n or ".third" in n}
    A = [p for n, p in theirs.items() if n.endswith("_A.second")]
    assert A
    assert all(len(p) for p in A)
    same = {n: torch.equal(p, theirs[n]) for n, p in model.named_parameters() if n in theirs}
    assert len(same) == len(theirs)
    assert all(same.values()), [name for name, equal in same.items() if not equal]


@dataclasses.dataclass(frozen=True)
class RoughConfig(methods.LoraConfig):
    """A method that changes the weight that it is given, and may begin with NaN."""

    method: ClassVar[str] = "rough"
    bad: bool = False

    def begin(self, own, pool, spec, weight) -> None:
        weight.zero_()
        if self.bad and "down_proj" in spec.name:
            own["A"][0, 0] = float("nan")


@pytest.mark.parametrize("front", ["ours", "peft"])
def test_the_base_is_not_in_a_method_s_hands_and_its_numbers_are_checked(front):
    def adapt(base, bad):
        config = RoughConfig(rank=2, target_modules=TARGETS, bad=bad)
        if front == "ours":
            return rasa_ext.patch_model(base, config=config)
        given = {"r": 2, "rasa_method": "rough", "rasa_options": {"bad": bad}}
        return peft.get_peft_model(base, rasa_ext.peft.RasaConfig(**given, target_modules=TARGETS))

    base = make_model()
    refused(lambda: adapt(base, True), base, "config: 'rough' begins with NaN .*down_proj")
    assert torch.equal(logits(adapt(copy.deepcopy(base), False)), logits(base))
