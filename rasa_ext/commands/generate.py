"""``rasa-ext generate``."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Annotated, Any

import typer

from rasa_ext.commands.evaluate import Base, Dtype, Targets, Template
from rasa_ext.commands.output import command, console


@command
def generate(
    targets: Targets,
    prompt: Annotated[
        list[str] | None,
        typer.Option(
            help="What is asked; may be given several times. Without it a conversation is held, "
            "a line a turn, with the one model that is given; /quit or Ctrl-D ends it.",
            show_default=False,
        ),
    ] = None,
    system: Annotated[str | None, typer.Option(help="A turn of the system before all.")] = None,
    model: Base = None,
    template: Template = None,
    max_new_tokens: Annotated[int, typer.Option(help="Room for an answer.")] = 256,
    temperature: Annotated[
        float, typer.Option(help="Of the sampling; 0 takes the most likely token.")
    ] = 0.0,
    seed: Annotated[int, typer.Option(help="Of the sampling.")] = 0,
    dtype: Dtype = "auto",
) -> None:
    """Let adapters and models answer, side by side: in a chat, or going on with a text."""
    from rasa_ext.commands.measure import each_model, trained_with_template
    from rasa_ext.commands.speaker import Speaker

    if temperature < 0:
        raise ValueError(f"temperature: expected 0 or more, got {temperature}.")
    if prompt is None and len(targets) > 1:
        raise ValueError("prompt: expected one, since a conversation is held with one model only.")
    for name, each, tokenizer in each_model(targets, model, dtype, console):
        uses = trained_with_template(name) if template is None else template
        speaker = Speaker(each, tokenizer, uses, max_new_tokens, temperature, seed)
        if prompt is None:
            _talk(speaker, system)
            continue
        for text in prompt:
            _show(name, text, speaker.answer([*_turns(system), _turn("user", text)]))


def _talk(speaker: Any, system: str | None) -> None:
    """Hold a conversation: every line is a turn, and the model hears all before it."""
    turns = _turns(system)
    for line in _lines():
        turns.append(_turn("user", line))
        turns.append(_turn("assistant", _stream(speaker.answer(turns))))


def _lines() -> Iterator[str]:
    prompt = "> " if sys.stdin.isatty() else ""
    if prompt:
        console.print("A line is a turn; /quit or Ctrl-D ends the conversation.", style="dim")
    while True:
        try:
            line = input(prompt)
        except EOFError:
            return
        if line.strip() == "/quit":
            return
        if line.strip():
            yield line


def _show(name: str, prompt: str, pieces: Iterator[str]) -> None:
    console.print(f"\n{name}", style="bold", markup=False)
    console.print(prompt, style="dim", markup=False)
    _stream(pieces)


def _stream(pieces: Iterator[str]) -> str:
    """Print an answer as it comes; returns it."""
    text = ""
    for piece in pieces:
        console.print(piece, end="", markup=False)
        text += piece
    console.print()
    return text


def _turns(system: str | None) -> list[dict[str, str]]:
    return [] if system is None else [_turn("system", system)]


def _turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}
