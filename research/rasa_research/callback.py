"""A callback for transformers' Trainer that runs extra steps between optimizer steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import TrainerCallback


def step_callback(
    steps: Any,
    before: Callable[[], object] = lambda: None,
    end: Callable[[], str] | None = None,
) -> TrainerCallback:
    """Make a callback that runs extra steps and stores their state in Trainer's checkpoints.

    Args:
        steps: an object with ``step``, called after each optimizer step, ``state_dict``, which
            returns numbers and strings, and ``load_state_dict``.
        before: called before each optimizer step, when gradients are available.
        end: called at the end, if training was not stopped early; the returned text is printed.
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
                    f"of {type(steps).__name__}, like this training, got one with none or several."
                )
            steps.load_state_dict(found["attributes"]["saved"])

        def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
            before()

        def on_optimizer_step(self, *_: Any, **__: Any) -> None:
            steps.step()

        def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if end is not None and state.global_step >= state.max_steps:
                text = end()
                if state.is_world_process_zero:
                    print(text)

    StepCallback.__name__ = name  # Trainer stores the state under this name
    return StepCallback()
