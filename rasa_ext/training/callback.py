"""A callback of transformers' Trainer for steps between those of the optimizer."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from transformers import TrainerCallback


class Steps(Protocol):
    """What is done after a step of the optimizer, and has a state of numbers and strings."""

    def step(self) -> Any:
        """Follow a step of the optimizer."""

    def state_dict(self) -> dict[str, Any]:
        """Give what a resumed training needs."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up what ``state_dict`` gave."""


def step_callback(steps: Steps, before: Callable[[], object] = lambda: None) -> TrainerCallback:
    """Make a callback that does the steps, and keeps their state in Trainer's checkpoints.

    Args:
        steps: done after each step of the optimizer.
        before: called before each of them, when gradients are there.
    """
    from transformers import TrainerCallback
    from transformers.trainer_callback import ExportableState

    name = f"{type(steps).__name__}Callback"

    class StepCallback(TrainerCallback, ExportableState):  # type: ignore[misc]  # untyped
        def state(self) -> dict[str, Any]:
            return {"args": {}, "attributes": {"saved": steps.state_dict()}}

        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if not state.global_step:
                return
            found = state.stateful_callbacks.get(name)
            if not isinstance(found, dict):
                raise ValueError(
                    "resume_from_checkpoint: expected a checkpoint of a training with one callback "
                    f"of {type(steps).__name__}, as this has, got one with another number of them."
                )
            steps.load_state_dict(found["attributes"]["saved"])

        def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
            before()

        def on_optimizer_step(self, *_: Any, **__: Any) -> None:
            steps.step()

    StepCallback.__name__ = name  # under which Trainer stores the state
    return StepCallback()
