"""Measuring a causal language model: greedy answers and exact match."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch

_NUMBER = re.compile(r"-?\d+(?:\.\d+)?")
_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}\b)")


@torch.inference_mode()
def greedy_answers(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    max_new_tokens: int,
    batch_size: int = 32,
) -> list[str]:
    """The most likely continuation of each prompt, without special tokens, in the given order.

    Prompts are taken as they are (a chat template is already applied) and batched by length.
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
            add_special_tokens=False,
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


def exact_match(answers: Sequence[str], expected: Sequence[int]) -> float:
    """The share of answers, in 0..1, whose last number is the expected one."""
    hits = sum(last_number(a) == e for a, e in zip(answers, expected, strict=True))
    return hits / max(len(expected), 1)
