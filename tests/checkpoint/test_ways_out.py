"""Unexpected files: the error says what the files are and what to do."""

import copy
import functools

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import rasa_ext
from rasa_ext.methods import AdapterConfig, LoraConfig
from tests.helpers.adapter_folders import check_large_field, edit, not_loaded
from tests.helpers.adapters import adapters, patched, same_adapters
from tests.helpers.cli import save_official
from tests.helpers.models import LLAMA
from tests.helpers.outside import PickedConfig
from tests.helpers.refusals import refused

WEIGHTS = "adapter_model.safetensors"


OTHERS = [
    (
        rasa_ext.export_lora,
        (rasa_ext.load_adapter, rasa_ext.load_official),
        "expected peft_type 'RASA', got 'LORA'.*rasa_ext.import_lora.*rasa-ext import-lora",
    ),
    (rasa_ext.save_adapter, (rasa_ext.import_lora,), "got 'RASA'.*rasa_ext.load_adapter"),
    (save_official, (rasa_ext.load_adapter,), "rasa_ext.load_official reads"),
]


@pytest.mark.parametrize(("write", "loads", "said"), OTHERS)
def test_a_folder_of_another_kind(write, loads, said, tmp_path):
    write(patched(LLAMA.build(), 4, 1), tmp_path)
    model = LLAMA.build()
    for load in loads:
        refused(functools.partial(load, model, tmp_path), model, said)


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
    said = f"1 of {len(tensors)} tensors hold NaN or infinity: {key}.*earlier checkpoint"
    refused(lambda: read(model, tmp_path), model, said)


def masked() -> nn.Module:
    """Return a model with a mask that holds -inf, like attention masks."""
    model = nn.ModuleDict({"layer": nn.Linear(4, 4), "gate": nn.Linear(4, 4)})
    model["gate"].register_buffer("mask", torch.full((2, 2), -torch.inf))
    return model


def test_a_mask_may_hold_infinity(tmp_path):
    rasa_ext.save_adapter(patched(masked(), 2, 1, modules_to_save=["gate"]), tmp_path)
    model = rasa_ext.load_adapter(masked(), tmp_path)
    assert model["gate"].mask.isinf().all()


def stack(layers: int) -> nn.Module:
    return nn.Sequential(*(nn.Linear(6, 6) for _ in range(layers)))


@pytest.mark.parametrize(("theirs", "ours"), [(4, 3), (3, 4)])
def test_another_number_of_layers(theirs, ours, tmp_path):
    rasa_ext.save_adapter(patched(stack(theirs), 2, 1), tmp_path)
    said = rf"The adapter has {theirs} layers \*, and the model {ours}\."
    not_loaded(rasa_ext.load_adapter, stack(ours), tmp_path, said)


def test_a_file_where_the_folder_was_expected(tmp_path):
    rasa_ext.save_adapter(patched(LLAMA.build()), tmp_path)
    for load in (rasa_ext.load_adapter, rasa_ext.load_official, rasa_ext.import_lora):
        with pytest.raises(FileNotFoundError, match=f"got the file .*; pass {tmp_path}"):
            load(LLAMA.build(), tmp_path / WEIGHTS)


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


WRONG = [
    ({"rank_pattern": {"a": [1]}}, r"rank_pattern .*got \[1\]"),
    ({"rank_pattern": {"a": 1.5}}, "rank_pattern .*got 1.5"),
    ({"rasa_alpha": 10**400}, "rasa_alpha"),
    ({"rasa_method": ["lora"]}, "rasa_method"),
    ({"rasa_groups": {"a": 3}}, "groups"),
    ({"rasa_groups": [3]}, "groups.*the item 3"),
    ({"target_modules": "(a+"}, "target_modules"),
]


@pytest.mark.parametrize(("fields", "said"), WRONG)
def test_a_config_of_wrong_values(fields, said, tmp_path):
    config = rasa_ext.RasaConfig() if "rank_pattern" in fields else LoraConfig()
    rasa_ext.save_adapter(rasa_ext.patch_model(LLAMA.build(), config=config), tmp_path)
    edit(tmp_path, **fields)
    not_loaded(rasa_ext.load_adapter, LLAMA.build(), tmp_path, said)


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
    not_loaded(rasa_ext.load_adapter, LLAMA.build(), tmp_path, "expected indices within")


@pytest.mark.parametrize("options", [{}, {"modules_to_save": ["lm_head"]}], ids=str)
@pytest.mark.parametrize("k", [0, 1, 4])
@pytest.mark.parametrize("shards", [1, 2])
def test_a_whole_model_that_was_saved_after_patching(shards, k, options, tmp_path):
    """The files contain the adapter's tensors but not its config."""
    model = patched(LLAMA.build(), 4, k, seed=1, **options)
    tensors = [(key, tensor.contiguous()) for key, tensor in model.state_dict().items()]
    for i in range(shards):
        save_file(dict(tensors[i::shards]), tmp_path / f"model-{i}.safetensors")
    not_loaded(rasa_ext.load_adapter, LLAMA.build(), tmp_path, "whole model.*patch_model")
    other = patched(LLAMA.build(), 4, k, seed=2, **options)
    assert same_adapters(model, rasa_ext.load_adapter(other, tmp_path))
    not_loaded(
        rasa_ext.load_adapter, patched(LLAMA.build(), 6, 2), tmp_path, "does not fit the model"
    )
