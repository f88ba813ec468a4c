"""The pictures of the documentation, drawn as it is built. ``python docs/pictures.py DIR`` as well.

Numbers in them come from the formulas below, to which tests hold the package.
"""

from __future__ import annotations

import io
import sys
from pathlib import Path

import matplotlib

matplotlib.use("svg")
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

PRIVATE, POOL, FROZEN, OTHER = "#4c72b0", "#dd8452", "#b8b8b8", "#55a868"
STYLE = {"font.size": 10, "svg.fonttype": "none", "svg.hashsalt": "rasa_ext"}


def effective_rank(layers: int, rank: int, k: int) -> int:
    """R = r - k + L*k."""
    return rank - k + layers * k


def trainable_parameters(layers: int, rank: int, k: int, out: int, width: int) -> int:
    """Of one group: A, B and pool as many as LoRA's, and a diagonal a layer."""
    return layers * rank * (width + out) + layers * effective_rank(layers, rank, k)


def pool() -> Figure:
    """LoRA's ranks beside RaSA's, four layers of rank 4."""
    layers, rank, k = 4, 4, 1
    figure, (lora, rasa) = pyplot.subplots(1, 2, figsize=(9.6, 3.4), layout="constrained")
    for axes, own, title in (
        (lora, rank, f"LoRA, r = {rank}: every layer uses its own {rank} ranks"),
        (
            rasa,
            rank - k,
            f"RaSA, r = {rank}, k = {k}: every layer uses {effective_rank(layers, rank, k)} ranks",
        ),
    ):
        for layer in range(layers):
            y = layers - layer
            for column in range(own):
                square(axes, column, y, PRIVATE)
            axes.text(-0.4, y + 0.4, f"layer {layer + 1}", ha="right", va="center")
        axes.set(xlim=(-2.6, 10), ylim=(0.6, layers + 1.3), aspect="equal")
        axes.set_title(title, fontsize=10)
        axes.axis("off")
    for slot in range(layers * k):
        square(rasa, 7, layers - slot, POOL)
    rasa.text(8.2, layers - 1.1, "the pool:\none rank\nfrom each\nlayer", va="center")
    for layer in range(layers):
        for slot in range(layers * k):
            ends = [layers - layer + 0.4, layers - slot + 0.4]
            rasa.plot([rank - k, 6.9], ends, color=POOL, linewidth=0.8, alpha=0.7)
    return figure


def matrices() -> Figure:
    """dW_i as a product of three matrices."""
    figure, axes = pyplot.subplots(figsize=(9.6, 3.2), layout="constrained")
    out, width, own, pooled = 2.6, 3.4, 0.8, 1.6
    place = 0.0
    block(axes, place, 0, width, out, FROZEN, "$\\Delta W_i$\n(out, in)")
    place += width + 0.3
    axes.text(place, out / 2, "=", ha="center", va="center", fontsize=14)
    place += 0.3
    block(axes, place, 0, own, out, PRIVATE, "$B_i$")
    block(axes, place + own, 0, pooled, out, POOL, "$B_S$")
    place += own + pooled + 0.4
    size = own + pooled
    top = out
    axes.add_patch(Rectangle((place, top - size), size, size, fill=False, edgecolor="black"))
    axes.plot([place, place + own], [top, top - own], color=OTHER, linewidth=4)
    axes.plot([place + own, place + size], [top - own, top - size], color=OTHER, linewidth=4)
    axes.text(place + size * 0.66, top - size * 0.3, "$d_i$", ha="center", va="center")
    place += size + 0.4
    block(axes, place, top - own, width, own, PRIVATE, "$A_i$  (r - k, in)")
    block(axes, place, top - size, width, pooled, POOL, "$A_S$  (L k, in)")
    axes.text(
        0,
        -0.35,
        "blue: layer i's own     green: layer i's own weights of all ranks     "
        "orange: the pool, the same in all L layers",
        va="top",
    )
    axes.set(xlim=(-0.1, place + width + 0.1), ylim=(-0.8, out + 0.1), aspect="equal")
    axes.axis("off")
    return figure


