"""``rasa-ext merge | export-lora | import-lora | import-official``: an adapter in, files out."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rasa_ext.cli.output import Overwrite, command, console, progress, table_of

if TYPE_CHECKING:
    from rasa_ext import Truncation

_Adapter = Annotated[Path, typer.Argument(help="Adapter directory.", show_default=False)]
_Output = Annotated[
    Path, typer.Option("--output", "-o", help="Directory to write.", show_default=False)
]
_Base = Annotated[
    str | None,
    typer.Option(
        "--model", help="Base model: hub id, directory or .gguf. [default: as the adapter says]"
    ),
]
_Dtype = Annotated[
    str, typer.Option(help="Of the base: float32, bfloat16, float16, or auto, as it is stored.")
]


@command
def merge(
    adapter: _Adapter,
    output: _Output,
    model: _Base = None,
    dtype: _Dtype = "auto",
    overwrite: Overwrite = False,
) -> None:
    """Fold an adapter into its base model and write a standalone model."""
    from rasa_ext.train.convert import merge_adapter
    from rasa_ext.train.working import working

    with working(progress, f"Merging {adapter}"):
        change = merge_adapter(adapter, output, base=model, dtype=dtype, overwrite=overwrite)
    console.print(f"Merged model in {output}; the largest change of a weight is {change:.3g}.")


@command
def export_lora(
    adapter: _Adapter,
    output: _Output,
    model: _Base = None,
    pad_to: Annotated[
        int | None, typer.Option(help="Rank to write. [default: the largest effective rank]")
    ] = None,
    rank: Annotated[
        int | None,
        typer.Option(
            help="Rank to write, which may be lower; the error of every layer is then printed.",
            show_default=False,
        ),
    ] = None,
    format: Annotated[
        str, typer.Option(help="peft (and vLLM, SGLang), gguf (llama.cpp), or mlx (mlx-lm).")
    ] = "peft",
    allow_dropped: Annotated[
        bool,
        typer.Option(
            "--allow-dropped", help="Write it even if llama.cpp or SGLang would leave a part out."
        ),
    ] = False,
    expert_layout: Annotated[
        str | None,
        typer.Option(
            help="Layout of adapted experts: peft (PEFT, and vLLM for gpt-oss), per-expert (vLLM, "
            "SGLang, llama.cpp), or shared-outer (SGLang, pool-only experts). [default: peft]",
            show_default=False,
        ),
    ] = None,
    yes: Annotated[
        bool, typer.Option("--yes", help="Write experts even if they take more than 1 GiB.")
    ] = False,
    overwrite: Overwrite = False,
) -> None:
    """Write an adapter as a plain LoRA for PEFT, vLLM, SGLang, llama.cpp and mlx-lm."""
    from rasa_ext.checkpoint.serving import serving_help
    from rasa_ext.train.convert import export_adapter
    from rasa_ext.train.working import working

    def announce(size: int) -> None:
        console.print(f"The LoRA takes {_bytes(size)}.")

    with working(progress, f"Exporting {adapter}"):
        lora = export_adapter(
            adapter,
            output,
            base=model,
            pad_to=pad_to,
            allow_dropped=allow_dropped,
            expert_layout=expert_layout,
            large=yes,
            announce=announce,
            rank=rank,
            format=format,
            overwrite=overwrite,
        )
    console.print(f"LoRA of rank {lora.rank} in {output}.")
    if lora.truncation is not None:
        _show_truncation(lora.truncation)
    told = serving_help(
        lora.base,
        output.resolve(),
        lora.rank,
        float32=lora.float32,
        expert_layout=lora.expert_layout,
        format=format,
    )
    console.print(told, markup=False)


def _show_truncation(found: Truncation) -> None:
    table = table_of("layer", "error")
    for name, error in found.layers.items():
        table.add_row(name, f"{error:.3g}")
    table.add_section()
    table.add_row("all", f"{found.error:.3g}")
    console.print(table)
    console.print("Errors are of the change of the weights, relative, in the Frobenius norm.")


@command
def import_lora(
    lora: Annotated[Path, typer.Argument(help="A LoRA in PEFT's format.", show_default=False)],
    output: _Output,
    model: _Base = None,
    overwrite: Overwrite = False,
) -> None:
    """Turn a LoRA into a RaSA adapter that computes the same function."""
    from rasa_ext.train.convert import import_lora_directory

    read = import_lora_directory(lora, output, base=model, overwrite=overwrite)
    console.print(
        f"The same adapter, of k = 0 and rank {read.rank}, for {len(read.factors)} layers in "
        f"{output}.",
        markup=False,
    )


@command
def import_official(
    checkpoint: Annotated[
        Path, typer.Argument(help="Checkpoint of the official RaSA code.", show_default=False)
    ],
    output: _Output,
    model: _Base = None,
    overwrite: Overwrite = False,
) -> None:
    """Turn a checkpoint of the official RaSA code into an adapter of this package."""
    from rasa_ext.train.convert import import_checkpoint
    from rasa_ext.train.working import working

    with working(progress, f"Reading {checkpoint} and its base"):
        import_checkpoint(checkpoint, output, base=model, overwrite=overwrite)
    console.print(f"Adapter in {output}.")


def _bytes(size: int) -> str:
    return f"{size / 2**30:,.2f} GiB" if size >= 2**30 else f"{size / 2**20:,.2f} MiB"
