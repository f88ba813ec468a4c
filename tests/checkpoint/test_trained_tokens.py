"""Trained token rows in the package's own files and in LoRAs for PEFT."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel

import rasa_ext
from tests.helpers.adapter_folders import read
from tests.helpers.adapters import same_adapters, same_bits
from tests.helpers.models import BERT, GEMMA, GPT2, LLAMA, T5, TIED, ids
from tests.helpers.trained_tokens import IDS, TABLES, with_moved_rows

pytestmark = pytest.mark.filterwarnings("ignore:groups", "ignore:Conv1D", "ignore:the model has")
KEY = "base_model.model.{}.token_adapter.trainable_tokens_delta"


@pytest.mark.parametrize("entry", [LLAMA, GPT2, T5, BERT, TIED], ids=ids)
def test_save_and_load(entry, tmp_path):
    model = with_moved_rows(entry)
    rasa_ext.save_adapter(model, tmp_path)
    config, tensors = read(tmp_path)
    assert config["trainable_token_indices"] == IDS
    owner = TABLES[entry.name][0]
    assert same_bits(tensors[KEY.format(owner)], model.get_submodule(owner).rows.detach())
    assert not [key for key in tensors if key.endswith("embed.weight")]
    loaded = rasa_ext.load_adapter(entry.build(), tmp_path)
    assert same_adapters(loaded, model)
    again = rasa_ext.load_adapter(with_moved_rows(entry, seed=9), tmp_path)  # into a patched model
    assert same_adapters(again, model)
    rasa_ext.merge(loaded)
    rasa_ext.save_adapter(loaded, tmp_path / "merged")
    merged = read(tmp_path / "merged")[1]
    assert merged.keys() == tensors.keys()
    assert all(same_bits(tensor, merged[key]) for key, tensor in tensors.items())


def test_rows_over_another_table(tmp_path):
    """Files store the rows themselves, not changes, so the base's old rows do not matter."""
    model, base = with_moved_rows(TIED), TIED.build()
    rasa_ext.save_adapter(model, tmp_path)
    with torch.no_grad():
        base.embed.weight[IDS] = 7.0
    loaded = rasa_ext.load_adapter(base, tmp_path)
    x = TIED.inputs(0)
    assert torch.equal(TIED.call(loaded, **x), TIED.call(model, **x))


def test_files_that_do_not_fit(tmp_path):
    rasa_ext.save_adapter(with_moved_rows(TIED), tmp_path)
    other = with_moved_rows(TIED, [1, 2])
    with pytest.raises(ValueError, match=r"differs .* trainable_token_indices"):
        rasa_ext.load_adapter(other, tmp_path)
    small = TIED.build()
    small.embed = torch.nn.Embedding(30, 12)
    with pytest.raises(ValueError, match="trainable_token_indices: expected indices below 30"):
        rasa_ext.load_adapter(small, tmp_path)


EXPORTS = [
    (LLAMA, IDS),
    (LLAMA, {"embed_tokens": IDS, "lm_head": [1, 5]}),
    (GPT2, IDS),
    (T5, IDS),
    (BERT, IDS),
    (GEMMA, [*IDS, 0]),
]


@pytest.mark.parametrize(("entry", "given"), EXPORTS)
def test_peft_computes_the_same(entry, given, tmp_path):
    model = with_moved_rows(entry, given)
    expected = entry.call(model, **entry.inputs(0)).log_softmax(-1)
    base = entry.build().eval()
    far = (entry.call(base, **entry.inputs(0)).log_softmax(-1) - expected).abs().max()
    with pytest.warns(UserWarning, match=r"SGLang .*trained rows"):
        rasa_ext.export_lora(model, tmp_path, allow_dropped=True)
    assert read(tmp_path)[0]["trainable_token_indices"].keys() == {
        names.partition(",")[0] for names in rasa_ext.summary(model).tokens
    }
    loaded = PeftModel.from_pretrained(base, tmp_path).eval()
    found = entry.call(loaded, **entry.inputs(0)).log_softmax(-1)
    assert (found - expected).abs().max() < 1e-4 * far
    assert rasa_ext.export_size(model) == sum(t.nbytes for t in read(tmp_path)[1].values())
