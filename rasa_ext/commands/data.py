"""Training data: rows of a file or of a hub data set, in the forms that TRL takes.

A row is ``{"prompt": str, "completion": str}``, in the data under these or other names,
``{"messages": [{"role": ..., "content": ...}, ...]}``, in the data also as ShareGPT has it, or
``{"text": str}``.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

__all__ = ["questions", "read_examples"]

Row = dict[str, Any]
Turns = list[dict[str, Any]]

# For conversations over a tokenizer without a chat template: "role: content", a line a turn.
PLAIN_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] + ':' }}{% if message['role'] == 'assistant' "
    "%}{% generation %}{{ ' ' + message['content'] + eos_token }}{% endgeneration %}{% else %}"
    "{{ ' ' + message['content'] }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)
_SUFFIXES = (".jsonl", ".json", ".csv", ".parquet", ".txt")


class DataError(ValueError):
    """Data that cannot be used; the message says where it is and what was expected."""


def check_source(source: str, option: str) -> None:
    """Raise DataError, naming the option, where a path of data holds no file."""
    path = Path(source)
    if path.is_file():
        return
    if path.is_dir() or path.suffix in _SUFFIXES or source.startswith((".", "/", "~")):
        what = "is a directory" if path.is_dir() else "does not exist"
        raise DataError(
            f"{option}: expected a file ({', '.join(_SUFFIXES)}) or a hub data set, but {source} "
            f"{what}."
        )


def read_examples(
    source: str,
    prompt_field: str = "prompt",
    completion_field: str = "completion",
    option: str = "data",
) -> list[Row]:
    """Read the rows of a file, or of a hub data set's split ``train``.

    Args:
        source: a file of JSON Lines, a JSON array, CSV, Parquet, or text with an example a line; or
            a data set's name.
        prompt_field: the name of the prompt's field; several, with commas, are joined by an empty
            line.
        completion_field: the name of the completion's field.
        option: what gave the source, for the error.

    Returns:
        A row for each example: a prompt and a completion under these names, messages, or a text.

    Raises:
        ValueError: naming the line and what was expected there; for a name that is neither a file
            nor loadable, naming the option.

    Example:
        >>> from rasa_ext.commands.data import read_examples
        >>> with open("data.jsonl", "w") as file:
        ...     _ = file.write('{"question": "1 + 1", "completion": "2"}')
        >>> read_examples("data.jsonl", prompt_field="question")
        [{'prompt': '1 + 1', 'completion': '2'}]
    """
    names = [name.strip() for name in prompt_field.split(",")]
    expected = (
        f"an object with the strings {', '.join(map(repr, names))} and {completion_field!r}, the "
        "last not empty (--prompt-field and --completion-field give other names), with 'messages', "
        "a list of {'role': ..., 'content': ...} in which the assistant answers, with such "
        "'conversations' of {'from': ..., 'value': ...}, or with 'text' alone"
    )
    check_source(source, option)
    rows = []
    try:
        for where, text, value in _values(source, option):
            row = _row(value, names, completion_field)
            if row is None:
                text = text if len(text) <= 100 else f"{text[:97]}..."
                raise DataError(f"{where}: expected {expected}, got {text}.")
            rows.append(row)
    except (UnicodeDecodeError, json.JSONDecodeError, csv.Error) as error:
        kind = Path(source).suffix
        raise DataError(
            f"{source}: expected {kind} in UTF-8, but it does not parse: {error}."
        ) from None
    if not rows:
        raise DataError(f"{source}: expected at least one example, got an empty file.")
    return rows


def _values(source: str, option: str) -> Iterable[tuple[str, str, Any]]:
    """Where each value is, its text, and the value; None where the text cannot be read."""
    path = Path(source)
    if not path.is_file() or path.suffix == ".parquet":
        values = _loaded(source, option)
    elif path.suffix == ".csv":
        return _table(path)
    elif path.suffix == ".json" and path.read_bytes().lstrip(b"\xef\xbb\xbf \t\r\n")[:1] == b"[":
        values = json.loads(path.read_text("utf-8-sig"))
    else:
        return _lines(path)
    return ((f"{source}, row {i}", str(row), row) for i, row in enumerate(values))


def _lines(path: Path) -> Iterable[tuple[str, str, Any]]:
    for number, raw in enumerate(path.read_bytes().splitlines(), start=1):
        text = raw.decode("utf-8-sig", errors="replace").strip()
        if not text:
            continue
        try:
            line = raw.decode("utf-8-sig")
            value = {"text": line} if path.suffix == ".txt" else json.loads(line)
        except ValueError:  # not UTF-8, either
            value = None
        yield f"{path}, line {number}", text, value


def _table(path: Path) -> Iterable[tuple[str, str, Any]]:
    """The rows of a CSV file, whose fields stay texts."""
    reader = csv.DictReader(io.StringIO(path.read_text("utf-8-sig"), newline=""), strict=True)
    for row in reader:
        fits = None not in row  # as where a comma in a text stands without quotes
        yield f"{path}, line {reader.line_num}", str(row), row if fits else None


def _loaded(source: str, option: str) -> Iterable[Any]:
    from rasa_ext.commands.models import go_offline_without_hub

    file = source.endswith(".parquet")
    if not file:
        go_offline_without_hub()
    import datasets  # reads as it is imported whether it is offline

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # the error below says it
    try:
        if file:
            return datasets.load_dataset("parquet", data_files=source, split="train")
        return datasets.load_dataset(source, split="train")
    except Exception as error:
        what = "no Parquet file" if file else "neither a file nor a hub data set"
        raise DataError(f"{option}: {source!r} is {what} that can be loaded: {error}") from error


def _row(value: Any, prompts: Sequence[str], completion: str) -> Row | None:
    """A decoded line as a row; None where it is none."""
    if not isinstance(value, dict):
        return None
    if "messages" in value or "conversations" in value:
        turns = value.get("messages", value.get("conversations"))
        turns = [_turn(turn) for turn in turns] if isinstance(turns, list) else []
        whole = all(isinstance(turn.get(k), str) for turn in turns for k in ("role", "content"))
        return {"messages": turns} if whole and _answers(turns) else None
    names = (*prompts, completion)
    texts = [value.get(name) for name in names]
    if names == ("prompt", "completion") and not value.keys() & set(names):
        texts = [value.get("text")]
    if not (all(isinstance(text, str) for text in texts) and texts[-1]):
        return None
    if len(texts) == 1:
        return {"text": texts[0]}
    return {"prompt": "\n\n".join(filter(None, texts[:-1])), "completion": texts[-1]}


def _turn(turn: Any) -> dict[str, Any]:
    """A turn of a conversation, also of one that ShareGPT wrote."""
    if not isinstance(turn, dict) or "from" not in turn:
        return turn if isinstance(turn, dict) else {}
    role = {"human": "user", "gpt": "assistant"}.get(str(turn["from"]), turn["from"])
    return {"role": role, "content": turn.get("value")}


def conversation(row: Row) -> Turns:
    """A row's messages; of a prompt and a completion, a turn of the user and the assistant's.

    Raises DataError for a plain text.
    """
    if "text" in row:
        raise DataError(
            "data: expected prompts and completions, or conversations, got plain text, which has "
            "no questions and answers."
        )
    if "messages" in row:
        return list(row["messages"])
    return [
        {"role": "user", "content": row["prompt"]},
        {"role": "assistant", "content": row["completion"]},
    ]


def rows_for_sft(
    sets: Sequence[Sequence[Row]], tokenizer: Any, template: bool
) -> tuple[list[list[Row]], bool]:
    """The rows of data sets for TRL's SFTTrainer, and whether it must tell the turns apart.

    Plain texts stay as they are, for TRL to learn whole. Without ``template``, or over a tokenizer
    without one, prompts and completions stay texts; TRL joins them as they stand and closes them
    with the end-of-sequence token. Else conversations are made of them, whose last turn is the
    completion. Where a conversation has several turns of the assistant, TRL learns them all at once
    if it can mark them in the template, and otherwise each becomes a row with all that came before
    it as the prompt.

    A tokenizer without a template gets `PLAIN_TEMPLATE` where there are conversations.

    Raises DataError where the template refuses a conversation.
    """
    texts = ["text" in row for rows in sets for row in rows]
    if any(texts):
        if not all(texts):
            raise DataError(
                "data: expected all rows, of --eval-data as well, to be plain texts or none, got "
                f"{sum(texts)} texts among {len(texts)} rows."
            )
        return [list(rows) for rows in sets], False
    if any("messages" in row for rows in sets for row in rows):
        if not template:
            raise DataError(
                "template: --no-template is for data with a prompt and a completion, got messages."
            )
        tokenizer.chat_template = tokenizer.chat_template or PLAIN_TEMPLATE
    if not (template and tokenizer.chat_template):
        return [list(rows) for rows in sets], False
    turns = [[_to_the_last_answer(row, tokenizer) for row in rows] for rows in sets]
    several = any(len(_answers(each)) > 1 for rows in turns for each in rows)
    if several and _can_mark_turns(tokenizer):
        return [[{"messages": each} for each in rows] for rows in turns], True
    return [
        [{"prompt": each[:i], "completion": [each[i]]} for each in rows for i in _answers(each)]
        for rows in turns
    ], False


def questions(rows: Sequence[Row], tokenizer: Any, template: bool) -> list[tuple[str, str]]:
    """Give what a model is asked, as text up to where its answer begins, and the right answer.

    The answer is the assistant's last turn, or the completion.

    Args:
        rows: as ``read_examples`` gives them.
        tokenizer: the model's.
        template: whether to use its chat template, if it has one; else the texts stand alone.

    Returns:
        A pair for each row.

    Example:
        >>> from rasa_ext.commands.data import questions
        >>> questions([{"prompt": "1 + 1 = ", "completion": "2"}], None, template=False)
        [('1 + 1 = ', '2')]
    """
    pairs = []
    for row in rows:
        turns = _to_the_last_answer(row, tokenizer) if template else conversation(row)
        if template and tokenizer.chat_template:
            asked = tokenizer.apply_chat_template(
                turns[:-1], tokenize=False, add_generation_prompt=True
            )
        else:
            asked = "\n".join(turn["content"] for turn in turns[:-1])
        pairs.append((asked, turns[-1]["content"]))
    return pairs


def write_examples(path: Path, rows: Iterable[Row]) -> None:
    """Write one JSON object a line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _to_the_last_answer(row: Row, tokenizer: Any) -> Turns:
    """The conversation up to the assistant's last turn: what follows it carries no loss."""
    turns = conversation(row)
    turns = turns[: _answers(turns)[-1] + 1]
    if tokenizer.chat_template:
        try:
            tokenizer.apply_chat_template(turns, tokenize=False)
        except Exception as error:  # templates raise whatever they like
            raise DataError(f"data: the chat template refuses {turns}: {error}") from error
    return turns


def _answers(turns: Sequence[dict[str, str]]) -> list[int]:
    """The places of the assistant's turns that answer something."""
    return [i for i, turn in enumerate(turns) if i and turn["role"] == "assistant"]


def _can_mark_turns(tokenizer: Any) -> bool:
    """Whether TRL can tell which tokens of a templated conversation are the assistant's."""
    from trl import get_training_chat_template

    try:
        get_training_chat_template(tokenizer)
    except ValueError:
        return False
    return True
