"""What a run prints before it trains: the rows, the first as the model sees it, and the sizes."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

from rich.console import Console
from rich.text import Text

from rasa_ext import summary
from rasa_ext.commands.data import DataError
from rasa_ext.commands.options import Options
from rasa_ext.commands.trainer import IGNORE

OPEN, CLOSE = ">>>", "<<<"  # around trained text in the printed example
_SHOWN = 400  # characters; longer text without loss is shortened in the middle


def show_data(options: Options, trainer: Any, rows: Sequence[Any], console: Console) -> None:
    """Print how many rows there are, and the first as the model sees it."""
    learnt = [trainer.train_dataset, trainer.eval_dataset]
    for (name, count), given, prepared in zip(trainer.counts.items(), rows, learnt, strict=False):
        text = f"{source_of(options, name)}: {count}"
        if options.task == "sft":
            args = options.training
            describe_rows(text, len(given), prepared, args.max_length, args.packing, console)
        else:
            console.print(f"{text}.", markup=False)
    seen = set(map(json.dumps, rows[0]))
    if both := sum(json.dumps(row) in seen for each in rows[1:] for row in each):
        console.print(f"{both:,} held-out examples are also trained on.", style="yellow")
    if options.task == "sft":
        plain = "text" in rows[0][0]
        show_example(trainer.train_dataset[0], trainer.processing_class, console, plain=plain)
        return
    show_row(rows[0][0], console)


def describe_rows(
    counts: str, given: int, prepared: Any, length: int, packing: bool, console: Console
) -> None:
    """Print the number of tokens with a loss, and of examples that were omitted or cut.

    Raises DataError if no example is left.
    """
    if not len(prepared):
        what = f"has a completion token within {length} tokens"
        raise DataError(f"seq_len: none of the {given} examples {what}; raise --seq-len.")
    labels = prepared["labels"]
    learnt = sum(label != IGNORE for row in labels for label in row)
    packed = packing and len(prepared) < given
    rows = f" in {len(prepared):,} rows" if packed else ""
    console.print(f"{counts}{rows}, {learnt:,} tokens to learn.")
    dropped, cut = given - len(prepared), sum(len(row) == length for row in labels)
    if not packed and (dropped or cut):
        console.print(
            f"--seq-len {length}: {dropped:,} examples have no completion token within this length "
            f"and are left out; {cut:,} more reach it and may be cut.",
            style="yellow",
        )


def show_example(
    row: Mapping[str, Any], tokenizer: Any, console: Console, *, plain: bool = False
) -> None:
    """Print a row as the model sees it, with trained text inside `OPEN` and `CLOSE`."""
    text = Text()
    for trained, stretch in marked(row, tokenizer):
        if trained:
            text.append(f"{OPEN}{stretch}{CLOSE}", style="bold green")
        elif len(stretch) <= _SHOWN:
            text.append(stretch)
        else:
            text.append(f"{stretch[: _SHOWN // 2]} [...] {stretch[-_SHOWN // 2 :]}")
    kind = "The first example, plain text without a chat template" if plain else "The first example"
    console.print(f"{kind}; trained text is inside {OPEN} {CLOSE}:", style="dim")
    console.print(text)


def marked(row: Mapping[str, Any], tokenizer: Any) -> list[tuple[bool, str]]:
    """Split a row's text into stretches with and without loss, as pairs (has loss, text)."""
    pairs = zip(row["input_ids"], row["labels"], strict=True)
    return [
        (trained, tokenizer.decode([token for token, _ in stretch]))
        for trained, stretch in groupby(pairs, key=lambda pair: pair[1] != IGNORE)
    ]


def show_row(row: Mapping[str, Any], console: Console) -> None:
    """Print a row by key."""
    console.print("The first example:", style="dim")
    for key, value in row.items():
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        console.print(f"  {key}: {text[:_SHOWN]}", markup=False)


def describe_adapter(model: Any, console: Console) -> int:
    """Print and return the number of trainable parameters."""
    report = summary(model)
    console.print(
        f"{report.trainable:,} of {report.total:,} parameters are trained ({len(report)} groups, "
        f"effective rank {max(row.R for row in report)})."
    )
    return report.trainable


def source_of(options: Options, name: str) -> str:
    """Return where rows are from, given the option that named it."""
    value = getattr(options.data, name)
    listed = value if isinstance(value, list) else [f"--{name.replace('_', '-')} {value}"]
    return ", ".join(str(each["path"] if isinstance(each, dict) else each) for each in listed)
