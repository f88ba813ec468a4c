"""``trainable_token_indices``: a config's trained rows of embeddings and heads."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

INPUT = ""
"""The name of the model's input embedding, to which a bare list of tokens applies."""

Tokens = tuple[tuple[str, tuple[int, ...]], ...]
"""Names of embeddings or heads with tokens, as a config stores them."""

GivenTokens = Tokens | Mapping[str, Sequence[int]] | Sequence[int] | None
"""Tokens as users give them."""

_KINDS = "a list of token indices, or a mapping from embedding names to such lists"


def checked_tokens(value: Any) -> Tokens:
    """Convert ``trainable_token_indices`` to the form in a config; raise for any other value."""
    if value is None:
        return ()
    if isinstance(value, str | bytes) or not isinstance(value, Iterable):
        raise TypeError(
            f"trainable_token_indices: expected {_KINDS}, got {value!r} ({type(value).__name__})."
        )
    if isinstance(value, Mapping):
        items = list(value.items())
    else:
        items = list(value)
        if not (items and all(isinstance(item, tuple) for item in items)):
            items = [(INPUT, items)] if items else []
    tokens = []
    for name, ids in items:
        if not isinstance(name, str):
            raise TypeError(f"trainable_token_indices: expected {_KINDS}, got the name {name!r}.")
        tokens.append((name, _checked_ids(name, ids)))
    return tuple(tokens)


def tokens_to_json(tokens: Tokens) -> list[int] | dict[str, list[int]] | None:
    """Return a config's tokens in PEFT's form: a list, or lists by module name."""
    if [name for name, _ in tokens] == [INPUT]:
        return list(tokens[0][1])
    return {name: list(ids) for name, ids in tokens} or None


def _checked_ids(name: str, ids: Any) -> tuple[int, ...]:
    of = f" of {name!r}" if name else ""
    if isinstance(ids, str | bytes) or not isinstance(ids, Iterable):
        raise TypeError(f"trainable_token_indices: expected {_KINDS}, got {ids!r}{of}.")
    tokens = tuple(sorted(ids) if isinstance(ids, set | frozenset) else ids)
    for token in tokens:
        if isinstance(token, bool) or not isinstance(token, int):
            raise TypeError(
                f"trainable_token_indices: expected integers, got {token!r}{of} "
                f"({type(token).__name__})."
            )
        if token < 0:
            raise ValueError(f"trainable_token_indices: expected indices >= 0, got {token}{of}.")
    if not tokens:
        raise ValueError(f"trainable_token_indices: expected at least one index{of}, got none.")
    if len(set(tokens)) < len(tokens):
        twice = next(token for token in tokens if tokens.count(token) > 1)
        raise ValueError(
            f"trainable_token_indices: expected each token once, got {twice}{of} twice."
        )
    return tokens
