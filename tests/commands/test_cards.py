"""Model cards of a run and of an import, and Trainer's own push."""

import re
from pathlib import Path

import pytest
import torch
import yaml
from trl import SFTConfig

import rasa_ext
from rasa_ext.commands.trainer import AdapterTrainer, dataset
from tests.helpers.adapter_folders import card, code, rows
from tests.helpers.adapters import same_adapters
from tests.helpers.cli import invoke, load, logits
from tests.helpers.finetuning import checkpoints_in, read_result
from tests.helpers.finetuning import run as finetune
from tests.helpers.hub import local_hub
from tests.helpers.tiny_lm import make_model, make_tokenizer, save_base, sums, write_jsonl


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A folder with a base, data and the output of a short run."""
    folder = tmp_path_factory.mktemp("anna")
    save_base(folder / "Tiny-LM")
    for name, each in (("train", sums(22)), ("test", sums(30)[22:])):
        write_jsonl(folder / f"{name}.jsonl", each)
    given = {"model": "Tiny-LM", "data": "train.jsonl", "eval_data": "test.jsonl", "output": "out"}
    paths = {name: str(folder / path) for name, path in given.items()}
    more = {"rank": 4, "lr": 3e-3, "max_steps": 10, "batch_size": 2, "grad_accum": 2, "seed": 5}
    finetune({**paths, **more})
    return folder


def test_a_run_s_card_has_its_data_choices_and_figures(run):
    text, summary = card(run / "out"), read_result(run / "out")
    table = rows(text)
    assert table["data"] == "`train.jsonl`, 22 examples"
    assert table["eval_data"] == "`test.jsonl`, 8 examples"
    assert table["steps"] == "10 of 10"
    assert (table["batch_size"], table["grad_accum"]) == ("2", "2")
    assert (table["lr"], table["seed"]) == ("0.003", "5")
    assert table["dtype of the base"] == "float32"
    assert table["trainable parameters"] == f"{summary['trainable']:,}"
    losses = f"{summary['first_loss']:.4f} -> {summary['last_loss']:.4f}"
    assert f"- training loss {losses}" in text
    held_out = f"{summary['eval_loss_before']:.4f} -> {summary['eval_loss']:.4f}"
    assert f"- held-out loss {held_out}" in text
    assert f"{summary['tokens_per_s']:,.0f} tokens/s" in text
    assert str(run) not in text
    assert "datasets" not in yaml.safe_load(text.split("---\n")[1])
    checkpoints = checkpoints_in(run / "out")
    assert checkpoints
    assert not any((folder / "README.md").exists() for _, folder in checkpoints)


def test_conversations_are_counted_with_their_answers(run, tmp_path):
    """The template marks no turns, so that each answer is a row."""
    turns = [{"role": role, "content": "a"} for role in ("user", "assistant") * 2]
    for name in ("a1", "a2"):
        write_jsonl(tmp_path / f"{name}.jsonl", [{"messages": turns}] * 3)
    words = [
        "--model",
        run / "Tiny-LM",
        "--data",
        tmp_path / "a*.jsonl",
        "--output",
        tmp_path / "o",
    ]
    text = invoke("finetune", *words, "--data", run / "train.jsonl", "--test-split", 0.25)
    table = rows(card(tmp_path / "o"))
    chats, answers = map(
        int, re.search(r"jsonl: (\d+) conversations, (\d+) answers,", text).groups()
    )
    assert f"--test-split 0.25: {28 - chats} conversations, {28 + 6 - answers} answers," in text
    assert chats == 21
    assert table["data"] == f"`a*.jsonl`, `train.jsonl`, {chats} conversations, {answers} answers"
    assert table["test_split"].startswith("0.25, 7 conversations")
    assert str(tmp_path) not in card(tmp_path / "o")


def test_no_file_of_a_run_that_is_pushed_has_a_path(run, tmp_path, monkeypatch):
    with local_hub(monkeypatch, tmp_path / "cache") as hub:
        invoke("push", run / "out", "me/sums", "--model", "owner/Tiny-LM")
        pushed = hub.files("me/sums")
    assert {
        "README.md",
        "adapter_config.json",
        "tokenizer.json",
        "loss.png",
    } <= pushed.keys()
    assert not [name for name, data in pushed.items() if str(run).encode() in data]


def test_an_export_says_what_its_adapter_s_card_said(run, tmp_path):
    text = invoke("export-lora", run / "out", "--output", tmp_path)
    assert f"rasa={tmp_path}" in text or f"{tmp_path.name}={tmp_path}" in text
    ours, its = rows(card(run / "out")), rows(card(tmp_path))
    for name in ("data", "steps", "lr"):
        assert its[name] == ours[name]
    assert str(run) not in card(tmp_path)
    assert "vllm serve BASE_FOLDER" in card(tmp_path)


def test_a_merged_model_s_card(run, tmp_path, monkeypatch):
    invoke("merge", run / "out", "--output", tmp_path / "merged")
    text = card(tmp_path / "merged")
    assert rows(text)["data"] == rows(card(run / "out"))["data"]
    assert rows(text)["base model"] == "`Tiny-LM`"
    namespace: dict = {}
    monkeypatch.chdir(tmp_path / "merged")
    exec(code(text), namespace)
    adapted = rasa_ext.load_adapter(load(run / "Tiny-LM"), run / "out")
    merged = namespace["model"].eval()
    torch.testing.assert_close(logits(merged), logits(adapted), rtol=1e-4, atol=1e-4)
    assert "vllm serve . --dtype float32" in text
    written = [*(tmp_path / "merged").iterdir()]
    assert not [path.name for path in written if str(run).encode() in path.read_bytes()]
    with local_hub(monkeypatch, tmp_path / "cache") as hub:
        rasa_ext.push_to_hub(tmp_path / "merged", "me/merged", base_model="owner/Tiny-LM")
        pushed = hub.files("me/merged")
    told = pushed["README.md"].decode()
    assert told.count('from_pretrained("me/merged")') == 2
    head = yaml.safe_load(told.split("---\n")[1])
    assert (head["base_model"], head["base_model_relation"]) == ("owner/Tiny-LM", "finetune")
    assert "model.safetensors" in pushed


def test_a_trainer_that_pushes(tmp_path, monkeypatch):
    """Trainer itself pushes during training, and at the end with the card."""
    with local_hub(monkeypatch, tmp_path / "cache") as hub:
        settings = {"max_steps": 2, "save_steps": 1, "push_to_hub": True, "bf16": False}
        arguments = SFTConfig(str(tmp_path / "sums"), **settings, report_to=[], disable_tqdm=True)
        turns = [{"messages": [{"role": "user", "content": "a"}]}] * 4
        trainer = AdapterTrainer(
            make_model(),
            arguments,
            adapter=rasa_ext.RasaConfig(rank=4),
            train_dataset=dataset(turns),
            processing_class=make_tokenizer(),
        )
        trainer.train()
        trainer.push_to_hub()
        pushed = hub.files("me/sums")
        assert hub.messages[-1] == "End of training"
        assert {"README.md", "adapter_config.json", "tokenizer.json"} <= pushed.keys()
        assert not [name for name in pushed if name.startswith("checkpoint-")]
        found = rasa_ext.load_adapter(make_model(), "me/sums")
    assert same_adapters(found, trainer.base_model)
