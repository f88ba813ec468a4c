"""A method that another installed package defines and announces by an entry point."""

import dataclasses
import os
import sys
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from peft import PeftModel
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM

import rasa_ext
from rasa_ext import methods
from tests.helpers import outside
from tests.helpers.cli import load, logits
from tests.helpers.processes import run_whole
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


def test_the_commands_train_show_merge_and_export_it(tmp_path):
    """In a new process that has not imported the method, with a package that announces VeRA."""
    installed = tmp_path / "site"
    about = installed / "vera_method-1.0.dist-info"
    about.mkdir(parents=True)
    text = Path(outside.__file__).read_text().replace('"vera"', '"outside-vera"')
    (installed / "vera_method.py").write_text(text + COUNT)
    (about / "METADATA").write_text(METADATA)
    (about / "entry_points.txt").write_text(ANNOUNCED)
    base, data = save_base(tmp_path / "base"), write_jsonl(tmp_path / "train.jsonl", sums(8))
    path = os.pathsep.join([str(installed), str(Path(rasa_ext.__file__).parents[1])])
    command = [sys.executable, "-c", COMMANDS, str(base), str(data), str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": path}
    words = " ".join(run_whole(command, env=environment).split())
    for said in ("rasa_method outside-vera", "Count the files of a folder.", "files: "):
        assert said in words
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    lora = PeftModel.from_pretrained(load(base), tmp_path / "lora").eval()
    torch.testing.assert_close(logits(lora), logits(merged), rtol=1e-4, atol=1e-4)
    assert (logits(load(base)) - logits(merged)).abs().max() > 1e-2
    assert "[arXiv 2310.11454]" in (tmp_path / "adapter" / "README.md").read_text()
    said = r"adapter_config\.json: rasa_method: .* got 'outside-vera'"
    with pytest.raises(ValueError, match=said):  # not installed in this process
        rasa_ext.load_adapter(make_model(), tmp_path / "adapter")


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
