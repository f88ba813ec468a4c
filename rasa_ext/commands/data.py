"""Training data: rows of files or of hub data sets, in the formats that TRL takes.

A row for sft is ``{"prompt": str, "completion": str}``, ``{"text": str}`` or ``{"messages":
[{"role": ..., "content": ...}, ...]}``. The data may have other names for prompt and completion,
and may have conversations in ShareGPT's format. Conversations may call tools, which a row lists as
``tools``. Rows for other tasks are in ``TASK_KEYS``; their prompts and answers are texts or turns.
"""

from __future__ import annotations

import contextlib
import csv
import difflib
import functools
import glob
import gzip
import importlib
import io
import json
import os
import random
import re
import signal
import threading
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

__all__ = ["questions", "read_examples"]

Row = dict[str, Any]
Turns = list[dict[str, Any]]

# For conversations if the tokenizer has no chat template: one line "role: content" per turn.
PLAIN_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] + ':' }}{% if message['role'] == 'assistant' "
    "%}{% generation %}{{ ' ' + message['content'] + eos_token }}{% endgeneration %}{% else %}"
    "{{ ' ' + message['content'] }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)
SECONDS = 5.0
"""Time for the chat template over one conversation."""
_SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".txt")
_ROLES = {"human": "user", "gpt": "assistant"}
_ROLES |= {name: name for name in ("system", "user", "assistant", "tool")}
"""Roles in ShareGPT's format, and what chat templates call them."""
_MORE, _COMMA, _END = (re.compile(rf"\s*{sign}") for sign in (r"\S", ",", r"\]"))
_KEYS = {"from": "role", "value": "content"}  # of ShareGPT
_KINDS: dict[type, str] = {str: "text", list: "a list", dict: "an object"}
_OTHERS = {
    b"PK\3\4": "a spreadsheet or a zip; save it as .csv",
    b"%PDF": "a PDF; save its text as .txt",
    b"\x28\xb5\x2f\xfd": "a file of zstd; unpack it by zstd -d",
    b"BZh": "a file of bzip2; unpack it by bunzip2",
    b"\xfd7zXZ": "a file of xz; unpack it by unxz",
    b"PAR1": "Parquet; name it .parquet",
    b"ARROW1": "Arrow; save it as .parquet",
}
"""Formats that are not text, by their first bytes."""


TASK_KEYS = {
    **{"dpo": ("chosen", "rejected"), "reward": ("chosen", "rejected")},
    **{"kto": ("prompt", "completion", "label"), "grpo": ("prompt",), "rloo": ("prompt",)},
}
"""What a row must have for another task than sft. Pairs may also have a prompt, and prompts what
reward functions read."""


class DataError(ValueError):
    """Invalid data. The message names the place and the expected form."""


def files_of(sources: str | Sequence[str], option: str) -> list[str]:
    """Return the files and hub data sets that an option names; patterns become files, sorted.

    Raises DataError, naming the option, for a path or a pattern without a file, and for a file that
    is named twice.
    """
    files: list[str] = []
    for source in [sources] if isinstance(sources, str) else sources:
        source = os.path.expanduser(source)
        there = [source] if Path(source).exists() else sorted(glob.glob(source))
        named = [name for name in there if Path(name).is_file()]
        local = source.removesuffix(".gz").endswith(_SUFFIXES) or source.startswith((".", "/", "~"))
        if not named and (local or Path(source).is_dir() or glob.has_magic(source)):
            what = "does not exist"
            if Path(source).is_dir():
                what = f"is a directory; name the files in it, such as {source}/*.jsonl"
            raise DataError(f"{option}: expected files or a hub data set, but {source} {what}.")
        for name in named or [source]:
            if name in files:
                raise DataError(f"{option}: expected every file once, but {name} is named twice.")
            files.append(name)
    return files


