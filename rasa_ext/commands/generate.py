"""``rasa-ext generate``: answer prompts with several models, or chat with one."""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rasa_ext.commands.output import command, console, printable
from rasa_ext.commands.parsing import check_dtype, check_least, check_seed


@command
def generate(
    targets: list[str],
    *,
    prompt: list[str] | None = None,
    system: str | None = None,
    model: str | None = None,
    template: bool | None = None,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    seed: int = 0,
    dtype: str = "auto",
) -> None:
    """Answer prompts with adapters and models, side by side, or chat with one of them.

    Args:
        targets: Adapters and models: directory (adapter, merged or other model), hub id, .gguf
            file, or smollm2.
        prompt: Prompt to answer; repeat the option for several. Without it, you chat with a single
            target, one line per turn, until /quit or Ctrl-D.
        system: System message before each prompt or chat.
        model: Base model of the adapters. [default: the one that each adapter names]
        template: Use the chat template, if there is one. [default: as the adapter was trained]
        max_new_tokens: Maximum length of an answer in tokens.
        temperature: Sampling temperature; 0 always takes the most likely token.
        seed: Seed of the sampling.
        dtype: Dtype of the base: float32, bfloat16, float16, or auto (the stored dtype).
    """
    check_least(temperature=(temperature, 0), max_new_tokens=(max_new_tokens, 1))
    check_dtype(dtype)
    check_seed(seed)
    for name in targets:
        if " " in name and not Path(name).exists():
            raise ValueError(f"targets: expected models, got {name!r}; did you mean --prompt?")
    if prompt is None and len(targets) > 1:
        raise ValueError(f"prompt: expected --prompt with several models, got {targets}.")
    from rasa_ext.commands.measuring import each_model
    from rasa_ext.commands.paths import trained_with_template

    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "do_sample": temperature > 0}
    if temperature:
        options["temperature"] = temperature
    before = [] if system is None else [{"role": "system", "content": system}]
    for name, loaded, tokenizer in each_model(targets, model, dtype):
        uses = trained_with_template(name) if template is None else template
        answer = functools.partial(print_answer, loaded, tokenizer, uses, seed, options)
        if prompt is None:
            _chat(answer, before)
        for text in prompt or ():
            console.print(f"\n{name}", style="bold", markup=False)
            console.print(text, style="dim", markup=False)
            answer([*before, {"role": "user", "content": text}])


def print_answer(
    model: Any,
    tokenizer: Any,
    template: bool,
    seed: int,
    options: dict[str, Any],
    turns: list[dict[str, str]],
) -> str:
    """Print the answer to a conversation token by token, and return it."""
    from transformers import TextStreamer, pipeline, set_seed

    from rasa_ext.commands.data import templated

    set_seed(seed)

    class Streamer(TextStreamer):
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            super().on_finalized_text(printable(text), stream_end)

    text = "\n".join(turn["content"] for turn in turns)
    if template and tokenizer.chat_template:
        text = templated(tokenizer, turns, "prompt", add_generation_prompt=True)
        options = {**options, "add_special_tokens": False}  # the template has them
    ask = pipeline("text-generation", model=model, tokenizer=tokenizer)
    (answer,) = ask(
        text,
        streamer=Streamer(tokenizer, skip_prompt=True, skip_special_tokens=True),
        return_full_text=False,
        **options,
    )
    return answer["generated_text"]


def _chat(answer: Callable[[list[dict[str, str]]], str], turns: list[dict[str, str]]) -> None:
    """Chat with a model that reads all earlier turns; every input line is a turn."""
    prompt = "> " if sys.stdin.isatty() else ""
    if prompt:
        console.print("Each line is a turn; /quit or Ctrl-D ends the chat.", style="dim")
    with contextlib.suppress(EOFError):
        while (line := input(prompt)).strip() != "/quit":
            if line.strip():
                turns = [*turns, {"role": "user", "content": line}]
                turns.append({"role": "assistant", "content": answer(turns)})
