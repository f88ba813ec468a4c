"""inspect: which arguments count as an adapter, and the output to a pipe."""

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rich.text import Text
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import rasa_ext
from rasa_ext.analysis import analyze
from rasa_ext.commands import output
from rasa_ext.commands.app import app
from rasa_ext.methods import AdapterConfig
from tests.helpers.adapters import patched
from tests.helpers.cli import invoke, load
from tests.helpers.methods import randomize
from tests.helpers.outside import VeraConfig
from tests.helpers.tiny_lm import make_model, save_base

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", ["adaptr", "some/adapter", "/nowhere/adapter", "empty"])
@pytest.mark.parametrize("words", [[], ["--spectrum"]])
def test_a_typo_is_no_hub_name(name, words, tmp_path, monkeypatch):
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("the hub was asked"))
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    text = invoke("inspect", name, *words, code=1)
    said = "holds no adapter_config.json" if name == "empty" else "does not exist"
    assert f"expected an adapter's directory, but {name} {said}" in text
    assert "To look at a model of the hub, pass --model." in text


def test_it_says_what_it_is(tmp_path):
    """It needs no base. A LoRA's layers are grouped like RaSA's."""
    model = patched(load(save_base(tmp_path / "base")), 4, 1)
    rasa_ext.save_adapter(model, tmp_path / "adapter")
    rasa_ext.export_lora(model, tmp_path / "lora")
    (tmp_path / "base").rename(tmp_path / "gone")
    ours, lora = invoke("inspect", tmp_path / "adapter"), invoke("inspect", tmp_path / "lora")
    assert ours.startswith(f"An adapter of the method RaSA for {tmp_path / 'base'}.")
    assert lora.startswith(f"An adapter of the method LoRA for {tmp_path / 'base'}.")
    assert "peft_type RASA" in ours
    assert "rasa_k 1" in ours
    # L, out x in, private, pooled, R, parameters: 2 layers, each with 3 + 1 ranks and a d of 5
    assert "model.layers.*.self_attn.q_proj 2 32 x 32 3 2 5 522" in ours
    assert "model.layers.*.mlp.up_proj 2 48 x 32 5 0 5 " in lora
    stored = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert f"{sum(t.numel() for t in stored.values()):,} parameters" in ours
    size = (tmp_path / "adapter" / "adapter_model.safetensors").stat().st_size
    assert f"{size:,} bytes" in ours
    assert "other tensors" not in ours + lora


def test_a_model_by_its_folder_or_by_option(tmp_path):
    base = save_base(tmp_path / "base")
    assert invoke("inspect", base).startswith("A new adapter for this LlamaForCausalLM:")
    assert invoke("inspect", base) == invoke("inspect", "--model", base)
    text = invoke("inspect", code=1)
    assert text == invoke("inspect", base, "--model", base, code=1)
    assert "expected an adapter's directory or --model, got both or neither" in text


def test_a_pipe_gets_whole_lines_and_a_warning_is_a_sentence(tmp_path):
    """Output to a real pipe is not cut, even if COLUMNS says that the terminal is narrow."""
    base, name = save_base(tmp_path / "base"), "model.layers.0.self_attn.q_proj"
    code = "from rasa_ext.commands import main; main()"
    words = ["inspect", "--model", str(base), "--target-modules", name.removeprefix("model.")]
    piped = {"capture_output": True, "text": True, "check": True, "cwd": ROOT}
    environment = {**os.environ, "COLUMNS": "40"}
    done = subprocess.run([sys.executable, "-c", code, *words], env=environment, **piped)
    assert re.search(r"^model\.layers\.\S*\.self_attn\.q_proj +1 +32 x 32 .*\d$", done.stdout, re.M)
    assert "\u2026" not in done.stdout
    (told,) = done.stderr.splitlines()  # other libraries print nothing
    assert told.startswith(f"Warning: groups: '{name}' is the only adap")
    assert "patch_model(" not in told  # no source line


