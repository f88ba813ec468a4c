"""transformers' Trainer, whose checkpoints hold the adapter and not the base model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import Trainer

from rasa_ext import load_adapter, save_adapter

_STATE = "trainer_state.json"


class AdapterTrainer(Trainer):
    """A Trainer for a patched model.

    A checkpoint is the adapter's two files, the tokenizer, and what Trainer writes itself:
    optimizer, scheduler, random and trainer state. Only how the model is written and read differs.
    """

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Evaluate without drawing from the random stream that dropout goes on with.

        So the losses depend neither on when there was an evaluation, nor on one being left out at
        an interrupt.
        """
        with torch.random.fork_rng(devices=[]):  # a data loader draws its seed on the CPU
            return super().evaluate(*args, **kwargs)

    def _save(
        self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None
    ) -> None:
        if not self.args.should_save:
            return
        directory = output_dir if output_dir is not None else self.args.output_dir
        save_adapter(self.accelerator.unwrap_model(self.model), directory)
        if self.processing_class is not None:
            self.processing_class.save_pretrained(directory)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        target = self.model if model is None else model
        load_adapter(self.accelerator.unwrap_model(target), resume_from_checkpoint)


def checkpoints_in(directory: Path) -> list[tuple[int, Path]]:
    """Complete checkpoints as (step, path), oldest first.

    Trainer writes its state last; a directory without it is one whose writing was cut off.
    """
    found = []
    for path in directory.glob("checkpoint-*"):
        step = path.name.removeprefix("checkpoint-")
        if step.isdigit() and (path / _STATE).is_file():
            found.append((int(step), path))
    return sorted(found)
