"""The commands evaluate and generate for adapters, merged models and bases."""

import shutil
from pathlib import Path

import pytest
from peft import PeftModel
from typer.testing import CliRunner

import rasa_ext
from rasa_ext.commands import generate, measuring
from rasa_ext.commands.app import app
from rasa_ext.commands.measuring import by_pattern
from rasa_ext.commands.paths import trained_with_template
from tests.helpers.cli import invoke, load
from tests.helpers.finetuning import read_result
from tests.helpers.tiny_lm import make_model, make_tokenizer, save_base, sums, write_jsonl


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A base, two of its adapters, a LoRA, a merged model and held-out data."""
    folder = tmp_path_factory.mktemp("evaluate")
    base = save_base(folder / "base")
    write_jsonl(folder / "train.jsonl", sums(12))
    write_jsonl(folder / "test.jsonl", sums(20)[12:])
    for name, *others in (("one",), ("two", "--no-template", "--rank", 4)):
        words = ["--model", base, "--data", folder / "train.jsonl", "--output", folder / name]
        more = ["--eval-data", folder / "test.jsonl", "--max-steps", 6, "--lr", 1e-2]
        invoke("finetune", *words, *more, *others)
    invoke("export-lora", folder / "one", "--output", folder / "lora")
    invoke("merge", folder / "one", "--output", folder / "merged")
    return folder


@pytest.mark.parametrize("command", ["merge", "export-lora"])
def test_what_is_made_of_an_adapter_without_a_template_says_so(command, folder, tmp_path):
    texts = [invoke(command, folder / n, "--output", tmp_path / n) for n in ("one", "two")]
    assert ["trained without a chat template" in text for text in texts] == [False, True]


def test_how_an_adapter_is_asked_stays_with_it(folder, tmp_path):
    """In both front ends, and in an adapter that is trained on."""
    base = str(folder / "base")
    for name, template in (("one", True), ("two", False)):
        assert trained_with_template(folder / name) is template
        rasa_ext.save_adapter(rasa_ext.load_adapter(load(base), folder / name), tmp_path / "ours")
        PeftModel.from_pretrained(load(base), folder / name).save_pretrained(tmp_path / "peft")
        found = [trained_with_template(tmp_path / again) for again in ("ours", "peft")]
        assert found == [template] * 2
    words = ["--model", base, "--data", folder / "train.jsonl", "--max-steps", 1]
    words += ["--init-adapter", folder / "one", "--no-template", "--output", tmp_path / "on"]
    invoke("finetune", *words)
    assert trained_with_template(tmp_path / "on") is False


def test_conversations_without_a_template_are_asked_alike_in_every_form(tmp_path, monkeypatch):
    """finetune gives a tokenizer without a template a plain one, which is not the base's."""
    make_model().save_pretrained(tmp_path / "base")
    make_tokenizer(None).save_pretrained(tmp_path / "base")
    turns = [{"role": "user", "content": "what"}, {"role": "assistant", "content": "that"}]
    data = write_jsonl(tmp_path / "chats.jsonl", [{"messages": turns}] * 2)
    one, *others = (tmp_path / name for name in ("one", "merged", "lora"))
    invoke("finetune", "--model", tmp_path / "base", "--data", data, "--output", one, "--epochs", 1)
    for command, output in zip(("merge", "export-lora"), others, strict=True):
        invoke(command, one, "--output", output)
    asked = []
    monkeypatch.setattr(generate, "print_answer", lambda *given: asked.append(given[1:3]))
    invoke("generate", one, *others, "--prompt", "what")
    assert all(template for _, template in asked)
    texts = {each.apply_chat_template(turns, tokenize=False) for each, _ in asked}
    assert texts == {"user: what\nassistant: that<|end|>\n"}


def summary(folder: Path, name: str) -> dict:
    return read_result(folder / name)


def test_losses_are_those_of_finetune_whatever_the_form(folder, monkeypatch):
    loaded, load = [], measuring.load_model
    monkeypatch.setattr(
        measuring, "load_model", lambda name, dtype: loaded.append(name) or load(name, dtype)
    )
    names = ["one", "lora", "two", "base", "merged"]
    words = [*(folder / name for name in names), "--data", folder / "test.jsonl"]
    text = invoke("evaluate", *words, "--no-answers", "--batch-size", 3)
    found = {name: float(text.split(f"{folder / name} ")[-1].split()[0]) for name in names}
    one, two = summary(folder, "one"), summary(folder, "two")
    expected = dict.fromkeys(("one", "lora", "merged"), one["eval_loss"])
    expected |= {"two": two["eval_loss"], "base": one["eval_loss_before"]}  # two: no template
    assert found == pytest.approx(expected, abs=1e-4)
    assert loaded == [str(folder / "base"), str(folder / "merged")]


