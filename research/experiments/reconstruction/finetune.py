"""Fine-tune all weights of SmolLM2-135M-Instruct on word problems, and save the model.

    python -m research.experiments.reconstruction.finetune [--steps N] [--batch-size N] [--lr R]

The experiments need the change of every weight, so the whole model is saved in float32 to
``weights/tuned`` beside this file (git ignores it). Losses and settings go to
``results/finetune.json``. An interrupted run resumes from its last checkpoint when started again.
"""

from __future__ import annotations

import argparse
import datetime
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import machine
from rasa_ext.commands.models import find_smollm2, load_model, load_tokenizer, save_model
from rasa_ext.commands.results import peak_memory
from research.experiments.tasks import Task, make_task, solved
from research.experiments.training import Recipe, Run, mean_loss, save

HERE = Path(__file__).parent
WEIGHTS = HERE / "weights"
RESULTS = HERE / "results"


def finetune(
    model: Any,
    tokenizer: Any,
    task: Task,
    recipe: Recipe,
    weights: Path,
    *,
    every: int = 50,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Train all weights of ``model``, save it to ``weights/tuned``, and return the measurements.

    Every ``every`` steps the state of the run is saved to ``weights/run.pt``, from which a later
    call with the same recipe resumes. The file is deleted at the end.

    Raises ValueError if ``weights`` has a run of another recipe, or if the run diverges.
    """
    pad, state = tokenizer.pad_token_id, weights / "run.pt"
    weights.mkdir(parents=True, exist_ok=True)
    model.requires_grad_(True)
    run = Run(model, task.train, pad, recipe)
    if state.is_file():
        stored = torch.load(state, weights_only=True)
        before = stored.pop("before")
        run.load_state_dict(stored)
        say(f"resuming after step {run.step}")
    else:
        before = scores(model, tokenizer, task, recipe.bfloat16)
        say(f"before: {_shown(before)}")
    while run.going:
        run.advance()
        if run.step % 10 == 0:
            recent = run.losses[-10:]
            say(f"step {run.step} of {recipe.steps}: loss {sum(recent) / len(recent):.4f}")
        if run.step % every == 0 and run.going:
            save({**run.state_dict(), "before": before}, state)
    if run.diverged:
        raise ValueError(f"lr: the loss is not finite at {recipe.lr:g}; use a lower one.")
    after = scores(model, tokenizer, task, recipe.bfloat16)
    say(f"after: {_shown(after)}")
    save_model(model, tokenizer, weights / "tuned")
    state.unlink(missing_ok=True)
    return {
        "before": before,
        "after": after,
        "steps": recipe.steps,
        "batch_size": recipe.batch_size,
        "lr": recipe.lr,
        "seed": recipe.seed,
        "bfloat16": recipe.bfloat16,
        "trainable_parameters": run.trainable,
        "problems": {"train": len(task.train), "test": len(task.test)},
        "last_training_loss": sum(run.losses[-10:]) / len(run.losses[-10:]),
        "peak_memory": peak_memory(),
    }


def scores(model: Any, tokenizer: Any, task: Task, bfloat16: bool) -> dict[str, float | None]:
    """Measure the test loss and the share of problems solved."""
    return {
        "loss": mean_loss(model, task.test, tokenizer.pad_token_id, bfloat16=bfloat16),
        "exact_match": solved(model, tokenizer, task, bfloat16=bfloat16),
    }


def _shown(figures: dict[str, float | None]) -> str:
    found = f"held-out loss {figures['loss']:.4f} per solution token"
    if figures["exact_match"] is not None:
        found += f", exact match {figures['exact_match']:.0%}"
    return found


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--lr", type=float, default=5e-5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--held-out", type=int, default=100, help="number of held-out problems")
    parser.add_argument("--float32", action="store_true", help="products in float32; slower")
    parser.add_argument("--weights", type=Path, default=WEIGHTS, help="folder for the weights")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for finetune.json")
    given = parser.parse_args()
    name = find_smollm2()
    model, tokenizer = load_model(name, "float32"), load_tokenizer(name)
    task = make_task(
        "maths", tokenizer, train=given.steps * given.batch_size, dev=0, test=given.held_out
    )
    recipe = Recipe(
        given.steps, given.batch_size, given.lr, seed=given.seed, bfloat16=not given.float32
    )
    found = finetune(model, tokenizer, task, recipe, given.weights)
    found["machine"] = machine()
    found["date"] = datetime.datetime.now(datetime.UTC).date().isoformat()
    given.results.mkdir(parents=True, exist_ok=True)
    text = json.dumps(found, indent=1)
    (given.results / "finetune.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
