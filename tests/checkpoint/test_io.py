"""Saving and loading: round trips, file sizes, strict checks, damaged files and digests."""

import copy
import functools
import json
import os
import re
import warnings
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

import rasa_ext
import rasa_ext.peft  # PEFT then reads adapters
from rasa_ext.analysis import analyze_adapter
from rasa_ext.checkpoint.files import digest, read_tensors
from rasa_ext.patching import owners
from tests.helpers import experts, oracle
from tests.helpers.adapter_folders import edit, not_loaded, read
from tests.helpers.adapters import (
    RANK,
    adapted_layers,
    adapters,
    content,
    patched,
    same_adapters,
    same_bits,
    same_tensors,
)
from tests.helpers.models import (
    BERT,
    EVERY,
    GPT2,
    LLAMA,
    SEQUENTIAL,
    T5,
    TIED,
    TWO_NAMES,
    ids,
    logits,
    rounding,
)
from tests.helpers.peft_sides import needs_experts
from tests.helpers.refusals import Snapshot, refused
from tests.helpers.trained_tokens import IDS, TABLES, with_moved_rows

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@pytest.mark.parametrize("k", [0, 1, RANK])
@pytest.mark.parametrize("entry", EVERY, ids=ids)
def test_round_trip(entry, k, tmp_path):
    """The file holds a header and each number once, in 4 bytes, under the documented names."""
    base = entry.build()
    model = patched(base, RANK, k, dropout=0.1, alpha=3.0)
    rasa_ext.save_adapter(model, tmp_path)
    assert sorted(content(tmp_path)) == ["README.md", CONFIG, WEIGHTS]
    assert "rasa_experts" not in json.loads((tmp_path / CONFIG).read_text())
    expected, pools = {}, set()
    for name, adapter in adapters(model).items():
        prefix = f"base_model.model.{name}.rasa_"
        expected |= {f"{prefix}{field}": getattr(adapter, field) for field in ("A", "B", "d")}
        if k and id(adapter.A_pool) not in pools:
            pools.add(id(adapter.A_pool))
            expected |= {f"{prefix}pool_A": adapter.A_pool, f"{prefix}pool_B": adapter.B_pool}
    tensors = load_file(tmp_path / WEIGHTS)
    assert tensors.keys() == expected.keys()
    assert all(same_bits(tensors[key], value.detach()) for key, value in expected.items())
    file = (tmp_path / WEIGHTS).read_bytes()
    numbers = sum(p.numel() for p in rasa_ext.adapter_parameters(model))
    assert len(file) == 4 * numbers + 8 + int.from_bytes(file[:8], "little")
    assert rasa_ext.load_adapter(base, tmp_path) is base
    assert same_adapters(model, base)
    assert {p.requires_grad for p in rasa_ext.adapter_parameters(base)} == {True}
    assert {layer.config.dropout for layer in adapted_layers(base).values()} == {0.1}
    assert torch.equal(logits(entry, model), logits(entry, base))


def mixture(grouping="slot"):
    return experts.patched(experts.model(), grouping)


EXPERTS = [(family, "shared", 1) for family in experts.FAMILIES]
EXPERTS += [("mixtral", grouping, k) for grouping in experts.GROUPINGS for k in (0, 1, 3)]
OPTIONS = {"target_modules": "all-linear", "exclude_modules": ("shared_expert_gate",)}
ADAPTED = [(LLAMA, patched)]
ADAPTED += [
    (experts.entry(family), lambda base, g=g, k=k: experts.patched(base, g, 3, k, **OPTIONS))
    for family, g, k in EXPERTS
]

ROWS = [LLAMA, GPT2, T5, BERT, TIED]
ADAPTED += [(entry, lambda base, entry=entry: with_moved_rows(entry)) for entry in ROWS]
NAMES = ["llama", *(f"{f}-{g}-{k}" for f, g, k in EXPERTS), *(f"{e.name}-rows" for e in ROWS)]