DAMAGES = {
    "cut": lambda t: t[:-1].clone(),
    "nested": lambda t: t[None],
    "scalar": lambda t: t.flatten()[0].clone(),
    "missing": lambda t: None,
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
@pytest.mark.parametrize("field", ["A", "B", "d", "pool_A"])
def test_tensors_that_do_not_fit_are_told(field, damage, tmp_path):
    rasa_ext.save_adapter(patched(make_model(), 4, 1), tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    key = next(key for key in tensors if key.endswith(f"down_proj.rasa_{field}"))
    tensors[key] = damage(tensors[key])
    save_file({name: t for name, t in tensors.items() if t is not None}, path)
    assert "No groups: " in invoke("inspect", tmp_path) or damage(torch.ones(1)) is None
    result = CliRunner().invoke(app, ["inspect", str(tmp_path), "--spectrum"])
    assert result.exit_code == 0 or "Error: " in result.output


def test_a_config_steers_no_terminal(tmp_path):
    """Not in results, errors or warnings, nor where a table or a spinner shows the text."""
    rasa_ext.save_adapter(patched(make_model(), 4, 1), tmp_path)
    path = tmp_path / "adapter_config.json"
    config = json.loads(path.read_text())
    evil = "x\x1b]0;title\x07\x1b[2J\r\x9by"
    for changed in ({"base_model_name_or_path": evil, "task_type": evil}, {"rasa_method": evil}):
        path.write_text(json.dumps(config | changed))
        for words in ([], ["--spectrum"]):
            text = CliRunner().invoke(app, ["inspect", str(tmp_path), *words]).output
            assert not {"\x1b", "\x07", "\r", "\x9b"} & set(text)
            assert words or "x]0;title[2Jy" in text
    assert output.sentence(f"a {evil}") == "Warning: a x]0;title[2Jy\n"
    with output.console.capture() as shown:
        output.console.print(Text(evil))
    assert shown.get() == "x]0;title[2Jy\n"


def test_numbers_that_are_not_finite_are_told(tmp_path):
    model = patched(make_model(), 4, 1)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.B[0, 0] = torch.nan
    rasa_ext.save_adapter(model, tmp_path)
    text = invoke("inspect", tmp_path)
    assert "1 tensors hold NaN or infinity, such as base_model.model.model.layers.0.mlp" in text


@pytest.fixture
def shapeless() -> AdapterConfig:
    """A config whose files do not contain the layers' shapes."""
    return VeraConfig(4)


def test_methods_whose_files_need_the_base_for_shapes(shapeless, tmp_path):
    base = save_base(tmp_path / "base")
    model = rasa_ext.patch_model(load(base), config=shapeless)
    randomize(model, 1)
    rasa_ext.save_adapter(model, tmp_path / "one")
    groups = invoke("inspect", tmp_path / "one")
    assert "other tensors" not in groups
    for row in rasa_ext.summary(model):
        shape = " x ".join(map(str, row.shape))
        R = row.R if row.R_min == row.R else f"{row.R_min}-{row.R}"
        line = rf"{re.escape(row.pattern)} {row.L} {shape} [\d-]+ [\d-]+ {R} "
        assert re.search(line, groups)
    ranks = {g.pattern: [layer.effective_rank for layer in g.layers] for g in analyze(model)}
    down = ranks["model.layers.*.mlp.down_proj"]
    words = ["inspect", tmp_path / "one", "--spectrum"]
    text = invoke(*words)
    assert f"{sum(down) / 2:.1f} ({min(down):.1f}-{max(down):.1f})" in text
    (tmp_path / "base").rename(tmp_path / "gone")
    assert "one/adapter_config.json names this base" in invoke(*words, code=1)
    assert invoke(*words, "--model", tmp_path / "gone") == text
    without = invoke("inspect", tmp_path / "one")
    assert "No groups: model: " in without
    assert "other tensors: base_model.model.model.layers.0" in without
    assert "No groups" not in invoke("inspect", tmp_path / "one", "--model", tmp_path / "gone")
