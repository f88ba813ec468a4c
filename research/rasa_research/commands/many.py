"""``rasa-ext compress-many | expand``: compress several LoRAs into a shared basis, and expand."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rasa_ext.commands.output import command, console, progress, table_of
from rasa_ext.commands.parsing import Overwrite
from rasa_research.commands import progress_bar

if TYPE_CHECKING:
    from rasa_research.solver import CompressedLoras

_Output = Annotated[
    Path, typer.Option("--output", "-o", help="Directory to write.", show_default=False)
]


@command
def compress_many(
    loras: Annotated[
        list[str],
        typer.Argument(
            help="LoRAs of one base in PEFT's format: directories, or NAME=DIRECTORY.",
            show_default=False,
        ),
    ],
    output: _Output,
    rank: Annotated[int, typer.Option(help="Rank R of the shared basis of each layer.")],
    iterations: Annotated[int, typer.Option(help="Maximum number of solver rounds.")] = 100,
    overwrite: Overwrite = False,
) -> None:
    """Compress several LoRAs of one base into one shared basis, with a diagonal for each."""
    from rasa_research.solver.many import compress_directories

    with progress_bar() as bar:
        task = bar.add_task("Layers", total=None)

        def show(layer: str, done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)
            if bar.disable and done * 10 // total > (done - 1) * 10 // total:
                progress.print(f"{layer}: {done} of {total} layers", markup=False)

        found = compress_directories(
            loras, output, rank, iterations=iterations, progress=show, overwrite=overwrite
        )
    _show(found)
    console.print(
        f"{len(found.loras.names)} LoRAs in {output}. Write one as a LoRA of rank {rank} with "
        f"`rasa-ext expand {output} {found.loras.names[0]} --output DIRECTORY`.",
        markup=False,
    )


@command
def expand(
    loras: Annotated[
        Path, typer.Argument(help="Directory that compress-many wrote.", show_default=False)
    ],
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            help="Directory to write, with one folder per LoRA.",
            show_default=False,
        ),
    ],
    names: Annotated[
        list[str] | None, typer.Argument(help="Names of LoRAs. [default: all]", show_default=False)
    ] = None,
    overwrite: Overwrite = False,
) -> None:
    """Write LoRAs from the result of compress-many as plain LoRAs for PEFT and servers."""
    from rasa_research.solver.many import expand_set

    found = expand_set(loras, names or [], output, overwrite=overwrite)
    for name in names or found.names:
        console.print(f"LoRA of rank {found.rank} in {output / name}.", markup=False)


def _show(found: CompressedLoras) -> None:
    """Show errors by adapter, by kind of layer and in total, with those of separate LoRAs."""
    from rasa_ext.patching import pattern

    kinds: dict[str, list[str]] = {}
    for layer in found.loras.layers:
        kinds.setdefault(pattern(layer), []).append(layer)
    table = table_of("LoRA or layers", "error", "separate", "ratio")
    apart = found.separate.adapters
    for name, error in found.errors.adapters.items():
        table.add_row(name, *_cells(error, apart[name]))
    table.add_section()
    for kind, layers in kinds.items():
        cells = _cells(found.errors.over(layers), found.separate.over(layers))
        table.add_row(f"{kind} ({len(layers)})", *cells)
    table.add_section()
    table.add_row("all", *_cells(found.errors.total, found.separate.total))
    console.print(table)
    size = found.loras.num_parameters
    console.print(
        "Errors are ||dW - dW'|| / ||dW||; over several LoRAs, their root mean square. The basis "
        f"and the diagonals have {size:,} parameters, {size / found.given:.1%} of the LoRAs' "
        f"{found.given:,}. The column separate has the smallest possible errors of separate LoRAs "
        "with as many parameters in every layer, from singular values."
    )


def _cells(error: float, apart: float) -> list[str]:
    return [f"{error:.4f}", f"{apart:.4f}", f"{error / apart:.4f}" if apart > 1e-6 else "-"]
