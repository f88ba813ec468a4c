"""Tables named by ``trainable_token_indices``, and the trained rows of a patched model."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rasa_ext.base_layers.linear import is_plain, stored_weight
from rasa_ext.base_layers.sharded import SHARDING_HINT, is_dtensor, is_emptied, what_is_here
from rasa_ext.base_layers.survey import Survey
from rasa_ext.methods.base import AdapterConfig
from rasa_ext.methods.token_indices import INPUT
from rasa_ext.nn.trained_tokens import TrainedTokens

ARGUMENT = "trainable_token_indices"
ROWS = ".token_adapter.trainable_tokens_delta"
"""End of PEFT's keys of trained rows."""


@dataclasses.dataclass(frozen=True)
class TokenRows:
    """Trained rows of one table, which is a weight (tokens, width)."""

    names: tuple[str, ...]
    """Modules that read the table; the first owns the trained rows. Embeddings come first."""
    ids: tuple[int, ...]
    """Token ids, in the order of the rows."""
    width: int


def find_rows(found: Survey, config: AdapterConfig) -> tuple[TokenRows, ...]:
    """Return the tables that ``config`` names, with all modules that read them.

    Raises ValueError, naming the argument, if there is no such table or it cannot be trained.
    """
    if not config.tokens:
        return ()
    tables = found.tables
    weights = {name: stored_weight(module) for name, module in tables.items()}
    first: dict[int, str] = {}
    for name, module in tables.items():
        first.setdefault(id(module), name)
    chosen: dict[int, tuple[str, tuple[int, ...]]] = {}
    for suffix, ids in config.tokens:
        for name in _named(found, suffix):
            before = chosen.setdefault(id(weights[name]), (name, ids))
            if before[1] != ids:
                raise ValueError(
                    f"{ARGUMENT}: expected the same tokens for {before[0]!r} and {name!r}, which "
                    "share one weight; name one of them, or give both the same list."
                )
    rows = []
    for table, (_, ids) in chosen.items():
        readers = [n for n in first.values() if id(weights[n]) == table]
        readers.sort(key=lambda name: isinstance(tables[name], nn.Linear))
        for name in readers:
            _check(name, tables[name], weights[name], ids, config)
        rows.append(TokenRows(tuple(readers), ids, tables[readers[0]].weight.shape[1]))
    return tuple(rows)


def _named(found: Survey, suffix: str) -> list[str]:
    """Return the names of the tables that an entry of the config matches."""
    embeddings = {n: table for n, table in found.tables.items() if isinstance(table, nn.Embedding)}
    known = ", ".join(map(repr, embeddings)) or "none"
    if suffix != INPUT:
        names = [name for name in found.tables if f".{name}".endswith(f".{suffix}")]
        if not names:
            raise ValueError(
                f"{ARGUMENT}: expected name suffixes of embeddings or linear heads, but no name "
                f"ends in {suffix!r}; the model's embeddings are {known}."
            )
        return names
    names = [name for name, table in embeddings.items() if table is found.input_embedding]
    if not names and len({id(table.weight) for table in embeddings.values()}) == 1:
        names = list(embeddings)
    if not names:
        raise ValueError(
            f"{ARGUMENT}: expected a mapping from embedding names to lists, got a list, and the "
            f"model does not define its input embedding; its embeddings are {known}."
        )
    return names[:1]


def _check(
    name: str,
    module: nn.Embedding | nn.Linear,
    weight: Tensor,
    ids: Sequence[int],
    config: AdapterConfig,
) -> None:
    """Raise ValueError if rows of a module's weight cannot be trained."""
    why = ""
    if is_dtensor(weight) or is_emptied(weight) or weight.dim() != 2:
        why = f"a weight that is {what_is_here(weight)}; {SHARDING_HINT}"
    elif not is_plain(weight):
        why = "a quantized weight, whose rows cannot be replaced"
    elif isinstance(module, nn.Embedding):
        if module.max_norm is not None:
            why = f"max_norm {module.max_norm}, with which a forward changes the weight"
        elif module.scale_grad_by_freq:
            why = "scale_grad_by_freq, which trained rows do not support"
        elif type(module).forward is not nn.Embedding.forward and not hasattr(
            module, "embed_scale"
        ):
            why = f"the forward of a {type(module).__name__}, which may do more than look up rows"
    if why:
        raise ValueError(
            f"{ARGUMENT}: cannot train rows of {name!r}, since it has {why}; leave it out, or "
            "train it in full with modules_to_save."
        )
    if max(ids) >= len(weight):
        raise ValueError(
            f"{ARGUMENT}: expected indices below {len(weight)}, the rows of {name!r}, got "
            f"{max(ids)}; for new tokens, call model.resize_token_embeddings first."
        )
    for item in config.modules_to_save:
        if f".{item}." in f".{name}.":
            raise ValueError(
                f"{ARGUMENT}: {name!r} is also trained in full by modules_to_save ({item!r}); name "
                "it in one of the two."
            )


def check_not_adapted(rows: Sequence[TokenRows], adapted: Sequence[str]) -> None:
    """Raise ValueError if an adapted layer's weight has trained rows."""
    for table_rows in rows:
        if both := [name for name in table_rows.names if name in adapted]:
            raise ValueError(
                f"{ARGUMENT}: rows of {table_rows.names[0]!r} are trained, but target_modules also "
                f"adapts {both[0]!r}, of the same weight; name it in one of the two, or exclude it."
            )


def make_modules(
    model: nn.Module, rows: Sequence[TokenRows], dtype: torch.dtype
) -> dict[nn.Module, TrainedTokens]:
    """Make the replacements of all modules that read a table with trained rows."""
    modules: dict[nn.Module, TrainedTokens] = {}
    for table_rows in rows:
        owner = None
        for name in table_rows.names:
            table: Any = model.get_submodule(name)
            modules[table] = TrainedTokens(table, table_rows.ids, dtype, owner)
            owner = owner or modules[table]
    return modules


def trained_tokens(model: nn.Module) -> list[tuple[str, TrainedTokens]]:
    """List ``(name, module)`` of all readers of trained rows, each once, in module order."""
    return [(name, m) for name, m in model.named_modules() if isinstance(m, TrainedTokens)]


def row_owners(model: nn.Module) -> list[tuple[str, TrainedTokens]]:
    """List ``(name, module)`` of the owners of trained rows."""
    return [(name, module) for name, module in trained_tokens(model) if module.owner is None]


def rows_key(name: str) -> str:
    """Return the key, without prefix, of a module's trained rows in a file; it is PEFT's."""
    return name + ROWS


def row_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return the live trained rows by key, without prefix."""
    return {rows_key(name): module.rows for name, module in row_owners(model)}


def merge_rows(model: nn.Module) -> float:
    """Write all trained rows into their tables; return the largest change of an entry."""
    return max((module.merge() for _, module in row_owners(model)), default=0.0)


def unmerge_rows(model: nn.Module) -> None:
    """Restore the original rows of all tables."""
    for _, module in row_owners(model):
        module.unmerge()


def check_rows_finite(rows: Iterable[tuple[str, Tensor, Tensor]]) -> None:
    """Raise ValueError if a row would not be finite in its table.

    An item of ``rows`` is the name for the error, the rows, and the table.
    """
    for name, trained, table in rows:
        if not trained.detach().to(table.dtype).isfinite().all():
            raise ValueError(
                f"model: expected finite merged weights, but trained rows of {name} hold values "
                f"that are not finite in {table.dtype}; nothing was merged."
            )
