"""The command compress: tables, pictures, adapters that load."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure

import rasa_ext
from rasa_ext.commands.models import load_tokenizer
from rasa_research import solver
from rasa_research.solver.plots import plot_errors
from tests.helpers.cli import TOKENS, invoke, load, logits, save_lora
from tests.helpers.file_limit import file_limit
from tests.helpers.tiny_lm import make_model, make_tokenizer, save_base

TEMPLATE = "{{ messages[0]['content'] }}"
"""The chat template of the fine-tuned model, which the base does not have."""


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return save_base(tmp_path_factory.mktemp("compress") / "base")


@pytest.fixture(scope="module")
def tuned(tmp_path_factory) -> Path:
    """The folder of the base after ten training steps on all weights, in several shards."""
    model = make_model().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(10):
        model(input_ids=TOKENS, labels=TOKENS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    directory = tmp_path_factory.mktemp("compress") / "tuned"
    model.save_pretrained(directory, max_shard_size="50KB")
    assert (directory / "model.safetensors.index.json").exists()
    make_tokenizer(TEMPLATE).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def lora(base, tmp_path_factory) -> Path:
    return save_lora(base, tmp_path_factory.mktemp("compress") / "lora")


def test_compress_a_fine_tuning(base, tuned, tmp_path):
    out = tmp_path / "out"
    words = ["compress", "--base", base, "--finetuned", tuned, "--rank", 4, "--k", 1]
    text = invoke(*words, "-o", out, "--iterations", 5)
    expected = solver.compress(
        load(base), load(base).state_dict(), load(tuned).state_dict(), 4, 1, iterations=5
    )
    for group, result in expected.groups.items():
        error, lora, equal = result.errors[-1], result.lora_error, result.lora_error_equal
        figures = f"{error:.4f} {lora:.4f} {error / lora:.4f} {equal:.4f} {error / equal:.4f}"
        assert re.search(rf"{re.escape(group.pattern)} 2 \d+ x \d+ \S+ {figures}", text)
    error, lora, equal = expected.error, expected.lora_error, expected.lora_error_equal
    figures = f"{error:.4f} {lora:.4f} {error / lora:.4f} {equal:.4f} {error / equal:.4f}"
    assert f"all {figures}" in text
    ours, loras = expected.num_parameters, expected.lora_num_parameters
    said = f"{ours:,} parameters, {ours / loras - 1:+.1%} compared with the {loras:,} of a LoRA of"
    assert f"{said} rank 4" in text
    assert f"Not in the adapter: {expected.residual_share:.2%} of the squared change" in text
    assert "model.layers.*.input_layernorm.weight (2): changed by" in text
    assert (out / "errors.png").read_bytes().startswith(b"\x89PNG")
    model = rasa_ext.load_adapter(load(base), out)
    assert json.loads((out / "adapter_config.json").read_text())["base_model_name_or_path"] == str(
        base
    )
    with torch.no_grad():
        before, near = (m(input_ids=TOKENS, labels=TOKENS).loss.item() for m in (load(base), model))
    assert near < before - 0.5
    assert load_tokenizer(str(out)).chat_template == TEMPLATE


def test_compress_of_models_that_do_not_differ(base, tmp_path):
    words = ["compress", "--base", base, "--iterations", 1, "-o", tmp_path / "out"]
    shutil.copytree(base, tmp_path / "same")
    text = invoke(*words, "--finetuned", tmp_path / "same", code=1)
    assert f"finetuned: expected layers that differ from those of {base}" in text
    assert not (tmp_path / "out").exists()


def test_compress_keeps_what_else_changed(base, tuned, tmp_path):
    words = ["compress", "--base", base, "--finetuned", tuned, "--iterations", 2]
    text = invoke(*words, "-o", tmp_path, "--rank", 32, "--k", 1, "--modules-to-save", "changed")
    assert "saved in full: model.embed_tokens, " in text
    assert "Not in the adapter:" not in text
    model = rasa_ext.load_adapter(load(base), tmp_path)
    torch.testing.assert_close(logits(model.eval()), logits(load(tuned)), rtol=1e-3, atol=1e-3)
    text = invoke(*words, "-o", tmp_path / "o", "--modules-to-save", "embed_tokens, norm")
    assert "saved in full: model.embed_tokens, model.norm" in text
    assert "Not in the adapter:" in text


def test_compress_a_checkpoint_that_is_no_safetensors_folder(base, tuned, tmp_path):
    """compress reads every checkpoint that transformers reads, with equal results."""
    model = load(tuned)
    (tmp_path / "pickled").mkdir()
    model.config.save_pretrained(tmp_path / "pickled")
    torch.save(model.state_dict(), tmp_path / "pickled" / "pytorch_model.bin")
    words = ["compress", "--base", base, "--iterations", 1, "--rank", 2]
    texts = [
        invoke(*words, "--finetuned", directory, "-o", tmp_path / "out", "--overwrite")
        for directory in (tuned, tmp_path / "pickled")
    ]
    assert texts[0] == texts[1]


def test_compress_a_lora(base, lora, tmp_path):
    text = invoke("compress", "--lora", lora, "--rank", 3, "--k", 1, "-o", tmp_path)
    assert "The LoRA has 1,728 parameters, at rank 6" in text  # 2 x 6 x (32 + 32 + 32 + 48)
    assert "model.layers.*.mlp.down_proj 2 32 x 48" in text
    said = r"RaSA r=3 k=1 has ([\d,]+) parameters, \S+ compared with the 864 of a LoRA of rank 3"
    parameters = re.search(said, text)
    assert int(parameters[1].replace(",", "")) == 864 + 2 * 2 * 4  # and L*R for each of two groups
    assert (tmp_path / "errors.png").exists()
    adapted = logits(rasa_ext.load_adapter(load(base), tmp_path).eval())
    peft = pytest.importorskip("peft")
    theirs, plain = logits(peft.PeftModel.from_pretrained(load(base), lora)), logits(load(base))
    assert (adapted - theirs).norm() < (plain - theirs).norm()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--base", "B"], "expected either --finetuned or --lora"),
        (["--base", "B", "--finetuned", "B", "--lora", "L"], "expected either --finetuned or"),
        (["--finetuned", "B"], "base: expected --base"),
        (["--base", "./nowhere", "--finetuned", "B"], "the directory ./nowhere does not exist"),
        (["--base", "B", "--finetuned", "B", "--dtype", "half"], "dtype: expected float64 or"),
        (["--lora", "B"], "adapter_config.json is missing"),
        (["--base", "B", "--finetuned", "B", "--rank", "0"], "rank: expected an integer >= 1"),
    ],
)
def test_bad_options(base, lora, words, message, tmp_path):
    places = {"B": base, "L": lora}
    words = [places.get(word, word) for word in words]
    text = invoke("compress", *words, "-o", tmp_path / "out", code=1)
    assert text.startswith("Error: ")
    assert message in text
    assert not (tmp_path / "out").exists()


def test_nothing_is_written_over_what_is_read(base, tuned, lora):
    for words in (
        ["compress", "--base", base, "--finetuned", tuned, "-o", tuned],
        ["compress", "--lora", lora, "-o", lora],
    ):
        assert "output: expected another directory" in invoke(*words, code=1)


def test_a_compression_s_card_has_its_errors(base, tuned, tmp_path):
    words = ["--base", base, "--finetuned", tuned, "--rank", 2, "--iterations", 1]
    text = invoke("compress", *words, "-o", tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    table = dict(re.findall(r"^\| (.+?) \| (.+) \|$", card, re.MULTILINE))
    assert float(table["error"]) > float(table["smallest error of a LoRA of rank 2"]) * 0.5 > 0.0
    assert f"all {table['error']}" in text
    assert "the full fine-tuning `tuned`" in card
    assert "of the squared change is in parameters that are neither" in card


def test_the_picture_explains_itself(monkeypatch):
    figures: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, _: figures.append(figure))
    model = torch.nn.Sequential(*(torch.nn.Linear(8, 8) for _ in range(3)))
    deltas = {str(i): torch.randn(8, 8) for i in range(3)}
    plot_errors(solver.fit_adapter(model, deltas, 2, 1, iterations=2), Path("errors.png"))
    (figure,) = figures
    assert figure.get_suptitle()
    (axes,) = figure.axes
    assert axes.get_ylabel() == "error / LoRA's minimum"
    told = [text.get_text() for text in axes.get_legend().get_texts()]
    assert told == ["RaSA", "LoRA, same rank"]


def test_files_that_cannot_or_should_not_be_written(base, tuned, tmp_path):
    out = tmp_path / "a" / "out"
    words = ["compress", "--base", base, "--finetuned", tuned, "--iterations", 1, "-o", out]
    with file_limit(4000):
        text = invoke(*words, code=1)
    assert f"Error: {out}: cannot be written: file too large" in text
    assert not list(tmp_path.iterdir())
    with file_limit(30_000):
        text = invoke(*words, "--rank", 1, code=1)
    assert f"Error: {out}: cannot be written" in text
    assert "what was written before is whole" in text  # the adapter is written, the picture is not
    assert rasa_ext.load_adapter(load(base), out)
    text = invoke(*words, code=1)
    assert f"output: expected a new folder or an empty one, but {out} holds files" in text
    invoke(*words, "--overwrite")
