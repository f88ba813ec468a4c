"""Fine-tune with any method, interrupt runs, read their logs, compare them."""

import contextlib
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
from rasa_ext.commands.options import Options, parse
from rasa_ext.commands.training import train
from rasa_ext.methods import AdapterConfig

Given = dict[str, Any]
"""Options of a run by name."""
KNOWN: dict[str, tuple[Given, AdapterConfig | None]] = {}
"""Options of a run and the config that they mean, by case; each test module adds its own."""


def parsed(options: Given, task: str = "sft") -> Options:
    """Parse options as a command line; a list's values follow the name."""
    words: list[str] = []
    for name, value in options.items():
        if isinstance(value, list):
            words += [f"--{name}", *map(str, value)]
        elif value is not None:
            words.append(f"--{name}={value}")
    return parse(task, words)


def run(options: Given, given: Any = None, **changes: Any) -> tuple[dict[str, Any], str]:
    """Fine-tune, and return the run's figures and printed text.

    ``given`` replaces the model that the run would load.
    """
    text = io.StringIO()
    result = train(parsed(options | changes), Console(file=text, width=200), model=given)
    return result, text.getvalue()


def small_options(base: Path, files: Path, output: Path, **more: Any) -> Given:
    """Return options of a run with dropout over the fixtures ``base`` and ``files``."""
    given = {"model": str(base), "data": str(files / "train.jsonl"), "output": str(output)}
    return {**given, "rank": 4, "dropout": 0.1, "lr": 3e-3, "batch_size": 2, **more}


def read_log(folder: str | Path) -> list[dict[str, Any]]:
    """Return the rows of Trainer's log."""
    state = json.loads((Path(folder) / "trainer_state.json").read_text())
    return state["log_history"]


def read_result(folder: str | Path) -> dict[str, Any]:
    return json.loads((Path(folder) / "all_results.json").read_text())


def checkpoints_in(folder: Path) -> list[tuple[int, Path]]:
    """List complete checkpoints as (step, path), oldest first."""
    found = (path.parent for path in folder.glob("checkpoint-*/trainer_state.json"))
    return sorted((int(path.name.removeprefix("checkpoint-")), path) for path in found)


def losses(directory: str | Path) -> list[tuple[int, float, float, float]]:
    """Return step, loss, learning rate and gradient norm of every step."""
    names = ("step", "loss", "learning_rate", "grad_norm")
    return [tuple(row[name] for name in names) for row in read_log(directory) if "loss" in row]


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


def interrupted(stop_at: int, options: Given, **changes: Any):
    """Call `run` with a Ctrl-C at the end of step ``stop_at``."""
    with interrupting(stop_at):
        return run(options, **changes)


def assert_same_runs(one: str | Path, two: str | Path) -> None:
    """Assert that the losses of all steps and the adapters are bit-identical."""
    assert losses(one) == losses(two)
    ours, theirs = (load_file(Path(each) / "adapter_model.safetensors") for each in (one, two))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def options_of(common: Given, name: str, output: Path, **changes) -> Given:
    method = {"method": name.partition(",")[0], "output": str(output)}
    return {**common, **method, **KNOWN[name][0], **changes}


def check_refused(common, name: str, changes: dict, message: str, output: Path) -> None:
    """Check that options are refused and nothing is written."""
    with pytest.raises(ValueError, match=re.escape(message)):
        run(options_of(common, name, output, **changes))
    assert not output.exists()
