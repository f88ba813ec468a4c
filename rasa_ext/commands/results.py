"""The results of a fine-tuning run in its output directory: metrics, card and plot."""

from __future__ import annotations

import glob
import json
import resource
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from rasa_ext import Card
from rasa_ext.commands.callbacks import values
from rasa_ext.commands.data import files_of
from rasa_ext.commands.options import FinetuneOptions
from rasa_ext.commands.trainer import AdapterTrainer
from rasa_ext.patching.state import patch_state


def write_results(
    trainer: AdapterTrainer, options: FinetuneOptions, interrupted: bool, trainable: int
) -> dict[str, Any]:
    """Write adapter, card, tokenizer, `loss.png` and `summary.json`; return the summary.

    "seconds" is the time in training steps, over all parts of a resumed run. "first_loss" and
    "last_loss" are means over the first and last tenth of the steps.
    """
    output = Path(options.output)
    rows = trainer.state.log_history
    losses, held_out = values(rows, "loss"), values(rows, "eval_loss") or [None]
    best = trainer.args.load_best_model_at_end
    tenth, seconds = max(1, len(losses) // 10), sum(values(rows, "seconds"))
    result = {
        "output": options.output,
        "interrupted": interrupted,
        "step": trainer.state.global_step,
        "total_steps": trainer.state.max_steps,
        "seconds": seconds,
        "tokens_per_s": sum(values(rows, "tokens")) / seconds if seconds else None,
        "first_loss": sum(losses[:tenth]) / tenth if losses else None,
        "last_loss": sum(losses[-tenth:]) / tenth if losses else None,
        "eval_loss_before": held_out[0],
        "eval_loss": trainer.state.best_metric if best else held_out[-1],
        "kept_step": trainer.state.best_global_step if best else trainer.state.global_step,
        "trainable": trainable,
        "peak_memory": peak_memory(),
    }
    trainer.model.eval()
    trainer.card = run_card(trainer, options, result)
    trainer.save_model()
    if not trainer.is_world_process_zero():
        return result
    if losses:
        config = patch_state(trainer.base_model).config
        rank = f" r={config.rank}" if hasattr(config, "rank") else ""
        title = f"{config.title}{rank}, {Path(options.model).name}"
        plot_loss(rows, output / "loss.png", title)
    text = json.dumps(result, indent=2)
    (output / "summary.json").write_text(text + "\n", encoding="utf-8")
    return result


def describe(result: Mapping[str, Any]) -> list[str]:
    """Return a run's metrics as lines of text, for the command's output and the card."""
    lines = []
    if result["seconds"]:
        time = f"{result['seconds']:.0f} s in {result['step']} steps"
        peak = zip(("resident", "on the GPU"), result["peak_memory"].values(), strict=False)
        memory = ", ".join(f"{size / 2**30:.2f} GiB {where}" for where, size in peak)
        lines.append(f"{time}, {result['tokens_per_s']:,.0f} tokens/s, peak memory {memory}")
    if result["first_loss"] is not None:
        losses = f"training loss {result['first_loss']:.4f} -> {result['last_loss']:.4f}"
        rose = "; it rose, try a lower --lr" if result["last_loss"] > result["first_loss"] else ""
        lines.append(f"{losses} (first and last tenth of the steps{rose})")
    if result["eval_loss"] is not None:
        before, after = result["eval_loss_before"], result["eval_loss"]
        kept = f" (of step {result['kept_step']}, which is kept)"
        kept = kept if result["kept_step"] != result["step"] else ""
        lines.append(f"held-out loss {before:.4f} -> {after:.4f}{kept}")
    return lines


def run_card(trainer: AdapterTrainer, options: FinetuneOptions, result: Mapping[str, Any]) -> Card:
    """Make a fine-tuning run's card, with its data, options and metrics."""
    chosen = {
        "steps": f"{result['step']:,} of {result['total_steps']:,}",
        "processes": trainer.args.world_size,
        "dtype of the base": str(trainer.base_model.dtype).removeprefix("torch."),
        "trainable parameters": f"{result['trainable']:,}",
    }
    for name, value in options.to_dict().items():
        if name in trainer.counts:
            named = [f"`{_local(s)}`" for s in value] if isinstance(value, list) else [str(value)]
            chosen[name] = ", ".join([*named, trainer.counts[name]])
        elif name in ("init_adapter", "rank_pattern") and value is not None:
            chosen[name] = f"`{_local(value)}`"
        elif name not in ("model", "output", "dtype", "max_steps") and value not in (None, ""):
            chosen[name] = value
    table = [f"| {name} | {value} |" for name, value in chosen.items()]
    sources = [*files_of(options.data, "data"), *files_of(options.eval_data or (), "eval_data")]
    return Card(
        [source for source in sources if not Path(source).is_file()],
        {
            "Training": "\n".join(["| | |", "| --- | --- |", *table]),
            "Figures of the run": "\n".join(f"- {line}" for line in describe(result)),
        },
    )


def _local(source: str) -> str:
    """Return a source's name for the card: only the last part of a local path, or a hub id."""
    path = Path(source).expanduser()
    local = path.exists() or glob.has_magic(source)
    return path.resolve().name if local else source


def peak_memory() -> dict[str, int]:
    """Return the peak memory so far: `rss_bytes` of the process, and `cuda_bytes` on a GPU.

    The resident set includes loaded libraries.
    """
    peak = {"rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}
    if torch.cuda.is_available():
        peak["cuda_bytes"] = torch.cuda.max_memory_allocated()
    return peak


def plot_loss(rows: Sequence[Mapping[str, Any]], path: Path, title: str) -> None:
    """Plot training and held-out loss of metrics.jsonl's rows into a PNG.

    The faint line is the loss of each step, the strong line a running mean over a twentieth of the
    steps.
    """
    figure = Figure(figsize=(7, 4), dpi=120, layout="constrained")  # pyplot has global state
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    steps, losses = zip(*((row["step"], row["loss"]) for row in rows if "loss" in row), strict=True)
    held_out = [(row["step"], row["eval_loss"]) for row in rows if "eval_loss" in row]
    width = max(1, len(losses) // 20)
    windows = [losses[max(0, end - width) : end] for end in range(1, len(losses) + 1)]
    means = [sum(window) / len(window) for window in windows]
    axes.plot(steps, losses, color="tab:blue", alpha=0.3, linewidth=1)
    axes.plot(steps, means, color="tab:blue", label="training")
    if held_out:
        axes.plot(*zip(*held_out, strict=True), "o-", color="tab:orange", label="held out")
    axes.set(xlabel="step", ylabel="loss per trained token (nats)", title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path)