@pytest.mark.filterwarnings("ignore:groups")
@pytest.mark.parametrize(("entry", "adapt"), ADAPTED, ids=NAMES)
def test_loading_into_a_base_or_over_an_adapter(entry, adapt, tmp_path):
    model = adapt(entry.build())
    rasa_ext.save_adapter(model, tmp_path)
    same = copy.deepcopy(model)  # which shares no tensors with the original
    identities = [id(p) for p in same.parameters()]
    with torch.no_grad():
        for parameter in rasa_ext.adapter_parameters(same):
            parameter.normal_()
        logits(entry, same)  # caches packs of the old adapter
    expected = logits(entry, model)
    for other in (entry.build(), same):
        loaded = rasa_ext.load_adapter(other, tmp_path)
        assert same_adapters(loaded, model)
        assert torch.equal(logits(entry, loaded), expected)
    assert [id(p) for p in same.parameters()] == identities


def tied_rows(given=IDS):
    return with_moved_rows(TIED, given)


def smaller():
    model = TIED.build()
    model.embed = nn.Embedding(30, 12)
    return model


def untied():
    model = TIED.build()
    model.readout.weight = nn.Parameter(model.embed.weight + 1)
    return patched(model, modules_to_save=["embed", "readout"])


OTHERS = [
    (lambda: patched(LLAMA.build()), lambda: patched(LLAMA.build(), 4, 2), r"k: 2, 1.*unpatch"),
    (mixture, lambda: mixture("shared"), "experts: 'shared', 'slot'"),
    (mixture, lambda: experts.model(num_local_experts=6), r"gate_up_proj\.rasa_"),
    (tied_rows, lambda: tied_rows([1, 2]), r"differs .* trainable_token_indices"),
    (tied_rows, smaller, "trainable_token_indices: expected indices below 30"),
    (untied, TIED.build, "embed.weight.*readout.weight"),
]


@pytest.mark.parametrize(("adapted", "other", "said"), OTHERS)
def test_another_adapter_or_model(adapted, other, said, tmp_path):
    rasa_ext.save_adapter(adapted(), tmp_path)
    not_loaded(rasa_ext.load_adapter, other(), tmp_path, said)


@pytest.mark.parametrize("entry", ROWS, ids=ids)
@pytest.mark.filterwarnings("ignore:groups")
def test_trained_rows_are_written_once_under_their_owner(entry, tmp_path):
    model, owner = with_moved_rows(entry), TABLES[entry.name][0]
    rasa_ext.save_adapter(model, tmp_path)
    config, tensors = read(tmp_path)
    assert config["trainable_token_indices"] == IDS
    rows = tensors[f"base_model.model.{owner}.token_adapter.trainable_tokens_delta"]
    assert same_bits(rows, model.get_submodule(owner).rows.detach())
    assert not [key for key in tensors if key.endswith("embed.weight")]


@pytest.mark.parametrize("named", [["embed"], ["readout"], ["embed", "readout"]], ids=str)
def test_tied_modules_to_save_are_written_under_both_names(named, tmp_path):
    """The weight is trained under both names, and PEFT unties what it copies."""
    model = patched(TIED.build(), RANK, 1, modules_to_save=named)
    assert set(rasa_ext.summary(model).modules_to_save) == {"embed", "readout"}
    with torch.no_grad():
        model.embed.weight.mul_(2)
    rasa_ext.save_adapter(model, tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    for name in ("embed", "readout"):
        assert torch.equal(tensors[f"base_model.model.{name}.weight"], model.embed.weight)
    for other in (TIED.build(), patched(TIED.build(), RANK, 1, modules_to_save=["readout"])):
        fresh = rasa_ext.load_adapter(other, tmp_path)
        assert fresh.embed.weight is fresh.readout.weight
        assert same_adapters(model, fresh)


@pytest.mark.parametrize("left_out", ["embed", "readout"])
def test_a_file_that_holds_a_tied_weight_under_one_name(left_out, tmp_path):
    """Files of earlier versions are so."""
    model = patched(TIED.build(), modules_to_save=[left_out])
    with torch.no_grad():
        model.embed.weight.mul_(2)
    rasa_ext.save_adapter(model, tmp_path)
    _edit(lambda t: t.pop(f"base_model.model.{left_out}.weight"))(tmp_path)
    loaded = rasa_ext.load_adapter(TIED.build(), tmp_path)
    assert torch.equal(loaded.embed.weight, model.embed.weight)
    assert loaded.readout.weight is loaded.embed.weight


def unfrozen(entry, kinds, seed=0):
    """Return a patched model, with moved values in parameters that were unfrozen by hand."""
    model = patched(entry.build())
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if re.search(kinds, name):
                noise = torch.rand(parameter.shape, generator=generator)
                parameter.requires_grad_(True).add_(noise)
    return model


BY_HAND = [(LLAMA, "norm"), (GPT2, "bias"), (BERT, "LayerNorm|bias"), (TIED, "embed"), (LLAMA, "")]


@pytest.mark.parametrize(("entry", "kinds"), BY_HAND, ids=lambda each: getattr(each, "name", each))
def test_what_was_unfrozen_by_hand(entry, kinds, tmp_path):
    """It is saved, also in adapted layers, and loaded into a base as into a patched model."""
    model = unfrozen(entry, kinds)
    rasa_ext.save_adapter(model, tmp_path)
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    for other in (entry.build(), patched(entry.build()), unfrozen(entry, kinds, seed=1)):
        loaded = rasa_ext.load_adapter(other, tmp_path)
        assert {name: p.requires_grad for name, p in loaded.named_parameters()} == flags
        assert same_adapters(loaded, model)
    read = PeftModel.from_pretrained(entry.build(), tmp_path)
    error = rounding(entry, rasa_ext.merge_and_unload(copy.deepcopy(model)))
    oracle.assert_close(logits(entry, read), logits(entry, model), error)


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD])
def test_what_was_trained_by_hand_and_frozen_before_saving(kind, tmp_path):
    """Code for evaluation freezes whole models. What was trained before patching is the base's."""
    base = LLAMA.build()
    train(base, base.model.layers[0].parameters(), kind)
    plain = copy.deepcopy(base)
    base.zero_grad()
    model = rasa_ext.patch_model(base, RANK, 1)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter.requires_grad or "norm" in name)
    train(model, model.parameters(), kind)
    model.requires_grad_(False)
    rasa_ext.save_adapter(model, tmp_path)
    assert {"norm" in key or "rasa" in key for key in read(tmp_path)[1]} == {True}
    assert same_adapters(rasa_ext.load_adapter(plain, tmp_path), model)