def read_examples(
    source: str | Sequence[str],
    prompt_field: str = "prompt",
    completion_field: str = "completion",
    option: str = "data",
    task: str = "sft",
    **of_hub: Any,
) -> list[Row]:
    """Read the rows of files, or of hub data sets' splits ``train``.

    Args:
        source: a file of JSON Lines, a JSON array, CSV, TSV, Parquet, or text with one example per
            line, which may be packed (.gz); a pattern such as ``train*.jsonl``; a data set's name;
            or several of them; or a mixture of data sets, as a list of TRL's ``DatasetConfig``.
        prompt_field: name of the prompt's field. With several names, separated by commas, the
            fields are joined by an empty line.
        completion_field: name of the completion's field.
        option: the option that set ``source``, for errors.
        task: what the rows are for: sft, dpo, kto, reward, grpo or rloo.
        of_hub: arguments of ``datasets.load_dataset`` for hub data sets, such as ``split``.

    Returns:
        One row per example, with the keys ``prompt`` and ``completion``, ``messages`` or ``text``;
        for another task, those of ``TASK_KEYS``.

    Raises:
        ValueError: a row is invalid; the message names the line, the key and what was expected. Or
            ``source`` is neither a file nor a data set that loads; the message names the option.

    Example:
        >>> from rasa_ext.commands.data import read_examples
        >>> with open("data.jsonl", "w") as file:
        ...     _ = file.write('{"question": "1 + 1", "completion": "2"}')
        >>> read_examples("data.jsonl", prompt_field="question")
        [{'prompt': '1 + 1', 'completion': '2'}]
    """
    names = [name.strip() for name in prompt_field.split(",")]
    row_of: Any = _row if task == "sft" else functools.partial(_task_row, task)
    if isinstance(source, list) and source and isinstance(source[0], dict):
        mixed = enumerate(_loaded(source, option, of_hub))
        return [row_of(f"datasets, row {i}", row, names, completion_field) for i, row in mixed]
    rows: list[Row] = []
    for name in files_of(source, option):
        before = len(rows)
        try:
            rows += (row_of(*p, names, completion_field) for p in _values(name, option, of_hub))
        except (csv.Error, gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise DataError(f"{name}: no {Path(name).suffix} that parses: {error}.") from None
        if len(rows) == before:
            raise DataError(f"{name}: expected at least one example, got an empty file.")
    return rows


def _values(source: str, option: str, of_hub: dict[str, Any]) -> Iterable[tuple[str, Any]]:
    """Return every value with its place."""
    path = Path(source)
    kind = path.with_suffix("").suffix if path.suffix == ".gz" else path.suffix
    if not path.is_file() or kind == ".parquet":
        return (
            (f"{source}, row {i}", row) for i, row in enumerate(_loaded(source, option, of_hub))
        )
    text = _text(path)
    if kind in (".csv", ".tsv"):
        return _table(source, text, "\t" if kind == ".tsv" else ",")
    if kind != ".txt":
        return _objects(source, text)
    lines = enumerate(io.StringIO(text, newline=None), start=1)
    return ((f"{source}, line {i}", {"text": t.rstrip("\n")}) for i, t in lines if t.strip())


def _text(path: Path) -> str:
    raw = path.read_bytes()
    if path.suffix == ".gz" or raw.startswith(b"\x1f\x8b"):
        raw = gzip.decompress(raw)
    for start, what in _OTHERS.items():
        if raw.startswith(start):
            raise DataError(f"{path}: expected text, got {what}.")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        code = "cp1252" if re.search(rb"[\x80-\x9f]", raw) else "latin1"
        code = "utf-16" if raw[:2] in (b"\xff\xfe", b"\xfe\xff") else code
        cure = f"try iconv -f {code} -t utf-8"
        raise DataError(f"{path}, line {line}: expected UTF-8; {cure}.") from None


def _objects(source: str, text: str) -> Iterator[tuple[str, Any]]:
    """Yield JSON values that follow each other, and the items of arrays."""
    decoder, line, end, inside = json.JSONDecoder(), 1, 0, False
    while match := _MORE.match(text, end):
        line, start = line + text.count("\n", end, match.end() - 1), match.end() - 1
        if text[start] == ("]" if inside else "["):
            inside, end = not inside, start + 1
            continue
        try:
            value, end = decoder.raw_decode(text, start)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{source}, line {line}: {_no_json(text, start, error)}") from None
        yield f"{source}, line {line}", value
        line += text.count("\n", start, end)
        if inside and (match := _COMMA.match(text, end)):
            line, end = line + text.count("\n", end, match.end()), match.end()
        elif inside and not _END.match(text, end):
            raise DataError(f"{source}, line {line}: expected ',' or ']' after an item.")
    if inside:
        line += text.count("\n", end)
        raise DataError(f"{source}, line {line}: expected ']', got the end of the file.")


def _no_json(text: str, start: int, error: Exception) -> str:
    """Return why no JSON value begins at ``start``."""
    if re.match(r"[{\[]?\s*'", text[start:]):
        return 'expected JSON, which quotes by ", got single quotes.'
    return f"expected JSON, one value a line or an array, but got {str(error).partition(';')[0]}."


def _table(source: str, text: str, delimiter: str) -> Iterator[tuple[str, Any]]:
    """Yield the rows of a CSV file, with every field as text."""
    csv.field_size_limit(1 << 30)  # by default a field, such as a document, ends the reading
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True, delimiter=delimiter)
    (*more, name) = reader.fieldnames or [""]
    if not more and re.search(r"[;\t]", name):
        raise DataError(f"{source}, line 1: expected columns apart by {delimiter!r}, got {name!r}.")
    for row in reader:
        where = f"{source}, line {reader.line_num}"
        if None in row:  # a key None has surplus fields, such as from an unquoted comma
            raise DataError(f"{where}: expected {len(more) + 1} fields, as in line 1, got more.")
        yield where, row


