"""Data: exactly which tokens have a loss, and the errors for bad lines."""

import bz2
import csv
import gzip
import io
import json
import lzma
import signal
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from rich.console import Console
from torch.nn.functional import cross_entropy
from trl import SFTConfig

from rasa_ext.commands import data
from rasa_ext.commands.data import DataError, read_examples
from rasa_ext.commands.shown import CLOSE, OPEN, describe_rows, marked, show_example
from rasa_ext.commands.trainer import IGNORE, AdapterTrainer, dataset
from tests.helpers.tiny_lm import CHATML, make_model, make_tokenizer, sums, write_jsonl

USER = {"role": "user", "content": "what is 2 plus 2?"}
FOUR = {"role": "assistant", "content": "4"}
AGAIN = {"role": "user", "content": "plus 2?"}
SIX = {"role": "assistant", "content": "the answer\nis 6"}

# CHATML with marked assistant turns, like TRL's training templates.
MARKED = CHATML.replace(
    "{{ m['content'] }}<|im_end|>\n",
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}<|im_end|>"
    "{% endgeneration %}{% else %}{{ m['content'] }}<|im_end|>{% endif %}\n",
)


def trainer(examples, tokenizer, directory, template=True, **options) -> AdapterTrainer:
    """Return a trainer like the one of `finetune`."""
    (rows,), marks = data.rows_for_sft([examples], tokenizer, template)
    settings = {"max_length": 256, "bf16": False, "use_cpu": True, "report_to": "none", **options}
    return AdapterTrainer(
        make_model(),
        SFTConfig(str(directory), assistant_only_loss=marks, **settings),
        train_dataset=dataset(rows),
        processing_class=tokenizer,
    )


def prepared(*args, **options):
    """Return the rows that the trainer uses."""
    return trainer(*args, **options).train_dataset


def bracketed(rows, tokenizer) -> list[str]:
    """Return the rows' texts, with what is trained in brackets."""
    for row in rows:
        for token, label in zip(row["input_ids"], row["labels"], strict=True):
            assert label in (IGNORE, token)
    parts = (marked(row, tokenizer) for row in rows)
    return ["".join(f"[{text}]" if trained else text for trained, text in row) for row in parts]


def messages(*turns: dict) -> dict:
    return {"messages": list(turns)}


def pair(prompt: str, completion: str) -> dict:
    return {"prompt": prompt, "completion": completion}


ASKED = "<|im_start|>user\nwhat is 2 plus 2?<|im_end|>\n<|im_start|>assistant\n"
AGAIN_ASKED = "<|im_start|>user\nplus 2?<|im_end|>\n<|im_start|>assistant\n"
IN_ONE_ROW = f"{ASKED}[4<|im_end|>]{AGAIN_ASKED}[the answer\nis 6<|im_end|>]"
TURNS = messages(USER, FOUR, AGAIN, SIX)
ROWS = {
    "one answer": (CHATML, pair("what is 2 plus 2?", "4"), [f"{ASKED}[4<|im_end|>\n]"]),
    "no template": (None, pair("2 plus 2?\n", "it is 4"), ["2 plus 2?\n[it is 4<|end|>]"]),
    # What follows the last answer is left out.
    "a turn more": (CHATML, messages(USER, FOUR, AGAIN), [f"{ASKED}[4<|im_end|>\n]"]),
    "marked turns": (MARKED, TURNS, [IN_ONE_ROW.replace("<|im_end|>\n", "<|im_end|>")]),
    "turns that no template marks": (
        CHATML,
        TURNS,
        [
            f"{ASKED}[4<|im_end|>\n]",
            f"{ASKED}4<|im_end|>\n{AGAIN_ASKED}[the answer\nis 6<|im_end|>\n]",
        ],
    ),
    "turns and no template": (
        None,
        TURNS,
        [
            "user: what is 2 plus 2?\nassistant:[ 4<|end|>]\nuser: plus 2?\n"
            "assistant:[ the answer\nis 6<|end|>]\n"
        ],
    ),
}
"""Chat template, example, and its rows, with what is trained in brackets."""


@pytest.mark.parametrize(("template", "example", "rows"), ROWS.values(), ids=ROWS)
def test_what_is_trained(template, example, rows, tmp_path):
    tokenizer = make_tokenizer(template)
    assert bracketed(prepared([example], tokenizer, tmp_path), tokenizer) == rows


