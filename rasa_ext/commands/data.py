"""Training data: reading and checking JSON lines, and bringing them into the form TRL takes.

A line is either ``{"prompt": str, "completion": str}``, under these or other names, or
``{"messages": [{"role": ..., "content": ...}, ...]}``.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rasa_ext.commands.hub import is_reachable, not_cached

__all__ = ["Example", "Fields", "questions", "read_examples"]

ROLES = ("system", "user", "assistant", "tool")

PLAIN_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] + ':' }}{% if message['role'] == 'assistant' "
    "%}{% generation %}{{ ' ' + message['content'] + eos_token }}{% endgeneration %}{% else %}"
    "{{ ' ' + message['content'] }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)
"""For conversations over a tokenizer without a chat template: ``role: content``, a line a turn."""


class DataError(ValueError):
    """Data that cannot be used; the message says where it is and what was expected."""


@dataclass(frozen=True)
class Example:
    """One checked line. Either both ``prompt`` and ``completion`` are set, or ``messages``.

    Example:
        >>> from rasa_ext.commands.data import Example
        >>> Example("data.jsonl, line 1", "1 + 1", "2").conversation()[0]
        {'role': 'user', 'content': '1 + 1'}
    """

    where: str
    """The file and line it came from, for errors."""
    prompt: str | None = None
    completion: str | None = None
    messages: tuple[dict[str, str], ...] | None = None

    def conversation(self) -> list[dict[str, str]]:
        """The messages; of a prompt and a completion, a turn of the user and the assistant's."""
        if self.messages is not None:
            return list(self.messages)
        return [
            {"role": "user", "content": str(self.prompt)},
            {"role": "assistant", "content": str(self.completion)},
        ]


@dataclass(frozen=True)
class Fields:
    """The names under which prompt and completion stand in the data.

    Example:
        >>> from rasa_ext.commands.data import Fields
        >>> Fields("instruction,input", "output").prompts()
        ['instruction', 'input']
    """

    prompt: str = "prompt"
    """Several names with commas are joined by an empty line."""
    completion: str = "completion"

    def prompts(self) -> list[str]:
        """The fields whose texts, where they are not empty, make the prompt, in this order."""
        return [name.strip() for name in self.prompt.split(",")]

    def expected(self) -> str:
        """What a line should be."""
        return (
            f"an object with the strings {self.prompt!r} and {self.completion!r}, or with "
            "'messages', a list of {'role': ..., 'content': ...}"
        )


def read_examples(source: str, fields: Fields = Fields(), option: str = "data") -> list[Example]:
    """Read the examples of a JSONL file, or of a hub data set's split ``train``.

    Args:
        source: the file, or the data set's name.
        fields: the names under which prompt and completion stand.
        option: what gave the source, for the error.

    Returns:
        One for each line.

    Raises:
        DataError: naming the line and what was expected there; for a name that is neither a file
            nor loadable, naming the option and what to do.

    Example:
        >>> from rasa_ext.commands.data import read_examples
        >>> with open("data.jsonl", "w") as file:
        ...     _ = file.write('{"prompt": "1 + 1", "completion": "2"}')
        >>> [example.completion for example in read_examples("data.jsonl")]
        ['2']
    """
    path = Path(source)
    if path.is_file():
        return _read_jsonl(path, fields)
    if path.is_dir():
        raise DataError(
            f"{option}: expected a JSONL file or a hub data set, got the directory {path}."
        )
    if path.suffix in (".jsonl", ".json") or source.startswith((".", "/", "~")):
        raise DataError(f"{option}: the file {source} does not exist.")
    return _read_hub(source, fields, option)


def parse_example(value: Any, where: str, fields: Fields = Fields()) -> Example:
    """Check one decoded line. Raises DataError beginning with ``where``."""
    if not isinstance(value, dict):
        raise DataError(f"{where}: expected {fields.expected()}; got {_describe(value)}.")
    if "messages" in value:
        return Example(where, messages=_check_messages(value["messages"], where))
    asked = [("prompt", name) for name in fields.prompts()]
    for option, field in (*asked, ("completion", fields.completion)):
        if field not in value:
            keys = ", ".join(map(repr, value)) or "no key"
            raise DataError(
                f"{where}: expected {fields.expected()}; {field!r} is missing, got {keys}. Other "
                f"names are given by --prompt-field and --completion-field, such as "
                f"--{option}-field {_guess(option, value)}."
            )
        if not isinstance(value[field], str):
            kind = _describe(value[field])
            raise DataError(f"{where}: {field!r}: expected a string, got {kind}.")
    if not value[fields.completion]:
        raise DataError(
            f"{where}: {fields.completion!r}: expected some text to learn, got an empty string."
        )
    prompt = "\n\n".join(value[name] for _, name in asked if value[name])
    return Example(where, prompt, value[fields.completion])


