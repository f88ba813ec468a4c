"""TrainedTokens: an embedding or a head with a few trained rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rasa_ext.nn.adapter import AdaptedModule, Adapter, check_whole
from rasa_ext.nn.precision import restored

_ASKED = {"bias", "num_embeddings", "embedding_dim", "padding_idx", "in_features", "out_features"}


class TrainedTokens(AdaptedModule):
    """A frozen embedding or linear head in which trained rows replace some rows of the table.

    An embedding returns the trained rows of these tokens, and a head computes their logits from the
    trained rows. The table is neither copied nor changed before a merge. The trained rows start as
    copies of the table's rows. They are values, not changes, so that they also fit a table with
    other rows for these tokens, as for new tokens.

    If a head shares the embedding's table, one module owns the rows as ``rows`` (n, width). The
    others hold a plain reference to it, so that a ``state_dict`` has each parameter once.

    Args:
        base_layer: an ``nn.Embedding``, optionally with an ``embed_scale``, or an ``nn.Linear``.
        token_ids: the n rows of the table to train, each once.
        dtype: the dtype of ``rows``.
        owner: the module that owns the rows; None makes this module the owner.

    Raises:
        RuntimeError: in a forward, the rows are sharded over processes; or they are merged, and
            the forward is for training, with grad.

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
    """For an embedding: the trained row of each token, or n for none. For a head: the tokens."""

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
        self.backup: Tensor | None = None  # while merged: the table's original rows
        self.__dict__["owner"] = owner
        weight = base_layer.weight
        if owner is None:
            rows = weight.detach()[self._ids(weight.device)]
            self.rows = nn.Parameter(rows.to(dtype))
        self.register_buffer("index", self._index(weight.device), persistent=False)
        self.train(base_layer.training)

    @property
    def merged(self) -> bool:
        """Whether the rows are currently merged into the base's table."""
        return (self.owner or self).backup is not None

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Compute the base's output as if the table had the trained rows."""
        y: Tensor = self.base_layer(x, *args, **kwargs)
        if self.disabled:
            return y
        if self.merged:
            self.check_not_trained()
            return y
        rows: Tensor = (self.owner or self).rows
        check_whole(rows=rows)
        rows = rows.to(y.device)  # a head may be on another device than the embedding
        if isinstance(self.base_layer, nn.Linear):
            return self._logits(self.base_layer, x, y, rows)
        return self._embedded(self.base_layer, x, y, rows)

    def _embedded(self, base: nn.Embedding, x: Tensor, y: Tensor, rows: Tensor) -> Tensor:
        """Put the trained rows into y (..., width), the base's output for x (...)."""
        count = len(self.token_ids)
        where = self.index[x.to(self.index.device)]
        if base.padding_idx in self.token_ids:  # an embedding gives the padding row no gradient
            at = self.token_ids.index(base.padding_idx)
            rows = torch.cat([rows[:at], rows[at : at + 1].detach(), rows[at + 1 :]])
        # An extra row stands for all untrained tokens. As the padding, it gets no gradient. The
        # lookup uses the rows' dtype, in which a row's gradients are summed.
        values = F.embedding(where, F.pad(rows, (0, 0, 0, 1)), padding_idx=count).to(y.dtype)
        scale = getattr(base, "embed_scale", None)
        if scale is not None:
            values = values * (scale.to(y.dtype) if isinstance(scale, Tensor) else scale)
        return torch.where((where < count).unsqueeze(-1), values, y)

    def _logits(self, base: nn.Linear, x: Tensor, y: Tensor, rows: Tensor) -> Tensor:
        """Put the trained tokens' logits into y (..., tokens), the base's output for x."""
        bias = None if base.bias is None else base.bias[self.index]
        logits = F.linear(x, rows.to(base.weight.dtype), bias)
        # In place, as y may be the largest tensor; no backward of a linear layer reads y.
        return y.index_copy_(-1, self.index, logits.to(y.dtype))

    @property
    def weight(self) -> Tensor:
        """The table with the trained rows, for code that reads it outside ``forward``.

        A differentiable copy; the base's weight while merged or disabled.
        """
        weight = self.base_layer.weight
        if self.disabled or self.merged:
            return weight
        rows = (self.owner or self).rows
        return weight.index_copy(0, self._ids(weight.device), rows.to(weight))

    @torch.no_grad()
    def merge(self) -> float:
        """Write the owner's rows into the table, and return the largest change of an entry."""
        weight = self.base_layer.weight
        ids = self._ids(weight.device)
        self.backup = weight[ids]
        weight.index_copy_(0, ids, self.rows.to(weight))
        return (weight[ids].float() - self.backup.float()).abs().max().item()

    @torch.no_grad()
    def unmerge(self) -> None:
        """Restore the table's rows bit for bit, if the owner's rows are merged."""
        if self.backup is not None:
            weight = self.base_layer.weight
            weight.index_copy_(0, self._ids(weight.device), self.backup)
            self.backup = None

    def adapters(self) -> Iterator[Adapter]:
        """Yield nothing: trained rows are no low-rank adapter."""
        yield from ()

    def restore(self) -> None:
        """Cast rows of a coarser dtype back to the configured dtype."""
        if self.owner is None:
            restored([self._parameters.get("rows")], self.dtype)

    def _apply(self, *args: Any, **kwargs: Any) -> Self:
        """Move and cast like any module, and refill the index, which ``to_empty`` leaves unset."""
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
        """Fall back to the base layer for attributes of an embedding or a head."""
        return getattr(self.base_layer, name) if name in _ASKED else super().__getattr__(name)

    def extra_repr(self) -> str:
        """Return the number of trained rows, for ``repr``."""
        return f"rows={len(self.token_ids)}{', merged' if self.merged else ''}"
