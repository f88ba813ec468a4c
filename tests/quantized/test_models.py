"""Models that transformers quantized on loading: Trainer, and saving a merged model."""

import copy
import json

import pytest
import torch
from compressed_tensors.compressors import ModelCompressor
from compressed_tensors.transform import TransformArgs, TransformConfig, TransformScheme
from peft import get_peft_model
from torchao.quantization import Int8WeightOnlyConfig
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TorchAoConfig

import rasa_ext
from rasa_ext.base_layers.quantized import format_of
from rasa_ext.commands import training
from rasa_ext.commands.models import load_model
from rasa_ext.commands.paths import ModelError
from rasa_ext.peft import RasaConfig
from tests.helpers import oracle
from tests.helpers.adapters import adapted_layers, patched
from tests.helpers.finetuning import parsed
from tests.helpers.layouts import dense, packed_model
from tests.helpers.quantized import TOKENS, logits, make_model, off
from tests.helpers.trainers import train_by_sft

CONFIGS = {
    "nf4": lambda: BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    ),
    "int8": lambda: BitsAndBytesConfig(load_in_8bit=True),
    "torchao int8": lambda: TorchAoConfig(Int8WeightOnlyConfig()),
}


@pytest.fixture(params=CONFIGS)
def model(request, tmp_path):
    make_model().bfloat16().save_pretrained(tmp_path / "base")
    return AutoModelForCausalLM.from_pretrained(
        tmp_path / "base", quantization_config=CONFIGS[request.param](), dtype=torch.bfloat16
    )


def test_trainer(model, tmp_path):
    trained = train_by_sft(rasa_ext.patch_model(model, 4, 1), tmp_path)
    assert all(format_of(layer.base_layer) for layer in adapted_layers(trained).values())


def test_what_was_merged_is_a_plain_model_also_to_transformers(model, tmp_path):
    untrained, copied = rasa_ext.patch_model(copy.deepcopy(model)), patched(model).eval()
    with torch.no_grad():
        kernel, before = (logits(each) for each in (model, copied))
        for each in (untrained, copied):
            with pytest.warns(UserWarning, match="merging into a dequantized weight"):
                rasa_ext.merge_and_unload(each)
        after = logits(copied)
        error = off(logits(untrained), kernel)  # the quantized base's own, from a dense one
    assert off(after, before) < 2 * error
    copied.save_pretrained(tmp_path / "merged")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.bfloat16)
    with torch.no_grad():
        assert torch.equal(again.eval()(input_ids=TOKENS).logits, after)
    assert not hasattr(again.config, "quantization_config")
    copied.half()  # transformers refuses this for a quantized model


def test_unpatching_leaves_a_quantized_model(model):
    rasa_ext.unpatch(rasa_ext.patch_model(model, 4, 1))
    assert model.is_quantized
    with pytest.raises(ValueError, match="not supported for quantized"):
        model.half()


def test_a_method_that_transformers_does_not_know(tmp_path):
    """The model has numbers without scales: both front ends and the commands name the method."""
    saved = make_model()
    saved.config.quantization_config = {"quant_method": "unheard_of"}
    saved.save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    said = "config.quantization_config has quant_method 'unheard_of'"
    with pytest.raises(ValueError, match=f"model: {said}"):
        rasa_ext.patch_model(model, 4, 1)
    with pytest.raises(ValueError, match=f"model: {said}"):
        get_peft_model(model, RasaConfig(r=4, task_type="CAUSAL_LM"))
    with pytest.raises(ModelError, match=said):
        load_model(str(tmp_path))
    assert not any(parameter.requires_grad is False for parameter in model.parameters())
    del model.config.quantization_config
    assert len(adapted_layers(rasa_ext.patch_model(model, 4, 1))) == 14


def write_quantization(folder, settings) -> None:
    """Write settings into a folder's config.json, over those of the same names."""
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = config.get("quantization_config", {}) | settings
    (folder / "config.json").write_text(json.dumps(config))


def test_commands_load_packed_zero_points(tmp_path):
    """transformers loads them only dequantized."""
    model = packed_model("packed int4 zero")
    model.save_pretrained(tmp_path)
    ModelCompressor.from_pretrained_model(model).update_config(tmp_path)
    found = load_model(str(tmp_path), "float32")
    plain = dense(model)
    oracle.assert_close(logits(found), logits(plain), oracle.rounding(plain, logits))


@pytest.mark.parametrize("form", ["packed int4", "packed int4 zero"])
def test_rotations(form, tmp_path):
    """transformers skips them, and leaves no trace in the model; config.json has them."""
    model = packed_model(form)
    model.save_pretrained(tmp_path)
    ModelCompressor.from_pretrained_model(model).update_config(tmp_path)

    def rotate(location: str) -> None:
        scheme = TransformScheme(
            type="hadamard", apply=[TransformArgs(targets="Linear", location=location)]
        )
        config = TransformConfig(config_groups={"R1": scheme})
        write_quantization(tmp_path, {"transform_config": config.model_dump(mode="json")})

    rotate("weight_input")  # the stored weights contain it
    rasa_ext.patch_model(load_model(str(tmp_path)), 4, 1)
    rotate("input")
    with pytest.raises(ModelError, match="has rotations"):
        load_model(str(tmp_path))
    if form == "packed int4":
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
        with pytest.raises(ValueError, match=r"model: config.quantization_config has rotations"):
            rasa_ext.patch_model(loaded, 4, 1)


@pytest.mark.parametrize(
    ("method", "backend"),
    [("gptq", "gptq_torch"), ("awq", "torch_awq"), ("auto-round", "torch"), ("fp8", None)],
)
def test_commands_ask_for_layers_with_a_backward(method, backend, tmp_path, monkeypatch):
    """transformers chooses other kernels for GPTQ and AWQ."""
    make_model().save_pretrained(tmp_path)
    write_quantization(tmp_path, {"quant_method": method, "bits": 4})

    def load(quantization_config=None, **_):
        raise ImportError(f"asked for {getattr(quantization_config, 'backend', None)}")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", load)
    with pytest.raises(ModelError, match=f"asked for {backend}"):
        load_model(str(tmp_path))


def test_a_half_precision_base_is_widened_on_a_cpu(tmp_path):
    """finetune does so without a GPU, also with quantized layers."""
    make_model().half().save_pretrained(tmp_path)
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "a", "completion": "b"}')
    given = {"model": str(tmp_path), "data": str(rows), "load_in_8bit": "true"}
    options = parsed({**given, "output": str(tmp_path / "out")})
    found = training._load(options)
    assert found.dtype == torch.float32
    assert format_of(found.model.layers[0].mlp.up_proj) is not None


def test_commands_say_that_shapes_differ(tmp_path):
    """transformers' report, which names them, is not printed by a command."""
    make_model().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"intermediate_size": 96}))
    with pytest.raises(ModelError, match=r"model: .* have other shapes than the model's"):
        load_model(str(tmp_path))
