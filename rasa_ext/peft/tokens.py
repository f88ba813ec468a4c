"""``trainable_token_indices`` under PEFT, whose wrappers hold the rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import torch
from peft.tuners.trainable_tokens import TrainableTokensLayer
from peft.utils.other import TrainableTokensWrapper
from torch import Tensor, nn

from rasa_ext.base_layers.survey import Survey, survey
from rasa_ext.checkpoint.lora_readers import peft_ties
from rasa_ext.methods.base import AdapterConfig
from rasa_ext.patching.tokens import ARGUMENT, TokenRows, check_not_adapted, find_rows

_INSTEAD = "train such rows with rasa_ext.patch_model"


def token_layers(model: nn.Module) -> list[TrainableTokensLayer]:
    """List PEFT's layers that own trained rows, in the model's order."""
    layers = (m for m in model.modules() if isinstance(m, TrainableTokensLayer))
    return [layer for layer in layers if layer.tied_adapter is None]


def settled_tokens(
    model: nn.Module, config: AdapterConfig, is_target: Callable[[str], bool]
) -> dict[str, list[int]] | None:
    """Return ``trainable_token_indices`` with whole names of embeddings, or None.

    Raises ValueError if PEFT would compute something else, before PEFT changes the model.
    """
    layers = survey(model)
    found = find_rows(layers, config)
    adapted = [name for rows in found for name in rows.names if is_target(name)]
    check_not_adapted(found, adapted)
    for rows in found:
        _check(layers, rows)
    return {rows.names[0]: list(rows.ids) for rows in found} or None


def _check(layers: Survey, rows: TokenRows) -> None:
    owner, tables = rows.names[0], layers.tables
    for name in rows.names:
        if getattr(tables[name], "bias", None) is not None:
            raise ValueError(
                f"{ARGUMENT}: expected heads without a bias, which PEFT leaves out, but {name!r} "
                f"has one; {_INSTEAD}."
            )
        if twice := [n for n, each in tables.items() if each is tables[name] and n != name]:
            raise ValueError(
                f"{ARGUMENT}: expected modules with one name each, since PEFT wraps a module under "
                f"one name only, but {name!r} is also {twice[0]!r}; {_INSTEAD}."
            )
    if len(rows.names) > 1 and not peft_ties(layers.model, [owner]):
        raise ValueError(
            f"{ARGUMENT}: {rows.names[1]!r} shares the weight of {owner!r}, which PEFT does not "
            f"know, since the model's config does not state it; {_INSTEAD}."
        )


class OptionalRows(TrainableTokensWrapper):
    """PEFT's wrapper, for models in which only some adapters have trained rows.

    PEFT 0.21 can neither save nor load an adapter without them.
    """

    bias = None  # TRL's losses read weight and bias of a tied head, and PEFT's wrapper has no bias

    def adapter_state_dict(  # type: ignore[override]  # as PEFT's own subclasses have it
        self, adapter_name: str, state_dict: dict[str, Any]
    ) -> dict[str, Any]:
        """Return the rows of an adapter, if it has any."""
        if adapter_name not in self.token_adapter.trainable_tokens_delta:
            return {}
        found: dict[str, Any] = cast(Any, super()).adapter_state_dict(adapter_name, state_dict)
        return found

    def adapter_state_dict_load_map(self, adapter_name: str) -> dict[str, str]:
        """Return the keys under which rows are loaded."""
        if adapter_name not in self.token_adapter.trainable_tokens_delta:
            return {}
        found: dict[str, str] = cast(Any, super()).adapter_state_dict_load_map(adapter_name)
        return found


def make_rows_optional(model: nn.Module) -> None:
    """Change the class of PEFT's wrappers to ``OptionalRows``: a tuner cannot choose the class."""
    for module in model.modules():
        if type(module) is TrainableTokensWrapper:
            module.__class__ = OptionalRows


def rows_of(model: nn.Module, adapter_name: str) -> dict[TokenRows, Tensor]:
    """Return the tables in which an adapter has trained rows, with the rows."""
    wrappers = {n: m for n, m in model.named_modules() if isinstance(m, TrainableTokensWrapper)}
    found = {}
    for name, wrapper in wrappers.items():
        layer: Any = wrapper.token_adapter
        if layer.tied_adapter is None and adapter_name in layer.trainable_tokens_delta:
            tied = [n for n, m in wrappers.items() if m.token_adapter.tied_adapter is layer]
            rows = layer.trainable_tokens_delta[adapter_name].detach()
            ids = tuple(layer.token_indices[adapter_name])
            found[TokenRows((name, *tied), ids, rows.shape[1])] = rows
    return found


def rows_in_tables(
    model: nn.Module, adapter_names: Sequence[str]
) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Yield the rows of these adapters: the name for an error, the rows, and the table."""
    for layer in token_layers(model):
        rows: Any = layer.trainable_tokens_delta
        table: Any = layer.get_base_layer().weight
        names = [name for name in adapter_names if name in rows]
        yield from ((f"the adapter {name!r}", rows[name], table) for name in names)


def cast_rows(model: nn.Module, adapter_name: str, dtype: torch.dtype) -> None:
    """Cast an adapter's rows to the dtype of its config, whatever the base's."""
    for _, rows, _ in rows_in_tables(model, [adapter_name]):
        if not rows.is_meta:
            rows.data = rows.data.to(dtype)


def copy_rows(model: nn.Module, source: str, target: str) -> None:
    """Copy the rows of one adapter to another."""
    for layer in token_layers(model):
        rows: Any = layer.trainable_tokens_delta
        if source in rows and target in rows:
            rows[target].data.copy_(rows[source].data)
