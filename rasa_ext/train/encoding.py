"""Text to token ids and labels: only completions, or the assistant's turns, carry a loss."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from rasa_ext.train.data import DataError, Example

IGNORE = -100
"""The label of a token that carries no loss, as torch's cross entropy has it."""


@dataclass(frozen=True)
class Segment:
    """A piece of an example's text and whether its tokens carry a loss."""

    text: str
    trained: bool


def encode(example: Example, tokenizer: Any, seq_len: int) -> dict[str, list[int]] | None:
    """``input_ids`` and ``labels`` of at most ``seq_len`` tokens, or None if no label is left.

    Raises DataError where the chat template refuses the conversation or rewrites earlier turns.
    """
    if example.messages is not None:
        ids, labels = _encode_conversation(example, example.messages, tokenizer)
    else:
        assert example.prompt is not None  # as data.Example says
        assert example.completion is not None
        ids, labels = _encode_pair(example.prompt, example.completion, tokenizer)
    ids, labels = ids[:seq_len], labels[:seq_len]
    # The first token has nothing before it that could predict it.
    if all(label == IGNORE for label in labels[1:]):
        return None
    return {"input_ids": ids, "labels": labels}


@dataclass
class Encoded:
    """A data set ready for training, and what had to be left out or cut."""

    rows: list[dict[str, list[int]]]
    dropped: int
    """Examples without a trained token within ``seq_len``."""
    truncated: int
    """Kept examples that reach ``seq_len``, so may have been cut."""

    @property
    def trained_tokens(self) -> int:
        """Tokens that carry a loss."""
        return sum(label != IGNORE for row in self.rows for label in row["labels"][1:])


def encode_all(examples: Iterable[Example], tokenizer: Any, seq_len: int) -> Encoded:
    """Encode every example. Raises DataError if none is left with a token to train on."""
    result = Encoded([], 0, 0)
    for example in examples:
        row = encode(example, tokenizer, seq_len)
        if row is None:
            result.dropped += 1
            continue
        result.rows.append(row)
        result.truncated += len(row["input_ids"]) == seq_len
    if not result.rows:
        if not result.dropped:
            raise DataError("data: expected at least one example, got none.")
        raise DataError(
            f"seq_len: within {seq_len} tokens none of the {result.dropped} examples has a "
            "completion token to train on; raise --seq-len or shorten the prompts."
        )
    return result


class Collator:
    """Pads rows on the right into tensors (batch, longest): ids, mask and labels, all int64."""

    def __init__(self, pad_token_id: int) -> None:
        self.pad_token_id = pad_token_id

    def __call__(self, rows: Sequence[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        """Stack the rows; padding has mask 0 and label -100."""
        longest = max(len(row["input_ids"]) for row in rows)
        shape = (len(rows), longest)
        ids = torch.full(shape, self.pad_token_id)
        mask = torch.zeros(shape, dtype=torch.long)
        labels = torch.full(shape, IGNORE)
        for i, row in enumerate(rows):
            length = len(row["input_ids"])
            ids[i, :length] = torch.tensor(row["input_ids"])
            labels[i, :length] = torch.tensor(row["labels"])
            mask[i, :length] = 1
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def _encode_pair(prompt: str, completion: str, tokenizer: Any) -> tuple[list[int], list[int]]:
    """Prompt and completion, each tokenized by itself, and the end-of-sequence token.

    By itself, since that is what a model meets when it is asked: were the text tokenized as a
    whole, a prompt's last space could end up in the completion's first token.
    """
    eos = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    ids = list(tokenizer(prompt)["input_ids"])
    if eos and ids[-1:] == eos and not prompt.endswith(tokenizer.eos_token):
        ids.pop()  # some tokenizers close every text
    learnt = list(tokenizer(completion, add_special_tokens=False)["input_ids"])
    if learnt[-1:] != eos:
        learnt += eos
    return ids + learnt, [IGNORE] * len(ids) + learnt


def _encode_conversation(
    example: Example, messages: Sequence[dict[str, str]], tokenizer: Any
) -> tuple[list[int], list[int]]:
    """The whole text, tokenized once; a token is trained if it lies within an assistant's turn."""
    if getattr(tokenizer, "chat_template", None):
        segments = _templated_turns(example, messages, tokenizer)
    else:
        segments = _plain_turns(messages, tokenizer.eos_token or "")
    if not getattr(tokenizer, "is_fast", False):
        raise DataError(
            f"model: expected a tokenizer that reports character offsets (a fast one), got "
            f"{type(tokenizer).__name__}; convert it with the `tokenizers` library."
        )
    text = "".join(segment.text for segment in segments)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    trained = _trained_spans(segments)
    ids = list(encoded["input_ids"])
    labels = [
        token if any(begin <= start < stop <= end for begin, end in trained) else IGNORE
        for token, (start, stop) in zip(ids, encoded["offset_mapping"], strict=True)
    ]
    return ids, labels


def _plain_turns(messages: Sequence[dict[str, str]], eos: str) -> list[Segment]:
    """A format for tokenizers without a chat template: ``role: content``, a line a turn."""
    segments = []
    for message in messages:
        head, body = f"{message['role']}:", f" {message['content']}"
        if message["role"] == "assistant":
            segments += [Segment(head, False), Segment(body + eos, True), Segment("\n", False)]
        else:
            segments.append(Segment(f"{head}{body}\n", False))
    return segments


def _templated_turns(
    example: Example, messages: Sequence[dict[str, str]], tokenizer: Any
) -> list[Segment]:
    messages = list(messages)
    last = max(i for i, message in enumerate(messages) if message["role"] == "assistant")
    messages = messages[: last + 1]  # what follows the assistant's last word carries no loss
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False)
        segments, done = [], 0
        for i, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            head = tokenizer.apply_chat_template(
                messages[:i], tokenize=False, add_generation_prompt=True
            )
            turn = tokenizer.apply_chat_template(messages[: i + 1], tokenize=False)
            if not (text.startswith(turn) and turn.startswith(head) and len(head) >= done):
                raise DataError(
                    f"{example.where}: the chat template rewrites earlier turns, so the "
                    f"assistant's words in messages[{i}] cannot be told apart; end the "
                    "conversation with the turn to learn."
                )
            end = len(turn.rstrip())  # the closing token is learnt, the line break after it not
            segments += [
                Segment(text[done : len(head)], False),
                Segment(text[len(head) : end], True),
            ]
            done = end
    except DataError:
        raise
    except Exception as error:  # templates raise whatever they like
        raise DataError(
            f"{example.where}: the chat template refuses this conversation: {error}"
        ) from error
    return [*segments, Segment(text[done:], False)]


def _trained_spans(segments: Sequence[Segment]) -> list[tuple[int, int]]:
    spans, start = [], 0
    for segment in segments:
        end = start + len(segment.text)
        if segment.trained and end > start:
            spans.append((start, end))
        start = end
    return spans
