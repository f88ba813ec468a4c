"""gpt-oss with MXFP4 experts: numbers, gradients of all layers, training, files, refusals."""

import copy

import pytest
import torch
from transformers.integrations.mxfp4 import Mxfp4GptOssExperts

import rasa_ext
from rasa_ext.peft import RasaConfig
from tests.helpers import experts
from tests.helpers.adapter_folders import same_exports
from tests.helpers.layouts import excesses_over_packed
from tests.helpers.peft import trained
from tests.helpers.quantized import TOKENS
from tests.helpers.trainers import train_by_sft
from tests.quantized import gpt_oss


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return gpt_oss.write_gpt_oss(tmp_path_factory.mktemp("gpt-oss"))


@pytest.fixture
def packed(folder):
    model = gpt_oss.packed(folder)
    assert isinstance(model.model.layers[0].mlp.experts, Mxfp4GptOssExperts)
    return model


def patched(model, **options):
    return rasa_ext.patch_model(model, 4, 1, **options).train()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("grouping", ["shared", "slot", None])
def test_gradients(folder, grouping, dtype, figure):
    """Gradients of all layers match those over dequantized experts, adapted or not."""
    wide = gpt_oss.dense(folder, dtype)
    packed = gpt_oss.packed(folder, dtype=dtype)
    double = copy.deepcopy(wide).double()
    bad, ratio = excesses_over_packed(double, wide, packed, grouping, TOKENS)
    figure(f"gpt-oss in MXFP4, {dtype}, experts {grouping}: error {ratio:.2f} times a dense base's")
    assert not bad


@pytest.mark.parametrize("entrance", ["core", "peft"])
def test_sft_trainer(packed, entrance, tmp_path):
    """With TRL's SFTTrainer and checkpointing, all adapters learn, even the first layer's."""
    config = None
    if entrance == "core":
        patched(packed, experts="shared")
    else:
        config = RasaConfig(r=4, rasa_k=1, rasa_experts="shared", task_type="CAUSAL_LM")
    model = train_by_sft(packed, tmp_path, config, gradient_checkpointing=True)
    assert any("experts" in name for name in trained(model))


@torch.no_grad()
def test_files_and_unpatching(packed, folder, tmp_path):
    """The adapter loads into the dequantized model; unpatching restores the experts."""
    own = {name: dict(vars(module)) for name, module in packed.named_modules()}
    model = patched(packed, experts="shared").eval()
    rows = rasa_ext.summary(model).formats
    assert rows == {"Mxfp4GptOssExperts, mxfp4, 4 bits": 4}
    wide = gpt_oss.dense(folder)
    with rasa_ext.disable_adapter(model):
        torch.testing.assert_close(model(TOKENS).logits, wide(TOKENS).logits)
    experts.randomize(model)
    rasa_ext.save_adapter(model, tmp_path / "adapter")
    loaded = rasa_ext.load_adapter(wide, tmp_path / "adapter").eval()
    torch.testing.assert_close(loaded(TOKENS).logits, model(TOKENS).logits)
    deltas, expected = (dict(rasa_ext.delta_weights(each)) for each in (model, loaded))
    assert any("experts" in name for name in deltas)
    torch.testing.assert_close(deltas, expected)
    for layout in ("peft", "per-expert"):
        assert same_exports(tmp_path / layout, model, loaded, expert_layout=layout)
    rasa_ext.unpatch(model)
    assert all(vars(module).keys() == own[name].keys() for name, module in model.named_modules())
    assert "forward" not in vars(model.model.layers[0].mlp.experts)


def test_refusals(packed):
    model = patched(packed, experts="shared")
    with pytest.raises(ValueError, match=r"gate_up_proj\[0\]' is packed as torch.uint8, and"):
        rasa_ext.merge(model)
    assert not model.model.layers[0].self_attn.q_proj.merged
