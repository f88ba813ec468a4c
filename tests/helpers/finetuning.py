"""Fine-tune with any method, interrupt runs, read their logs, compare them."""

import contextlib
import dataclasses
import io
import json
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from rasa_ext.commands import callbacks
from rasa_ext.commands.options import FinetuneOptions
from rasa_ext.commands.training import train
from rasa_ext.methods import AdapterConfig

KNOWN: dict[str, tuple[dict, AdapterConfig | None]] = {}
"""Options of finetune and the config that they mean, by case; each test module adds its own."""


def run(options: FinetuneOptions, given: Any = None, **changes: Any) -> tuple[dict[str, Any], str]:
    """Fine-tune, and return the run's figures and printed text.

    ``given`` replaces the model that the run would load.
    """
    text, options = io.StringIO(), dataclasses.replace(options, **changes)
    result = train(options, Console(file=text, width=200), model=given)
    return result, text.getvalue()


def small_options(base: Path, files: Path, output: Path, **more: Any) -> FinetuneOptions:
    """Return options of a run with dropout over the fixtures ``base`` and ``files``."""
    given = {"model": str(base), "data": str(files / "train.jsonl"), "output": str(output)}
    return FinetuneOptions(**given, rank=4, dropout=0.1, lr=3e-3, batch_size=2, **more)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def checkpoints_in(folder: Path) -> list[tuple[int, Path]]:
    """List complete checkpoints as (step, path), oldest first."""
    found = (path.parent for path in folder.glob("checkpoint-*/trainer_state.json"))
    return sorted((int(path.name.removeprefix("checkpoint-")), path) for path in found)


def losses(directory: str | Path) -> list[tuple[int, float, float, float]]:
    """Return step, loss, learning rate and gradient norm of every step."""
    rows = read_metrics(Path(directory) / "metrics.jsonl")
    names = ("step", "loss", "lr", "grad_norm")
    return [tuple(row[name] for name in names) for row in rows if "loss" in row]


@contextlib.contextmanager
def interrupting(stop_at: int) -> Iterator[None]:
    """Press Ctrl-C at the end of step ``stop_at`` of runs in this process."""
    original = callbacks.InterruptCallback.on_step_end

    def interrupt(self, args, state, control, **kwargs):
        if state.global_step == stop_at:
            signal.raise_signal(signal.SIGINT)
        return original(self, args, state, control, **kwargs)

    with mock.patch.object(callbacks.InterruptCallback, "on_step_end", interrupt):
        yield


def interrupted(stop_at: int, options: FinetuneOptions, **changes: Any):
    """Call `run` with a Ctrl-C at the end of step ``stop_at``."""
    with interrupting(stop_at):
        return run(options, **changes)


def assert_same_runs(one: str | Path, two: str | Path) -> None:
    """Assert that the losses of all steps and the adapters are bit-identical."""
    assert losses(one) == losses(two)
    ours, theirs = (load_file(Path(each) / "adapter_model.safetensors") for each in (one, two))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def more(text: str) -> dict:
    """Return the option for other fields of the method's config."""
    return {"method_options": text}


def options_of(common, name: str, output: Path, **changes) -> FinetuneOptions:
    method = {"method": name.partition(",")[0], "output": str(output)}
    return FinetuneOptions(**{**common, **method, **KNOWN[name][0], **changes})


def check_refused(common, name: str, changes: dict, message: str, output: Path) -> None:
    """Check that options are refused and nothing is written."""
    with pytest.raises(ValueError, match=re.escape(message)):
        run(options_of(common, name, output, **changes))
    assert not output.exists()
