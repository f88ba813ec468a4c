"""``rasa-ext inspect``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from rasa_ext.commands.output import command, console, progress, table_of


@command
def inspect(
    target: Annotated[
        str | None,
        typer.Argument(help="Adapter directory, or a model's directory or .gguf."),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(help="Instead: a model, which may be on the hub.", show_default=False),
    ] = None,
    rank: Annotated[int, typer.Option(help="For a model: the rank to plan with.")] = 8,
    k: Annotated[
        int | None, typer.Option(help="For a model: ranks to share. [default: rank // 8]")
    ] = None,
    target_modules: Annotated[
        str, typer.Option(help="For a model: as in `rasa-ext finetune`.")
    ] = "all-linear",
    experts: Annotated[
        str | None,
        typer.Option(help="For a model: which experts share a pool: slot, layer or shared."),
    ] = None,
    spectrum: Annotated[
        bool,
        typer.Option(
            "--spectrum",
            help="For an adapter: its layers' effective ranks and use of the pool instead, with "
            "pictures.",
        ),
    ] = False,
    compare: Annotated[
        tuple[Path, Path] | None,
        typer.Option(
            metavar="FIRST SECOND",
            help="Instead: two adapters, RaSA's or LoRAs, and the ratio of their mean effective "
            "ranks by the kind of layer.",
            show_default=False,
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            help="Directory for the pictures of --spectrum. [default: the adapter's]",
        ),
    ] = None,
) -> None:
    """Show an adapter's config, groups and size; or what an adapter of a model would be."""
    from rasa_ext.commands.contents import check_adapter, is_model

    if compare is not None:
        if target is not None or model is not None:
            raise ValueError("compare: expected two adapters and no other target, got one more.")
        _show_comparison(*compare)
        return
    if (target is None) == (model is None):
        raise ValueError("target: expected an adapter's directory or --model, got both or neither.")
    if target is None or (not spectrum and is_model(Path(target))):
        _show_plan(str(model or target), rank, k, target_modules, experts)
        return
    directory = Path(target)
    check_adapter(directory, "target", " To look at a model of the hub, pass --model.")
    if spectrum:
        _show_spectrum(directory, directory if output is None else output)
    else:
        _show_adapter(directory)


def _show_adapter(directory: Path) -> None:
    from rasa_ext.commands.contents import read_adapter

    contents = read_adapter(directory)
    settings = Table(show_header=False, box=None, pad_edge=False)
    for key, value in contents.config.items():
        if value not in (None, [], {}):
            settings.add_row(key, _text(value))
    console.print(settings)
    if contents.groups:
        table = table_of("group", "L", "out x in", "private", "pooled", "R", "parameters")
        for group in contents.groups:
            table.add_row(
                group.pattern,
                str(group.layers),
                _shape(group.shape, group.experts),
                str(group.private),
                str(group.pooled),
                str(group.private + group.pooled),
                f"{group.parameters:,}",
            )
        console.print(table)
    if contents.other:
        names = list(contents.other)
        shown = ", ".join(f"{name} {contents.other[name]}" for name in names[:4])
        more = f", and {len(names) - 4} more" if len(names) > 4 else ""
        console.print(f"other tensors: {shown}{more}", markup=False)
    if contents.not_finite:
        names = list(contents.not_finite)
        console.print(
            f"{len(names)} tensors hold NaN or infinity, such as {names[0]}: the training that "
            "wrote them had diverged.",
            style="yellow",
            markup=False,
        )
    console.print(
        f"{contents.parameters:,} parameters, {contents.file_bytes:,} bytes "
        f"({contents.file_bytes / 2**20:.2f} MiB)"
    )


def _show_spectrum(directory: Path, output: Path) -> None:
    from rasa_ext.checkpoint.writing import writing
    from rasa_ext.commands.contents import groups_in
    from rasa_ext.commands.plots import plot_pool_use, plot_spectra
    from rasa_ext.commands.working import working

    with working(progress, f"Taking the singular values of {directory}"):
        groups = groups_in(directory)
    table = table_of(
        "group", "L", "out x in", "R", "effective rank", "private", "slots used", "||dW||"
    )
    for group in groups:
        layers = group.layers
        ranks = [layer.effective_rank for layer in layers]
        slots = group.pool_use.shape[1]
        table.add_row(
            group.pattern,
            str(len(group.weights)),
            _shape(group.shape, group.experts),
            str(len(layers[0].singular_values)),
            f"{_mean(ranks):.1f} ({min(ranks):.1f}-{max(ranks):.1f})",
            f"{_mean([layer.private_share for layer in layers]):.0%}",
            f"{_mean([layer.slots_used for layer in layers]):.1f} of {slots}",
            f"{_mean([layer.norm for layer in layers]):.3g}",
        )
    console.print(table)
    plots = {"spectrum.png": plot_spectra}
    if any(group.pool_use.numel() for group in groups):
        plots["pool.png"] = plot_pool_use
    pictures = {output / name: plot for name, plot in plots.items()}
    for path, plot in pictures.items():
        with writing(path, f"the adapter in {directory} is whole"):
            output.mkdir(parents=True, exist_ok=True)
            plot(groups, path)
    shown = ", ".join(map(str, pictures))
    over = "layers and experts" if any(group.experts for group in groups) else "layers"
    console.print(f"Means over {over}. Pictures: {shown}", markup=False)


def _show_comparison(first: Path, second: Path) -> None:
    from rasa_ext.commands.contents import compare_adapters
    from rasa_ext.commands.working import working

    with working(progress, f"Taking the singular values of {first} and {second}"):
        rows = compare_adapters(first, second)
    table = table_of("kind of layer", str(first), str(second), "ratio")
    for row in rows:
        table.add_row(row.kind, f"{row.first:.2f}", f"{row.second:.2f}", f"{row.ratio:.2f}")
    console.print(table)
    console.print("Mean effective ranks: exp of the entropy of the singular values over their sum.")


def _shape(shape: tuple[int, int], experts: int) -> str:
    """Write out x in, and before it how many experts are stacked."""
    return " x ".join(map(str, (experts, *shape) if experts else shape))


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _show_plan(
    name: str, rank: int, k: int | None, target_modules: str, experts: str | None
) -> None:
    from rasa_ext import patch_model, summary
    from rasa_ext.commands.models import load_skeleton
    from rasa_ext.commands.options import parse_targets

    model = load_skeleton(name)
    targets = parse_targets(target_modules)
    patch_model(model, rank=rank, k=k, target_modules=targets, experts=experts)
    report = summary(model)
    table = table_of("group", "L", "out x in", "R", "trainable")
    for row in report:
        shape = _shape(row.shape, row.experts)
        table.add_row(row.pattern, str(row.L), shape, str(row.R), f"{row.trainable:,}")
    console.print(table)
    console.print(
        f"{report.trainable:,} of {report.total:,} parameters would be trained "
        f"({100 * report.trainable / report.total:.3f} %), an adapter file of "
        f"{4 * report.adapter / 2**20:.1f} MiB"
    )
    for line in report.left_out():
        console.print(line, markup=False)


def _text(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
