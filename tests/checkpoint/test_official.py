"""Checkpoints of the official RaSA code."""

import copy
import io
import json
import os
import re
import zipfile

import pytest
import torch
from torch import nn

import rasa_ext
from tests.helpers import experts, oracle
from tests.helpers.adapter_folders import edit, not_loaded
from tests.helpers.adapters import (
    RANK,
    adapted_layers,
    adapters,
    assert_matches_oracle,
    observe,
    patched,
    same_adapters,
    trainable_copies,
)
from tests.helpers.models import LLAMA
from tests.helpers.refusals import refused

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def write(directory, k=1, targets=ALL, change=lambda tensors: None, **options):
    """Write a checkpoint with nonzero adapters; return the adapters by layer."""
    found = trainable_copies(adapters(patched(LLAMA.build(), RANK, k, target_modules=targets)))
    tensors = oracle.official_tensors(found)
    change(tensors)
    oracle.write_official(
        directory, tensors, rank=RANK, k=k, alpha=8, target_modules=targets, **options
    )
    return found


@pytest.mark.parametrize("pickled", [False, True])
@pytest.mark.parametrize("targets", [ALL, ["q_proj", "down_proj"]], ids=len)
@pytest.mark.parametrize("k", [1, RANK // 2, RANK])
def test_load(k, targets, pickled, tmp_path):
    """All tensors are loaded; logits and gradients match the official formula."""
    found = write(tmp_path, k, targets, pickled=pickled)
    base = LLAMA.build()
    model = copy.deepcopy(base)
    assert rasa_ext.load_official(model, tmp_path) is model
    assert adapters(model).keys() == found.keys()
    for name, adapter in adapters(model).items():
        for field in ("A", "A_pool", "B", "B_pool", "d"):
            assert torch.equal(getattr(adapter, field), getattr(found[name], field))
    model.eval()  # turn off the checkpoint's dropout
    observed = observe(model, adapters(model), LLAMA, LLAMA.inputs(0))
    assert_matches_oracle(LLAMA, base, model, observed, LLAMA.inputs(0))


def test_the_config_is_taken_over(tmp_path):
    write(tmp_path, k=2)
    model = rasa_ext.load_official(LLAMA.build(), tmp_path)
    layer = model.model.layers[0].mlp.up_proj
    assert layer.A.shape[0] == RANK - 2
    assert layer.config.dropout == 0.05
    rasa_ext.save_adapter(model, tmp_path / "ours")
    config = json.loads((tmp_path / "ours" / "adapter_config.json").read_text())
    official = json.loads((tmp_path / "adapter_config.json").read_text())
    for field in ("peft_type", "r", "rasa_k", "rasa_alpha", "rasa_dropout", "bias"):
        assert config[field] == official[field]
    assert sorted(config["target_modules"]) == sorted(official["target_modules"])
    assert same_adapters(rasa_ext.load_adapter(LLAMA.build(), tmp_path / "ours"), model)


def test_half_precision_checkpoints_become_float32(tmp_path):
    def halve(tensors):
        tensors.update({key: value.bfloat16() for key, value in tensors.items()})

    found = write(tmp_path, change=halve)
    model = rasa_ext.load_official(LLAMA.build().bfloat16(), tmp_path)
    for name, layer in adapted_layers(model).items():
        assert layer.A.dtype == torch.float32
        assert torch.equal(layer.A, found[name].A.bfloat16().float())


BIN = "adapter_model.bin"
LAYER = "base_model.model.model.layers.1.mlp.up_proj.rasa_"
POOL = "base_model.rasa_shared_A.mlp__up_proj.weight"


def _tensors(change):
    """Write what ``change`` makes of the tensors."""

    def damage(folder):
        tensors = torch.load(folder / BIN, weights_only=True)
        torch.save(change(tensors), folder / BIN)

    return damage


def _drop(key):
    return _tensors(lambda tensors: {k: t for k, t in tensors.items() if k != key})


def _put(key, change=lambda tensor: torch.zeros(2)):
    return _tensors(lambda tensors: {**tensors, key: change(tensors.get(key))})


def _bytes(change):
    return lambda folder: (folder / BIN).write_bytes(change((folder / BIN).read_bytes()))


def _flipped(whole):
    """Flip a bit of the first tensor, which the zip's checksum covers."""
    first = next(iter(torch.load(io.BytesIO(whole)).values())).numpy().tobytes()
    return whole.replace(first, bytes([first[0] ^ 1]) + first[1:], 1)


def _config(**fields):
    return lambda folder: edit(folder, **fields)


REFUSED, OTHER = f"{BIN}: refused", f"{BIN}: expected a dictionary of tensors"
DENSE = rf"{BIN}: expected dense tensors .*{re.escape(POOL)}"


DAMAGES = [
    (_drop(f"{LAYER}mixing.weight"), f"1 missing: {LAYER}mixing.weight"),
    (_drop(POOL), f"1 missing: {POOL}"),
    (_put("base_model.model.model.layers.9.mlp.up_proj.rasa_A.weight"), "layers.9"),
    (_put("base_model.rasa_shared_A.nothing.weight"), "nothing"),
    (_put("stray"), "stray"),
    (_put(f"{LAYER}B.weight", lambda t: t[1:].clone()), rf"{LAYER}B.weight \(.*\(39, 3\)"),
    (_put(POOL, lambda t: t[1:].clone()), rf"{POOL} \(.*\(2, 24\)"),
    (_put(POOL, lambda t: t.to_sparse()), DENSE),
    (_put(POOL, lambda t: t.to("meta")), DENSE),
    (_put(POOL, lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8)), DENSE),
    (_put(POOL, lambda t: torch.zeros(()).expand(1 << 40)), DENSE),
    (_tensors(lambda t: [1, 2]), OTHER),
    (_tensors(lambda t: {"a": "text"}), OTHER),
    (_tensors(lambda t: torch.zeros(2)), OTHER),
    (_bytes(lambda whole: b""), REFUSED),
    (_bytes(lambda whole: b"not a pickle"), REFUSED),
    (_bytes(lambda whole: b"PK\x03\x04 not a zip"), REFUSED),
    (_bytes(lambda whole: whole[: len(whole) // 2]), REFUSED),
    (_bytes(_flipped), REFUSED),
    (_config(bias="lora_only"), "bias.*lora_only"),
    (_config(layers_to_transform=[0, 1]), "layers_to_transform"),
    (_config(r=None), r"\br\b"),
    (_config(rasa_k=RANK + 1), r"\bk\b"),
    (_config(target_modules=["no_such"]), "no_such"),
]


@pytest.mark.parametrize(("damage", "said"), DAMAGES)
def test_what_is_refused(damage, said, tmp_path):
    """The error names tensors as the file does."""
    write(tmp_path, pickled=True)
    damage(tmp_path)
    not_loaded(rasa_ext.load_official, LLAMA.build(), tmp_path, said)


class Runs:
    """An object that runs a function when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("inside", ["a dictionary", "the file"])
def test_a_pickle_that_runs_code_is_refused(inside, tmp_path):
    directory, trap = tmp_path / "adapter", tmp_path / "ran"
    write(directory, pickled=True)
    file = directory / "adapter_model.bin"
    tensors = torch.load(file, weights_only=True)
    torch.save({**tensors, "extra": Runs(trap)} if inside == "a dictionary" else Runs(trap), file)
    said = r"adapter_model\.bin: refused.* could run code"
    not_loaded(rasa_ext.load_official, LLAMA.build(), directory, said)
    assert not trap.exists()
    torch.load(file, weights_only=False)
    assert trap.exists()  # the trap works without the refusal


@pytest.mark.parametrize("kind", ["compressed", "overlap"])
def test_a_file_that_takes_more_memory_than_disk_is_refused_unread(kind, tmp_path, monkeypatch):
    write(tmp_path, pickled=True)
    file, how = tmp_path / "adapter_model.bin", zipfile.ZIP_STORED
    with zipfile.ZipFile(file) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    if kind == "compressed":
        how = zipfile.ZIP_DEFLATED
    with zipfile.ZipFile(file, "w", how) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
        if kind == "overlap":
            archive.filelist += archive.filelist
    monkeypatch.setattr(torch, "load", None)
    not_loaded(rasa_ext.load_official, LLAMA.build(), tmp_path, f"{file.name}: refused.*{kind}")


def test_into_a_patched_model(tmp_path):
    write(tmp_path)
    model = rasa_ext.load_official(LLAMA.build(), tmp_path)
    same = copy.deepcopy(model)
    for parameter in rasa_ext.adapter_parameters(same):
        nn.init.zeros_(parameter)
    assert same_adapters(rasa_ext.load_official(same, tmp_path), model)
    not_loaded(rasa_ext.load_official, patched(LLAMA.build(), RANK, 2), tmp_path, "k: 2, 1")


def test_single_experts_over_a_model_that_stacks_them(tmp_path):
    """transformers 4 had a layer for each expert; the error names a package for such files."""
    layer = "model.layers.0.block_sparse_moe.experts.0.w1"
    adapter = oracle.Adapter(*(torch.zeros(2, 2) for _ in range(4)), torch.zeros(4))
    tensors = oracle.official_tensors({layer: adapter})
    oracle.write_official(tmp_path, tensors, rank=RANK, k=1, alpha=8, target_modules=["w1"])
    said = r"layers\.0\.mlp\.experts\.gate_up_proj'; load_official_experts of rasa_r"
    not_loaded(rasa_ext.load_official, experts.model("mixtral"), tmp_path, said)


def test_a_pool_that_two_groups_would_share(tmp_path):
    """The official format has one pool for all layers with the same name."""
    blocks = [nn.ModuleDict({"proj": nn.Linear(8, out)}) for out in (8, 8, 6, 6)]
    model = nn.ModuleDict({"layers": nn.ModuleList(blocks)})
    found = {"layers.0.proj": adapters(patched(model, RANK, 1))["layers.0.proj"]}
    tensors = oracle.official_tensors(found)
    oracle.write_official(tmp_path, tensors, rank=RANK, k=1, alpha=8, target_modules=["proj"])
    said = "rasa_shared_A.proj.weight would be the pool of several groups"
    refused(lambda: rasa_ext.load_official(model, tmp_path), model, said)
