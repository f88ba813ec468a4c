"""``rasa-ext ranks``: plan the rank of every block."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from rasa_ext.commands.output import command, console, table_of

if TYPE_CHECKING:
    from rasa_research.ranks.planning import RankOptions, RankPlan


@command
def ranks(
    model: Annotated[
        str,
        typer.Argument(help="Hub id, local directory, .gguf file, or smollm2.", show_default=False),
    ],
    data: Annotated[str, typer.Argument(help="Data in a form that sft takes.", show_default=False)],
    output: Annotated[
        Path | None,
        typer.Option(help="JSON file for the dimensions, the ranks and the rank_pattern."),
    ] = None,
    k: Annotated[
        int, typer.Option(help="Lowest rank of a block: 1 for LoRA, and RaSA's k for RaSA.")
    ] = 1,
    pooling: Annotated[
        str,
        typer.Option(help="Which state of an example is the point: mean, last or first."),
    ] = "mean",
    points: Annotated[
        int, typer.Option(help="Maximum number of examples, drawn at random.")
    ] = 2000,
    seed: Annotated[int, typer.Option(help="Seed of the draw.")] = 0,
    blocks: Annotated[
        str | None,
        typer.Option(
            help="Name of the model's list of blocks, such as model.layers. [default: the longest]"
        ),
    ] = None,
    target_modules: Annotated[str, typer.Option(help="As in sft.")] = "all-linear",
    prompt_field: Annotated[str, typer.Option(help="As in sft.")] = "prompt",
    completion_field: Annotated[str, typer.Option(help="As in sft.")] = "completion",
    template: Annotated[
        bool,
        typer.Option(
            "--template/--no-template", help="Use the model's chat template, if it has one."
        ),
    ] = True,
    seq_len: Annotated[int, typer.Option(help="Maximum length of an example in tokens.")] = 1024,
    batch_size: Annotated[int, typer.Option(help="Examples per forward pass.")] = 8,
    dtype: Annotated[
        str,
        typer.Option(help="Of the model: float32, bfloat16, float16, or auto, as it is stored."),
    ] = "auto",
) -> None:
    """Plan a rank for every block from the dimension of hidden states, like GeLoRA."""
    from rasa_research.ranks import Pooling
    from rasa_research.ranks.planning import RankOptions, plan_ranks

    options = RankOptions(
        model=model,
        data=data,
        pooling=cast(Pooling, pooling),
        points=points,
        seed=seed,
        k=k,
        blocks=blocks,
        target_modules=target_modules,
        template=template,
        prompt_field=prompt_field,
        completion_field=completion_field,
        seq_len=seq_len,
        batch_size=batch_size,
        dtype=dtype,
    )
    plan = plan_ranks(options)
    table = table_of(f"{plan.points:,} examples of {data}", "dimension", "rank")
    for name, dimension, rank in zip(plan.blocks, plan.dimensions, plan.ranks, strict=False):
        table.add_row(name, f"{dimension:.2f}", str(rank))
    table.add_row("after the last block", f"{plan.dimensions[-1]:.2f}", "")
    console.print(table)
    if output is not None:
        _write(output, options, plan)
        console.print(f"rank_pattern of {len(plan.rank_pattern)} layers: {output}", markup=False)


def _write(path: Path, options: RankOptions, plan: RankPlan) -> None:
    values: dict[str, Any] = {**dataclasses.asdict(options), **dataclasses.asdict(plan)}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
