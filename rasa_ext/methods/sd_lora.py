"""SD-LoRA: a LoRA a task, whose directions stay while their magnitudes are trained on."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from rasa_ext.methods.base import (
    AdapterConfig,
    Counts,
    Place,
    checked_alpha,
    checked_choice,
    checked_integer,
    checked_rank,
    document_fields,
    empty_stack,
    fresh_A,
    fresh_B,
    option,
)
from rasa_ext.ops import Factors


@dataclasses.dataclass(frozen=True)
class SdLoraConfig(AdapterConfig):
    """The config of an SD-LoRA (arXiv 2501.13198), for tasks that come one after the other.

    dW = s B A + m_1 B_1 A_1 / n_1 + m_2 B_2 A_2 / n_2 + ...: the pair of the present task, and
    those of the tasks before, which stay as they are while their magnitudes m_k are trained.
    ``rasa_ext.training.next_task`` begins a task, and ``absorb`` takes one out again that the
    others can express. A layer owns A (r, in), B (out, r), the buffers stack_A and stack_B with
    all former ranks, and norms n; magnitudes m (tasks,) are its own or its group's.

    Raises:
        TypeError, ValueError: naming the field, what was expected and what came.

    Example:
        >>> from rasa_ext.methods import SdLoraConfig
        >>> model = rasa_ext.patch_model(model, config=SdLoraConfig(rank=4))
        >>> model = rasa_ext.training.next_task(model)  # after training on the first
        >>> {row.R for row in rasa_ext.summary(model)}
        {8}
    """

    method: ClassVar[str] = "sd-lora"

    rank: int = option(10, "The rank r of the first task's pair.")
    alpha: float = option(10.0, "The scale s of the present task's pair is alpha / r.")
    norm: str = option(
        "none",
        "What a former direction is divided by: 'none', where it goes on as it ended, s included; "
        "'frobenius', the norm of B_k A_k, as in the paper; 'product', that of B_k times that of "
        "A_k, as in the official code.",
    )
    tied: bool = option(
        True,
        "Whether the layers of a group share their magnitudes, or each has its own. The paper ties "
        "all layers of a model.",
    )
    rank_schedule: Counts = option(
        (),
        "Ranks of later tasks: {5: 8, 9: 6} means rank 8 from the fifth task on, 6 from the 9th.",
    )
    past: tuple[int, ...] = option(
        (), "The ranks of the former tasks. rasa_ext.training.next_task sets it."
    )

    def __post_init__(self) -> None:
        """Check every field and bring it into its canonical form."""
        self._set(rank=checked_rank(self.rank), alpha=checked_alpha(self.alpha))
        checked_choice("norm", self.norm, ("none", "frobenius", "product"))
        schedule = {int(task): rank for task, rank in dict(self.rank_schedule).items()}
        for task, rank in schedule.items():
            if task < 2 or checked_integer("rank_schedule", rank) < 1:
                raise ValueError(
                    "rank_schedule: expected tasks from 2 on with ranks from 1 on, got "
                    f"{{{task}: {rank}}}."
                )
        self._set(rank_schedule=tuple(sorted(schedule.items())), past=tuple(self.past))
        super().__post_init__()

    @property
    def present_rank(self) -> int:
        """The rank of the present task's pair."""
        rank = self.rank
        for task, its in cast("tuple[tuple[int, int], ...]", self.rank_schedule):
            rank = its if task <= len(self.past) + 1 else rank
        return rank

    @property
    def scale(self) -> float:
        """s, of the present task's pair."""
        return self.alpha / self.present_rank

    def own(self, place: Place) -> dict[str, Tensor]:
        """Make A (r, in), B (out, r), and for former tasks the stack, norms, and m if not tied."""
        dtype = self.adapter_dtype
        own: dict[str, Tensor] = {
            "A": fresh_A(self.present_rank, place, dtype),
            "B": fresh_B(self.present_rank, place, dtype),
        }
        if self.past:
            own |= empty_stack(sum(self.past), place, dtype)
            own["norms"] = torch.ones(len(self.past), dtype=dtype, device=place.device)
            if not self.tied:
                own["m"] = self._magnitudes(place)
        return own

    def pool(self, places: Sequence[Place]) -> dict[str, Tensor]:
        """Make m (tasks,) where it is tied; without former tasks a buffer with no elements."""
        return {"m": self._magnitudes(places[0])} if self.tied else {}

    def factors(self, own: Mapping[str, Tensor], pool: Mapping[str, Tensor], place: Any) -> Factors:
        """Give the present pair with s for every rank, and the former ones as its pool."""
        A, B = own["A"], own["B"]
        d = A.new_full((A.shape[0],), self.scale)
        if not self.past:
            return Factors(A, None, B, None, d)
        m = (pool if self.tied else own)["m"].to(A.device)
        ranks = torch.tensor(self.past, device=A.device)
        each = torch.repeat_interleave(m / own["norms"], ranks, output_size=sum(self.past))
        return Factors(A, own["stack_A"], B, own["stack_B"], torch.cat((d, each)))

    def _magnitudes(self, place: Place) -> Tensor:
        ones = torch.ones(len(self.past), dtype=self.adapter_dtype, device=place.device)
        return nn.Parameter(ones) if self.past else ones


document_fields(SdLoraConfig)
