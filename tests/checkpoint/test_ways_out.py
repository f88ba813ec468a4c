"""Unexpected files: the error says what the files are and what to do."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import rasa_ext
from rasa_ext.methods import AdapterConfig, LoraConfig
from tests.helpers.adapter_folders import check_large_field, edit
from tests.helpers.adapters import adapters, patched, same_adapters
from tests.helpers.cli import save_official
from tests.helpers.models import LLAMA
from tests.helpers.outside import PickedConfig
from tests.helpers.refusals import refused

WEIGHTS = "adapter_model.safetensors"


def saved(folder: Path) -> Path:
    rasa_ext.save_adapter(patched(LLAMA.build(), 4, 1), folder)
    return folder


def test_a_lora_where_an_adapter_was_expected(tmp_path):
    rasa_ext.export_lora(patched(LLAMA.build(), 4, 1), tmp_path)
    model = LLAMA.build()
    for load in (rasa_ext.load_adapter, rasa_ext.load_official):
        refused(
            lambda load=load: load(model, tmp_path),
            model,
            "expected peft_type 'RASA', got 'LORA'",
            "rasa_ext.import_lora",
            "rasa-ext import-lora",
        )


def test_an_adapter_where_a_lora_was_expected(tmp_path):
    saved(tmp_path)
    model = LLAMA.build()
    refused(
        lambda: rasa_ext.import_lora(model, tmp_path),
        model,
        "got 'RASA'; this is a RaSA adapter already",
        "rasa_ext.load_adapter",
    )


def test_an_official_checkpoint_where_an_adapter_was_expected(tmp_path):
    save_official(patched(LLAMA.build()), tmp_path)
    model = LLAMA.build()
    refused(lambda: rasa_ext.load_adapter(model, tmp_path), model, "rasa_ext.load_official reads")


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.99])
@pytest.mark.parametrize("name", [WEIGHTS, "adapter_config.json"])
def test_a_cut_file(name, share, tmp_path):
    path = saved(tmp_path) / name
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    model = LLAMA.build()
    refused(
        lambda: rasa_ext.load_adapter(model, tmp_path),
        model,
        f"{name}: damaged or cut",
        "use a complete copy of it, or an earlier checkpoint",
    )


LOADERS = {
    "adapter": (rasa_ext.save_adapter, rasa_ext.load_adapter),
    "lora": (rasa_ext.export_lora, rasa_ext.import_lora),
}


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite(value, loader, tmp_path):
    write, read = LOADERS[loader]
    write(patched(LLAMA.build(), 4, 1), tmp_path)
    path = tmp_path / WEIGHTS
    tensors = load_file(path)
    key = next(key for key in tensors if key.endswith(("rasa_B", "lora_B.weight")))
    tensors[key][0, 0] = value
    save_file(tensors, path)
    model = LLAMA.build()
    refused(
        lambda: read(model, tmp_path),
        model,
        f"1 of {len(tensors)} tensors hold NaN or infinity: {key}",
        "earlier checkpoint",
    )


class Masked(nn.Module):
    """A module to save with a mask that holds -inf, like attention masks."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.gate = nn.Linear(4, 4)
        self.gate.register_buffer("mask", torch.full((2, 2), -torch.inf))


def test_a_mask_may_hold_infinity(tmp_path):
    rasa_ext.save_adapter(patched(Masked(), 2, 1, modules_to_save=["gate"]), tmp_path)
    model = rasa_ext.load_adapter(Masked(), tmp_path)
    assert model.gate.mask.isinf().all()


def stack(layers: int) -> nn.Module:
    return nn.Sequential(*(nn.Linear(6, 6) for _ in range(layers)))


