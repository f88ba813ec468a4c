"""Trained rows of an embedding in a LoRA's files, in PEFT's form, and what readers do with them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from rasa_ext.patching.tokens import TokenRows, trained_tokens


def token_setting(tokens: tuple[TokenRows, ...]) -> dict[str, list[int]] | None:
    """Give ``trainable_token_indices`` of PEFT's config: tokens by the names of owners."""
    return {rows.names[0]: list(rows.ids) for rows in tokens} or None


def dropped_rows(root: nn.Module, tokens: tuple[TokenRows, ...]) -> Iterator[str]:
    """Name what a reader leaves out of trained rows without an error."""
    if not tokens:
        return
    yield (
        f"SGLang leaves the trained rows of {tokens[0].names[0]} out without a word (vLLM and "
        "llama.cpp refuse them)"
    )
    modules = dict(trained_tokens(root))
    for name, module in modules.items():
        if module.bias is not None:
            yield f"PEFT leaves out the bias of {name}, a head with trained rows"
    tied = [rows.names for rows in tokens if len(rows.names) > 1]
    if tied and not peft_ties(root, [names[0] for names in tied]):
        yield (
            f"PEFT does not give {tied[0][1]} the trained rows of {tied[0][0]}, since the model's "
            "config does not say that its input embedding is tied"
        )


def peft_ties(root: Any, owners: list[str]) -> bool:
    """Tell whether PEFT knows the modules that share the weights of ``owners``."""
    config = getattr(root, "config", None)
    said = getattr(config, "tie_word_embeddings", False) and hasattr(root, "_tied_weights_keys")
    if not said or not hasattr(root, "get_input_embeddings"):
        return False
    inputs = root.get_input_embeddings()
    return all(root.get_submodule(name) is inputs for name in owners)
