"""Sets of LoRAs and folders of weights, damaged like adapters in tests/checkpoint/fuzz.py."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

import rasa_research
from rasa_research import solver
from tests.checkpoint import fuzz
from tests.helpers.models import LLAMA

INDEX = "model.safetensors.index.json"


def write_set(folder: Path) -> None:
    loras = [folder.with_name(f"{folder.name}-{name}") for name in "ab"]
    for each in loras:
        fuzz._lora(each)
    solver.compress_many(loras, rank=4).loras.save(folder)
    for each in loras:
        shutil.rmtree(each)


def read_set(base: nn.Module, folder: Path) -> nn.Module:
    loras = solver.LoraSet.load(folder)
    return loras.install(base, loras.names[0])


def write_shards(folder: Path) -> None:
    folder.mkdir()
    tensors = list(LLAMA.build().state_dict().items())
    names = [f"model-0000{i + 1}-of-00002.safetensors" for i in range(2)]
    for i, name in enumerate(names):
        save_file(dict(tensors[i::2]), folder / name)
    shards = {key: names[i % 2] for i, (key, _) in enumerate(tensors)}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": shards}))


def read_shards(base: nn.Module, folder: Path) -> torch.Tensor:
    weights = solver.SafetensorsFolder(folder)
    return torch.cat([weights[key].double().flatten() for key in sorted(weights)])


KINDS = {
    "LoRA set": fuzz._of_llama(read_set, write_set),
    "shards": fuzz.Kind(write_shards, nn.Identity, read_shards, lambda numbers: numbers),
}


def test_damaged_folders_are_refused_in_a_sentence_or_load_whole(tmp_path, monkeypatch):
    packages = (fuzz.PACKAGE, str(Path(rasa_research.__file__).parent))
    monkeypatch.setattr(fuzz, "PACKAGE", packages)
    monkeypatch.setattr(fuzz, "KINDS", KINDS)
    monkeypatch.chdir(tmp_path)
    found = fuzz.fuzz(100, 20261127, tmp_path)
    assert [number for number, *_ in found] == list(range(100))
    assert not [each for each in found if each[3] in fuzz.NEVER]
    outcomes = [outcome for *_, outcome, _ in found]
    assert outcomes.count(fuzz.OWN) > 50
    assert outcomes.count(fuzz.EQUAL) > 5
