"""The commands compress-many and expand: tables, files, LoRAs that PEFT loads."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch

import rasa_ext
from rasa_research import solver
from tests.helpers.cli import invoke, load, logits
from tests.helpers.tiny_lm import save_base

NAMES = ("maths", "code", "verse")


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return save_base(tmp_path_factory.mktemp("many") / "base")


@pytest.fixture(scope="module")
def loras(base, tmp_path_factory) -> list[Path]:
    """Three LoRAs with equal A, B and pool and different diagonals, with R = 9 in each layer."""
    directories = []
    model = rasa_ext.patch_model(load(base), rank=8, k=1, target_modules=["q_proj", "down_proj"])
    torch.manual_seed(1)
    for name in NAMES:
        with torch.no_grad():
            for parameter in rasa_ext.adapter_parameters(model):
                if not directories or parameter.dim() == 1:
                    parameter.add_(torch.randn_like(parameter) * 0.3)
        directories.append(tmp_path_factory.mktemp("many") / name)
        rasa_ext.export_lora(model, directories[-1])
    return directories


def served(base: Path, directory: Path) -> torch.Tensor:
    peft = pytest.importorskip("peft")
    return logits(peft.PeftModel.from_pretrained(load(base), directory).eval())


def test_the_set_and_back(base, loras, tmp_path):
    text = invoke("compress-many", *loras, "--rank", 9, "-o", tmp_path / "set")
    size = 2 * 9 * (32 + 32 + 32 + 48 + 2 * 3)
    given = 3 * 2 * 9 * (32 + 32 + 32 + 48)
    assert f"have {size:,} parameters, {size / given:.1%} of the LoRAs' {given:,}" in text
    for row in (*NAMES, r"model\.layers\.\*\.mlp\.down_proj \(2\)", "all"):
        found = re.search(rf"{row} ([\d.]+) ([\d.]+) ([\d.]+)", text)
        error, apart, ratio = map(float, found.groups())
        assert error < 1e-3 < apart
        assert ratio == pytest.approx(error / apart, abs=2e-3)
    assert f"rasa-ext expand {tmp_path / 'set'} maths --output" in text
    text = invoke("expand", tmp_path / "set", "-o", tmp_path / "out")
    for name, directory in zip(NAMES, loras, strict=True):
        assert f"LoRA of rank 9 in {tmp_path / 'out' / name}." in text
        expected, found = served(base, directory), served(base, tmp_path / "out" / name)
        assert (found - expected).norm() < 1e-2 * (expected - logits(load(base))).norm()


def test_names_and_parts(loras, tmp_path):
    first, second, third = loras
    copy = shutil.copytree(second, tmp_path / "a=b")
    words = [f"sums={first}", copy, f"x={third}"]
    invoke("compress-many", *words, "--rank", 4, "--iterations", 1, "-o", tmp_path / "set")
    assert solver.LoraSet.load(tmp_path / "set").names == ("sums", "a=b", "x")
    invoke("expand", tmp_path / "set", "x", "sums", "-o", tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"x", "sums"}
    again = ["expand", tmp_path / "set", "a=b", "-o", tmp_path / "out"]
    assert "holds files; pass --overwrite" in invoke(*again, code=1)
    invoke(*again, "--overwrite")
    text = invoke("expand", tmp_path / "set", "y", "-o", tmp_path / "no", code=1)
    assert "name: expected one of sums, a=b, x, got 'y'" in text
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["A", "--rank", "4"], "expected two LoRAs or more, got 1"),
        (["A", "A", "--rank", "4"], "are both named 'maths'; pass"),
        (["A", "B", "--rank", "0"], "rank: expected 1 or more, got 0"),
        (["A", "B", "--rank", "4", "--iterations", "-1"], "iterations: expected 0 or more"),
        (["A", "nowhere", "--rank", "4"], "nowhere/adapter_config.json is missing"),
        (["A", "a/b=B", "--rank", "4"], "expected a valid folder name for B, got 'a/b'"),
    ],
)
def test_bad_options(loras, words, message, tmp_path):
    places = {"A": loras[0], "B": loras[1]}
    words = [places.get(word, word) for word in words]
    text = invoke("compress-many", *words, "-o", tmp_path / "out", code=1)
    assert text.startswith("Error: ")
    assert message in text
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["../victim", "/victim", "sub/victim", ".."])
def test_names_of_a_file_lead_nowhere_else(name, loras, tmp_path):
    name = f"{tmp_path}{name}" if name.startswith("/") else name
    invoke("compress-many", *loras, "--rank", 2, "--iterations", 0, "-o", tmp_path / "set")
    path = tmp_path / "set" / "adapter_config.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps({**settings, "adapters": ["maths", name, "verse"]}))
    for words in ([], ["maths"], [name]):
        text = invoke("expand", tmp_path / "set", *words, "-o", tmp_path / "out", code=1)
        assert f"valid folder name for {tmp_path / 'set'}, got {name!r}" in text
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


def test_nothing_is_written_over_what_is_read(loras, tmp_path):
    words = ["compress-many", *loras, "--rank", 2, "--overwrite"]
    assert "expected another directory" in invoke(*words, "-o", loras[1], code=1)
    invoke(*words, "--iterations", 0, "-o", tmp_path)
    assert "expected another directory" in invoke("expand", tmp_path, "-o", tmp_path, code=1)


def test_a_set_is_told_from_an_adapter(base, loras, tmp_path):
    words = ["compress-many", *loras, "--rank", 2, "--iterations", 0, "-o", tmp_path / "set"]
    invoke(*words)
    for command in ("import-lora", "merge"):
        words = [command, tmp_path / "set", "--model", base]
        text = invoke(*words, "--output", tmp_path / "out", code=1)
        assert "got 'LORA_SET'" in text
    text = invoke("expand", loras[0], "-o", tmp_path / "out", code=1)
    assert "peft_type 'LORA_SET' in adapter_config.json, got 'LORA'" in text