def _loaded(
    source: str | list[dict[str, Any]], option: str, of_hub: dict[str, Any]
) -> Iterable[Any]:
    """Load a Parquet file, a hub data set, or a mixture as TRL does."""
    from rasa_ext.commands.models import go_offline_without_hub

    file = isinstance(source, str) and Path(source).is_file()
    if not file:
        go_offline_without_hub()
    import datasets  # only now: importing it reads whether it is offline

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # the error below has the message
    place = {"path": "parquet", "data_files": source} if file else {"path": source, **of_hub}
    try:
        if isinstance(source, list):
            trl: Any = importlib.import_module("trl")
            return trl.get_dataset(trl.DatasetMixtureConfig(datasets=[*source]))["train"]
        return datasets.load_dataset(**{"split": "train", **place})
    except Exception as error:
        what = "no Parquet file" if file else "neither a file nor a hub data set"
        what = what if isinstance(source, str) else "no mixture"
        raise DataError(f"{option}: {source!r} is {what} that can be loaded: {error}") from error


def _row(where: str, value: Any, prompts: Sequence[str], completion: str) -> Row:
    """Return the row of a decoded value. Raises DataError, which names the place and the key."""
    value = _as(dict, value, where)
    given = {name: item for name, item in value.items() if item is not None}
    for key in ("messages", "conversations"):
        if key in given:
            row = {"messages": _turns(given[key], f"{where}, {key!r}")}
            tools = _as(list, given.get("tools", []), f"{where}, 'tools'")
            return {**row, "tools": tools} if tools else row
    names = (*prompts, completion)
    if names == ("prompt", "completion") and not given.keys() & set(names) and "text" in given:
        names = ("text",)
    if missing := [name for name in names if name not in given]:
        if missing[0] in value:
            raise DataError(f"{where}, {missing[0]!r}: expected text, got nothing.")
        raise DataError(
            f"{where}: expected the key {missing[0]!r}, {_hint(where, missing[0], given)}."
        )
    texts = [_as(str, given[name], f"{where}, {name!r}") for name in names]
    if not texts[-1].strip():
        what = "blanks" if texts[-1] else "an empty string"
        raise DataError(f"{where}, {names[-1]!r}: expected text, got {what}.")
    if len(texts) == 1:
        return {"text": texts[0]}
    return {"prompt": "\n\n".join(filter(None, texts[:-1])), "completion": texts[-1]}


def _task_row(task: str, where: str, value: Any, prompts: Sequence[str], completion: str) -> Row:
    """Return the row of a decoded value for another task than sft."""
    value = _as(dict, value, where)
    given = {name: item for name, item in value.items() if item is not None}
    sources = {"completion": completion}
    if all(name in given for name in prompts) and len(prompts) > 1:
        given["prompt"] = "\n\n".join(
            _as(str, given[name], f"{where}, {name!r}") for name in prompts
        )
    elif prompts != ["prompt"]:
        sources["prompt"] = prompts[0]
    row: Row = {}
    for key in TASK_KEYS[task]:
        name = sources.get(key, key)
        if name not in given:
            raise DataError(
                f"{where}: expected the key {name!r}, {_hint(where, name, given, task)}."
            )
        row[key] = _label(given[name], where) if key == "label" else _said(key, given[name], where)
    if "chosen" in row:
        if (name := sources.get("prompt", "prompt")) in given:
            row["prompt"] = _said("prompt", given[name], where)
        if row["chosen"] == row["rejected"]:
            raise DataError(f"{where}: expected two answers, but 'chosen' equals 'rejected'.")
    kinds = {type(item) for key, item in row.items() if key != "label"}
    if len(kinds) > 1:
        raise DataError(f"{where}: expected texts or lists of turns, got both in one row.")
    return {**given, **row} if task in ("grpo", "rloo") else row


