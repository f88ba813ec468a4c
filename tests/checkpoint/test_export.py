"""An exported LoRA that PEFT loads onto the plain base computes the same function."""

import json

import pytest
import torch
from peft import PeftModel
from torch import nn

import rasa_ext
from tests.helpers import oracle
from tests.helpers.adapter_folders import changes_in, read
from tests.helpers.adapters import RANK, adapted_layers, adapters, content, patched
from tests.helpers.models import (
    BERT,
    ENCODER,
    FAMILIES,
    GEMMA,
    GPT2,
    LLAMA,
    T5,
    TIED,
    TIED_LLAMA,
    VIT,
    Entry,
    ids,
    logits,
    rounding,
)
from tests.helpers.peft import load_in_peft
from tests.helpers.refusals import refused
from tests.helpers.trained_tokens import IDS, with_moved_rows

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*Conv1D",
    "ignore:modules_to_save",
    "ignore:.*SGLang",
    "ignore:.*is_gradient_checkpointing",
)


def assert_same_in_peft(entry, base, model, directory):
    expected = logits(entry, model.eval())
    loaded = load_in_peft(base, directory)
    found = logits(entry, loaded)
    oracle.assert_close(found, expected, rounding(entry, loaded))
    difference = (found - expected).abs().max().item()
    change = (logits(entry, base.eval()) - expected).abs().max().item()
    assert change > 1e-2
    return loaded, difference