def test_without_the_template_both_texts_are_joined_as_they_stand(tmp_path):
    tokenizer, example = make_tokenizer(), pair("2 plus 2?\n", "it is 4")
    rows = prepared([example], tokenizer, tmp_path, template=False)
    assert bracketed(rows, tokenizer) == ["2 plus 2?\n[it is 4<|end|>]"]


LOOPS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"


TEMPLATES = [
    (LOOPS, "more than 0.2 s"),
    ("{{ ().__class__.__base__.__subclasses__() }}", "access to attribute"),
    ("{{ 'x' * 10**15 }}", "MemoryError"),
]


@pytest.mark.parametrize(("template", "said"), TEMPLATES)
def test_templates_that_do_not_end_or_break_in_are_refused(template, said, monkeypatch):
    monkeypatch.setattr(data, "SECONDS", 0.2)
    before = signal.getsignal(signal.SIGALRM)
    with pytest.raises(DataError, match=rf"^prompt: the chat template refuses .*{said}"):
        data.templated(make_tokenizer(template), [USER], "prompt")
    with pytest.raises(DataError, match=rf"^data: the chat template refuses .*{said}"):
        data.questions([messages(USER, FOUR)], make_tokenizer(template), True)
    assert signal.getsignal(signal.SIGALRM) is before
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)


def test_data_sets_are_brought_into_one_form():
    """The trainer has one setting for both sets; an example with several turns decides it."""
    tokenizer = make_tokenizer(MARKED)
    sets = [[pair("x", "y")], [messages(USER, FOUR, AGAIN, SIX)]]
    rows, marks = data.rows_for_sft(sets, tokenizer, True)
    assert marks
    assert [list(row) for some in rows for row in some] == [["messages"], ["messages"]]


def test_templates_that_refuse_say_so_and_messages_need_one():
    refusing = make_tokenizer("{{ raise_exception('no system turn') }}")
    with pytest.raises(DataError, match=r"data: the chat template refuses .*no system turn"):
        data.rows_for_sft([[messages(USER, FOUR)]], refusing, True)
    with pytest.raises(DataError, match=r"template: --no-template is for .*got messages"):
        data.rows_for_sft([[messages(USER, FOUR)]], make_tokenizer(), False)


def said(rows, given: int, seq_len: int, packing: bool = False) -> str:
    text = io.StringIO()
    console = Console(file=text, width=200)
    describe_rows(f"d: {given} examples", given, rows, seq_len, packing, console)
    return text.getvalue()


def test_seq_len_cuts_the_end_and_drops_what_has_nothing_left_to_learn(tmp_path):
    tokenizer = make_tokenizer()
    examples = [pair("what is ", "1234"), pair("what is the answer is " * 9, "4")]
    (whole, _) = prepared(examples, tokenizer, tmp_path, template=False)
    cut = len(whole["input_ids"]) - 2
    rows = prepared(examples, tokenizer, tmp_path, template=False, max_length=cut)
    assert len(rows) == 1
    assert rows[0]["input_ids"] == whole["input_ids"][:cut]
    assert rows[0]["labels"] == whole["labels"][:cut]
    count = sum(label != IGNORE for label in whole["labels"][:cut])
    text = said(rows, 2, cut)
    assert f"2 examples, {count} tokens to learn" in text
    assert f"--seq-len {cut}: 1 examples have no completion token" in text
    assert "1 more reach it and may be cut" in text
    rows = prepared(examples[1:], tokenizer, tmp_path, template=False, max_length=5)
    with pytest.raises(DataError, match=r"seq_len: none of the 1 examples .* within 5 tokens"):
        said(rows, 1, 5)


def test_the_first_example_is_shown_with_its_trained_part_marked(tmp_path):
    tokenizer, text = make_tokenizer(), io.StringIO()
    examples = [pair(f"[bold]{'a' * 500}the end", "4")]
    (row,) = prepared(examples, tokenizer, tmp_path, max_length=2048)
    show_example(row, tokenizer, Console(file=text, width=2000))
    shown = text.getvalue()
    assert f"the end<|im_end|>\n<|im_start|>assistant\n{OPEN}4<|im_end|>\n{CLOSE}" in shown
    assert "<|im_start|>user\n[bold]aaa" in shown
    assert "aaa [...] aaa" in shown