def train(model, parameters, kind):
    optimizer = kind(list(parameters), lr=0.1)
    LLAMA.loss(model.train(), LLAMA.inputs(0))[1].backward()
    optimizer.step()


def test_an_adapter_leaves_what_it_brought_when_another_comes_or_it_goes(tmp_path):
    base, one, two = LLAMA.build(), unfrozen(LLAMA, "norm"), patched(LLAMA.build(), seed=4)
    rasa_ext.save_adapter(one, tmp_path / "one")
    rasa_ext.save_adapter(two, tmp_path / "two")
    model = rasa_ext.load_adapter(LLAMA.build(), tmp_path / "one")
    assert same_adapters(model, one)
    assert same_adapters(rasa_ext.load_adapter(model, tmp_path / "two"), two)
    assert same_adapters(rasa_ext.load_adapter(model, tmp_path / "one"), one)
    assert same_tensors(rasa_ext.unpatch(model).state_dict(), base.state_dict())
    assert all(p.requires_grad for p in model.parameters())


def test_an_adapter_without_them_loads_beside_what_was_unfrozen_by_hand(tmp_path):
    rasa_ext.save_adapter(patched(LLAMA.build()), tmp_path)
    model = unfrozen(LLAMA, "norm")
    before = model.model.norm.weight.clone()
    assert torch.equal(rasa_ext.load_adapter(model, tmp_path).model.norm.weight, before)


def test_unfrozen_weights_of_merged_layers_are_refused(tmp_path):
    model = unfrozen(LLAMA, "q_proj.base_layer.weight")
    rasa_ext.save_adapter(model, tmp_path / "free")
    rasa_ext.merge(model)
    said = r"model: .*q_proj\.base_layer\.weight was unfrozen .*rasa_ext\.unmerge"
    refused(lambda: rasa_ext.save_adapter(model, tmp_path / "no"), model, said, kind=RuntimeError)
    rasa_ext.unmerge(model)
    rasa_ext.save_adapter(model, tmp_path / "again")
    assert content(tmp_path / "free") == content(tmp_path / "again")


@pytest.mark.parametrize(
    "make",
    [lambda: patched(LLAMA.build()), lambda: patched(TWO_NAMES.build()), tied_rows],
    ids=["llama", "two names", "rows"],
)
def test_saving_while_merged(make, tmp_path):
    model = make()
    rasa_ext.save_adapter(model, tmp_path / "free")
    rasa_ext.merge(model)
    rasa_ext.save_adapter(model, tmp_path / "merged")
    assert content(tmp_path / "free") == content(tmp_path / "merged")
    load = functools.partial(rasa_ext.load_adapter, model, tmp_path / "free")
    refused(load, model, "unmerge", kind=RuntimeError)


