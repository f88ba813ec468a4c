"""Exported LoRAs, read by the rules of vLLM, SGLang and llama.cpp in serving_rules.py."""

from __future__ import annotations

import copy

import pytest
import torch

import rasa_ext
from rasa_ext.checkpoint import serving
from tests.helpers import oracle
from tests.helpers.adapters import RANK, adapters, patched
from tests.helpers.models import GPT2, LLAMA, TIED_LLAMA
from tests.helpers.serving_rules import READERS, VLLM_RANKS, Refused, read

BASE = LLAMA.build()


def export(directory, model=None, **options):
    rasa_ext.export_lora(patched(BASE) if model is None else model, directory, **options)
    return read(directory)


def assert_read(reader, config, tensors, limit, model):
    """Check that a reader with this rank limit computes the model's weight changes."""
    found, expected = READERS[reader](config, tensors, BASE, limit), adapters(model)
    assert found.keys() == expected.keys()
    for name, delta in found.items():
        assert delta.dtype == torch.float32
        torch.testing.assert_close(
            delta.double(), oracle.delta(expected[name]), rtol=1e-5, atol=1e-6
        )


OPTIONS = {
    **{f"k={k}": {"k": k} for k in (0, 1, RANK)},
    # Layers in smaller groups have a lower effective rank.
    "several ranks": {"k": 2, "exclude_modules": ["layers.1.mlp.down_proj"]},
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_every_reader_computes_the_adapter(reader, options, tmp_path):
    model = patched(BASE, RANK, **options)
    ranks = {adapter.d.numel() for adapter in adapters(model).values()}
    assert len(ranks) == 1 + ("exclude_modules" in options)
    config, tensors = export(tmp_path, model)
    limit = next(rank for rank in VLLM_RANKS if rank >= config["r"])
    assert_read(reader, config, tensors, limit, model)


@pytest.mark.parametrize("bucket", [rank for rank in VLLM_RANKS if rank >= 8])
def test_padding_to_every_rank_bucket(bucket, tmp_path):
    model = patched(BASE)
    config, tensors = export(tmp_path, model, rank=bucket)
    assert config["r"] == bucket
    for reader in READERS:
        assert_read(reader, config, tensors, bucket, model)


def test_the_command_knows_the_rank_buckets():
    assert serving.VLLM_RANKS == VLLM_RANKS


NO_SERVER = "save what rasa_ext.merge_and_unload"


@pytest.mark.parametrize(
    ("model", "readers", "warning"),
    [
        (lambda: patched(GPT2.build()), ["vllm"], f"Conv1D .* vLLM cannot.*{NO_SERVER}"),
        (
            lambda: patched(BASE, modules_to_save=["lm_head"]),
            ["vllm", "llama.cpp", "sglang"],
            rf"modules_to_save \(lm_head\), .*{NO_SERVER}",
        ),
        (
            lambda: patched(BASE, target_modules=["q_proj", "o_proj"]),
            ["sglang"],
            rf"q_proj is adapted without v_proj in 3 layers\. SGLang.*{NO_SERVER}",
        ),
        (
            lambda: patched(TIED_LLAMA.build(), target_modules=["q_proj", "v_proj", "lm_head"]),
            ["llama.cpp"],
            "lm_head is tied to the embedding, and llama.cpp refuses",
        ),
    ],
    ids=["Conv1D", "modules_to_save", "q alone", "tied head"],
)
def test_what_a_reader_refuses_is_warned_of(model, readers, warning, tmp_path):
    model = model()
    with pytest.warns(UserWarning, match=warning):
        config, tensors = export(tmp_path, model)
    for reader in readers:
        with pytest.raises(Refused):
            READERS[reader](config, tensors, rasa_ext.unpatch(copy.deepcopy(model)), 16)


DROPPED = {
    "final norm": (
        "llama.cpp",
        {"modules_to_save": ["norm"]},
        r"llama\.cpp reads the trained norms of modules_to_save \(model\.norm\.weight\)",
    ),
    "norms of layers": (
        "llama.cpp",
        {"modules_to_save": ["input_layernorm", "lm_head"]},
        r"\(model\.layers\.0\.input_layernorm\.weight, .*\) but leaves them out",
    ),
    "k, v without q": (
        "sglang",
        {"target_modules": ["k_proj", "v_proj"]},
        "k_proj is adapted without q_proj in 3 layers, and SGLang",
    ),
    "v without q": (
        "sglang",
        {"target_modules": ["v_proj", "o_proj"]},
        "v_proj is adapted without q_proj .* leaves v_proj out",
    ),
    "up without gate": (
        "sglang",
        {"target_modules": ["up_proj", "o_proj"]},
        "up_proj is adapted without gate_proj",
    ),
}


@pytest.mark.parametrize("case", DROPPED)
def test_what_a_reader_would_drop_is_not_written_unless_asked(case, tmp_path):
    """The reader would load the folder but silently apply only a part of the adapter."""
    reader, options, message = DROPPED[case]
    model = patched(BASE, **options)
    with pytest.raises(ValueError, match=f"{message}.*{NO_SERVER}.*allow_dropped=True"):
        rasa_ext.export_lora(model, tmp_path)
    assert not [*tmp_path.iterdir()]
    with pytest.warns(UserWarning, match=f"{message}.*{NO_SERVER}"):
        config, tensors = export(tmp_path, model, allow_dropped=True)
    factors = sum(".lora_" in key for key in tensors)
    assert factors == 2 * len(adapters(model))
    if "lm_head" not in options.get("modules_to_save", ()):  # llama.cpp refuses a trained head
        found = READERS[reader](config, tensors, BASE, 16)
        assert 2 * len(found) < len(tensors)


@pytest.mark.parametrize(
    "targets",
    [
        "all-linear",
        ["q_proj", "v_proj"],
        ["q_proj", "k_proj", "v_proj"],
        ["gate_proj"],
        ["down_proj"],
    ],
    ids=str,
)
def test_what_every_reader_takes_is_not_warned_of(targets, tmp_path, recwarn):
    model = patched(BASE, target_modules=targets)
    config, tensors = export(tmp_path, model)
    assert not [w for w in recwarn if issubclass(w.category, UserWarning)]
    for reader in READERS.values():
        assert reader(config, tensors, BASE, 16)


@pytest.mark.parametrize(
    ("reader", "change"),
    [
        *(("vllm", {name: None}) for name in ("r", "lora_alpha", "target_modules")),
        ("vllm", {"use_dora": True}),
        ("vllm", {"bias": "all"}),
        ("vllm", {"modules_to_save": ["norm"]}),
        ("vllm", {"r": 17}),
        ("vllm", {"target_modules": "all-linear"}),
        ("vllm", {"target_modules": ["wq"]}),
        ("sglang", {"peft_type": "RASA"}),
        ("sglang", {"target_modules": "q_proj"}),
        ("sglang", {"r": 8}),
        ("llama.cpp", {"lora_alpha": None}),
    ],
    ids=str,
)
def test_the_rules_refuse_other_configs(reader, change, tmp_path):
    config, tensors = export(tmp_path)
    changed = {key: value for key, value in {**config, **change}.items() if change.get(key, 1)}
    with pytest.raises(Refused):
        READERS[reader](changed, tensors, BASE, 16)


@pytest.mark.parametrize("change", [{"use_rslora": True}, {"lora_alpha": 3}])
@pytest.mark.parametrize("reader", READERS)
def test_the_rules_notice_another_scale(reader, change, tmp_path):
    model = patched(BASE)
    config, tensors = export(tmp_path, model)
    found = READERS[reader]({**config, **change}, tensors, BASE, 16)
    name, adapter = next(iter(adapters(model).items()))
    same = torch.allclose(found[name].double(), oracle.delta(adapter), atol=1e-5)
    assert same == ("use_rslora" in change and reader != "vllm")