def test_the_loss_is_the_mean_over_completion_tokens_whatever_the_batch(tmp_path):
    losses = []
    for size in (1, 3):
        made = trainer(sums(7), make_tokenizer(), tmp_path, per_device_eval_batch_size=size)
        losses.append(made.evaluate(made.train_dataset)["eval_loss"])
    terms, model = [], make_model()
    for row in made.train_dataset:
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"])[1:]
        logits = model(ids).logits[0, :-1].double()
        trained = labels != IGNORE
        terms.append(cross_entropy(logits[trained], labels[trained], reduction="none"))
    assert losses == pytest.approx([torch.cat(terms).mean().item()] * 2, rel=1e-5)


@pytest.mark.parametrize("accumulated", [None, 20])
def test_logits_of_trained_tokens_alone_give_trl_s_loss(accumulated, tmp_path):
    made = trainer(sums(5), make_tokenizer(), tmp_path)
    assert made._compacts
    batch = made.data_collator(list(made.train_dataset))
    found = []
    for compact in (True, False):
        made._compacts = compact
        loss = made.compute_loss(made.model, dict(batch), num_items_in_batch=accumulated)
        found.append((loss, torch.autograd.grad(loss, made.model.model.norm.weight)[0]))
    torch.testing.assert_close(*found)


def test_a_packed_example_sees_only_itself(tmp_path):
    examples, tokenizer = sums(6), make_tokenizer()
    plain = trainer(examples, tokenizer, tmp_path)
    packed = trainer(examples, tokenizer, tmp_path, packing=True, max_length=128)
    assert len(packed.train_dataset) < len(plain.train_dataset)
    losses = []
    for made in (plain, packed):
        batch = made.data_collator(list(made.train_dataset))
        losses.append(made.compute_loss(made.model, batch).item())
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    text = said(packed.train_dataset, 6, 128, packing=True)
    assert f"6 examples in {len(packed.train_dataset)} rows" in text


GOOD = json.dumps({"prompt": "a", "completion": "b"})


def turns(*each: object) -> str:
    return json.dumps({"messages": [USER, *each]})


def called(function: object) -> dict:
    return {"role": "assistant", "tool_calls": [{"function": function}]}


WRONG_LINES = {
    "{'prompt': 'a'}": ': expected JSON, which quotes by ", got single quotes.',
    "a line of text": ": expected JSON, one value a line or an array, but got Expecting value",
    "[" * 100_000: ": expected JSON, one value a line or an array, but got maximum recursion",
    f'{{"prompt": {"1" * 5000}}}': ": expected JSON, one value a line or an array, but got Exceeds",
    '{"prompt": "a", "completion": null}': ", 'completion': expected text, got nothing.",
    '{"prompt": "a", "completion": " \\n"}': ", 'completion': expected text, got blanks.",
    turns({**FOUR, "weight": 0}): ", turn 2, 'weight': expected 1, got 0: every answer is trained",
    "[1]": ": expected an object, got 1.",
    "{}": ": expected the key 'prompt', got none; --prompt-field and --completion-field set",
    '{"prompt": "a"}': ": expected the key 'completion', got 'prompt'; --prompt-field",
    '{"text": "a", "prompt": "b"}': ": expected the key 'completion', got 'text', 'prompt'; ",
    '{"prompt": "a", "completoin": "b"}': ": expected the key 'completion', got 'completoin'; ren",
    '{"prompt": "a", "chosen": "b"}': "'rejected', which are for `rasa-ext dpo`.",
    '{"instruction": "a", "output": "b"}': "got Alpaca's; pass --prompt-field instruction,",
    json.dumps(USER): ": expected the key 'prompt', got 'role', 'content'; --prompt-field",
    '{"prompt": "a", "completion": 3}': ", 'completion': expected text, got 3.",
    '{"prompt": "a", "completion": ""}': ", 'completion': expected text, got an empty string.",
    '{"text": ""}': ", 'text': expected text, got an empty string.",
    '{"messages": "user: a"}': ", 'messages': expected a list, got \"user: a\".",
    '{"messages": []}': ", 'messages': expected the assistant's turn after another, got none.",
    turns(): ", 'messages': expected the assistant's turn after another, got user.",
    json.dumps({"messages": [FOUR]}): ", 'messages': expected the assistant's turn after another, "
    "got assistant.",
    turns("hi"): ", 'messages', turn 2: expected an object, got \"hi\".",
    turns({"content": "4"}): ", 'messages', turn 2, 'role': expected text, got nothing.",
    turns({"role": "assistant"}): ", 'messages', turn 2, 'content': expected text, got nothing.",
    turns({"role": "assistant", "content": ["4"]}): ", turn 2, 'content': expected an object, got",
    turns({"role": "assistant", "content": [{"type": "image"}]}): ", 'content', 'text': expected "
    "text, got nothing.",
    turns(called("add")): ", turn 2, 'tool_calls', 'function': expected an object, got \"add\".",
    turns(called({"arguments": {}})): ", 'tool_calls', 'name': expected text, got nothing.",
    turns(called({"name": "f", "arguments": "a"})): ", 'arguments': expected an object, got \"a\".",
    json.dumps({**json.loads(turns(FOUR)), "tools": "add"}): ", 'tools': expected a list, got",
    '{"conversations": [{"from": "human", "value": "a"}, {"from": "bot", "value": "b"}]}': ", "
    "'conversations', turn 2, 'from': expected human, gpt, system, user, assistant, tool, got",
}
"""What is wrong, and what is said after the place."""