def _edit(change):
    def edit(directory):
        tensors = load_file(directory / WEIGHTS)
        change(tensors)
        save_file(tensors, directory / WEIGHTS)

    return edit


def _config(**values):
    return lambda directory: edit(directory, **values)


KEY = "base_model.model.model.layers.1.self_attn.k_proj.rasa_"
FIRST = "base_model.model.model.layers.0.self_attn.k_proj.rasa_pool_"
CUT = "{}: damaged or cut.* use a complete copy of it, or an earlier checkpoint"


DAMAGES = [
    (_edit(lambda t: t.pop(f"{KEY}A")), rf"missing: {KEY}A"),
    (_edit(lambda t: t.pop(f"{FIRST}B")), rf"missing: {FIRST}B"),
    (_edit(lambda t: t.pop("base_model.model.lm_head.weight")), "missing.*lm_head"),
    (_edit(lambda t: t.update(stray=torch.zeros(1))), "unexpected: stray"),
    (_edit(lambda t: t.update({f"{KEY}d": torch.zeros(9)})), rf"{KEY}d .*\(6,\).*\(9,\)"),
    (
        _edit(lambda t: t.update({f"{KEY}B": t[f"{KEY}B"].T.contiguous()})),
        rf"{KEY}B \(expected \(12, 3\), got \(3, 12\)\)",
    ),
    (lambda d: (d / WEIGHTS).write_bytes(b"12345678 nonsense"), CUT.format(WEIGHTS)),
    (lambda d: os.truncate(d / WEIGHTS, 700), CUT.format(WEIGHTS)),
    (lambda d: torch.save({"weight": nn.Linear(2, 2)}, d / WEIGHTS), CUT.format(WEIGHTS)),
    (lambda d: (d / CONFIG).write_text("{"), CUT.format(CONFIG)),
    (lambda d: (d / CONFIG).write_text("[" * 100_000), CUT.format(CONFIG)),
    (lambda d: (d / CONFIG).write_text("[]"), rf"{CONFIG}.*object"),
    (lambda d: (d / CONFIG).write_text('{"model_type": "llama"}'), "peft_type.*got none"),
    (_config(r=0), "rank.*0"),
    (_config(r=None), r"\br\b"),
    (_config(rasa_dropout=7), "dropout.*7"),
    (lambda d: (d / WEIGHTS).unlink(), WEIGHTS),
    (lambda d: (d / CONFIG).unlink(), CONFIG),
]


@pytest.mark.parametrize("prepatched", [False, True])
@pytest.mark.parametrize(("damage", "said"), DAMAGES)
def test_damaged_files_are_refused(damage, said, prepatched, tmp_path):
    """The error names the problem, and the model stays unchanged."""
    options = {"target_modules": ["k_proj", "up_proj"], "modules_to_save": ["lm_head"]}
    rasa_ext.save_adapter(patched(LLAMA.build(), seed=1, **options), tmp_path)
    damage(tmp_path)
    model = patched(LLAMA.build(), seed=2, **options) if prepatched else LLAMA.build()
    before = Snapshot(model)
    with pytest.raises((ValueError, FileNotFoundError), match=said):
        rasa_ext.load_adapter(model, tmp_path)
    before.assert_unchanged()


READERS = {
    "adapter": (rasa_ext.save_adapter, lambda d: rasa_ext.load_adapter(SEQUENTIAL.build(), d)),
    "lora": (rasa_ext.export_lora, lambda d: rasa_ext.import_lora(SEQUENTIAL.build(), d)),
    "inspected": (rasa_ext.save_adapter, lambda d: read_tensors(d / WEIGHTS)),
    "analysed": (rasa_ext.save_adapter, analyze_adapter),
}


