"""``rasa-ext compress``: compress a full fine-tuning or a LoRA into a RaSA adapter."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.progress import Progress

from rasa_ext.commands.output import command, console, progress, table_of
from rasa_ext.commands.parsing import Overwrite
from rasa_research.commands import progress_bar

if TYPE_CHECKING:
    from rasa_ext.patching import Group
    from rasa_research.solver.compress import CompressedAdapter
    from rasa_research.solver.fit import Solver

PICTURE = "errors.png"

_Output = Annotated[
    Path, typer.Option("--output", "-o", help="Directory to write.", show_default=False)
]
_Iterations = Annotated[int, typer.Option(help="Rounds of the solver.")]
_Dtype = Annotated[
    str, typer.Option(help="Dtype of the computation: float64, or float32 for half the memory.")
]


@command
def compress(
    output: _Output,
    base: Annotated[
        str | None,
        typer.Option(
            help="Model before fine-tuning: hub id, directory or .gguf. [default: with --lora, the "
            "one that it names]"
        ),
    ] = None,
    finetuned: Annotated[
        str | None, typer.Option(help="The model after full fine-tuning.", show_default=False)
    ] = None,
    lora: Annotated[
        Path | None,
        typer.Option(help="A LoRA in PEFT's format, in place of --finetuned.", show_default=False),
    ] = None,
    rank: Annotated[int, typer.Option(help="LoRA rank r per layer.")] = 8,
    k: Annotated[int, typer.Option(help="Ranks per layer that go to the shared pool.")] = 1,
    target_modules: Annotated[
        str, typer.Option(help="With --finetuned: layers to adapt, as in `rasa-ext sft`.")
    ] = "all-linear",
    modules_to_save: Annotated[
        str,
        typer.Option(
            help="With --finetuned: modules to save in full, as name suffixes with commas, or "
            "`changed` for all modules that changed and are not adapted."
        ),
    ] = "",
    iterations: _Iterations = 50,
    dtype: _Dtype = "float64",
    overwrite: Overwrite = False,
) -> None:
    """Find the RaSA adapter closest to a full fine-tuning or a larger LoRA."""
    from rasa_ext.commands.models import copy_tokenizer
    from rasa_ext.commands.parsing import parse_targets
    from rasa_research.solver.conversion import compress_finetuned, compress_lora

    if (finetuned is None) == (lora is None):
        raise ValueError("finetuned: expected either --finetuned or --lora, got both or neither.")
    with progress_bar() as bar:
        solver = _solver(bar, iterations, dtype)
        if lora is not None:
            read, found = compress_lora(
                lora, output, rank, k, base=base, solver=solver, overwrite=overwrite
            )
        elif base is None or finetuned is None:
            raise ValueError("base: expected --base, the model before --finetuned, got none.")
        else:
            names = [name.strip() for name in modules_to_save.split(",") if name.strip()]
            found = compress_finetuned(
                base,
                finetuned,
                output,
                rank,
                k,
                target_modules=parse_targets(target_modules),
                modules_to_save="changed" if names == ["changed"] else names,
                solver=solver,
                overwrite=overwrite,
            )
    copy_tokenizer(lora or Path(str(finetuned)), output)
    if lora is not None:
        console.print(f"The LoRA has {read.num_parameters:,} parameters, at rank {read.rank}.")
    _show(found, output)
    _show_lost(found)


def _show(found: CompressedAdapter, output: Path) -> None:
    """Show errors of RaSA and LoRA in a table and a plot."""
    from rasa_research.solver.plots import plot_errors

    rank, k = found.config.rank, found.config.k
    table = table_of(
        "group",
        "L",
        "out x in",
        "||dW||",
        "error",
        f"LoRA r={rank}",
        "ratio",
        "equal LoRA",
        "ratio",
    )
    for group, result in found.groups.items():
        table.add_row(
            group.pattern,
            str(len(group.names)),
            f"{group.shape[0]} x {group.shape[1]}",
            f"{result.norm:.3g}",
            *_errors(result.errors[-1], result.lora_error, result.lora_error_equal),
        )
    errors = _errors(found.error, found.lora_error, found.lora_error_equal)
    table.add_row("all", "", "", "", *errors)
    console.print(table)
    ours, loras = found.num_parameters, found.lora_num_parameters
    console.print(
        "Errors are ||dW - adapter||\u00b2 / ||dW||\u00b2; those of LoRAs are the smallest "
        f"possible. RaSA r={rank} k={k} has {ours:,} parameters, {ours / loras - 1:+.1%} compared "
        f"with the {loras:,} of a LoRA of rank {rank}; the equal LoRA has as many as RaSA, with "
        "one more rank in some layers."
    )
    plot_errors(found.groups, output / PICTURE)
    console.print(f"Adapter in {output}; picture: {output / PICTURE}", markup=False)


def _errors(error: float, *loras: float) -> list[str]:
    """Return table cells: the error, then each LoRA's error and the ratio to it."""
    cells = [f"{error:.4f}"]
    for lora in loras:
        cells += [f"{lora:.4f}", f"{error / lora:.4f}" if lora > 1e-12 else "-"]
    return cells


def _show_lost(found: CompressedAdapter) -> None:
    if found.plan.modules_to_save:
        console.print(f"saved in full: {', '.join(found.plan.modules_to_save)}", markup=False)
    if not found.lost:
        return
    from rasa_ext.patching import pattern

    console.print(
        f"Not in the adapter: {found.residual_share:.2%} of the squared change is in parameters "
        "that are neither adapted nor saved in full (--modules-to-save):"
    )
    kinds: dict[str, list[tuple[float, float]]] = {}
    for name, each in found.lost.items():
        kinds.setdefault(pattern(name), []).append((each.change**2, each.base**2))
    for kind, squares in kinds.items():
        change, base = (sum(column) ** 0.5 for column in zip(*squares, strict=True))
        relative = f", {change / base:.2%} of its norm" if base else ""
        console.print(f"  {kind} ({len(squares)}): changed by {change:.3g}{relative}", markup=False)


def _solver(bar: Progress, iterations: int, dtype: str) -> Solver:
    """Make a solver that shows iterations in the bar, or in a pipe prints each group's start."""
    import torch

    from rasa_research.solver.fit import Solver

    if dtype not in ("float64", "float32"):
        raise ValueError(f"dtype: expected float64 or float32, got {dtype!r}.")
    tasks = {}

    def show(group: Group, done: int, total: int) -> None:
        if group not in tasks:
            tasks[group] = bar.add_task(group.pattern, total=total)
            if bar.disable:
                progress.print(f"{group.pattern}: {total} iterations", markup=False)
        bar.update(tasks[group], completed=done)

    return Solver(iterations=iterations, dtype=getattr(torch, dtype), progress=show)