@pytest.mark.parametrize(("theirs", "ours"), [(4, 3), (3, 4)])
def test_another_number_of_layers(theirs, ours, tmp_path):
    rasa_ext.save_adapter(patched(stack(theirs), 2, 1), tmp_path)
    model = stack(ours)
    refused(
        lambda: rasa_ext.load_adapter(model, tmp_path),
        model,
        rf"The adapter has {theirs} layers \*, and the model {ours}\.",
        "Load it into the model that it was trained on, named in base_model_name_or_path",
    )


def test_a_file_where_the_folder_was_expected(tmp_path):
    path = saved(tmp_path) / WEIGHTS
    for load in (rasa_ext.load_adapter, rasa_ext.load_official, rasa_ext.import_lora):
        with pytest.raises(FileNotFoundError, match=f"got the file {path}; pass {tmp_path}"):
            load(LLAMA.build(), path)


def test_a_config_of_nothing(tmp_path):
    (saved(tmp_path) / "adapter_config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(ValueError, match=r"got none; check that this is the folder of an adapter"):
        rasa_ext.load_adapter(LLAMA.build(), tmp_path)


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("part", ["model.layers.1", ""], ids=["block", "model"])
def test_weights_that_are_not_in_memory_take_no_adapter(part, loader, tmp_path):
    """accelerate offloads weights to the meta device; copying into them would do nothing."""
    write, read = LOADERS[loader]
    write(patched(LLAMA.build()), tmp_path)
    model = LLAMA.build()
    model.get_submodule(part).to("meta")
    kinds = [type(module) for module in model.modules()]
    with pytest.raises(ValueError, match=r"model: .*layers\.\d.* on the meta device.*device_map"):
        read(model, tmp_path)
    assert [type(module) for module in model.modules()] == kinds


@pytest.mark.parametrize("loader", LOADERS)
def test_an_adapter_that_is_not_in_memory_is_not_written(loader, tmp_path):
    model = patched(LLAMA.build())
    rasa_ext.save_adapter(model, tmp_path / "whole")
    model.model.layers[1].to("meta")
    with pytest.raises(ValueError, match=r"model: .*layers\.1.* on the meta device"):
        LOADERS[loader][0](model, tmp_path / "new")
    assert not (tmp_path / "new").exists()
    with pytest.raises(ValueError, match="on the meta device"):
        rasa_ext.load_adapter(model, tmp_path / "whole")


@pytest.mark.parametrize("place", [1, 3])
def test_a_block_that_was_copied_after_patching(place, tmp_path):
    """The copy has its own pool; an appended copy also has a name that was not planned."""
    model = patched(LLAMA.build())
    blocks, block = model.model.layers, copy.deepcopy(model.model.layers[1])
    if place < len(blocks):
        blocks[place] = block
    else:
        blocks.append(block)
    name = rf"model: .*layers\.{place}\.self_attn\.q_proj' is a copy.*export_lora"
    refused(lambda: rasa_ext.save_adapter(model, tmp_path / "new"), model, name)
    assert not (tmp_path / "new").exists()
    rasa_ext.export_lora(model, tmp_path / "lora")
    written = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    assert sum(key.endswith("lora_A.weight") for key in written) == len(adapters(model))


LARGE = {"r": 10**8, "rasa_k": 10**8, "rank_pattern": {"q_proj": 10**8}}


@pytest.mark.parametrize("field", LARGE)
def test_a_config_of_ranks_that_the_file_has_not(field, tmp_path):
    check_large_field(rasa_ext.RasaConfig(rank=4), field, LARGE[field], tmp_path)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"rasa_train_A": "no"}, "rasa_train_A to be true or false, got 'no'"),
        ({"rank_pattern": [1]}, "rank_pattern to be an object"),
        ({"rank_pattern": {"a": [1]}}, r"rank_pattern to hold counts of ranks, got \[1\]"),
        ({"rasa_alpha": 10**400}, "rasa_alpha to fit in 62 bits"),
        ({"rank_pattern": {"a": 1.5}}, "rank_pattern to hold counts of ranks, got 1.5"),
        ({"rasa_method": ["lora"]}, r"rasa_method: expected .*got \['lora'\]"),
        ({"rasa_groups": {"a": 3}}, "groups: expected a sequence of strings"),
        ({"rasa_groups": [3]}, "groups: expected a sequence of patterns.*the item 3"),
        ({"target_modules": "(a+"}, "target_modules: expected a regular expression"),
    ],
)
def test_a_config_of_wrong_values(fields, said, tmp_path):
    config = rasa_ext.RasaConfig() if "rank_pattern" in fields else LoraConfig()
    rasa_ext.save_adapter(rasa_ext.patch_model(LLAMA.build(), config=config), tmp_path)
    edit(tmp_path, **fields)
    base = LLAMA.build()
    refused(lambda: rasa_ext.load_adapter(base, tmp_path), base, said)


