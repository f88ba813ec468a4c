"""Data: which tokens carry a loss, exactly, and what a bad line is told."""

from __future__ import annotations

import json
import re

import pytest
import torch
from tokenizers import processors

from rasa_ext.train import data
from rasa_ext.train.data import DataError, Example, parse_example, read_examples
from rasa_ext.train.encoding import IGNORE, Collator, encode, encode_all
from rasa_ext.train.evaluate import completion_loss
from tests.helpers.tiny_lm import make_model, make_tokenizer, sums, write_jsonl

USER = {"role": "user", "content": "what is 2 plus 2?"}
FOUR = {"role": "assistant", "content": "4"}
AGAIN = {"role": "user", "content": "plus 2?"}
SIX = {"role": "assistant", "content": "the answer\nis 6"}


def trained_text(row: dict, tokenizer) -> list[str]:
    """The stretches of text whose tokens carry a loss."""
    stretches, current = [], []
    for token, label in zip(row["input_ids"], row["labels"], strict=True):
        assert label in (IGNORE, token)
        if label != IGNORE:
            current.append(token)
        elif current:
            stretches.append(tokenizer.decode(current))
            current = []
    return [*stretches, tokenizer.decode(current)] if current else stretches


def messages(*turns: dict) -> Example:
    return parse_example({"messages": list(turns)}, "here")


def test_prompt_tokens_are_masked_and_completion_tokens_are_not():
    tokenizer = make_tokenizer()
    prompt, completion = "what is 2 plus 2? ", "the answer is 4"
    row = encode(Example("here", prompt, completion), tokenizer, 64)
    before = tokenizer(prompt)["input_ids"]
    learnt = [*tokenizer(completion)["input_ids"], tokenizer.eos_token_id]
    assert row["input_ids"] == before + learnt
    assert row["labels"] == [IGNORE] * len(before) + learnt


def test_a_prompts_last_space_does_not_swallow_the_completions_first_token():
    tokenizer = make_tokenizer()
    together = [tokenizer.decode([t]) for t in tokenizer("what is the answer")["input_ids"]]
    assert " the" in together
    row = encode(Example("here", "what is ", "the answer"), tokenizer, 64)
    assert trained_text(row, tokenizer) == ["the answer<|end|>"]


def test_special_tokens_of_the_tokenizer_itself():
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A <|end|>", special_tokens=[("<|im_start|>", 1), ("<|end|>", 0)]
    )
    row = encode(Example("here", "2 plus 2 is ", "4"), tokenizer, 64)
    assert row["input_ids"][0] == 1
    assert row["input_ids"].count(tokenizer.eos_token_id) == 1
    assert trained_text(row, tokenizer) == ["4<|end|>"]


def test_only_the_assistants_turns_are_trained_and_their_closing_token():
    tokenizer = make_tokenizer()
    row = encode(messages(USER, FOUR, AGAIN, SIX), tokenizer, 256)
    assert trained_text(row, tokenizer) == ["4<|im_end|>", "the answer\nis 6<|im_end|>"]
    whole = tokenizer.apply_chat_template([USER, FOUR, AGAIN, SIX], tokenize=False)
    assert tokenizer.decode(row["input_ids"]) == whole


def test_what_follows_the_last_assistant_turn_is_left_out():
    tokenizer = make_tokenizer()
    assert encode(messages(USER, FOUR, AGAIN), tokenizer, 256) == encode(
        messages(USER, FOUR), tokenizer, 256
    )


def test_without_a_chat_template_roles_are_spelt_out():
    tokenizer = make_tokenizer(chat_template=None)
    row = encode(messages(USER, FOUR, AGAIN, SIX), tokenizer, 256)
    assert tokenizer.decode(row["input_ids"]) == (
        "user: what is 2 plus 2?\nassistant: 4<|end|>\nuser: plus 2?\n"
        "assistant: the answer\nis 6<|end|>\n"
    )
    assert trained_text(row, tokenizer) == [" 4<|end|>", " the answer\nis 6<|end|>"]


