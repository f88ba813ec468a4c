"""Other PEFT features either work with RaSA or raise an error that says why not."""

from functools import partial

import pytest
import torch
from peft import (
    LoraConfig,
    PeftModel,
    get_peft_model,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from peft.helpers import rescale_adapter_scale
from peft.tuners.lora.conversion import convert_to_lora
from peft.utils.hotswap import hotswap_adapter
from safetensors.torch import load_file
from trl.experimental.sdpo.teacher_sync import is_pure_lora_training

import rasa_ext
from rasa_ext.peft import RasaConfig
from tests.helpers import oracle
from tests.helpers.adapters import RANK
from tests.helpers.models import GPT2
from tests.helpers.peft import TOKENS, WEIGHTS, close, dense, layers, logits, tiny, trained, two
from tests.helpers.peft_sides import FAMILIES, sides
from tests.helpers.refusals import refused
from tests.helpers.tiny_lm import make_model
from tests.helpers.unet import Unet


def test_saving_some_of_the_adapters(tmp_path):
    model = two()
    model.save_pretrained(tmp_path, selected_adapters=["second"])
    assert not (tmp_path / WEIGHTS).exists()
    saved = load_file(tmp_path / "second" / WEIGHTS)
    assert sum(tensor.numel() for tensor in saved.values()) == sum(
        p.numel() for key, p in model.named_parameters() if key.endswith(".second")
    )
    again = PeftModel.from_pretrained(make_model(), tmp_path / "second").eval()
    close(again(TOKENS).logits, dense(model, "second"))
    with pytest.raises(ValueError, match="third"):
        model.save_pretrained(tmp_path, selected_adapters=["third"])


def test_pickled_adapters_are_read(tmp_path):
    model = tiny()
    model.save_pretrained(tmp_path, safe_serialization=False)
    assert (tmp_path / "adapter_model.bin").exists()
    assert torch.equal(logits(PeftModel.from_pretrained(make_model(), tmp_path)), logits(model))


def test_status_by_layer():
    model = two()
    model.base_model.set_adapter(["default", "second"])
    status = {each.name: each for each in model.get_layer_status()}
    assert len(status) == len(layers(model))
    q = status["model.model.layers.0.self_attn.q_proj"]
    assert q.active_adapters == ["default", "second"]
    assert q.available_adapters == ["default", "second"]
    assert q.requires_grad == {"default": True, "second": True}
    assert status["model.model.layers.0.mlp.up_proj"].available_adapters == ["default"]
    assert not q.merged_adapters
    model.merge_adapter(["second"])
    assert model.get_model_status().merged_adapters == ["second"]


def test_the_configs_dtype_holds_over_any_base(tmp_path):
    """Nothing is rounded to bfloat16, which cannot represent the initial diagonal."""
    model = get_peft_model(make_model().bfloat16(), RasaConfig(r=RANK, rasa_alpha=3.3))
    assert model(TOKENS).logits.dtype == torch.bfloat16
    for layer in layers(model).values():
        expected = oracle.initial_d(RANK, 1, 2, layer.adapter().spec.index, 3.3)
        torch.testing.assert_close(layer.rasa_d["default"].double(), expected, rtol=1e-6, atol=0)
    model.add_adapter("second", RasaConfig(r=2, adapter_dtype="bfloat16"))
    assert dtypes(model, "default") == {torch.float32}
    assert dtypes(model, "second") == {torch.bfloat16}
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(make_model().bfloat16(), tmp_path)
    assert dtypes(again, "default") == {torch.float32}


def dtypes(model, adapter: str) -> set[torch.dtype]:
    names = (".rasa_", f".{adapter}")
    return {p.dtype for n, p in model.named_parameters() if names[0] in n and n.endswith(names[1])}


@pytest.mark.parametrize("low", [False, True])
def test_without_autocast_the_dtype_is_the_bases(low, tmp_path):
    options = {"autocast_adapter_dtype": False, "low_cpu_mem_usage": low}
    config = RasaConfig(r=RANK, init_weights=False)
    model = get_peft_model(make_model().bfloat16(), config, autocast_adapter_dtype=False)
    assert dtypes(model.train(), "default") == {torch.bfloat16}  # train() restores dtypes
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(make_model().bfloat16(), tmp_path, **options)
    again.load_adapter(tmp_path, "loaded", **options)
    again.add_adapter("added", RasaConfig(r=2), **options)
    for name in ("default", "loaded", "added"):
        assert dtypes(again.train(), name) == {torch.bfloat16}
    assert torch.equal(again.eval()(TOKENS).logits, model.eval()(TOKENS).logits)


@pytest.mark.parametrize("bias", ["all", "rasa_only"])
def test_biases_are_trained_saved_and_merged(bias, tmp_path):
    def call(model) -> torch.Tensor:
        return GPT2.call(model, **GPT2.inputs(0))

    config = RasaConfig(r=2, bias=bias, init_weights=False)
    model = get_peft_model(GPT2.build(), config)
    every = [n for n, _ in model.named_parameters() if n.endswith("bias")]
    meant = [n for n in every if bias == "all" or ".base_layer." in n]
    assert [n for n, p in model.named_parameters() if p.requires_grad and n in every] == meant
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    call(model).square().mean().backward()
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1).step()
    assert all(not torch.equal(p, before[n]) for n, p in model.named_parameters() if n in meant)
    model.save_pretrained(tmp_path)
    logits = call(model.eval()).detach()
    again = PeftModel.from_pretrained(GPT2.build(), tmp_path)
    for other in (again, rasa_ext.load_adapter(GPT2.build(), tmp_path)):
        torch.testing.assert_close(call(other.eval()), logits)
    with pytest.raises(ValueError, match="bias="):
        rasa_ext.peft.export_lora(model, tmp_path / "lora")
    with pytest.raises(ValueError, match="1 adapter with bias"):
        model.add_adapter("second", config)
    torch.testing.assert_close(call(model.merge_and_unload()), logits, rtol=1e-4, atol=1e-4)