@pytest.mark.parametrize("reader", READERS)
def test_a_rotten_file_is_refused_by_name(reader, tmp_path):
    """One flipped bit in a number is detected, although names, dtypes and shapes fit."""
    write, read = READERS[reader]
    write(patched(SEQUENTIAL.build()), tmp_path)
    whole = (tmp_path / WEIGHTS).read_bytes()
    start = 8 + int.from_bytes(whole[:8], "little")
    for at in (start, (start + len(whole)) // 2, len(whole) - 1):
        rotten = bytearray(whole)
        rotten[at] ^= 1
        (tmp_path / WEIGHTS).write_bytes(rotten)
        with pytest.raises(ValueError, match=rf"{WEIGHTS}: expected tensors with the SHA-256"):
            read(tmp_path)
    (tmp_path / WEIGHTS).write_bytes(whole)
    read(tmp_path)


DIGESTED = {
    "name": lambda t: t.update(c=t.pop("a")),
    "swapped": lambda t: t.update(a=t["b"], b=t["a"]),
    "dtype": lambda t: t.update(a=t["a"].view(torch.int32)),
    "shape": lambda t: t.update(a=t["a"].view(3, 2)),
    "bytes": lambda t: t.update(a=t["a"].clone().index_fill_(0, torch.tensor(1), 7.0)),
    "missing": lambda t: t.pop("empty"),
}


@pytest.mark.parametrize("change", DIGESTED.values(), ids=DIGESTED)
def test_the_digest_is_of_names_dtypes_shapes_and_bytes(change):
    tensors = {
        "a": torch.arange(6.0).view(2, 3),
        "b": torch.arange(1.0, 7.0).view(2, 3),
        "empty": torch.empty(0, 4),
        "half": torch.ones(3, dtype=torch.bfloat16),
    }
    before = digest(tensors)
    strided = {**tensors, "a": tensors["a"].T.contiguous().T}
    assert digest(dict(reversed(strided.items()))) == before
    change(tensors)
    assert digest(tensors) != before


def test_the_same_adapter_is_the_same_bytes(tmp_path):
    """Files are reproducible, although safetensors writes metadata in random order."""
    model, found = patched(SEQUENTIAL.build()), set()
    for _ in range(12):
        rasa_ext.save_adapter(model, tmp_path)
        found.add((tmp_path / WEIGHTS).read_bytes())
    assert len(found) == 1
    with safe_open(tmp_path / WEIGHTS, framework="pt") as file:
        assert file.metadata() == {"format": "pt", "sha256": digest(load_file(tmp_path / WEIGHTS))}


WRITTEN = Path(__file__).parent / "written"
"""Adapters written while a group's first layer owned the pool: folders of ``save_adapter`` and of
PEFT, and a whole model's state."""
SIZES = {
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": 10,
}
OLD_EXPERTS = ["experts_slot", "experts_layer", "experts_shared", "peft_experts"]
OLD = ["rasa", "pool_only", "lora", "peft"]


def old_base(folder: str) -> nn.Module:
    if folder in OLD_EXPERTS:
        config = MixtralConfig(**SIZES, num_local_experts=2, num_experts_per_tok=1)
        return MixtralForCausalLM(config)
    return LlamaForCausalLM(LlamaConfig(**SIZES))


@pytest.mark.parametrize(
    "folder", [*OLD, *(pytest.param(each, marks=needs_experts) for each in OLD_EXPERTS)]
)
def test_an_adapter_written_before_is_read_and_written_again(folder, tmp_path):
    model = rasa_ext.load_adapter(old_base(folder), WRITTEN / folder)
    written = load_file(WRITTEN / folder / WEIGHTS)
    for name, owner in owners(model):
        for field, tensor in owner.own_tensors().items():
            assert same_bits(tensor, written[f"base_model.model.{name}.rasa_{field}"])
    assert any(".rasa_pool_" in key for key in written) or folder == "lora"
    rasa_ext.save_adapter(model, tmp_path / "ours")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        peft = PeftModel.from_pretrained(old_base(folder), WRITTEN / folder)
    peft.save_pretrained(tmp_path / "peft")
    for name in ("ours", "peft"):
        again = load_file(tmp_path / name / WEIGHTS)
        assert again.keys() == written.keys()
        assert all(same_bits(again[key], written[key]) for key in written)


def test_a_whole_model_written_before_is_read(tmp_path):
    expected = rasa_ext.load_adapter(old_base("rasa"), WRITTEN / "rasa")
    config = rasa_ext.patching.state.patch_state(expected).config
    model = rasa_ext.patch_model(old_base("rasa"), config=config)
    rasa_ext.load_adapter(model, WRITTEN / "whole")
    for found, other in zip(owners(model), owners(expected), strict=True):
        pairs = zip(found[1].adapter().sources(), other[1].adapter().sources(), strict=True)
        assert all(torch.equal(*pair) for pair in pairs)
