"""Training data: rows of a file or of a hub data set, in the formats that TRL takes.

A row is ``{"prompt": str, "completion": str}``, ``{"messages": [{"role": ..., "content": ...},
...]}`` or ``{"text": str}``. The data may have other names for prompt and completion, and may have
conversations in ShareGPT's format.
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
import signal
import threading
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
_SUFFIXES = (".jsonl", ".json", ".csv", ".parquet", ".txt")


class DataError(ValueError):
    """Invalid data. The message names the place and the expected form."""


def check_source(source: str, option: str) -> None:
    """Raise DataError, naming the option, if ``source`` is a path without a file."""
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
        source: a file of JSON Lines, a JSON array, CSV, Parquet, or text with one example per line;
            or a data set's name.
        prompt_field: name of the prompt's field. With several names, separated by commas, the
            fields are joined by an empty line.
        completion_field: name of the completion's field.
        option: the option that set ``source``, for errors.

    Returns:
        One row per example, with the keys ``prompt`` and ``completion``, ``messages`` or ``text``.

    Raises:
        ValueError: a line is invalid; the message names the line and the expected form. Or
            ``source`` is neither a file nor a data set that loads; the message names the option.

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
        "last not empty (--prompt-field and --completion-field set other names), with 'messages', "
        "a list of {'role': ..., 'content': ...} in which the assistant answers, with "
        "'conversations', such a list of {'from': ..., 'value': ...}, or with only 'text'"
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
    """Yield each value's place, text, and decoded value, or None if the text does not parse."""
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
        except ValueError:  # invalid JSON or UTF-8
            value = None
        yield f"{path}, line {number}", text, value


def _table(path: Path) -> Iterable[tuple[str, str, Any]]:
    """Yield the rows of a CSV file, with every field as text."""
    reader = csv.DictReader(io.StringIO(path.read_text("utf-8-sig"), newline=""), strict=True)
    for row in reader:
        fits = None not in row  # a key None has surplus fields, such as from an unquoted comma
        yield f"{path}, line {reader.line_num}", str(row), row if fits else None


def _loaded(source: str, option: str) -> Iterable[Any]:
    from rasa_ext.commands.models import go_offline_without_hub

    file = source.endswith(".parquet")
    if not file:
        go_offline_without_hub()
    import datasets  # only now: importing it reads whether it is offline

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # the error below has the message
    try:
        if file:
            return datasets.load_dataset("parquet", data_files=source, split="train")
        return datasets.load_dataset(source, split="train")
    except Exception as error:
        what = "no Parquet file" if file else "neither a file nor a hub data set"
        raise DataError(f"{option}: {source!r} is {what} that can be loaded: {error}") from error


def _row(value: Any, prompts: Sequence[str], completion: str) -> Row | None:
    """Return the row of a decoded line, or None if the line is not a valid row."""
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
    """Return a turn with role and content, converted if it is in ShareGPT's format."""
    if not isinstance(turn, dict) or "from" not in turn:
        return turn if isinstance(turn, dict) else {}
    role = {"human": "user", "gpt": "assistant"}.get(str(turn["from"]), turn["from"])
    return {"role": role, "content": turn.get("value")}


def conversation(row: Row) -> Turns:
    """Return a row's messages. A prompt and a completion become a user and an assistant turn.

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
            raise DataError(
                "data: expected all rows, including those of --eval-data, to be plain texts, or "
                f"none, got {sum(texts)} texts among {len(texts)} rows."
            )
        return [list(rows) for rows in sets], False
    if any("messages" in row for rows in sets for row in rows):
        if not template:
            raise DataError("template: --no-template is for prompts and completions, got messages.")
        tokenizer.chat_template = tokenizer.chat_template or PLAIN_TEMPLATE
    if not (template and tokenizer.chat_template):
        return [list(rows) for rows in sets], False
    turns = [[_to_the_last_answer(row, tokenizer) for row in rows] for rows in sets]
    several = any(len(_answers(row)) > 1 for rows in turns for row in rows)
    if several and _can_mark_turns(tokenizer):
        return [[{"messages": row} for row in rows] for rows in turns], True
    return [
        [{"prompt": row[:i], "completion": [row[i]]} for row in rows for i in _answers(row)]
        for rows in turns
    ], False


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
        turns = _to_the_last_answer(row, tokenizer) if template else conversation(row)
        if template and tokenizer.chat_template:
            asked = templated(tokenizer, turns[:-1], "data", add_generation_prompt=True)
        else:
            asked = "\n".join(turn["content"] for turn in turns[:-1])
        pairs.append((asked, turns[-1]["content"]))
    return pairs


def write_examples(path: Path, rows: Iterable[Row]) -> None:
    """Write one JSON object per line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _to_the_last_answer(row: Row, tokenizer: Any) -> Turns:
    """Return the conversation up to the assistant's last turn; later turns carry no loss."""
    turns = conversation(row)
    turns = turns[: _answers(turns)[-1] + 1]
    if tokenizer.chat_template:
        templated(tokenizer, turns, "data")
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
