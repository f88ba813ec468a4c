"""Measuring and asking models: held-out loss, greedy answers, exact match."""

from __future__ import annotations

import contextlib
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.console import Console
from trl import SFTConfig

import rasa_ext
from rasa_ext.checkpoint.files import read_config
from rasa_ext.commands.callbacks import EvaluationProgress
from rasa_ext.commands.contents import is_adapter
from rasa_ext.commands.data import Example, questions, rows_for_sft
from rasa_ext.commands.models import base_of, load_model, load_tokenizer, naming_the_base
from rasa_ext.commands.options import RECORD
from rasa_ext.commands.trainer import AdapterTrainer, dataset
from rasa_ext.commands.working import working

_NUMBER = re.compile(r"-?\d+(?:\.\d+)?")
_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}\b)")

Rule = Callable[[str], object]
"""What counts of an answer, such as its last number; None where there is nothing of the kind."""


@dataclass
class Measured:
    """A model on held-out examples."""

    loss: float
    """Nats per token that is to be learnt."""
    matched: float | None = None
    """The share of answers that are right, in 0..1; None where none could be judged."""
    answers: list[str] = field(default_factory=list)


def each_model(
    names: Sequence[str], base: str | None, dtype: str, console: Console
) -> Iterator[tuple[str, Any, Any]]:
    """Every model by its name, with its tokenizer; a base of several adapters is loaded once.

    Args:
        names: adapter directories, RaSA's or PEFT's, or models as `load_model` takes them. What
            is yielded is good until the next.
        base: the base of the adapters; where None, what their configs say.
        dtype: of the base, as `load_model` has it.
        console: where progress is shown.

    Raises ValueError or FileNotFoundError where one cannot be read, or does not fit its base.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    loaded, model = "", torch.nn.Module()
    for name in names:
        path = Path(name)
        wanted = base_of(path, base) if is_adapter(path) else name
        if wanted != loaded:
            named = naming_the_base(path, base) if is_adapter(path) else contextlib.nullcontext()
            with named, working(console, f"Loading {wanted}"):
                loaded, model = wanted, load_model(wanted, dtype).to(device)
        if not is_adapter(path):
            yield name, model, load_tokenizer(wanted)
            continue
        own = (path / "tokenizer_config.json").is_file()
        tokenizer = load_tokenizer(name if own else wanted)
        if read_config(path).get("peft_type") == "RASA":
            yield name, rasa_ext.load_adapter(model, path).eval(), tokenizer
            rasa_ext.unpatch(model)
        else:
            from peft import PeftModel

            adapted = PeftModel.from_pretrained(model, name).eval()
            yield name, adapted, tokenizer
            adapted.unload()


def trained_with_template(name: str) -> bool:
    """Whether `finetune` used the chat template, where the name is of an adapter of it, or may."""
    record = Path(name) / RECORD
    return not record.is_file() or yaml.safe_load(record.read_text()).get("template", True)


def measure(
    model: Any,
    tokenizer: Any,
    examples: Sequence[Example],
    console: Console,
    *,
    template: bool = True,
    rule: Rule | None = None,
    seq_len: int = 1024,
    batch_size: int = 8,
    max_new_tokens: int = 256,
) -> Measured:
    """Measure the loss and, with a ``rule`` that finds an answer in every example, exact match.

    The answer that is right is found in the completion, or the assistant's last turn, by the same
    rule as that which the model gives.
    """
    result = Measured(
        held_out_loss(model, tokenizer, examples, console, template, seq_len, batch_size)
    )
    if rule is None:
        return result
    prompts, right = zip(*questions(examples, tokenizer, template), strict=True)
    expected = [rule(text) for text in right]
    if any(answer is None for answer in expected):
        return result
    for start in range(0, len(prompts), batch_size):
        some = prompts[start : start + batch_size]
        result.answers += greedy_answers(
            model,
            tokenizer,
            some,
            max_new_tokens,
            special_tokens=not (template and tokenizer.chat_template),
        )
        console.print(f"{len(result.answers)} of {len(prompts)} questions answered")
    result.matched = exact_match(result.answers, expected, rule)
    return result


def held_out_loss(
    model: Any,
    tokenizer: Any,
    examples: Sequence[Example],
    console: Console,
    template: bool,
    seq_len: int,
    batch_size: int,
) -> float:
    """The mean loss over all tokens that `finetune` would learn of the examples, in nats."""
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
        trainer.add_callback(EvaluationProgress(console))
        return trainer.evaluate(trainer.train_dataset)["eval_loss"]


@torch.inference_mode()
def greedy_answers(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    max_new_tokens: int,
    batch_size: int = 32,
    special_tokens: bool = False,
) -> list[str]:
    """The most likely continuation of each prompt, without special tokens, in the given order.

    Prompts are taken as they are, and batched by length; ``special_tokens`` adds the tokenizer's
    own, which a chat template has already.
    """
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    answers = [""] * len(prompts)
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        batch = tokenizer(
            [prompts[i] for i in chosen],
            return_tensors="pt",
            padding=True,
            padding_side="left",
            add_special_tokens=special_tokens,
        ).to(model.device)
        output = model.generate(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            max_new_tokens=max_new_tokens,
            do_sample=False,
            use_cache=True,
            pad_token_id=tokenizer.pad_token_id,
        )
        texts = tokenizer.batch_decode(
            output[:, batch["input_ids"].shape[1] :], skip_special_tokens=True
        )
        for i, text in zip(chosen, texts, strict=True):
            answers[i] = text.strip()
    return answers


def last_number(text: str) -> float | None:
    """The last number in a text: where an answer stands, bare or explained; None if none."""
    found = _NUMBER.findall(_THOUSANDS.sub("", text))
    return float(found[-1]) if found else None


def by_pattern(pattern: str) -> Rule:
    """The rule that takes a regular expression's last match: its first group, or all of it.

    Raises ValueError where it is no regular expression.
    """
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise ValueError(
            f"answer_pattern: expected a regular expression, got {pattern!r}: {error}."
        ) from None

    def rule(text: str) -> str | None:
        found = [match[1 if compiled.groups else 0] for match in compiled.finditer(text)]
        return found[-1].strip() if found and found[-1] is not None else None

    return rule


def exact_match(
    answers: Sequence[str], expected: Sequence[object], rule: Rule = last_number
) -> float:
    """The share of answers, in 0..1, of which the rule finds what is expected."""
    hits = sum(rule(answer) == right for answer, right in zip(answers, expected, strict=True))
    return hits / max(len(expected), 1)