@pytest.mark.parametrize("k", [0, 1, RANK // 2, RANK])
@pytest.mark.parametrize("entry", FAMILIES, ids=ids)
def test_families(entry, k, tmp_path, figure):
    """All modules use one rank and one scale, without rank_pattern or alpha_pattern."""
    base = entry.build()
    model = patched(base, RANK, k)
    rank = rasa_ext.export_lora(model, tmp_path)
    assert rank == max(adapter.d.numel() for adapter in adapters(model).values())
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    expected = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "lora_dropout": 0}
    expected |= {"use_rslora": False, "bias": "none", "fan_in_fan_out": entry is GPT2}
    assert {key: config[key] for key in expected} == expected
    assert not any(config.get(key) for key in ("rank_pattern", "alpha_pattern", "use_dora"))
    assert isinstance(config["target_modules"], list)
    loaded, difference = assert_same_in_peft(entry, base, model, tmp_path)
    adapted = {n for n, m in loaded.base_model.model.named_modules() if hasattr(m, "lora_A")}
    assert adapted == adapted_layers(model).keys()
    figure(f"LoRA of {entry.name} k={k} in PEFT: largest difference of logits {difference:.1e}")


@pytest.mark.parametrize(
    ("entry", "options"),
    [
        (LLAMA, {"target_modules": ["q_proj", "lm_head"]}),
        (LLAMA, {"exclude_modules": ["layers.1.self_attn.q_proj"]}),
        (LLAMA, {"target_modules": r"model\.layers\.2\..*proj"}),
        (BERT, {"target_modules": ["attention.output.dense"]}),
        (BERT, {"target_modules": ["pooler.dense"]}),
        (BERT, {"exclude_modules": ["pooler.dense"]}),
        (T5, {"target_modules": r"decoder\..*\.(q|v)"}),
        (T5, {"target_modules": ["EncDecAttention.o"]}),
        (GPT2, {"target_modules": ["attn.c_proj"]}),
        (VIT, {"modules_to_save": ["classifier"]}),
        (BERT, {"modules_to_save": ["pooler", "classifier"]}),
    ],
    ids=lambda value: value.name if isinstance(value, Entry) else str(value),
)
def test_any_choice_of_layers(entry, options, tmp_path):
    base = entry.build()
    model = patched(base, RANK, 1, **options)
    with torch.no_grad():
        for name in options.get("modules_to_save", ()):
            module = model.get_submodule("bert.pooler" if name == "pooler" else name)
            for parameter in module.parameters():
                parameter.add_(0.5)
    rasa_ext.export_lora(model, tmp_path, allow_dropped=True)
    assert_same_in_peft(entry, base, model, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    trained = [name.rpartition(".")[2] for name in config["modules_to_save"] or ()]
    assert sorted(trained) == sorted(options.get("modules_to_save", ()))


def test_export_leaves_the_model_alone_and_may_follow_a_merge(tmp_path):
    model = patched(LLAMA.build())
    rasa_ext.export_lora(model, tmp_path / "before")
    rasa_ext.merge(model)
    rasa_ext.export_lora(model, tmp_path / "after")
    assert content(tmp_path / "before") == content(tmp_path / "after")
    assert all(layer.merged for layer in adapted_layers(model).values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_base_exports_in_float32(dtype, tmp_path):
    model = patched(LLAMA.build().to(dtype))
    rasa_ext.export_lora(model, tmp_path)
    assert {tensor.dtype for tensor in read(tmp_path)[1].values()} == {torch.float32}
    written = changes_in(tmp_path)
    for name, dW in rasa_ext.delta_weights(model):
        torch.testing.assert_close(written[name].float(), dW)


@pytest.mark.parametrize("targets", ["all-linear", ["linear2"]], ids=str)
def test_the_fast_path_of_torchs_encoder_in_peft_is_warned_of(targets, tmp_path):
    """In eval mode the fast path skips PEFT's adapter, until the fast path is disabled."""
    base = ENCODER.build().eval()
    model = patched(base, target_modules=targets)
    said = "skips the adapters.*set_fastpath_enabled.*merge_and_unload"
    with pytest.warns(UserWarning, match=said):
        rasa_ext.export_lora(model, tmp_path)
    expected, plain = logits(ENCODER, model.eval()), logits(ENCODER, base)
    loaded = load_in_peft(base, tmp_path)
    torch.testing.assert_close(logits(ENCODER, loaded), plain)
    assert (plain - expected).abs().max() > 1e-2
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        torch.testing.assert_close(logits(ENCODER, loaded), expected)
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


def test_an_encoder_without_a_fast_path_is_not_warned_of(tmp_path, recwarn):
    layer = nn.TransformerEncoderLayer(16, 4, 24, activation=nn.Tanh(), batch_first=True)
    rasa_ext.export_lora(patched(nn.TransformerEncoder(layer, 2)), tmp_path)
    assert not [w for w in recwarn if "fast path" in str(w.message)]


@pytest.mark.parametrize("entry", [TIED_LLAMA, GPT2, T5], ids=ids)
@pytest.mark.parametrize("named", ["input", "output"])
@pytest.mark.filterwarnings("ignore:.*tie", "ignore:.*key 'modules_to_save'")
def test_trained_ties(entry, named, tmp_path):
    """Training one module changes the tied one; PEFT copies both, from either kind of file."""
    import rasa_ext.peft  # PEFT then reads the adapter, too

    base = entry.build()
    table = getattr(base, f"get_{named}_embeddings")()
    name = next(name for name, module in base.named_modules() if module is table)
    model = patched(base, modules_to_save=[name])
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(1.5)
    rasa_ext.export_lora(model, tmp_path / "lora")
    rasa_ext.save_adapter(model, tmp_path / "adapter")
    expected = logits(entry, model)
    for folder in ("lora", "adapter"):
        found = logits(entry, PeftModel.from_pretrained(entry.build(), tmp_path / folder))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    fresh = entry.build()
    rasa_ext.import_lora(fresh, tmp_path / "lora")
    torch.testing.assert_close(logits(entry, fresh), expected, rtol=1e-4, atol=1e-4)


def test_what_was_unfrozen_by_hand_is_refused(tmp_path):
    model = patched(LLAMA.build())
    model.model.norm.weight.requires_grad_(True)
    for call in (
        lambda: rasa_ext.export_lora(model, tmp_path / "lora"),
        lambda: rasa_ext.export_size(model),
        lambda: rasa_ext.export_error(model, 2),
    ):
        refused(call, model, r"model: .*model\.norm\.weight .*modules_to_save .*merge_and_unload")
    assert not [*tmp_path.iterdir()]


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


TRAINED_ROWS = [
    (LLAMA, IDS),
    (LLAMA, {"embed_tokens": IDS, "lm_head": [1, 5]}),
    (GPT2, IDS),
    (T5, IDS),
    (BERT, IDS),
    (GEMMA, [*IDS, 0]),
]


@pytest.mark.parametrize(("entry", "given"), TRAINED_ROWS)
@pytest.mark.filterwarnings("ignore:groups")
def test_peft_computes_with_trained_rows(entry, given, tmp_path):
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