def _said(key: str, value: Any, where: str) -> str | Turns:
    """Return a prompt or an answer: a text, or turns that end with the role who speaks."""
    where = f"{where}, {key!r}"
    if isinstance(value, str):
        if not value.strip():
            raise DataError(
                f"{where}: expected text, got {'blanks' if value else 'an empty string'}."
            )
        return value
    turns = [_turn(turn, f"{where}, turn {i}") for i, turn in enumerate(_as(list, value, where), 1)]
    last = turns[-1]["role"] if turns else "none"
    if (last == "assistant") == (key == "prompt"):
        who = "another than the assistant" if key == "prompt" else "the assistant"
        raise DataError(f"{where}: expected turns that end with {who}'s, got {last}.")
    return turns


def _label(value: Any, where: str) -> bool:
    """Return whether an answer is a good one."""
    known = {"true": True, "false": False, "1": True, "0": False}
    if (text := str(value).lower()) not in known:
        raise DataError(f"{where}, 'label': expected true or false, got {value!r}.")
    return known[text]


def _hint(where: str, name: str, given: Row, task: str = "sft") -> str:
    """Return what a row without the key ``name`` has, and what to do."""
    needed = TASK_KEYS.get(task, ())
    if "chosen" in given and "chosen" not in needed:
        return "got 'chosen' and 'rejected', which are for `rasa-ext dpo`"
    if "label" in given and "label" not in needed:
        return "got 'label', which is for `rasa-ext kto`"
    if task != "sft" and "completion" in given and "completion" not in needed:
        return "got 'completion', which is for `rasa-ext sft`"
    for key in ("messages", "conversations", "text"):
        if task != "sft" and key in given:
            return f"got {key!r}, which is for `rasa-ext sft`"
    if {"instruction", "output"} <= given.keys():
        return "got Alpaca's; pass --prompt-field instruction,input --completion-field output"
    if near := difflib.get_close_matches(name, given, 1):
        return f"got {near[0]!r}; rename it"
    there = ", ".join(map(repr, given)) or "none"
    if re.search(r"\.[ct]sv(\.gz)?, line \d+$", where):
        return f"got {there} in line 1, which names the columns"
    return f"got {there}; --prompt-field and --completion-field set other names"


def _as(kind: type, value: Any, where: str) -> Any:
    """Return a value of a kind, also one that is written as JSON. Raises DataError for others."""
    if kind is not str and isinstance(value, str):
        with contextlib.suppress(ValueError, RecursionError):
            value = json.loads(value)
    if isinstance(value, kind):
        return value
    text = "nothing" if value is None else json.dumps(value, ensure_ascii=False, default=str)
    text = text if len(text) <= 80 else f"{text[:77]}..."
    raise DataError(f"{where}: expected {_KINDS[kind]}, got {text}.")


def _turns(value: Any, where: str) -> Turns:
    turns = [_turn(turn, f"{where}, turn {i}") for i, turn in enumerate(_as(list, value, where), 1)]
    if not _answers(turns):
        roles = ", ".join(turn["role"] for turn in turns) or "none"
        raise DataError(f"{where}: expected the assistant's turn after another, got {roles}.")
    return turns


def _turn(value: Any, where: str) -> dict[str, Any]:
    """Return a turn with role and text, converted if it is in ShareGPT's format."""
    given = _as(dict, value, where)
    turn = {_KEYS.get(name, name): item for name, item in given.items() if item is not None}
    role = _as(str, turn.get("role"), f"{where}, 'role'")
    if "from" in given:
        if role not in _ROLES:
            raise DataError(f"{where}, 'from': expected {', '.join(_ROLES)}, got {role!r}.")
        turn["role"] = _ROLES[role]
    if turn.get("weight", 1) != 1:
        raise DataError(
            f"{where}, 'weight': expected 1, got {turn['weight']!r}: every answer is trained; end "
            "the conversation before this turn."
        )
    if "tool_calls" in turn:
        calls = _as(list, turn["tool_calls"], f"{where}, 'tool_calls'")
        turn["tool_calls"] = [_call(call, f"{where}, 'tool_calls'") for call in calls]
        turn.setdefault("content", "")
    text, where = turn.get("content"), f"{where}, 'content'"
    if isinstance(text, list):  # the parts of a multimodal message
        parts = [_as(dict, part, where) for part in text]
        text = "".join(_as(str, part.get("text"), f"{where}, 'text'") for part in parts)
    return {**turn, "content": _as(str, text, where)}


