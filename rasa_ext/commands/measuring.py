"""Measurements of models: held-out loss, greedy answers, exact match."""

from __future__ import annotations

import contextlib
import copy
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import pipeline
from trl import SFTConfig

import rasa_ext
from rasa_ext.checkpoint.files import read_config
from rasa_ext.commands.data import Row, rows_for_sft
from rasa_ext.commands.models import base_of, load_model, load_tokenizer, own_tokenizer, scores
from rasa_ext.commands.output import working
from rasa_ext.commands.paths import is_adapter
from rasa_ext.commands.trainer import AdapterTrainer, dataset

_NUMBER = re.compile(r"-?\d+(?:\.\d+)?")
_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}\b)")

# A function that extracts the part of an answer to compare, such as its last number, or None.
Rule = Callable[[str], object]


def each_model(
    names: Sequence[str], base: str | None, dtype: str
) -> Iterator[tuple[str, Any, Any]]:
    """Yield the name, model and tokenizer of every target. A yielded model is valid until the next.

    Successive adapters of one base share the loaded base.

    Args:
        names: adapter directories, of this package or PEFT, or models as `load_model` takes them.
        base: the base of the adapters; None takes the one that each config names.
        dtype: dtype of the base, as in `load_model`.

    Raises ValueError or FileNotFoundError if a target cannot be read, or does not fit the base.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    loaded, model = "", torch.nn.Module()
    for name in names:
        path, adapted = Path(name), is_adapter(Path(name))
        with base_of(path, base) if adapted else contextlib.nullcontext(name) as wanted:
            if adapted and scores(path):
                raise ValueError(f"targets: expected language models, but {name} scores answers.")
            if wanted != loaded:
                with working(f"Loading {wanted}"):
                    loaded, model = wanted, load_model(wanted, dtype).to(device)
            tokenizer = own_tokenizer(path) or load_tokenizer(wanted)
        if not adapted:
            yield name, model, tokenizer
        elif read_config(path).get("peft_type") == "RASA":
            yield name, rasa_ext.load_adapter(model, path).eval(), tokenizer
            rasa_ext.unpatch(model)
        else:
            from peft import PeftModel

            lora = PeftModel.from_pretrained(model, name).eval()
            yield name, lora, tokenizer
            lora.unload()


def held_out_loss(
    model: Any,
    tokenizer: Any,
    examples: Sequence[Row],
    template: bool,
    seq_len: int,
    batch_size: int,
) -> float:
    """Return the mean loss in nats over the tokens on which `finetune` would train."""
    (rows,), marks = rows_for_sft([examples], tokenizer, template)
    with tempfile.TemporaryDirectory() as directory:
        arguments = SFTConfig(
            directory,
            per_device_eval_batch_size=batch_size,
            max_length=seq_len,
            assistant_only_loss=marks,
            bf16=False,
            prediction_loss_only=True,
            gradient_checkpointing=False,
            report_to=[],
            disable_tqdm=True,
            dataloader_pin_memory=torch.cuda.is_available(),
        )
        trainer = AdapterTrainer(
            model, arguments, train_dataset=dataset(rows), processing_class=tokenizer
        )
        for callback in list(trainer.callback_handler.callbacks):
            trainer.remove_callback(callback)
        return trainer.evaluate(trainer.train_dataset)["eval_loss"]


def greedy_answers(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    max_new_tokens: int,
    batch_size: int = 32,
    special_tokens: bool = False,
) -> list[str]:
    """Return the greedy continuation of each prompt, without special tokens.

    ``special_tokens`` adds the tokenizer's special tokens to the prompts. Prompts from a chat
    template already contain them.
    """
    tokenizer = copy.copy(tokenizer)
    tokenizer.padding_side = "left"  # so that all answers of a batch start at one position
    ask = pipeline("text-generation", model=model, tokenizer=tokenizer)
    answers = ask(
        list(prompts),
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        return_full_text=False,
        add_special_tokens=special_tokens,
    )
    return [answer[0]["generated_text"].strip() for answer in answers]


def last_number(text: str) -> float | None:
    """Return the last number in a text, which is usually the answer, or None."""
    numbers = _NUMBER.findall(_THOUSANDS.sub("", text))
    return float(numbers[-1]) if numbers else None


def by_pattern(pattern: str) -> Rule:
    """Make a rule that returns the last match of a pattern: its first group, or the whole match.

    Raises ValueError if the pattern is no regular expression.
    """
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise ValueError(
            f"answer_pattern: expected a regular expression, got {pattern!r}: {error}."
        ) from None

    def rule(text: str) -> str | None:
        groups = [match[1 if compiled.groups else 0] for match in compiled.finditer(text)]
        return groups[-1].strip() if groups and groups[-1] is not None else None

    return rule


def exact_match(
    answers: Sequence[str], expected: Sequence[object], rule: Rule = last_number
) -> float:
    """Return the share of answers, in 0..1, from which the rule extracts the expected value."""
    hits = sum(rule(answer) == right for answer, right in zip(answers, expected, strict=True))
    return hits / max(len(expected), 1)
