"""LoraConfig(experts="own"): each expert has its own pair of factors, like PEFT's LoRA."""

import copy

import pytest
import torch
from peft import LoraConfig as PeftLoraConfig
from peft import PeftModel, get_peft_model
from torch import nn

import rasa_ext
import rasa_ext.peft
from rasa_ext.methods import LoraConfig
from tests.helpers import experts, oracle
from tests.helpers.adapters import same_bits
from tests.helpers.expert_files import logits

FAMILIES = (*experts.UNLIKE, "llama4_text")
OPTIONS = ({}, {"rslora": True}, {"train_A": False})
ONLY = r".*\.experts\.\w+_proj"


def adapted(family: str, targets: str = "all-linear", **options) -> tuple[nn.Module, nn.Module]:
    """Return a plain model, and a patched copy with random adapters."""
    base = experts.model(family).eval()
    config = LoraConfig(rank=3, alpha=6.0, experts="own", target_modules=targets, **options)
    model = rasa_ext.patch_model(copy.deepcopy(base), config=config)
    torch.manual_seed(0)
    for parameter in rasa_ext.adapter_parameters(model):
        torch.nn.init.normal_(parameter, std=0.3)
    return base, model


def dense(base: nn.Module, model: nn.Module, scale: float) -> dict[str, torch.Tensor]:
    """Return W[e] + s B[e] A[e] of each stacked weight by name, differentiable in A and B."""
    found = {}
    for path, module in model.named_modules():
        for name, stack in module.stacks().items() if hasattr(module, "stacks") else ():
            change = scale * stack.B @ stack.A
            weight = base.get_parameter(f"{path}.{name}").detach()
            found[f"{path}.{name}"] = weight + (
                change if change.shape == weight.shape else change.mT
            )
    return found


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_output_and_gradients(family, options):
    base, model = adapted(family, ONLY, **options)
    base, model = base.double(), model.double()
    base.config._experts_implementation = "eager"
    scale = 6.0 / (3**0.5 if options.get("rslora") else 3)
    parameters = rasa_ext.adapter_parameters(model)
    assert len(parameters) == (4 if "train_A" in options else 8)
    tokens = torch.arange(12).view(2, 6)
    probe = torch.randn(2, 6, 32, dtype=torch.float64)
    with oracle.in_float64():
        plain = torch.func.functional_call(base, dense(base, model, scale), (tokens,)).logits
        expected = torch.autograd.grad((plain * probe).sum(), parameters)
        found = model(tokens).logits
        grads = torch.autograd.grad((found * probe).sum(), parameters)
    torch.testing.assert_close(found, plain, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(grads, expected, rtol=1e-9, atol=1e-9)
    assert all(grad.any() for grad in expected)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing")
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_files_merge_and_peft(family, options, tmp_path):
    base, model = adapted(family, **options)
    expected = logits(model)
    assert (logits(base) - expected).abs().max() > 0.1
    rasa_ext.save_adapter(model, tmp_path / "own")
    loaded = rasa_ext.load_adapter(copy.deepcopy(base), tmp_path / "own").eval()
    assert same_bits(logits(loaded), expected)
    assert rasa_ext.export_lora(model, tmp_path / "lora", expert_layout="peft") == 3
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "lora").eval()
    error = oracle.rounding(loaded, logits)
    oracle.assert_close(logits(loaded), expected, error)
    if "train_A" not in options:
        loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "own").eval()
        assert same_bits(logits(loaded), expected)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    rasa_ext.merge(model)
    oracle.assert_close(logits(model), expected, error)
    rasa_ext.unmerge(model)
    assert all(same_bits(p.detach(), before[name]) for name, p in model.named_parameters())


def test_it_has_as_many_numbers_as_pefts_and_begins_as_that_does():
    base = experts.model("mixtral")
    config = PeftLoraConfig(r=3, target_parameters=["gate_up_proj", "down_proj"], target_modules=[])
    theirs = get_peft_model(copy.deepcopy(base), config)
    config = LoraConfig(rank=3, experts="own", target_modules=ONLY)
    ours = rasa_ext.patch_model(copy.deepcopy(base), config=config)
    count = sum(p.numel() for p in theirs.parameters() if p.requires_grad)
    assert sum(p.numel() for p in rasa_ext.adapter_parameters(ours)) == count
    assert [(row.L, row.R, row.experts) for row in rasa_ext.summary(ours)] == [(2, 3, 5)] * 2
    error = oracle.rounding(base.eval(), logits)
    oracle.assert_close(logits(ours.eval()), logits(base), error)
    A = torch.cat([p.flatten() for n, p in ours.named_parameters() if n.endswith("up_proj.A")])
    assert 0.9 * 16**-0.5 < A.abs().max() <= 16**-0.5


def test_without_the_argument_a_warning_says_how():
    with pytest.warns(UserWarning, match="To adapt them, pass experts='own'"):
        rasa_ext.patch_model(experts.model(), config=LoraConfig(rank=1))
