"""A method that another installed package defines and announces by an entry point."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM

import rasa_ext
from rasa_ext import methods
from tests.helpers import outside
from tests.helpers.tiny_lm import make_model, save_base, sums, write_jsonl

COUNT = '''

def count(folder: str) -> None:
    """Count the files of a folder."""
    print("files:", len(list(__import__("pathlib").Path(folder).iterdir())))
'''
ANNOUNCED = """
[rasa_ext.methods]
outside-vera = vera_method:VeraConfig
[rasa_ext.commands]
count = vera_method:count
"""
METADATA = "Metadata-Version: 2.1\nName: vera-method\nVersion: 1.0\n"


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """A folder of packages; one of them announces VeRA."""
    folder = tmp_path_factory.mktemp("site")
    text = Path(outside.__file__).read_text().replace('"vera"', '"outside-vera"')
    (folder / "vera_method.py").write_text(text + COUNT)
    about = folder / "vera_method-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text(METADATA)
    (about / "entry_points.txt").write_text(ANNOUNCED)
    return folder


def run(installed: Path, *arguments: str) -> str:
    """Run a new process that has not imported the method; return the printed text."""
    path = os.pathsep.join([str(installed), str(Path(rasa_ext.__file__).parents[1])])
    environment = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


TRAIN = """
import sys, torch, rasa_ext
from transformers import AutoModelForCausalLM
base, folder = sys.argv[1:]
kind = rasa_ext.methods.method_named("outside-vera")
config = kind(rank=4, target_modules=["q_proj", "down_proj"])
model = rasa_ext.patch_model(AutoModelForCausalLM.from_pretrained(base), config=config)
trained = {n.rpartition(".")[2] for n, p in model.named_parameters() if p.requires_grad}
assert trained == {"b", "d"}, trained
optimizer = torch.optim.AdamW(rasa_ext.training.parameter_groups(model, lr=0.1))
tokens = torch.arange(1, 9).view(2, 4)
for _ in range(3):
    model(tokens, labels=tokens).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
rasa_ext.save_adapter(model, folder + "/adapter")
rasa_ext.export_lora(model, folder + "/lora")
model.eval()
with torch.no_grad():
    logits = model(tokens).logits
    rasa_ext.merge(model)
    assert torch.allclose(model(tokens).logits, logits, atol=1e-4)
    rasa_ext.unmerge(model)
    assert torch.equal(model(tokens).logits, logits)
assert len(list(rasa_ext.summary(model))) == 2
torch.save(logits, folder + "/logits.pt")
"""

LOAD = """
import sys, torch, rasa_ext, rasa_ext.peft
from peft import PeftModel
from rasa_ext.analysis import analyze_adapter
from transformers import AutoModelForCausalLM
base, folder = sys.argv[1:]
tokens, expected = torch.arange(1, 9).view(2, 4), torch.load(folder + "/logits.pt")
load = AutoModelForCausalLM.from_pretrained
with torch.no_grad():
    loaded = rasa_ext.load_adapter(load(base), folder + "/adapter").eval()
    assert torch.equal(loaded(tokens).logits, expected)
    plug_in = PeftModel.from_pretrained(load(base), folder + "/adapter").eval()
    assert torch.equal(plug_in(tokens).logits, expected)
    peft = PeftModel.from_pretrained(load(base), folder + "/lora").eval()
    assert torch.allclose(peft(tokens).logits, expected, atol=1e-4)
    assert not torch.allclose(load(base)(tokens).logits, expected, atol=1e-2)
groups = analyze_adapter(folder + "/adapter", load(base))
assert all(0 < layer.effective_rank <= 4 for group in groups for layer in group.layers)
"""


def test_it_trains_and_another_process_reads_all_of_it(installed, tmp_path):
    base = str(save_base(tmp_path / "base"))
    run(installed, "-c", TRAIN, base, str(tmp_path))
    assert "[arXiv 2310.11454]" in (tmp_path / "adapter" / "README.md").read_text()
    assert "VeRA" in (tmp_path / "lora" / "README.md").read_text()
    run(installed, "-c", LOAD, base, str(tmp_path))
    said = r"adapter_config\.json: rasa_method: .* got 'outside-vera'"
    with pytest.raises(ValueError, match=said):  # not installed in this process
        rasa_ext.load_adapter(make_model(), tmp_path / "adapter")


COMMANDS = """
import sys
from typer.testing import CliRunner
from rasa_ext.commands.app import app
base, data, folder = sys.argv[1:]
adapter = f"{folder}/adapter"
train = f"--model {base} --data {data} --rank 4 --max-steps 2 --batch-size 2 --lr 0.1"
for words in (
    f"finetune {train} --output {adapter} --method outside-vera",
    f"inspect {adapter}",
    f"merge {adapter} --output {folder}/merged",
    f"export-lora {adapter} --output {folder}/lora",
    "--help",
    f"count {adapter}",
):
    done = CliRunner().invoke(app, words.split())
    assert done.exit_code == 0, (words, done.output)
    print(done.output)
"""


def test_the_commands_train_show_merge_and_export_it(installed, tmp_path):
    base, data = save_base(tmp_path / "base"), write_jsonl(tmp_path / "train.jsonl", sums(8))
    shown = run(installed, "-c", COMMANDS, str(base), str(data), str(tmp_path))
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["rasa_method"] == "outside-vera"
    words = " ".join(shown.split())
    for said in ("rasa_method outside-vera", "Count the files of a folder.", "files: "):
        assert said in words
    AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert (tmp_path / "lora" / "adapter_model.safetensors").is_file()


def test_a_name_is_one_method_s():
    class First(methods.AdapterConfig):
        method = "of a test"

    assert methods.method_named("of a test") is First
    assert First.title == "of a test"
    with pytest.raises(ValueError, match="method: expected a name that no other method has"):

        class Second(methods.AdapterConfig):
            method = "of a test"

    assert methods.method_named("of a test") is First
    del methods.base.METHODS["of a test"]
    for name in ("of a test", 3):
        with pytest.raises(ValueError, match=rf"method: expected .*'lora' or .* got {name!r}; u"):
            methods.method_named(name)


@dataclasses.dataclass(frozen=True)
class HalfComputedConfig(methods.LoraConfig):
    """LoRA whose odd layers compute A; the even ones have it."""

    method: ClassVar[str] = "half-computed"

    def factors(self, own, pool, spec):
        found = super().factors(own, pool, spec)
        return found._replace(A=found.A.sin()) if spec.index % 2 else found


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("method", [outside.VeraConfig, outside.PickedConfig, HalfComputedConfig])
def test_computed_factors_under_gradient_checkpoints(method, reentrant):
    """A checkpoint must save equal tensors in the forward and again, also after ``eval()``."""
    torch.manual_seed(0)
    base = nn.Sequential(*(nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for _ in range(4))).double()
    config = method(rank=2, target_modules="all-linear", adapter_dtype=torch.float64)
    model = rasa_ext.patch_model(base, config=config)
    for parameter in rasa_ext.adapter_parameters(model):
        nn.init.normal_(parameter)
    x = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    trained = list(rasa_ext.adapter_parameters(model))
    expected = torch.autograd.grad(model.eval()(x).square().sum(), trained)
    for _ in range(2):
        y = x
        for block in model.train():
            y = checkpoint(block, y, use_reentrant=reentrant)
        y.square().sum().backward()
        torch.testing.assert_close(tuple(p.grad for p in trained), expected)
        model.eval()
        model.zero_grad()