def test_templates_that_rewrite_or_refuse_say_so():
    rewriting = make_tokenizer(
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
        "{{ m['content'] if loop.last else 'gone' }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    with pytest.raises(DataError, match=r"here: the chat template rewrites earlier turns"):
        encode(messages(USER, FOUR, AGAIN, SIX), rewriting, 256)
    refusing = make_tokenizer("{{ raise_exception('no system turn') }}")
    with pytest.raises(DataError, match=r"here: the chat template refuses .*no system turn"):
        encode(messages(USER, FOUR), refusing, 256)


def test_seq_len_cuts_the_end_and_drops_what_has_nothing_left_to_learn():
    tokenizer = make_tokenizer()
    examples = [Example("a", "what is ", "1234"), Example("b", "what is the answer is " * 9, "4")]
    whole = encode(examples[0], tokenizer, 64)
    cut = len(whole["input_ids"]) - 2
    encoded = encode_all(examples, tokenizer, cut)
    assert (len(encoded.rows), encoded.dropped, encoded.truncated) == (1, 1, 1)
    assert encoded.rows[0]["input_ids"] == whole["input_ids"][:cut]
    assert encoded.rows[0]["labels"] == whole["labels"][:cut]
    assert encoded.trained_tokens == sum(label != IGNORE for label in whole["labels"][:cut])
    with pytest.raises(DataError, match=r"seq_len: within 5 tokens none of the 1 examples"):
        encode_all(examples[1:], tokenizer, 5)


def test_collator_pads_on_the_right():
    batch = Collator(pad_token_id=9)(
        [
            {"input_ids": [1, 2, 3], "labels": [IGNORE, 2, 3]},
            {"input_ids": [4], "labels": [4]},
        ]
    )
    assert batch["input_ids"].tolist() == [[1, 2, 3], [4, 9, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[IGNORE, 2, 3], [4, IGNORE, IGNORE]]


def test_the_loss_is_the_mean_over_completion_tokens():
    model, tokenizer = make_model(), make_tokenizer()
    rows = encode_all([parse_example(row, "here") for row in sums(7)], tokenizer, seq_len=64).rows
    terms = []
    with torch.no_grad():
        for row in rows:
            logits = model(torch.tensor([row["input_ids"]])).logits[0].double()
            for i, label in enumerate(row["labels"][1:]):
                if label != IGNORE:
                    terms.append(-logits[i].log_softmax(-1)[label].item())
        batch = Collator(tokenizer.pad_token_id)(rows)
        ours = model(**batch).loss.item()
    expected = sum(terms) / len(terms)
    assert ours == pytest.approx(expected, rel=1e-5)
    for batch_size in (1, 3, 16):
        measured = completion_loss(model, rows, tokenizer.pad_token_id, batch_size)
        assert measured == pytest.approx(expected, rel=1e-5)


GOOD = json.dumps({"prompt": "a", "completion": "b"})
BAD_LINES = [
    ("{", "does not parse"),
    ("[1]", "expected an object with the strings 'prompt' and 'completion'"),
    ('{"prompt": "a"}', "'completion' is missing, got 'prompt'"),
    ('{"text": "a"}', "'prompt' is missing, got 'text'"),
    ('{"prompt": "a", "completion": 3}', "'completion': expected a string, got int 3"),
    ('{"prompt": "a", "completion": ""}', "'completion': expected some text"),
    ('{"messages": []}', "'messages': expected a list"),
    ('{"messages": ["hi"]}', "messages[0]: expected an object with 'role' and 'content'"),
    (
        json.dumps({"messages": [USER, {"role": "bot", "content": "x"}]}),
        "messages[1]: 'role': expected one of system, user, assistant, tool, got 'bot'",
    ),
    (
        json.dumps({"messages": [USER, {"role": "assistant", "content": None}]}),
        "messages[1]: 'content': expected a string, got NoneType",
    ),
    (json.dumps({"messages": [USER]}), "expected a turn of the assistant"),
]


@pytest.mark.parametrize(("line", "expected"), BAD_LINES)
def test_a_bad_line_names_file_line_and_what_was_expected(tmp_path, line, expected):
    path = tmp_path / "train.jsonl"
    path.write_text(f"{GOOD}\n\n{line}\n{GOOD}\n")
    with pytest.raises(DataError, match=re.escape(expected)) as caught:
        read_examples(str(path))
    assert str(caught.value).startswith(f"{path}, line 3: ")


def test_bytes_that_are_not_utf8(tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_bytes(GOOD.encode() + b'\n{"prompt": "\xff"}\n')
    with pytest.raises(DataError, match=r"line 2: expected UTF-8"):
        read_examples(str(path))


def test_blank_lines_and_a_byte_order_mark_are_fine(tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + f"{GOOD}\n\n  \n{GOOD}\n".encode())
    assert [example.where for example in read_examples(str(path))] == [
        f"{path}, line 1",
        f"{path}, line 4",
    ]


def test_files_that_are_not_there_or_empty(tmp_path):
    with pytest.raises(DataError, match=r"missing\.jsonl does not exist"):
        read_examples(str(tmp_path / "missing.jsonl"))
    with pytest.raises(DataError, match="got an empty file"):
        read_examples(str(write_jsonl(tmp_path / "empty.jsonl", [])))
    with pytest.raises(DataError, match="got the directory"):
        read_examples(str(tmp_path))


def test_a_hub_data_set_needs_the_datasets_library(monkeypatch):
    monkeypatch.setattr(data.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DataError, match=r"'some/set' is not a file; .*pip install datasets"):
        read_examples("some/set")
