"""What servers refuse or leave out of an exported LoRA, by their sources, is warned of or refused.

tests/readers runs vLLM, llama.cpp and mlx-lm over the files.
"""

from __future__ import annotations

import pytest

import rasa_ext
from tests.helpers.adapter_folders import changes_in
from tests.helpers.adapters import adapters, patched
from tests.helpers.models import BERT, GPT2, LLAMA, TIED, TIED_LLAMA

BASE = LLAMA.build()
ROWS = "trainable_token_indices"
INSTEAD = r"save what rasa_ext\.merge_and_unload"


@pytest.mark.parametrize(
    ("entry", "options", "warning"),
    [
        (GPT2, {}, f"Conv1D .* vLLM cannot.*{INSTEAD}"),
        (LLAMA, {"modules_to_save": ["lm_head"]}, rf"modules_to_save \(lm_head\), .*{INSTEAD}"),
        (LLAMA, {"target_modules": ["q_proj", "o_proj"]}, "q_proj .* v_proj in 3 layers.*SGLang"),
        (TIED_LLAMA, {"target_modules": ["q_proj", "v_proj", "lm_head"]}, "lm_head .*llama.cpp"),
        # PEFT ties weights only by the model's config, and its token wrappers drop a head's bias.
        (TIED, {ROWS: [5]}, "PEFT does not use the trained rows of embed in readout"),
        (BERT, {ROWS: {"classifier": [1]}}, "PEFT leaves out the bias of classifier"),
    ],
    ids=["Conv1D", "modules_to_save", "q alone", "tied head", "tied rows", "biased rows"],
)
@pytest.mark.filterwarnings("ignore")
def test_what_a_reader_refuses_is_warned_of(entry, options, warning, tmp_path):
    with pytest.warns(UserWarning, match=warning):
        rasa_ext.export_lora(patched(entry.build(), **options), tmp_path, allow_dropped=True)


DROPPED = {
    "final norm": ({"modules_to_save": ["norm"]}, r"llama\.cpp.*\(model\.norm\.weight\)"),
    "norms of layers": (
        {"modules_to_save": ["input_layernorm", "lm_head"]},
        r"llama\.cpp.*\(model\.layers\.0\.input_layernorm\.weight, .*\)",
    ),
    "k, v without q": ({"target_modules": ["k_proj", "v_proj"]}, "k_proj .* q_proj .*SGLang"),
    "v without q": ({"target_modules": ["v_proj", "o_proj"]}, "v_proj .* q_proj .*SGLang"),
    "rows": ({ROWS: [5, 30]}, r"SGLang .*trained rows of model\.embed_tokens"),
    "up without gate": ({"target_modules": ["up_proj"]}, "up_proj .* gate_proj .*SGLang"),
}


@pytest.mark.parametrize("case", DROPPED)
def test_what_a_reader_would_drop_is_not_written_unless_asked(case, tmp_path):
    """The reader would load the folder but silently apply only a part of the adapter."""
    options, message = DROPPED[case]
    model = patched(BASE, **options)
    with pytest.raises(ValueError, match=f"{message}.*{INSTEAD}.*allow_dropped=True"):
        rasa_ext.export_lora(model, tmp_path)
    assert not [*tmp_path.iterdir()]
    with pytest.warns(UserWarning, match=f"{message}.*{INSTEAD}"):
        rasa_ext.export_lora(model, tmp_path, allow_dropped=True)
    assert changes_in(tmp_path).keys() == adapters(model).keys()


@pytest.mark.parametrize(
    "targets",
    ["all-linear", ["q_proj", "v_proj"], ["q_proj", "k_proj", "v_proj"], ["gate_proj"]],
    ids=str,
)
def test_what_every_reader_takes_is_not_warned_of(targets, tmp_path, recwarn):
    rasa_ext.export_lora(patched(BASE, target_modules=targets), tmp_path)
    assert not [w for w in recwarn if issubclass(w.category, UserWarning)]
