"""Checkpoints of ModelOpt. ``data`` has two that nvidia-modelopt 0.47 wrote, of one layer."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

import rasa_ext
from rasa_ext.base_layers.quantized import format_of
from rasa_ext.commands.models import load_model
from rasa_ext.commands.paths import ModelError
from tests.helpers import oracle
from tests.helpers.adapters import adapted_layers
from tests.helpers.layouts import excesses_over_packed

DATA = Path(__file__).parent / "data"
TOKENS = torch.arange(24).view(2, 12) * 7 % 16
E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=torch.float64)


def weights(folder: Path) -> dict[str, Tensor]:
    """Return the numbers in float64, by the formats' formulas."""
    stored = load_file(folder / "model.safetensors")
    found = {key: tensor.double() for key, tensor in stored.items() if key.endswith("weight")}
    for key in found:
        scales = {name: stored.get(f"{key}_{name}") for name in ("scale", "scale_2")}
        if scales["scale"] is None:
            continue
        scale = scales["scale"].double()
        if scales["scale_2"] is not None:
            codes = torch.stack([stored[key] & 15, stored[key] >> 4], -1).flatten(1).long()
            found[key] = torch.cat([E2M1, -E2M1])[codes]
            scale = (scale * scales["scale_2"].double()).repeat_interleave(16, 1)
        found[key] = found[key] * scale
    return found


def dense(folder: Path, dtype: torch.dtype) -> nn.Module:
    config = AutoConfig.from_pretrained(folder)
    del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float64)
    model.load_state_dict(weights(folder), strict=False)
    return model.to(dtype).requires_grad_(False)


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    return model(input_ids=TOKENS).logits


@pytest.mark.parametrize("form", ["fp8", "nvfp4"])
def test_a_step(form, figure):
    """Logits and gradients match those over the stored numbers in float64."""
    folder = DATA / f"modelopt_{form}"
    model, wide = load_model(str(folder), "float32"), dense(folder, torch.float64)
    plain = dense(folder, torch.float32)
    oracle.assert_close(logits(model), logits(wide), oracle.rounding(plain, logits))
    bad, ratio = excesses_over_packed(wide, plain, model, None, TOKENS)
    assert all(format_of(layer.base_layer) for layer in adapted_layers(model).values())
    figure(f"modelopt {form}: error {ratio:.2f} times a dense base's")
    assert not bad
    before = logits(model.eval())
    with pytest.warns(UserWarning, match="merging into a dequantized weight"):
        merged = rasa_ext.merge_and_unload(model)
    oracle.assert_close(logits(merged), before, oracle.rounding(merged, logits))


def changed(folder: Path, settings: dict[str, object] | None) -> str:
    """Copy the FP8 checkpoint with other settings."""
    shutil.copytree(DATA / "modelopt_fp8", folder, dirs_exist_ok=True)
    config = json.loads((folder / "config.json").read_text())
    stored = config.pop("quantization_config")
    if settings is not None:
        config["quantization_config"] = stored | settings
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def test_scales_of_parts_that_the_model_lacks(tmp_path):
    """A checkpoint with a vision tower loads as a language model."""
    model = dense(DATA / "modelopt_fp8", torch.float32)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors |= {"visual.0.weight": torch.ones(2, 2), "visual.0.weight_scale": torch.ones(2)}
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    assert torch.equal(load_model(str(tmp_path))(TOKENS).logits, model(TOKENS).logits)


def test_refusals(tmp_path):
    """Other algorithms are refused, and so are scales of which config.json says nothing."""
    with pytest.raises(ModelError, match=r"quant_algo 'W4A16_AWQ' is not read"):
        load_model(changed(tmp_path, {"quant_algo": "W4A16_AWQ"}))
    with pytest.raises(ModelError, match=r"model: .*down_proj\.weight_scale, \.\.\."):
        load_model(changed(tmp_path, None))
    changed(tmp_path, {"ignore": ["lm_head"]})
    tensors = load_file(tmp_path / "model.safetensors")
    tensors.pop("model.layers.0.mlp.up_proj.weight_scale")
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"model: .* lacks 1 of its weights \(.*up_proj"):
        load_model(str(tmp_path))
