"""TrainedTokens: an embedding, or a head, of whose table a few rows are trained."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rasa_ext.base_layers.sharded import SHARDING_HINT, is_whole, what_is_here
from rasa_ext.nn.adapter import AdaptedModule, Adapter
from rasa_ext.nn.precision import restored

if TYPE_CHECKING:
    from typing_extensions import Self


_ASKED = {"bias", "num_embeddings", "embedding_dim", "padding_idx", "in_features", "out_features"}


class TrainedTokens(AdaptedModule):
    """A frozen embedding, or linear head, with trained rows in place of some of its table's.

    An embedding gives the trained row for each token that has one, and a head takes the logits of
    those tokens from them. The table is neither copied nor written to, until a merge. The rows
    start as the table's; they are values, not changes, so that they mean the same over a table
    whose own rows of these tokens are others, as new tokens' may be.

    Where a head shares the embedding's table, one module owns the rows as ``rows`` (n, width), and
    the others know that one, unregistered, so that no parameter stands twice in a ``state_dict``.

    Args:
        base_layer: an ``nn.Embedding``, which may scale its output by ``embed_scale``, or an
            ``nn.Linear``.
        token_ids: the n rows of the table that are trained, each once.
        dtype: of ``rows``.
        owner: the module whose rows these are; None makes this one the owner.

    Raises:
        RuntimeError: in a forward, the rows are sharded over processes; or they are merged, and
            the forward is one of training with grad.

    Example:
        >>> from rasa_ext.nn.trained_tokens import TrainedTokens
        >>> embedding = TrainedTokens(torch.nn.Embedding(10, 4), [8, 9], torch.float32)
        >>> embedding(torch.tensor([[1, 9]])).shape, embedding.rows.shape
        (torch.Size([1, 2, 4]), torch.Size([2, 4]))
    """

    base_layer: nn.Embedding | nn.Linear
    owner: TrainedTokens | None
    rows: nn.Parameter
    index: Tensor
    """Of an embedding, for each token: its row, or n where it has none. Of a head: the tokens."""

    def __init__(
        self,
        base_layer: nn.Embedding | nn.Linear,
        token_ids: Sequence[int],
        dtype: torch.dtype,
        owner: TrainedTokens | None = None,
    ) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.token_ids = tuple(token_ids)
        self.dtype = dtype
        self.disabled = False
        self.kept: Tensor | None = None  # while merged: the table's rows as they were
        self.__dict__["owner"] = owner
        weight = base_layer.weight
        if owner is None:
            rows = weight.detach()[self._ids(weight.device)]
            self.rows = nn.Parameter(rows.to(dtype))
        self.register_buffer("index", self._index(weight.device), persistent=False)
        self.train(base_layer.training)

    @property
    def merged(self) -> bool:
        """Whether the rows stand in the base's table at present."""
        return (self.owner or self).kept is not None

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Compute what the base would, were the trained rows in its table."""
        y: Tensor = self.base_layer(x, *args, **kwargs)
        if self.disabled:
            return y
        if self.merged:
            if self.training and torch.is_grad_enabled():
                raise RuntimeError(
                    "the trained rows are merged into their table, so they would not be trained; "
                    "call rasa_ext.unmerge(model) first."
                )
            return y
        rows: Tensor = (self.owner or self).rows
        if not is_whole(rows):
            raise RuntimeError(
                f"expected trained rows that are whole on every process, but they are "
                f"{what_is_here(rows)}; {SHARDING_HINT}."
            )
        rows = rows.to(y.device)  # a head may lie elsewhere than the embedding
        if isinstance(self.base_layer, nn.Linear):
            return self._logits(self.base_layer, x, y, rows)
        return self._embedded(self.base_layer, x, y, rows)

    def _embedded(self, base: nn.Embedding, x: Tensor, y: Tensor, rows: Tensor) -> Tensor:
        """Put the trained rows into y (..., width), the rows that the base gives for x (...)."""
        count = len(self.token_ids)
        where = self.index[x.to(self.index.device)]
        if base.padding_idx in self.token_ids:  # to which an embedding gives no gradient
            at = self.token_ids.index(base.padding_idx)
            rows = torch.cat([rows[:at], rows[at : at + 1].detach(), rows[at + 1 :]])
        # One more row stands for all tokens that have none. As the padding it gets no gradient. In
        # the rows' own dtype, in which the gradients of a row's many places are summed.
        values = F.embedding(where, F.pad(rows, (0, 0, 0, 1)), padding_idx=count).to(y.dtype)
        scale = getattr(base, "embed_scale", None)
        if scale is not None:
            values = values * (scale.to(y.dtype) if isinstance(scale, Tensor) else scale)
        return torch.where((where < count).unsqueeze(-1), values, y)

    def _logits(self, base: nn.Linear, x: Tensor, y: Tensor, rows: Tensor) -> Tensor:
        """Put the trained tokens' logits into y (..., tokens), the base's of x (..., width)."""
        bias = None if base.bias is None else base.bias[self.index]
        logits = F.linear(x, rows.to(base.weight.dtype), bias)
        # In place, as y may be the largest tensor of all; no backward of a linear layer reads it.
        return y.index_copy_(-1, self.index, logits.to(y.dtype))

    @property
    def weight(self) -> Tensor:
        """The table with the trained rows in it, for code that reads it past ``forward``.

        A differentiable copy; the base's own weight while merged or disabled.
        """
        weight = self.base_layer.weight
        if self.disabled or self.merged:
            return weight
        rows = (self.owner or self).rows
        return weight.index_copy(0, self._ids(weight.device), rows.to(weight))

    @torch.no_grad()
    def merge(self) -> float:
        """Write an owner's rows into the table, and give the largest change of an entry."""
        weight = self.base_layer.weight
        ids = self._ids(weight.device)
        self.kept = weight[ids]
        weight.index_copy_(0, ids, self.rows.to(weight))
        return (weight[ids].float() - self.kept.float()).abs().max().item()

    @torch.no_grad()
    def unmerge(self) -> None:
        """Give the table its rows back, to the bit, if an owner's are in it."""
        if self.kept is not None:
            weight = self.base_layer.weight
            weight.index_copy_(0, self._ids(weight.device), self.kept)
            self.kept = None

    def adapters(self) -> Iterator[Adapter]:
        """Give none: rows are no low-rank adapter."""
        yield from ()

    def drop_pack(self) -> None:
        """Forget nothing: nothing is cached."""

    def restore(self) -> None:
        """Give rows that were cast to a coarser dtype their own again."""
        if self.owner is None:
            restored([self._parameters.get("rows")], self.dtype)

    def _apply(self, *args: Any, **kwargs: Any) -> Self:
        """Move and cast as any module, and fill the index again: ``to_empty`` leaves it without."""
        super()._apply(*args, **kwargs)
        self.index = self._index(self.index.device)
        return self

    def _ids(self, device: torch.device) -> Tensor:
        return torch.tensor(self.token_ids, device=device)

    def _index(self, device: torch.device) -> Tensor:
        ids = self._ids(device)
        if isinstance(self.base_layer, nn.Linear):
            return ids
        count, tokens = len(self.token_ids), self.base_layer.num_embeddings
        index = torch.full((tokens,), count, dtype=torch.int32, device=device)
        return index.index_copy_(0, ids, torch.arange(count, dtype=torch.int32, device=device))

    def __getattr__(self, name: str) -> Any:
        """Look up on the base layer what model code asks an embedding or a head for."""
        return getattr(self.base_layer, name) if name in _ASKED else super().__getattr__(name)

    def extra_repr(self) -> str:
        """Show how many rows are trained."""
        return f"rows={len(self.token_ids)}{', merged' if self.merged else ''}"