def ranks() -> Figure:
    """What k costs and what it gives, by the number of layers."""
    rank, side, counts = 8, 4096, list(range(1, 81))
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9.6, 3.4), layout="constrained")
    for k in (0, 1, 2, 4):
        label = "k = 0 (LoRA)" if k == 0 else f"k = {k}"
        (line,) = left.plot(counts, [effective_rank(n, rank, k) for n in counts], label=label)
        if k:
            lora = [n * rank * 2 * side for n in counts]
            ours = [trainable_parameters(n, rank, k, side, side) for n in counts]
            more = [100 * (a / b - 1) for a, b in zip(ours, lora, strict=True)]
            right.plot(counts, more, color=line.get_color())
    left.set(xlabel="layers in the group", ylabel="effective rank R", title=f"r = {rank}")
    right.set(
        xlabel="layers in the group",
        ylabel="more trainable parameters than LoRA, %",
        title=f"r = {rank}, weights of {side} x {side}",
    )
    left.legend(frameon=False)
    return figure


def flow() -> Figure:
    """What is done in weight space and what with tokens."""
    figure, axes = pyplot.subplots(figsize=(9.6, 3.6), layout="constrained")
    box(axes, 0.0, 2.6, 2.6, "$A_i, A_S, B_i, B_S, d_i$\nfloat32, trained", PRIVATE)
    box(axes, 3.8, 2.6, 2.6, "pack: cast, join,\nscale by d, pad", OTHER)
    box(axes, 7.6, 2.6, 2.6, "$A_p$ (R, in)   $B_t$ (out, R)\nthe dtype of x", PRIVATE)
    box(axes, 0.0, 0.4, 2.6, "x (M, in)", FROZEN)
    box(axes, 3.8, 0.4, 2.6, "U = x $A_p^T$\n(M, R), kept", OTHER)
    box(axes, 7.6, 0.4, 2.6, "y = U $B_t^T$ + x $W^T$ + bias\n(M, out)", FROZEN)
    for start, end in (
        ((2.6, 3.1), (3.8, 3.1)),
        ((6.4, 3.1), (7.6, 3.1)),
        ((2.6, 0.9), (3.8, 0.9)),
        ((6.4, 0.9), (7.6, 0.9)),
        ((8.1, 2.6), (5.9, 1.4)),
        ((8.9, 2.6), (8.9, 1.4)),
    ):
        axes.annotate("", end, start, arrowprops={"arrowstyle": "->", "linewidth": 1.2})
    axes.text(-0.2, 3.1, "weight\nspace", ha="right", va="center")
    axes.text(-0.2, 0.9, "tokens", ha="right", va="center")
    axes.set(xlim=(-1.3, 10.4), ylim=(0.2, 3.8))
    axes.axis("off")
    return figure


PICTURES = {"pool": pool, "matrices": matrices, "ranks": ranks, "flow": flow}


def draw_all() -> dict[str, str]:
    """SVG text of every picture by name; the same text in every run."""
    drawn = {}
    with matplotlib.rc_context(STYLE):
        for name, draw in PICTURES.items():
            figure, file = draw(), io.StringIO()
            figure.savefig(file, format="svg", metadata={"Date": None}, transparent=False)
            pyplot.close(figure)
            drawn[name] = file.getvalue()
    return drawn


def square(axes: Axes, x: float, y: float, color: str) -> None:
    """One rank."""
    axes.add_patch(Rectangle((x, y), 0.8, 0.8, facecolor=color, edgecolor="white"))


def block(axes: Axes, x: float, y: float, width: float, height: float, color: str, text: str):
    """One matrix."""
    axes.add_patch(Rectangle((x, y), width, height, facecolor=color, edgecolor="white"))
    axes.text(x + width / 2, y + height / 2, text, ha="center", va="center", color="black")


def box(axes: Axes, x: float, y: float, width: float, text: str, color: str) -> None:
    """One step, a box of height 1."""
    axes.add_patch(Rectangle((x, y), width, 1, facecolor=color, alpha=0.35, edgecolor="black"))
    axes.text(x + width / 2, y + 0.5, text, ha="center", va="center")


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    for name, svg in draw_all().items():
        (folder / f"{name}.svg").write_text(svg)