def _call(value: Any, where: str) -> dict[str, Any]:
    """Return a tool call with its arguments as an object, as templates expect it."""
    call = _as(dict, value, where)
    function = _as(dict, call.get("function"), f"{where}, 'function'")
    _as(str, function.get("name"), f"{where}, 'name'")
    arguments = _as(dict, function.get("arguments", {}), f"{where}, 'arguments'")
    return {**call, "function": {**function, "arguments": arguments}}


def counted(rows: Sequence[Row]) -> str:
    """Return how many examples there are, or conversations and answers that are trained."""
    turns = [row["messages"] for row in rows if "messages" in row]
    if not turns:
        return f"{len(rows):,} examples"
    answers = len(rows) - len(turns) + sum(len(_answers(each)) for each in turns)
    return f"{len(rows):,} conversations, {answers:,} answers"


def split(rows: Sequence[Row], share: float, seed: int) -> tuple[list[Row], list[Row]]:
    """Split rows at random, with a share of them in the second part.

    Raises DataError if one part would be empty.
    """
    count = round(share * len(rows))
    if not 0 < count < len(rows):
        raise DataError(f"test_split: expected rows on both sides, got {count} of {len(rows)}.")
    shuffled = random.Random(seed).sample(rows, len(rows))
    return shuffled[count:], shuffled[:count]


def conversation(row: Row) -> Turns:
    """Return a row's messages. A prompt and a completion become a user and an assistant turn.

    Raises DataError for a plain text.
    """
    if "text" in row:
        raise DataError("data: expected prompts and completions, or conversations, got plain text.")
    if "messages" in row:
        return list(row["messages"])
    return [
        {"role": "user", "content": row["prompt"]},
        {"role": "assistant", "content": row["completion"]},
    ]


def rows_for_sft(
    sets: Sequence[Sequence[Row]], tokenizer: Any, template: bool
) -> tuple[list[list[Row]], bool]:
    """Convert the rows of data sets for TRL's SFTTrainer.

    Returns the rows, and whether to train with ``assistant_only_loss``.

    Plain texts do not change; all their tokens carry a loss. Without ``template``, or if the
    tokenizer has none, prompts and completions stay texts; TRL joins them without a separator and
    appends the end-of-sequence token. Otherwise they become conversations whose last turn is the
    completion. If some conversation has several assistant turns and TRL can mark them in the
    template, every conversation stays one row. If TRL cannot, each assistant turn becomes a row,
    with all turns before it as the prompt.

    A tokenizer without a template gets `PLAIN_TEMPLATE` if there are conversations.

    Raises DataError if the template refuses a conversation.
    """
    texts = ["text" in row for rows in sets for row in rows]
    if any(texts):
        if not all(texts):
            got = f"{sum(texts)} texts among {len(texts)} rows"
            raise DataError(f"data: expected all rows, also held-out, or none as text, got {got}.")
        return [list(rows) for rows in sets], False
    if any("messages" in row for rows in sets for row in rows):
        if not template:
            raise DataError("template: --no-template is for prompts and completions, got messages.")
        tokenizer.chat_template = tokenizer.chat_template or PLAIN_TEMPLATE
    if not (template and tokenizer.chat_template):
        return [list(rows) for rows in sets], False
    called = any("tools" in row for rows in sets for row in rows)
    chats = [[(_to_the_last(row, tokenizer), row.get("tools")) for row in rows] for rows in sets]
    several = any(len(_answers(turns)) > 1 for rows in chats for turns, _ in rows)
    marks = several and _can_mark_turns(tokenizer)

    def parts(turns: Turns, tools: Any) -> list[Row]:
        more = {"tools": json.dumps(tools)} if called else {}
        if marks:
            return [{"messages": turns, **more}]
        return [{"prompt": turns[:i], "completion": [turns[i]], **more} for i in _answers(turns)]

    return [[part for pair in rows for part in parts(*pair)] for rows in chats], marks


