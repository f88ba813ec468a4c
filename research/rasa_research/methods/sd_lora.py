"""SD-LoRA: one LoRA per task. Former directions are frozen; all magnitudes are trained."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from rasa_ext.methods import (
    AdapterConfig,
    Factors,
    LayerSpec,
    checked_choice,
    checked_integer,
    document_fields,
    fresh_A,
    fresh_B,
    option,
)
from rasa_research.methods.stack import empty_stack


@dataclasses.dataclass(frozen=True)
class SdLoraConfig(AdapterConfig):
    """The config of an SD-LoRA (arXiv 2501.13198), for a sequence of tasks.

    dW = m_1 B_1 A_1 / n_1 + ... + m_t B A / n. The pairs of former tasks are frozen. The pair of
    the current task and all magnitudes m are trained. ``norm`` defines the divisors n.
    ``rasa_research.training.next_task`` starts a task, and ``absorb`` removes a former direction
    that the others can express. A layer owns A (r, in), B (out, r), the buffers stack_A and stack_B
    with all former ranks, and ``norms`` (former tasks,). The layer or the group owns m (tasks,),
    with the current task last.

    Raises:
        TypeError, ValueError: naming the field, what was expected and what was given.

    Example:
        >>> from rasa_research import methods, training
        >>> model = rasa_ext.patch_model(model, config=methods.SdLoraConfig(rank=4))
        >>> model = training.next_task(model)  # after training on the first
        >>> {row.R for row in rasa_ext.summary(model)}
        {8}
    """

    method: ClassVar[str] = "sd-lora"
    title: ClassVar[str] = "SD-LoRA"
    paper: ClassVar[str] = "2501.13198"
    peft: ClassVar[str] = "rasa_research.training.next_task starts its tasks"

    rank: int = option(10, "The rank r of the first task's pair.")
    alpha: float = option(
        8.0, "A task's magnitude starts at alpha / r; the default is the official code's 0.8."
    )
    norm: str = option(
        "none",
        "Divisor of a direction. 'none': 1. 'frobenius', as in the paper: the norm of B_k A_k, for "
        "the current task too once B is not zero. 'product', as in the official code: the norm of "
        "B_k times the norm of A_k, for former tasks only.",
    )
    tied: bool = option(
        True,
        "Whether the layers of a group share magnitudes. In the paper all layers of a model do.",
    )
    rank_schedule: Mapping[int, int] | tuple[tuple[int, int], ...] = option(
        (),
        "Ranks of later tasks: {5: 8, 9: 6} means rank 8 from the fifth task on, 6 from the 9th.",
        counts=1,
    )
    past: tuple[int, ...] = option(
        (), "The ranks of the former tasks. rasa_research.training.next_task sets it."
    )

    def __post_init__(self) -> None:
        """Check every field and convert it to the canonical form."""
        checked_choice("norm", self.norm, ("none", "frobenius", "product"))
        super().__post_init__()
        schedule = []
        for task, rank in dict(self.rank_schedule).items():
            if not str(task).isdecimal() or int(task) < 2 or rank < 1:
                raise ValueError(
                    f"rank_schedule: expected tasks >= 2 with ranks >= 1, got {{{task!r}: {rank}}}."
                )
            schedule.append((int(task), rank))
        object.__setattr__(self, "rank_schedule", tuple(sorted(schedule)))
        past = self.past
        if not isinstance(past, list | tuple) or any(checked_integer("past", r) < 1 for r in past):
            raise ValueError(f"past: expected a sequence of ranks >= 1, got {past!r}.")
        object.__setattr__(self, "past", tuple(past))

    @property
    def present_rank(self) -> int:
        """Rank of the current task's pair."""
        rank = self.rank
        for task, later in dict(self.rank_schedule).items():
            rank = later if task <= len(self.past) + 1 else rank
        return rank

    @property
    def scale(self) -> float:
        """Initial value of the current task's magnitude."""
        return self.alpha / self.present_rank

    def layer_tensors(self, spec: LayerSpec) -> dict[str, Tensor]:
        """Make A (r, in) and B (out, r); for former tasks, the stack and norms; m if not tied."""
        dtype = self.adapter_dtype
        own: dict[str, Tensor] = {
            "A": fresh_A(self.present_rank, spec, dtype),
            "B": fresh_B(self.present_rank, spec, dtype),
        }
        if self.past:
            own |= empty_stack(sum(self.past), spec, dtype)
            own["norms"] = torch.ones(len(self.past), dtype=dtype, device=spec.device)
        if not self.tied:
            own["m"] = self._magnitudes(spec)
        return own

    def group_tensors(self, specs: Sequence[LayerSpec]) -> dict[str, Tensor]:
        """Make m (tasks,) if it is tied."""
        return {"m": self._magnitudes(specs[0])} if self.tied else {}

    def factors(self, own: Mapping[str, Tensor], pool: Mapping[str, Tensor], spec: Any) -> Factors:
        """Return the current pair, the former pairs as the pool, and m divided by norms as d."""
        A, B = own["A"], own["B"]
        m = (pool if self.tied else own)["m"].to(A.device)
        d = m[-1].repeat(len(A))
        if self.norm == "frobenius":
            B = B / direction_norm(A, B, self.norm)
        if not self.past:
            return Factors(A, None, B, None, d)
        ranks = torch.tensor(self.past, device=A.device)
        each = torch.repeat_interleave(m[:-1] / own["norms"], ranks, output_size=sum(self.past))
        return Factors(A, own["stack_A"], B, own["stack_B"], torch.cat((d, each)))

    def _magnitudes(self, spec: LayerSpec) -> Tensor:
        shape = (len(self.past) + 1,)
        m = torch.full(shape, self.scale, dtype=self.adapter_dtype, device=spec.device)
        return nn.Parameter(m)


def direction_norm(A: Tensor, B: Tensor, norm: str) -> Tensor:
    """Return the divisor of a direction B A, computed from r x r matrices; 1 for a zero B A."""
    if norm == "none":
        return A.new_ones(())
    wide = torch.promote_types(A.dtype, torch.float32)
    down, up = (rows @ rows.t() for rows in (A.to(wide), B.t().to(wide)))
    square = (up * down).sum() if norm == "frobenius" else up.trace() * down.trace()
    return torch.where(square > 0, square, 1.0).sqrt().to(A.dtype)


document_fields(SdLoraConfig)