def test_nested_json(tmp_path):
    (tmp_path / "adapter_config.json").write_text("[" * 100_000)
    base = LLAMA.build()
    said = r"adapter_config.json: damaged or cut, since it does not parse as JSON"
    refused(lambda: rasa_ext.load_adapter(base, tmp_path), base, said)


@pytest.fixture
def indexed() -> AdapterConfig:
    """A config with index tensors in its layers."""
    return PickedConfig(rank=4)


@pytest.mark.parametrize("index", [-1, 10**6])
def test_features_that_a_layer_has_not(index, indexed, tmp_path):
    """Such indices would load and fail only in the forward."""
    model = rasa_ext.patch_model(LLAMA.build(), config=indexed)
    rasa_ext.save_adapter(model, tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    next(tensor for key, tensor in tensors.items() if key.endswith("_index"))[0] = index
    save_file(tensors, path)
    base = LLAMA.build()
    said = "expected indices within the layer or its pool"
    refused(lambda: rasa_ext.load_adapter(base, tmp_path), base, said)


@pytest.mark.parametrize("options", [{}, {"modules_to_save": ["lm_head"]}], ids=str)
@pytest.mark.parametrize("k", [0, 1, 4])
@pytest.mark.parametrize("shards", [1, 2])
def test_a_whole_model_that_was_saved_after_patching(shards, k, options, tmp_path):
    """The files contain the adapter's tensors but not its config."""
    model = patched(LLAMA.build(), 4, k, seed=1, **options)
    tensors = [(key, tensor.contiguous()) for key, tensor in model.state_dict().items()]
    for i in range(shards):
        save_file(dict(tensors[i::shards]), tmp_path / f"model-{i}.safetensors")
    base = LLAMA.build()
    said = "got the directory of a whole model.*patch_model"
    refused(lambda: rasa_ext.load_adapter(base, tmp_path), base, said)
    other = patched(LLAMA.build(), 4, k, seed=2, **options)
    assert same_adapters(model, rasa_ext.load_adapter(other, tmp_path))
    of_another_rank = patched(LLAMA.build(), 6, 2)
    said = "does not fit the model"
    refused(lambda: rasa_ext.load_adapter(of_another_rank, tmp_path), of_another_rank, said)


@pytest.mark.parametrize("keep", [0.3, 0.9])
def test_a_cut_bin(keep, tmp_path):
    rasa_ext.export_lora(patched(LLAMA.build()), tmp_path)
    weights = tmp_path / "adapter_model.safetensors"
    path = tmp_path / "adapter_model.bin"
    tensors = load_file(weights)
    torch.save(tensors, path)
    weights.unlink()
    rasa_ext.import_lora(LLAMA.build(), tmp_path)
    whole = path.read_bytes()
    base = LLAMA.build()
    flipped = bytearray(whole)
    flipped[whole.index(next(iter(tensors.values())).numpy().tobytes())] ^= 1
    for damaged in (whole[: int(keep * len(whole))], bytes(flipped)):
        path.write_bytes(damaged)
        said = r"adapter_model\.bin: refused, since .* is damaged"
        refused(lambda: rasa_ext.import_lora(base, tmp_path), base, said)