def test_exact_match_counts_what_a_rule_finds(folder, monkeypatch):
    def answered(model, tokenizer, prompts, *_, **__):
        assert all(prompt.endswith("<|im_start|>assistant\n") for prompt in prompts)
        return [f"so 1 and {i}" for i in range(len(prompts))]

    monkeypatch.setattr(measuring, "greedy_answers", answered)
    rows = [{"prompt": f"say {i}", "completion": f"is {i % 2}, {i}"} for i in range(4)]
    data = write_jsonl(folder / "answers.jsonl", rows)
    words = ["evaluate", folder / "base", "--data", data, "--show", 1]
    text = invoke(*words)
    assert "100.0%" in text
    assert "say 0 [is 0, 0]" in text
    assert "so 1 and 0" in text
    assert "50.0%" in invoke(*words, "--answer-pattern", r"(\d)(?=,| and)")
    assert "100.0%" in invoke(*words, "--limit", 2, "--answer-pattern", r"[01]$")
    text = invoke(*words, "--answer-pattern", "X=(.*)")
    assert "No exact match: some completions have no answer to match, by the rule X=(.*)" in text


def test_a_rule_takes_the_last_match():
    rule = by_pattern(r"#### *(.+)")
    assert rule("2 + 2\n#### 4\n#### 5 ") == "5"
    assert rule("4") is None
    assert by_pattern("[A-D]")("A or B") == "B"
    with pytest.raises(ValueError, match="answer_pattern: expected a regular expression, got"):
        by_pattern("(")


def test_plain_text_has_a_loss_alone_and_no_template(folder, monkeypatch):
    data = folder / "test.txt"
    data.write_text("what is 2?\nthe answer is 4\n")
    words = ["--model", folder / "base", "--data", data, "--eval-data", data, "--output"]
    invoke("finetune", *words, folder / "plain", "--max-steps", 1)
    loss = f"{summary(folder, 'plain')['eval_loss']:.4f}"
    assert f"{loss} -" in invoke("evaluate", folder / "plain", "--data", data)
    text = invoke("evaluate", folder / "plain", "--data", data, "--show", 1, code=1)
    assert "data: expected prompts and completions, or conversations, got plain text" in text
    given = []
    monkeypatch.setattr(generate, "print_answer", lambda *_: given.append(_))
    invoke("generate", folder / "plain", "--prompt", "what is")
    (_, _, template, *_), *_ = given
    assert template is False


def test_generate_answers_side_by_side(folder):
    prompts = ["--prompt", "what is 1 plus 7?", "--prompt", "what is 2?"]
    words = ["generate", folder / "one", folder / "base", *prompts, "--max-new-tokens", 5]
    text = invoke(*words)
    assert text.count("what is 1 plus 7?") == text.count("what is 2?") == 2
    model = rasa_ext.load_adapter(load(folder / "base"), folder / "one")
    asked = "<|im_start|>user\nwhat is 2?<|im_end|>\n<|im_start|>assistant\n"
    (answer,) = measuring.greedy_answers(model, make_tokenizer(), [asked], 5, 1)
    answer = " ".join(answer.split())
    assert answer
    assert f"what is 2? {answer}" in text.partition(f"{folder / 'base'} what")[0]


def test_what_a_template_says_steers_no_terminal(folder, tmp_path):
    shutil.copytree(folder / "base", tmp_path / "base")
    template = tmp_path / "base/chat_template.jinja"
    template.write_text("{{ raise_exception('\x1b[2J\x1b]0;title\x07 no user turn') }}")
    result = CliRunner().invoke(app, ["generate", str(tmp_path / "base"), "--prompt", "what"])
    assert result.exit_code == 1
    assert "Error: prompt: the chat template refuses" in result.output
    assert "[2J]0;title no user turn" in result.output
    assert "\x1b" not in result.output


def test_what_a_model_says_steers_no_terminal(capsys):
    tokenizer = make_tokenizer()
    tokenizer.decode = lambda *_, **__: "\x1b[2Jtwo\u009b\n"
    generate.print_answer(
        make_model(), tokenizer, False, 0, {"max_new_tokens": 2}, [{"content": "x"}]
    )
    out = capsys.readouterr().out
    assert "[2Jtwo\n" in out
    assert not {"\x1b", "\u009b"} & set(out)


def test_a_conversation_remembers_its_turns(folder, monkeypatch):
    heard = []
    monkeypatch.setattr(generate, "print_answer", lambda *_: heard.append(list(_[-1])) or "so?")
    words = ["generate", str(folder / "one"), "--system", "Be brief."]
    result = CliRunner().invoke(app, words, input="one\n\ntwo\n/quit\nthree\n")
    assert result.exit_code == 0, result.output
    assert len(heard) == 2
    assert [turn["content"] for turn in heard[1]] == ["Be brief.", "one", "so?", "two"]


def test_sampling_follows_its_seed(folder):
    words = ["generate", folder / "base", "--prompt", "what is", "--max-new-tokens", 8]
    words += ["--temperature", 5, "--no-template"]
    texts = [invoke(*words, "--seed", seed) for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