def rows_for_task(sets: Sequence[Sequence[Row]], tokenizer: Any, template: bool) -> list[list[Row]]:
    """Convert the rows of another task than sft for TRL's trainers.

    With ``template``, prompts and answers that are text become turns, if the tokenizer has a chat
    template. Whole texts without a prompt stay as they are. A tokenizer without a template gets
    `PLAIN_TEMPLATE` if there are turns.

    Raises DataError if only some rows are texts, or the template refuses a row.
    """
    every = [row for rows in sets for row in rows]
    if any(isinstance(item, list) for row in every for item in map(row.get, _SPOKEN)):
        tokenizer.chat_template = tokenizer.chat_template or PLAIN_TEMPLATE

    def turned(row: Row) -> Row:
        if "prompt" not in row or not (template and tokenizer.chat_template):
            return row
        roles = {key: "user" if key == "prompt" else "assistant" for key in _SPOKEN if key in row}
        return row | {
            key: [{"role": role, "content": row[key]}]
            for key, role in roles.items()
            if isinstance(row[key], str)
        }

    made = [[turned(row) for row in rows] for rows in sets]
    kinds = {type(row[key]) for rows in made for row in rows for key in _SPOKEN if key in row}
    if len(kinds) > 1:
        raise DataError("data: expected all rows as texts, or all as lists of turns, got both.")
    for row in (row for rows in made for row in rows if kinds == {list}):
        answers = [row[key] for key in _SPOKEN[1:] if key in row] or [[]]
        for answer in answers:
            templated(tokenizer, [*row.get("prompt", ()), *answer], "data")
    return made


_SPOKEN = ("prompt", "completion", "chosen", "rejected")


def questions(rows: Sequence[Row], tokenizer: Any, template: bool) -> list[tuple[str, str]]:
    """Return for each row the text that the model must continue, and the right answer.

    The answer is the assistant's last turn, or the completion.

    Args:
        rows: rows from ``read_examples``.
        tokenizer: the model's tokenizer.
        template: use the tokenizer's chat template, if it has one. Otherwise the turns are joined
            by line breaks, without roles.

    Returns:
        One pair (text, answer) per row.

    Example:
        >>> from rasa_ext.commands.data import questions
        >>> questions([{"prompt": "1 + 1 = ", "completion": "2"}], None, template=False)
        [('1 + 1 = ', '2')]
    """
    pairs = []
    for row in rows:
        turns = _to_the_last(row, tokenizer) if template else conversation(row)
        if template and tokenizer.chat_template:
            options = {"add_generation_prompt": True, "tools": row.get("tools")}
            asked = templated(tokenizer, turns[:-1], "data", **options)
        else:
            asked = "\n".join(turn["content"] for turn in turns[:-1])
        pairs.append((asked, turns[-1]["content"]))
    return pairs


def write_examples(path: Path, rows: Iterable[Row]) -> None:
    """Write one JSON object per line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _to_the_last(row: Row, tokenizer: Any) -> Turns:
    """Return the conversation up to the assistant's last turn; later turns carry no loss."""
    turns = conversation(row)
    turns = turns[: _answers(turns)[-1] + 1]
    if tokenizer.chat_template:
        text = templated(tokenizer, turns, "data", tools=row.get("tools"))
        calls = (call["function"]["name"] for turn in turns for call in turn.get("tool_calls", ()))
        if lost := [name for name in calls if name not in text]:
            raise DataError(f"data: the chat template leaves out the call of the tool {lost[0]!r}.")
    return turns


def templated(tokenizer: Any, turns: Turns, argument: str, **options: Any) -> str:
    """Return the text of a conversation by the chat template, which may be a stranger's.

    Raises DataError, naming the argument, if the template refuses the turns or takes too long.
    """
    try:
        with _at_most(SECONDS):
            return str(tokenizer.apply_chat_template(turns, tokenize=False, **options))
    except Exception as error:  # a template can raise any exception
        said = f"{error}" or type(error).__name__
        raise DataError(f"{argument}: the chat template refuses {turns}: {said}") from error


@contextlib.contextmanager
def _at_most(seconds: float) -> Iterator[None]:
    """Raise TimeoutError in code that takes longer, in the main thread and not on Windows."""
    main = threading.current_thread() is threading.main_thread()
    if not (main and hasattr(signal, "setitimer")):
        yield
        return

    def stop(*_: object) -> None:
        raise TimeoutError(f"it takes more than {seconds:g} s.")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _answers(turns: Sequence[dict[str, str]]) -> list[int]:
    """Return the indices of the assistant's turns that follow another turn."""
    return [i for i, turn in enumerate(turns) if i and turn["role"] == "assistant"]


def _can_mark_turns(tokenizer: Any) -> bool:
    """Check whether TRL can find the assistant's tokens in a templated conversation."""
    from trl import get_training_chat_template

    try:
        get_training_chat_template(tokenizer)
    except ValueError:
        return False
    return True