def test_as_a_lora_of_its_effective_rank():
    """PEFT converts by SVD, which is exact at rank R."""
    model = tiny().eval()
    rank = next(iter(layers(model).values())).rasa_d["default"].shape[0]
    config, state = convert_to_lora(model, rank=rank)
    lora = get_peft_model(make_model(), config).eval()
    set_peft_model_state_dict(lora, state)
    assert isinstance(config, LoraConfig)
    close(lora(TOKENS).logits, dense(model, "default"))


@sides(*FAMILIES)
def test_transformers_own_loading(side, tmp_path, monkeypatch):
    # transformers 5.24 asks for a PEFT newer than 0.21 without needing it.
    monkeypatch.setattr("transformers.integrations.peft.check_peft_version", lambda **_: None)
    source = side.one()
    source.save_pretrained(tmp_path)
    model = side.base()
    model.load_adapter(str(tmp_path))
    expected = side.logits(source)
    assert torch.equal(side.logits(model), expected)
    model.disable_adapters()
    assert torch.equal(side.logits(model), side.logits(side.base()))
    model.enable_adapters()
    model.save_pretrained(tmp_path / "again")
    ours = rasa_ext.load_adapter(side.base(), tmp_path / "again")
    assert torch.equal(side.logits(ours), expected)


def test_adapters_of_adapters_are_not_combined():
    model = two()
    with pytest.raises(NotImplementedError, match=r"^add_weighted_adapter: .*set_adapter"):
        model.add_weighted_adapter(["default", "second"], [0.5, 0.5], "third")
    assert list(model.peft_config) == ["default", "second"]


def test_adapters_are_not_swapped_in_place(tmp_path):
    """PEFT swaps only LoRA; its error comes before any change."""
    tiny(seed=5).save_pretrained(tmp_path)
    model = tiny()
    swap = partial(hotswap_adapter, model, tmp_path, "default", torch_device="cpu")
    refused(swap, model, "only supports .*LORA.* but RASA")


def test_what_asks_for_lora_by_name():
    model = tiny()
    with (
        pytest.raises(ValueError, match="LoraLayer"),
        rescale_adapter_scale(model, 0.5),
    ):
        pass
    # TRL's SDPO and SDFT then refuse an averaged teacher.
    assert not is_pure_lora_training(model)


def test_diffusers_files_of_loras_are_not_written():
    class Model(Unet):
        def save_lora_adapter(self, directory):
            raise AssertionError("it wrote RaSA's tensors as a LoRA's")

    model = Model()
    inject_adapter_in_model(RasaConfig(r=2), model)
    with pytest.raises(ValueError, match=r"^save_lora_adapter: .*save_pretrained"):
        model.save_lora_adapter("folder")


def test_adapters_of_several_methods_are_not_mixed():
    with pytest.raises(ValueError, match=r"RASA.* not compatible"):
        get_peft_model(make_model(), RasaConfig(r=2), mixed=True)
    model = tiny()
    with pytest.raises(ValueError, match=r"RASA.*LORA|LORA.*RASA"):
        model.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj"]))
    assert list(model.peft_config) == ["default"]


def test_compile():
    """The model compiles to one graph, and changed parameters take effect."""
    torch._dynamo.reset()
    model = tiny().eval()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    close(compiled(TOKENS).logits, dense(model, "default"))
    with torch.no_grad():
        for parameter in trained(model).values():
            parameter.mul_(0.5)
    close(compiled(TOKENS).logits, dense(model, "default"))
    compiled(TOKENS).logits.sum().backward()
    assert all(p.grad is not None for p in trained(model).values())


def test_transformers_own_adapters(monkeypatch):
    """A transformers model injects the adapter itself, without a PeftModel around it."""
    monkeypatch.setattr("transformers.integrations.peft.check_peft_version", lambda **_: None)
    source = tiny()
    model = make_model()
    model.add_adapter(RasaConfig(r=RANK, rasa_k=1))
    assert set(trained(model)) == {key.removeprefix("base_model.model.") for key in trained(source)}
    set_peft_model_state_dict(
        model, {key.rpartition(".")[0]: p for key, p in trained(source).items()}
    )
    close(model(TOKENS).logits, dense(source, "default"))
    model.disable_adapters()
    assert torch.equal(model(TOKENS).logits, make_model()(TOKENS).logits)
    model.enable_adapters()
    state = model.get_adapter_state_dict()
    assert {f"base_model.model.{key}.default" for key in state} == set(trained(source))
