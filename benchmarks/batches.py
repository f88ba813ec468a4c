"""Texts as tokens and labels, and batches of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

Row = dict[str, list[int]]
"""Token ids and labels of one text."""

IGNORE = -100
"""The label of a token without loss."""


def encoded(prompt: str, completion: str, tokenizer: Any, seq_len: int) -> Row:
    """Tokenize both texts separately; only the completion's tokens have a loss."""
    before = list(tokenizer(prompt, add_special_tokens=False)["input_ids"])
    learnt = list(tokenizer(completion, add_special_tokens=False)["input_ids"])
    ids, labels = before + learnt, [IGNORE] * len(before) + learnt
    return {"input_ids": ids[:seq_len], "labels": labels[:seq_len]}


def collate(rows: Sequence[Row], pad_token_id: int) -> dict[str, Tensor]:
    """Return ids, mask and labels, all int64 (rows, longest), padded on the right."""
    ids = [torch.tensor(row["input_ids"]) for row in rows]
    labels = [torch.tensor(row["labels"]) for row in rows]
    return {
        "input_ids": pad_sequence(ids, batch_first=True, padding_value=pad_token_id),
        "attention_mask": pad_sequence([torch.ones_like(each) for each in ids], batch_first=True),
        "labels": pad_sequence(labels, batch_first=True, padding_value=IGNORE),
    }