def answer(line: str, path: Path) -> str:
    path.write_text(f"{GOOD}\n\n{line}\n{GOOD}\n")
    with pytest.raises(DataError) as caught:
        read_examples(str(path))
    return str(caught.value)


@pytest.mark.parametrize("line", WRONG_LINES, ids=lambda line: line[:80])
def test_a_wrong_line_is_answered_with_its_place_and_key(tmp_path, line):
    said = answer(line, tmp_path / "train.jsonl")
    place = f"{tmp_path / 'train.jsonl'}, line 3"
    assert said.startswith(place)
    assert WRONG_LINES[line] in said
    assert len(said) - len(place) < 160


def test_no_two_mistakes_have_one_answer(tmp_path):
    assert len({answer(line, tmp_path / "train.jsonl") for line in WRONG_LINES}) == len(WRONG_LINES)


def test_blank_lines_and_a_byte_order_mark_are_fine(tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + f"{GOOD}\n\n  \n{GOOD}\n".encode())
    assert read_examples(str(path)) == [pair("a", "b")] * 2


FIELDS = [
    ({"asked": "Add.", "given": "2, 2"}, "Add.\n\n2, 2"),
    ({"asked": "Add 2 and 2.", "given": ""}, "Add 2 and 2."),
]


@pytest.mark.parametrize(("row", "prompt"), FIELDS)
@pytest.mark.parametrize("comma", [", ", ","])
def test_fields_of_other_names(row, prompt, comma, tmp_path):
    path = write_jsonl(tmp_path / "data.jsonl", [{**row, "answer": "4"}])
    assert read_examples(str(path), f"asked{comma}given", "answer") == [pair(prompt, "4")]
    assert read_examples(str(path), "asked", "answer") == [pair(row["asked"], "4")]


def write_data(path: Path, rows: list[dict]) -> Path:
    if path.suffix in (".csv", ".tsv"):
        with path.open("w", newline="", encoding="utf-8-sig") as file:
            dialect = "excel-tab" if path.suffix == ".tsv" else "excel"
            writer = csv.DictWriter(file, list(rows[0]), dialect=dialect)
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".parquet":
        Dataset.from_list(rows).to_parquet(path)
    elif path.suffix == ".json":
        path.write_text("\ufeff\n" + json.dumps(rows, indent=1))
    else:
        path.write_text("".join(f"{row['text']}\n\n" for row in rows))
    return path