def rows_for_sft(
    sets: Sequence[Sequence[Example]], tokenizer: Any, template: bool
) -> tuple[list[list[dict[str, Any]]], bool]:
    """The rows of data sets for TRL's SFTTrainer, and whether it must tell the turns apart.

    Without ``template``, or over a tokenizer without one, prompts and completions stay texts; TRL
    joins them as they stand and closes them with the end-of-sequence token. Else conversations
    are made of them, whose last turn is the completion. Where a conversation has several turns of
    the assistant, TRL learns them all at once if it can mark them in the template, and otherwise
    each becomes a row with all that came before it as the prompt.

    A tokenizer without a template gets `PLAIN_TEMPLATE` where there are conversations.

    Raises DataError where the template refuses a conversation.
    """
    chats = [example.where for each in sets for example in each if example.messages is not None]
    if chats and not template:
        raise DataError(
            "template: --no-template is for data with a prompt and a completion, and "
            f"{chats[0]} has messages."
        )
    if chats and not tokenizer.chat_template:
        tokenizer.chat_template = PLAIN_TEMPLATE
    if not tokenizer.eos_token:
        raise DataError(
            "model: expected a tokenizer with an end-of-sequence token, which closes what is "
            "learnt; set one in its tokenizer_config.json."
        )
    if not (template and tokenizer.chat_template):
        return [
            [{"prompt": e.prompt, "completion": e.completion} for e in examples]
            for examples in sets
        ], False
    turns = [[_to_the_last_answer(e, tokenizer) for e in examples] for examples in sets]
    several = any(len(_answers(each)) > 1 for examples in turns for each in examples)
    if several and _can_mark_turns(tokenizer):
        return [[{"messages": each} for each in examples] for examples in turns], True
    return [
        [{"prompt": each[:i], "completion": [each[i]]} for each in examples for i in _answers(each)]
        for examples in turns
    ], False


def questions(examples: Sequence[Example], tokenizer: Any, template: bool) -> list[tuple[str, str]]:
    """Give what a model is asked, as text up to where its answer begins, and the right answer.

    The answer is the assistant's last turn, or the completion.

    Args:
        examples: as ``read_examples`` gives them.
        tokenizer: the model's.
        template: whether to use its chat template, if it has one; else the texts stand alone.

    Returns:
        A pair for each example.

    Example:
        >>> from rasa_ext.commands.data import Example, questions
        >>> questions([Example("here", "1 + 1 = ", "2")], None, template=False)
        [('1 + 1 = ', '2')]
    """
    found = []
    for example in examples:
        turns = _to_the_last_answer(example, tokenizer) if template else example.conversation()
        found.append((prompt_text(turns[:-1], tokenizer, template), turns[-1]["content"]))
    return found


def prompt_text(turns: Sequence[dict[str, str]], tokenizer: Any, template: bool) -> str:
    """A conversation as text, up to where the assistant's next turn begins."""
    if not (template and tokenizer.chat_template):
        return "\n".join(turn["content"] for turn in turns)
    return tokenizer.apply_chat_template(list(turns), tokenize=False, add_generation_prompt=True)


def write_examples(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write one JSON object a line."""
    with path.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def _read_jsonl(path: Path, fields: Fields) -> list[Example]:
    examples = []
    with path.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            where = f"{path}, line {number}"
            try:
                line = raw.decode("utf-8-sig" if number == 1 else "utf-8").strip()
                value = json.loads(line) if line else None
            except UnicodeDecodeError as error:
                raise DataError(f"{where}: expected UTF-8 text, got {error.reason}.") from None
            except ValueError as error:
                raise DataError(
                    f"{where}: expected one JSON object a line ({fields.expected()}), but it does "
                    f"not parse: {error}."
                ) from None
            if line:
                examples.append(parse_example(value, where, fields))
    if not examples:
        raise DataError(f"{path}: expected at least one example, got an empty file.")
    return examples


def _read_hub(name: str, fields: Fields, option: str) -> list[Example]:
    is_reachable()
    import datasets  # reads as it is imported whether it is offline

    try:
        rows = datasets.load_dataset(name, split="train")
    except Exception as error:
        if reason := not_cached(error):
            said = f"is neither a file nor a data set {reason}, or give a JSONL file."
        else:
            said = f"is not a file, and could not be loaded as a hub data set: {error}"
        raise DataError(f"{option}: {name!r} {said}") from error
    return [parse_example(row, f"{name}, row {i}", fields) for i, row in enumerate(rows)]


def _check_messages(messages: Any, where: str) -> tuple[dict[str, str], ...]:
    if not isinstance(messages, list) or not messages:
        raise DataError(
            f"{where}: 'messages': expected a list of {{'role', 'content'}} objects, got "
            f"{_describe(messages)}."
        )
    for i, message in enumerate(messages):
        if not isinstance(message, dict):
            raise DataError(
                f"{where}: messages[{i}]: expected an object with 'role' and 'content', got "
                f"{_describe(message)}."
            )
        if message.get("role") not in ROLES:
            raise DataError(
                f"{where}: messages[{i}]: 'role': expected one of {', '.join(ROLES)}, got "
                f"{message.get('role')!r}."
            )
        if not isinstance(message.get("content"), str):
            raise DataError(
                f"{where}: messages[{i}]: 'content': expected a string, got "
                f"{_describe(message.get('content'))}."
            )
    if all(message["role"] != "assistant" for message in messages[1:]):
        raise DataError(
            f"{where}: 'messages': expected a turn of the assistant to learn, and one before it, "
            "got none."
        )
    return tuple({"role": m["role"], "content": m["content"]} for m in messages)


def _to_the_last_answer(example: Example, tokenizer: Any) -> list[dict[str, str]]:
    """The conversation up to the assistant's last turn: what follows it carries no loss."""
    turns = example.conversation()
    turns = turns[: _answers(turns)[-1] + 1]
    if not tokenizer.chat_template:
        return turns
    try:
        tokenizer.apply_chat_template(turns, tokenize=False)
    except Exception as error:  # templates raise whatever they like
        raise DataError(
            f"{example.where}: the chat template refuses this conversation: {error}"
        ) from error
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


def _guess(option: str, value: dict[str, Any]) -> str:
    """A field that may be the one that is looked for, by the names of well-known data sets."""
    usual = {
        "prompt": ("question", "instruction", "query", "input"),
        "completion": ("answer", "output", "response", "solution"),
    }
    return next((name for name in usual[option] if name in value), "NAME")


def _describe(value: Any) -> str:
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:57] + '...'}"
