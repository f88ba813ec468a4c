"""Save and load models of many kinds, most with two parts that have layers of the same name.

The parts are an encoder and a decoder, or two towers. Each part has its own pools, which the
official format cannot express, so the files here use our format.
"""

import pytest
import torch
import transformers
from peft import AutoPeftModel, AutoPeftModelForCausalLM, AutoPeftModelForSeq2SeqLM, PeftModel
from torch import Tensor, nn

import rasa_ext
from tests.helpers.adapters import same_tensors
from tests.helpers.models import GPT2, T5
from tests.helpers.peft import adapted, trained

SMALL = {"d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "decoder_start_token_id": 1}
SMALL |= {f"{side}_attention_heads": 2 for side in ("encoder", "decoder")}
SMALL |= {f"{side}_ffn_dim": 24 for side in ("encoder", "decoder")}
SMALL |= {"vocab_size": 40, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
TOWER = {"hidden_size": 16, "intermediate_size": 24}
TOWER |= {"num_hidden_layers": 2, "num_attention_heads": 2}
IMAGES = {"image_size": 8, "patch_size": 4}

TOKENS = torch.arange(3, 13).view(2, 5)
PAIR = {"input_ids": TOKENS, "decoder_input_ids": TOKENS.flip(1)}
PIXELS = torch.linspace(-1, 1, 2 * 3 * 8 * 8).view(2, 3, 8, 8)


def whisper() -> nn.Module:
    sizes = {"num_mel_bins": 8, "max_source_positions": 6, "max_target_positions": 8}
    config = transformers.WhisperConfig(**SMALL, **sizes)
    return transformers.WhisperForConditionalGeneration(config)


def bart() -> nn.Module:
    config = transformers.BartConfig(**SMALL, max_position_embeddings=12)
    return transformers.BartForConditionalGeneration(config)


def clip() -> nn.Module:
    text = {**TOWER, "vocab_size": 40, "max_position_embeddings": 8, "eos_token_id": 2}
    vision = {**TOWER, **IMAGES}
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)
    return transformers.CLIPModel(config)


def llava() -> nn.Module:
    text = {**TOWER, "vocab_size": 40, "num_key_value_heads": 2, "max_position_embeddings": 32}
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**TOWER, **IMAGES, projection_dim=8),
        text_config=transformers.LlamaConfig(**text),
        image_token_index=39,
        vision_feature_layer=-1,
    )
    return transformers.LlavaForConditionalGeneration(config)


WITH_IMAGE = torch.cat([torch.full((2, 4), 39), TOKENS], 1)
SPEECH = torch.linspace(-1, 1, 2 * 8 * 12).view(2, 8, 12)
SPOKEN = {"input_features": SPEECH, "decoder_input_ids": TOKENS}

# Builder, inputs, task type, and the PEFT class that loads base and adapter together.
FAMILIES = {
    "whisper": (whisper, SPOKEN, None, AutoPeftModel),
    "bart": (bart, PAIR, "SEQ_2_SEQ_LM", AutoPeftModelForSeq2SeqLM),
    "gpt2": (GPT2.build, GPT2.inputs(0), "CAUSAL_LM", AutoPeftModelForCausalLM),
    "t5": (T5.build, T5.inputs(0), "SEQ_2_SEQ_LM", AutoPeftModelForSeq2SeqLM),
    "clip": (clip, {"input_ids": TOKENS, "pixel_values": PIXELS}, None, AutoPeftModel),
    "llava": (llava, {"input_ids": WITH_IMAGE, "pixel_values": PIXELS}, None, AutoPeftModel),
}


@torch.no_grad()
def output(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """Return logits; for CLIP, image-text logits, which depend on both towers."""
    found = model.eval()(**inputs)
    return found.logits_per_image if "logits_per_image" in found else found.logits


@pytest.mark.parametrize("family", FAMILIES)
def test_saved_loaded_and_trained_on(family, tmp_path):
    build, inputs, task, auto = FAMILIES[family]
    torch.manual_seed(0)
    build().save_pretrained(tmp_path / "base")

    def base() -> nn.Module:
        return type(build()).from_pretrained(tmp_path / "base")

    model = adapted(base(), task_type=task)
    expected = output(model, inputs)
    assert not torch.equal(expected, output(base(), inputs))
    model.save_pretrained(tmp_path / "adapter")

    loaded = PeftModel.from_pretrained(base(), tmp_path / "adapter")
    assert torch.equal(output(loaded, inputs), expected)
    loaded.load_adapter(tmp_path / "adapter", "second")
    loaded.set_adapter("second")
    assert torch.equal(output(loaded, inputs), expected)
    ours = rasa_ext.load_adapter(base(), tmp_path / "adapter")
    assert torch.equal(output(ours, inputs), expected)
    rasa_ext.save_adapter(ours, tmp_path / "ours")
    again = PeftModel.from_pretrained(base(), tmp_path / "ours")
    for each in (again, auto.from_pretrained(tmp_path / "adapter")):
        assert torch.equal(output(each, inputs), expected)

    resumed = PeftModel.from_pretrained(base(), tmp_path / "adapter", is_trainable=True)
    assert len(trained(resumed)) == len(trained(model))
    with torch.no_grad():
        for parameter in trained(resumed).values():
            parameter.sub_(0.01)
    resumed.save_pretrained(tmp_path / "checkpoint")
    model.load_adapter(tmp_path / "checkpoint", "default", is_trainable=True)  # like Trainer
    assert same_tensors(trained(resumed), trained(model))
    assert torch.equal(output(model, inputs), output(resumed, inputs))