def test_several_files_and_patterns_are_read_in_order(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("b1", "a2", "a1", "a[1]"):
        write_jsonl(tmp_path / f"{name}.jsonl", [pair(name, "x")])
    found = read_examples(["b1.jsonl", "a?.jsonl", "a[1].jsonl"])
    assert [row["prompt"] for row in found] == ["b1", "a1", "a2", "a[1]"]


def test_long_fields_a_lost_suffix_and_the_home_directory(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    long = "word " * 40_000
    (tmp_path / "d.csv").write_text(f"text\n{long}\n")
    (tmp_path / "d.jsonl").write_bytes(gzip.compress(GOOD.encode()))
    assert read_examples(["~/d.csv", "~/d.jsonl"]) == [{"text": long}, pair("a", "b")]


def test_a_file_counts_once(tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_text(GOOD)
    for again in (str(path), str(tmp_path / "d*.jsonl")):
        with pytest.raises(DataError, match=r"^data: expected every file once, but .* named twice"):
            read_examples([str(path), again])


def test_json_may_be_packed_and_is_read_as_it_stands(tmp_path):
    """Objects over several lines, and an array, though the name says a line each."""
    rows = [pair("a", "b"), pair("c", "d")]
    forms = ["\n".join(json.dumps(row, indent=1) for row in rows), json.dumps(rows)]
    for text in forms:
        (tmp_path / "d.jsonl.gz").write_bytes(gzip.compress(text.encode()))
        (tmp_path / "d.jsonl").write_text(text)
        for name in ("d.jsonl", "d.jsonl.gz"):
            assert read_examples(str(tmp_path / name)) == rows


def test_a_part_is_held_out_at_random():
    rows = sums(20)
    learnt, held_out = data.split(rows, 0.2, seed=1)
    assert len(held_out) == 4
    assert sorted(map(str, learnt + held_out)) == sorted(map(str, rows))
    assert held_out != rows[:4]
    assert data.split(rows, 0.2, seed=1) == (learnt, held_out)
    assert data.split(rows, 0.2, seed=2) != (learnt, held_out)
    with pytest.raises(DataError, match=r"test_split: expected rows on both sides, got 0 of 20"):
        data.split(rows, 0.01, seed=1)


TOOL = {"type": "function", "function": {"name": "add", "parameters": {}}}
CALLS = CHATML.replace(
    "{{ m['content'] }}",
    "{{ m['content'] }}{% for c in m['tool_calls'] or [] %}{{ c.function.name }}"
    "({{ c.function.arguments | tojson }}){% endfor %}",
)


def test_tool_calls_and_tools_reach_the_template(tmp_path):
    """Arguments of one name may have several types, and may be JSON, as OpenAI writes them."""
    answer = {"role": "tool", "content": "4"}
    first = messages(USER, called({"name": "add", "arguments": {"a": 2}}), answer, FOUR)
    chats = [
        {**first, "tools": json.dumps([TOOL])},
        messages(USER, called({"name": "add", "arguments": '{"a": "2"}'})),
    ]
    path = write_jsonl(tmp_path / "d.jsonl", chats)
    tokenizer = make_tokenizer(
        "{% for t in tools or [] %}{{ t.function.name }}{% endfor %}" + CALLS
    )
    rows = bracketed(prepared(read_examples(str(path)), tokenizer, tmp_path), tokenizer)
    assert rows[0].startswith("add<|im_start|>user")
    assert [row.partition("[")[2] for row in rows] == [
        'add({"a": 2})<|im_end|>\n]',
        "4<|im_end|>\n]",
        'add({"a": "2"})<|im_end|>\n]',
    ]
    with pytest.raises(DataError, match=r"data: the chat template leaves out the call .* 'add'"):
        prepared(read_examples(str(path)), make_tokenizer(CHATML), tmp_path)


def test_the_text_of_content_parts_is_read(tmp_path):
    parts = [{"type": "text", "text": "what is "}, {"type": "text", "text": "2 plus 2?"}]
    path = write_jsonl(tmp_path / "d.jsonl", [messages({**USER, "content": parts}, FOUR)])
    assert read_examples(str(path)) == [messages(USER, FOUR)]


@pytest.mark.parametrize("suffix", ["csv", "tsv", "parquet", "json"])
def test_files_of_other_formats_have_the_same_rows(suffix, tmp_path):
    """Numbers in a CSV stay text."""
    rows = [pair("what, 1?", "007"), pair("two\nlines", "NA")]
    assert read_examples(str(write_data(tmp_path / f"d.{suffix}", rows))) == rows


@pytest.mark.parametrize("suffix", ["parquet", "json"])
def test_conversations_of_sharegpt_become_messages(suffix, tmp_path):
    turns = [("system", "brief"), ("human", "1?"), ("gpt", "2"), ("user", "3?"), ("assistant", "4")]
    given = [{"id": "x", "conversations": [{"from": who, "value": text} for who, text in turns]}]
    names = {"human": "user", "gpt": "assistant"}
    expected = messages(*({"role": names.get(w, w), "content": text} for w, text in turns))
    assert read_examples(str(write_data(tmp_path / f"d.{suffix}", given))) == [expected]


@pytest.mark.parametrize("suffix", ["txt", "csv", "json", "parquet"])
def test_plain_text_is_learnt_whole_without_a_template(suffix, tmp_path):
    rows = [{"text": "  what is 2, 3?"}, {"text": "the answer"}]
    examples = read_examples(str(write_data(tmp_path / f"d.{suffix}", rows)))
    assert examples == rows
    tokenizer, text = make_tokenizer(), io.StringIO()
    made = prepared(examples, tokenizer, tmp_path)
    assert bracketed(made, tokenizer) == [f"[{row['text']}<|end|>]" for row in rows]
    show_example(made[0], tokenizer, Console(file=text, width=200), plain=True)
    assert "first example, plain text without a chat template; trained text" in text.getvalue()
    assert f"{OPEN}  what is 2, 3?<|end|>{CLOSE}" in text.getvalue()


def test_plain_text_stays_apart_from_questions_and_answers():
    with pytest.raises(DataError, match=r"data: expected all rows, .* got 1 texts among 2 rows"):
        data.rows_for_sft([[{"text": "a"}], [pair("a", "b")]], make_tokenizer(), True)
    with pytest.raises(DataError, match=r"data: expected prompts and completions, or .* got plain"):
        data.questions([{"text": "a"}], make_tokenizer(), True)


LATIN = GOOD.encode() + b'\n{"prompt": "caf\xe9"}\n'
BAD_FILES = [
    ("d.json", '[{"text": "a"},\n{"text" "b"}]', r"line 2: expected JSON, .*: line 2 column 9"),
    ("d.json", '[{"text": "a"},\n\n3]', "d.json, line 3: expected an object, got 3."),
    ("d.json", '[{"text": "a"},\n', "d.json, line 2: expected ']', got the end"),
    ("d.json", '[{"text": "a"}\n{"text": "b"}]', "d.json, line 1: expected ',' or ']'"),
    ("d.json", '{"text": 3}', "d.json, line 1, 'text': expected text, got 3."),
    ("d.csv", "prompt,completion\na,b\nc\n", "d.csv, line 3, 'completion': expected text, got no"),
    ("d.csv", "What is 2?,2\na,b\n", "the key 'prompt', got 'What is 2.', '2' in line 1, which na"),
    ("d.csv", "prompt,completion\na,b,c\n", "d.csv, line 2: expected 2 fields, as in line 1, got"),
    ("d.csv", 'prompt,completion\na,"b', r"d.csv: no .csv that parses: unexpected end of data"),
    ("d.csv", "prompt;completion\na;b", "line 1: expected columns apart by ',', got 'prompt;comp"),
    ("d.csv", "prompt,completion\n", "expected at least one example"),
    ("d.parquet", "prompt", "data: '.*d.parquet' is no Parquet file that can be loaded: "),
    ("d.txt", "\n \n", "expected at least one example"),
    ("d.jsonl", "", "got an empty file"),
    ("d.jsonl.gz", GOOD, "d.jsonl.gz: no .gz that parses: Not a gzipped file"),
    (
        "d.jsonl.gz",
        gzip.compress(GOOD.encode(), mtime=0)[:-9],
        "no .gz that parses: Compressed file ended",
    ),
    ("d.xlsx", b"PK\3\4\0", "d.xlsx: expected text, got a spreadsheet or a zip; save it as .csv."),
    ("d.pdf", b"%PDF-1.7", "d.pdf: expected text, got a PDF; save its text as .txt."),
    ("d.jsonl.zst", b"\x28\xb5\x2f\xfd\xe9", "got a file of zstd; unpack it by zstd -d."),
    ("d.jsonl.bz2", bz2.compress(GOOD.encode()), "got a file of bzip2; unpack it by bunzip2."),
    ("d.jsonl.xz", lzma.compress(GOOD.encode()), "got a file of xz; unpack it by unxz."),
    ("d.arrow", b"ARROW1\0\0\xe9", "got Arrow; save it as .parquet."),
    ("d.jsonl", b"PAR1\xe9", "got Parquet; name it .parquet."),
    ("d.yaml", "- prompt: a\n", "line 1: expected JSON, one value a line or an array, but got Exp"),
    ("d.jsonl", LATIN, "line 2: expected UTF-8; try iconv -f latin1 -t utf-8."),
    ("d.jsonl", b'{"text": "\x93a\x94"}', "line 1: expected UTF-8; try iconv -f cp1252 -t utf-8."),
    ("d.jsonl", GOOD.encode("utf-16"), "line 1: expected UTF-8; try iconv -f utf-16"),
    ("missing.jsonl", None, r"data: expected files .*missing\.jsonl does not exist"),
    ("d*.jsonl", None, r"data: expected files .*d\*\.jsonl does not exist"),
    ("", None, "is a directory"),
    ("some/set", None, "'some/set' is neither a file nor a hub data set that can be loaded"),
]


@pytest.mark.parametrize(("name", "content", "message"), BAD_FILES)
def test_files_that_do_not_parse_or_are_none(name, content, message, tmp_path):
    if content is not None:
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=message):
        read_examples(name if "/" in name else str(tmp_path / name))
