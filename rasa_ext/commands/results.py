"""The results of a fine-tuning run in its output directory: metrics, card and plot."""

from __future__ import annotations

import glob
import resource
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from rasa_ext import Card
from rasa_ext.commands.callbacks import Progress, values
from rasa_ext.commands.data import conversation, files_of, templated
from rasa_ext.commands.measuring import greedy_answers
from rasa_ext.commands.options import TASKS, Options
from rasa_ext.commands.output import working
from rasa_ext.patching.state import patch_state

_FIGURES = {
    "dpo": {"rewards/margins": "margin"},
    "kto": {"rewards/margins": "margin"},
    "reward": {"accuracy": "accuracy"},
    "grpo": {"reward": "reward"},
    "rloo": {"reward": "reward"},
}


def figures(task: str) -> Mapping[str, str]:
    """Return the numbers of a task besides the loss, as TRL names them, and what to call them."""
    return _FIGURES.get(task, {})


def write_folder(
    trainer: Any,
    options: Options,
    interrupted: bool,
    trainable: int,
    progress: Progress,
    row: dict[str, Any],
) -> dict[str, Any]:
    """Write adapter, card, tokenizer, `loss.png` and Trainer's state; return the run's numbers.

    The card has the question of ``row``, with the model's answer.
    """
    rows, state = trainer.state.log_history, trainer.state
    losses, held_out = values(rows, "loss"), values(rows, "eval_loss") or [None]
    seconds, tokens = progress.seconds, progress.tokens
    best, tenth = trainer.args.load_best_model_at_end, max(1, len(losses) // 10)
    result = {
        "output": str(options.output),
        "interrupted": interrupted,
        "step": state.global_step,
        "total_steps": state.max_steps,
        "seconds": seconds,
        "tokens_per_s": tokens / seconds if tokens and seconds else None,
        "first_loss": sum(losses[:tenth]) / tenth if losses else None,
        "last_loss": sum(losses[-tenth:]) / tenth if losses else None,
        "eval_loss_before": held_out[0],
        "eval_loss": state.best_metric if best else held_out[-1],
        "kept_step": state.best_global_step if best else state.global_step,
        "trainable": trainable,
        "peak_memory": peak_memory(),
    }
    for name, text in figures(options.task).items():
        for prefix, where in (("", "training"), ("eval_", "held-out")):
            if found := values(rows, prefix + name):
                result[f"{where} {text}"] = [found[0], found[-1]]
    trainer.card = folder_card(trainer, options, result, _asked(options, trainer, row))
    trainer.save_model(_internal_call=True)  # a push waits for the plot
    trainer.save_state()
    trainer.save_metrics("all", result, combined=False)
    if losses and trainer.is_world_process_zero():
        plan = patch_state(trainer.skeleton).plan
        rank = f" r={plan.config.rank}" if hasattr(plan.config, "rank") else ""
        name = Path(options.base.model_name_or_path).name
        title = f"{plan.config.title}{rank}, {name}"
        plot_loss(rows, options.output / "loss.png", title, figures(options.task))
    if trainer.args.push_to_hub:
        trainer.push_to_hub()
    return result


def folder_card(trainer: Any, options: Options, result: Mapping[str, Any], asked: str) -> Card:
    """Make a run's card, with its task, data, options, numbers, and a question with its answer."""
    data = options.data
    chosen: dict[str, Any] = {
        "task": f"{options.task}, by TRL's {TASKS[options.task].kind}Trainer",
        "steps": f"{result['step']:,} of {result['total_steps']:,}",
        "processes": trainer.args.world_size,
        "dtype of the base": str(trainer.base_model.dtype).removeprefix("torch."),
        "trainable parameters": f"{result['trainable']:,}",
    }
    for name, count in trainer.counts.items():
        value = getattr(data, name)
        named = [f"`{_local(str(s))}`" for s in value] if isinstance(value, list) else [str(value)]
        chosen[name] = ", ".join([*named, count])
    for name, value in options.given.items():
        if name in ("init_adapter", "rank_pattern"):
            chosen[name] = f"`{_local(value)}`"
        elif name not in ("model", "output", "dtype", "max_steps", *chosen):
            chosen[name] = value
    table = [f"| {name} | {value} |" for name, value in chosen.items()]
    named = [
        source
        for given, option in ((data.data, "data"), (data.eval_data or [], "eval_data"))
        for source in files_of([each for each in given if isinstance(each, str)], option)
        if not Path(source).is_file()
    ]
    return Card(
        named,
        {
            "Training": "\n".join(["| | |", "| --- | --- |", *table]),
            "Figures of the run": "\n".join(f"- {line}" for line in describe(result)),
            "A question": asked,
        },
    )


def describe(result: Mapping[str, Any]) -> list[str]:
    """Return a run's metrics as lines of text, for the command's output and the card."""
    lines = []
    if result["seconds"]:
        time = f"{result['seconds']:.0f} s in {result['step']} steps"
        if (speed := result.get("tokens_per_s")) is not None:
            time += f", {speed:,.0f} tokens/s"
        peak = zip(("resident", "on the GPU"), result["peak_memory"].values(), strict=False)
        memory = ", ".join(f"{size / 2**30:.2f} GiB {where}" for where, size in peak)
        lines.append(f"{time}, peak memory {memory}")
    if result["first_loss"] is not None:
        first, last = (round(result[f"{name}_loss"], 4) for name in ("first", "last"))
        worse = last > first and "training reward" not in result
        rose = "; it rose, try a lower --lr" if worse else ""
        lines.append(
            f"training loss {first:.4f} -> {last:.4f} (first and last tenth of the steps{rose})"
        )
    if result["eval_loss"] is not None:
        before, after = result["eval_loss_before"], result["eval_loss"]
        kept = f" (of step {result['kept_step']}, which is kept)"
        kept = kept if result["kept_step"] != result["step"] else ""
        lines.append(f"held-out loss {before:.4f} -> {after:.4f}{kept}")
    for name, pair in result.items():
        if name.startswith(("training ", "held-out ")):
            lines.append(f"{name} {pair[0]:.4f} -> {pair[1]:.4f}")
    return lines


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


def plot_loss(
    rows: Sequence[Mapping[str, Any]], path: Path, title: str, names: Mapping[str, str] = {}
) -> None:
    """Plot training and held-out loss of a log's rows, and other numbers by name, into a PNG.

    The faint line is the loss of each step, the strong line a running mean over a twentieth of the
    steps. Two held-out values are dots.
    """
    shown = {"loss": "loss per trained token (nats)" if not names else "loss", **names}
    size = (7, 4 if len(shown) == 1 else 6)
    figure = Figure(figsize=size, dpi=120, layout="constrained")  # pyplot has global state
    FigureCanvasAgg(figure)
    for axes, (name, text) in zip(
        figure.subplots(len(shown), 1, squeeze=False)[:, 0], shown.items(), strict=True
    ):
        steps, found = _series(rows, name)
        width = max(1, len(found) // 20)
        windows = [found[max(0, end - width) : end] for end in range(1, len(found) + 1)]
        means = [sum(window) / len(window) for window in windows]
        axes.plot(steps, found, color="tab:blue", alpha=0.3, linewidth=1)
        axes.plot(steps, means, color="tab:blue", label="training")
        if (held_out := _series(rows, f"eval_{name}"))[0]:
            line = "o-" if len(held_out[0]) > 2 else "o"
            axes.plot(*held_out, line, color="tab:orange", label="held out")
        axes.set(xlabel="step", ylabel=text, title=title if name == "loss" else "")
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path)


def _series(rows: Sequence[Mapping[str, Any]], name: str) -> tuple[list[int], list[float]]:
    pairs = [(row["step"], row[name]) for row in rows if name in row]
    return [step for step, _ in pairs], [value for _, value in pairs]


def _asked(options: Options, trainer: Any, row: dict[str, Any]) -> str:
    """Return a held-out question with the trained model's answer, for the card."""
    if options.task == "reward" or "text" in row or trainer.args.world_size > 1:
        return ""
    tokenizer, prompt = trainer.processing_class, row.get("prompt")
    turns = conversation(row)[:-1] if "messages" in row else prompt
    if turns is None:
        return ""
    uses = options.data.template and tokenizer.chat_template
    if isinstance(turns, str) and uses:
        turns = [{"role": "user", "content": turns}]
    asked = str(turns)
    if not isinstance(turns, str):
        more = {"add_generation_prompt": True, "tools": row.get("tools")}
        asked, prompt = templated(tokenizer, turns, "data", **more), turns[-1]["content"]
    special = isinstance(turns, str)
    with working("Asking a question"):
        (answer,) = greedy_answers(trainer.base_model, tokenizer, [asked], 48, 1, special)
    quoted = "\n".join(f"> {line}" for line in str(prompt).splitlines())
    return f"{quoted}\n\n{answer}"
