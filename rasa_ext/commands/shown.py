"""What is said of the data before training: counts, and one example as it is trained."""

from __future__ import annotations

from itertools import groupby
from typing import Any

from rich.console import Console
from rich.text import Text

from rasa_ext.commands.data import DataError
from rasa_ext.commands.options import FinetuneOptions
from rasa_ext.commands.trainer import IGNORE

OPEN, CLOSE = ">>>", "<<<"
"""Around what is trained."""

_SHOWN = 400
"""Characters of an untrained stretch, which is cut in its middle."""


def describe_rows(
    source: str, given: int, prepared: Any, options: FinetuneOptions, console: Console
) -> None:
    """Count what a prepared data set has to learn, and what was left out or cut.

    Raises DataError if nothing is left.
    """
    length = options.seq_len
    if not len(prepared):
        raise DataError(
            f"seq_len: within {length} tokens none of the {given} examples has a completion token "
            "to train on; raise --seq-len or shorten the prompts."
        )
    import pyarrow.compute as compute

    labels = prepared.with_format("arrow")[:]["labels"]
    learnt = compute.sum(compute.not_equal(compute.list_flatten(labels), IGNORE)).as_py()
    packed = options.packing and len(prepared) < given
    rows = f" in {len(prepared):,} rows" if packed else ""
    console.print(f"{source}: {given:,} examples{rows}, {learnt:,} tokens to learn.")
    if packed:
        return
    if dropped := given - len(prepared):
        console.print(
            f"{dropped:,} of them have no completion token within --seq-len {length} and are left "
            "out.",
            style="yellow",
        )
    full = compute.equal(compute.list_value_length(labels), length)
    if cut := compute.sum(full).as_py():
        console.print(f"{cut:,} reach --seq-len {length} and may be cut there.", style="yellow")


def show_example(row: dict[str, Any], tokenizer: Any, console: Console) -> None:
    """Print a row as the model sees it, what is trained within `OPEN` and `CLOSE`."""
    text = Text()
    for trained, stretch in marked(row, tokenizer):
        if trained:
            text.append(f"{OPEN}{stretch}{CLOSE}", style="bold green")
        else:
            text.append(_shortened(stretch))
    console.print(f"The first example; what is trained stands in {OPEN} {CLOSE}:", style="dim")
    console.print(text)


def _shortened(text: str) -> str:
    if len(text) <= _SHOWN:
        return text
    return f"{text[: _SHOWN // 2]} [...] {text[-_SHOWN // 2 :]}"


def marked(row: dict[str, Any], tokenizer: Any) -> list[tuple[bool, str]]:
    """The stretches of a row's text, each with whether its tokens carry a loss."""
    pairs = zip(row["input_ids"], row["labels"], strict=True)
    return [
        (trained, tokenizer.decode([token for token, _ in stretch]))
        for trained, stretch in groupby(pairs, key=lambda pair: pair[1] != IGNORE)
    ]
