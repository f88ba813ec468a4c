"""The pictures of the documentation, each for a light and a dark page.

The numbers in them are from the formulas below, which tests compare with the package. A picture is
about as wide as a phone's screen, so that its text is readable there.
"""

from __future__ import annotations

import csv
import io
import statistics
from pathlib import Path

import matplotlib

matplotlib.use("svg")
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

PRIVATE, POOL, FROZEN, WEIGHTS = "#4c8bd0", "#e08a45", "#9a9a9a", "#4fa56b"
LIGHT = {"text.color": "#222222", "axes.edgecolor": "#555555", "axes.labelcolor": "#222222"}
DARK = {"text.color": "#e2e4e9", "axes.edgecolor": "#a0a4ad", "axes.labelcolor": "#e2e4e9"}
STYLE = {"font.size": 10, "svg.fonttype": "path", "svg.hashsalt": "rasa_ext"}
WIDTH = 5.2


def effective_rank(layers: int, rank: int, k: int) -> int:
    """Compute R = r - k + L*k."""
    return rank - k + layers * k


def pool() -> Figure:
    """Draw LoRA's ranks above RaSA's, for four layers of rank 4."""
    layers, rank, k = 4, 4, 1
    figure, (lora, rasa) = pyplot.subplots(2, 1, figsize=(WIDTH, 4.6), layout="constrained")
    for axes, own, title in (
        (lora, rank, f"LoRA, r = {rank}: each layer uses its own {rank} ranks"),
        (
            rasa,
            rank - k,
            f"RaSA, r = {rank}, k = {k}, equal parameters:\n"
            f"each layer uses {effective_rank(layers, rank, k)} ranks",
        ),
    ):
        for layer in range(layers):
            y = layers - layer
            for column in range(own):
                square(axes, column, y, PRIVATE)
            axes.text(-0.4, y + 0.4, f"layer {layer + 1}", ha="right", va="center")
        axes.set(xlim=(-2.2, 10.6), ylim=(0.9, layers + 0.9), aspect="equal")
        axes.set_title(title, fontsize=11)
        axes.axis("off")
    for slot in range(layers * k):
        square(rasa, 6.5, layers - slot, POOL)
    rasa.text(7.7, layers - 1.1, "the pool:\none rank\nfrom each\nlayer", va="center")
    for layer in range(layers):
        for slot in range(layers * k):
            ends = [layers - layer + 0.4, layers - slot + 0.4]
            rasa.plot([rank - k, 6.4], ends, color=POOL, linewidth=0.9, alpha=0.8)
    return figure


def start() -> Figure:
    """Draw where d starts, for four layers of rank 4."""
    layers, rank, k = 4, 4, 1
    own = rank - k
    figure, axes = pyplot.subplots(figsize=(WIDTH, 2.7), layout="constrained")
    for layer in range(layers):
        y = layers - layer
        axes.text(-0.4, y + 0.4, f"layer {layer + 1}", ha="right", va="center")
        for column in range(effective_rank(layers, rank, k)):
            given = column < own or column - own == layer
            x = column + 0.5 * (column >= own)
            color = PRIVATE if column < own else POOL
            square(axes, x, y, color, alpha=1 if given else 1 / layers)
            text = "1" if given else f"1/{layers}"
            axes.text(x + 0.4, y + 0.4, text, ha="center", va="center", fontsize=9)
    axes.text(own / 2 - 0.1, 0.5, "own ranks", ha="center", va="center")
    axes.text(own + 0.4 + layers / 2, 0.5, "the pool", ha="center", va="center")
    axes.set(xlim=(-2.2, 7.6), ylim=(0.1, layers + 0.9), aspect="equal")
    axes.axis("off")
    return figure


def matrices() -> Figure:
    """Draw dW_i as a product of three matrices."""
    figure, axes = pyplot.subplots(figsize=(WIDTH, 2.6), layout="constrained")
    out, width, own, pooled = 2.6, 2.6, 0.7, 1.5
    place = 0.0
    block(axes, place, 0, width, out, FROZEN, "$\\Delta W_i$\n(out, in)")
    place += width + 0.3
    axes.text(place, out / 2, "=", ha="center", va="center", fontsize=14)
    place += 0.3
    block(axes, place, 0, own, out, PRIVATE, "$B_i$")
    block(axes, place + own, 0, pooled, out, POOL, "$B_S$")
    place += own + pooled + 0.25
    size, top = own + pooled, out
    edge = axes.spines["left"].get_edgecolor()
    axes.add_patch(Rectangle((place, top - size), size, size, fill=False, edgecolor=edge))
    axes.plot([place, place + size], [top, top - size], color=WEIGHTS, linewidth=4)
    axes.text(place + size * 0.68, top - size * 0.3, "$d_i$", ha="center", va="center")
    place += size + 0.25
    block(axes, place, top - own, width, own, PRIVATE, "$A_i$")
    block(axes, place, top - size, width, pooled, POOL, "$A_S$")
    for row, (color, text) in enumerate(
        (
            (PRIVATE, "the layer's own r - k ranks"),
            (POOL, "the pool of L k ranks, the same in all L layers"),
            (WEIGHTS, "the layer's weight of every rank"),
        )
    ):
        axes.add_patch(Rectangle((0, -0.85 - 0.5 * row), 0.34, 0.34, facecolor=color))
        axes.text(0.55, -0.68 - 0.5 * row, text, va="center")
    axes.set(xlim=(-0.05, place + width + 0.05), ylim=(-2.0, out + 0.05), aspect="equal")
    axes.axis("off")
    return figure


def flow() -> Figure:
    """Draw the steps in weight space and the steps for every token."""
    figure, axes = pyplot.subplots(figsize=(WIDTH, 3.7), layout="constrained")
    for y, left, right in (
        (4.0, ("$A_i, A_S, B_i, B_S, d_i$\nfloat32, trained", PRIVATE), ("x  (M, in)", FROZEN)),
        (
            2.0,
            ("pack: cast, join,\nscale by d, pad", WEIGHTS),
            ("$U = x\\,A_p^T$  (M, R)\nkept for the backward", WEIGHTS),
        ),
        (
            0.0,
            ("$A_p$ (R, in),  $B_p$ (R, out)\nin the dtype of x", PRIVATE),
            ("$y = x\\,W^T + b + U\\,B_p$\n(M, out)", FROZEN),
        ),
    ):
        box(axes, 0.0, y, 4.6, *left)
        box(axes, 5.6, y, 4.6, *right)
    for start, end in (
        ((2.3, 4.0), (2.3, 3.2)),
        ((2.3, 2.0), (2.3, 1.2)),
        ((7.9, 4.0), (7.9, 3.2)),
        ((7.9, 2.0), (7.9, 1.2)),
        ((4.6, 0.8), (5.6, 2.3)),
        ((4.6, 0.5), (5.6, 0.5)),
    ):
        arrow = {"arrowstyle": "->", "linewidth": 1.3, "color": matplotlib.rcParams["text.color"]}
        axes.annotate("", end, start, arrowprops=arrow)
    for x, text in ((2.3, "in weight space"), (7.9, "for every token")):
        axes.text(x, 5.6, text, ha="center", va="center", fontsize=11)
    axes.set(xlim=(-0.1, 10.3), ylim=(-0.1, 5.9))
    axes.axis("off")
    return figure


def known_rank() -> Figure:
    """Plot held-out losses at r = 1, a panel for each task of research/experiments/known_rank."""
    looks = {
        "lora-r1": ("LoRA", FROZEN),
        "diagonal-r1": ("RaSA, k = 0:\nno pool", PRIVATE),
        "rasa-r1-k1": ("RaSA, k = 1", POOL),
    }
    figure, panels = pyplot.subplots(2, 2, figsize=(8.3, 5.8), layout="constrained")
    for axes, (task, losses) in zip(panels.flat, known_rank_losses().items(), strict=True):
        for place, (method, (_, color)) in enumerate(looks.items()):
            axes.plot([place] * len(losses[method]), losses[method], "o", color=color, alpha=0.6)
            mean = statistics.mean(losses[method])
            axes.plot([place - 0.25, place + 0.25], [mean, mean], color=color, linewidth=3)
            axes.text(place + 0.3, mean, f"{mean:.2g}" if mean < 1 else f"{mean:.2f}", va="center")
        axes.set_xticks(range(len(looks)), [label for label, _ in looks.values()])
        axes.set(xlim=(-0.5, 2.75), ylim=(0, None), title=task)
    for row in panels:
        row[0].set_ylabel("held-out loss")
    return figure


def known_rank_losses() -> dict[str, dict[str, list[float]]]:
    """Read ten seeds' losses at the best rate, the only one that all seeds ran, by task, method."""
    path = Path(__file__).parents[1] / "research/experiments/known_rank/results/runs.csv"
    with path.open() as file:
        rows = list(csv.DictReader(file))
    tasks = {
        f"{task}-L{layers}": f"{question}\n{layers} layers, r = 1"
        for layers in (2, 6)
        for task, question in (
            ("permute", "Do values that changed places in half\nof the facts do so in the others?"),
            ("values", "Are new values known\nafter other words than in training?"),
        )
    }
    losses: dict[str, dict[str, list[float]]] = {}
    for task, title in tasks.items():
        runs: dict[tuple[str, str], list[float]] = {}
        for row in rows:
            if row["task"] == task:
                found = runs.setdefault((row["method"], row["lr"]), [])
                found.append(float(row["test_loss"]))
        losses[title] = {method: run for (method, _), run in runs.items() if len(run) == 10}
    return losses


COMPARED = {
    "word problems, 100 steps, k=1": ("maths", "100", "rasa-r8-k1", "lora-r8"),
    "docstrings, 60 steps, k=1": ("docstrings", "60", "rasa-r8-k1", "lora-r8"),
    "docstrings, 600 steps, k=1": ("docstrings", "600", "rasa-r8-k1", "lora-r8"),
    "docstrings, 600 steps, k=8": ("docstrings", "600", "rasa-r8-k8", "lora-r8"),
    "GSM8K, 150 steps, k=1, larger scale": ("gsm8k", "150", "rasa-r8-k1-a60", "lora-r8-a32"),
    "GSM8K, 600 steps, k=1": ("gsm8k", "600", "rasa-r8-k1", "lora-r8"),
    "GSM8K, 600 steps, k=8": ("gsm8k", "600", "rasa-r8-k8", "lora-r8"),
    "GSM8K, 600 steps, r=1, k=1": ("gsm8k", "600", "rasa-r1-k1", "lora-r1"),
    "GSM8K, 600 steps, r=2, k=2": ("gsm8k", "600", "rasa-r2-k2", "lora-r2"),
    "GSM8K, 2,000 steps, k=1": ("gsm8k", "2000", "rasa-r8-k1", "lora-r8"),
}
"""Pairs of methods in research/experiments/compare, by title; r = 8 if it names no other."""
STUDENT = 4.303
"""The 0.975 quantile of Student's t for three differences."""


def differences() -> Figure:
    """Plot RaSA's held-out loss less LoRA's, with the 95 % interval of three paired seeds."""
    figure, axes = pyplot.subplots(figsize=(8.3, 4), layout="constrained")
    for place, (task, steps, *methods) in enumerate(COMPARED.values()):
        ours, theirs = (best_seeds(task, steps, method) for method in methods)
        less = [a["test_loss"] - b["test_loss"] for a, b in zip(ours, theirs, strict=True)]
        reach = STUDENT * statistics.stdev(less) / len(less) ** 0.5
        mean = statistics.mean(less)
        color = PRIVATE if mean + reach < 0 else POOL if mean > reach else FROZEN
        axes.plot([mean - reach, mean + reach], [place, place], color=color, linewidth=2)
        axes.plot(less, [place] * len(less), "o", color=color, alpha=0.6)
    axes.axvline(0, color=FROZEN, linewidth=1)
    axes.set_yticks(range(len(COMPARED)), list(COMPARED))
    axes.invert_yaxis()
    axes.set(xlabel="held-out loss, RaSA less LoRA (left: RaSA is better)")
    return figure


def forgetting() -> Figure:
    """Plot what GSM8K's runs lost on other text against what they learnt, at r = 8."""
    looks = {
        "lora-r8": ("LoRA", FROZEN),
        "rasa-r8-k1": ("RaSA, k = 1", PRIVATE),
        "rasa-r8-k8": ("RaSA, k = 8", POOL),
    }
    figure, panels = pyplot.subplots(1, 2, figsize=(8.3, 3.6), layout="constrained", sharey=True)
    for axes, steps in zip(panels, ("600", "2000"), strict=True):
        for method, (label, color) in looks.items():
            runs = [run for run in compared_runs("gsm8k", steps, method) if run["forgot"] < LOST]
            found = [[run[name] for run in runs] for name in ("test_loss", "forgot")]
            axes.plot(*found, "o", color=color, alpha=0.6, label=label)
        axes.set(title=f"{int(steps):,} steps", xlabel="held-out loss on GSM8K")
        axes.axhline(0, color=FROZEN, linewidth=1)
    panels[0].set_ylabel("loss gained on other text")
    panels[0].legend(frameon=False)
    return figure


LOST = 0.3
"""Runs that lost more, in nats, failed: their rate was too high."""


def compared_runs(task: str, steps: str, method: str) -> list[dict[str, float]]:
    """Return the runs of a method in research/experiments/compare: rate, seed and losses."""
    path = Path(__file__).parents[1] / "research/experiments/compare/results/runs.csv"
    with path.open() as file:
        rows = list(csv.DictReader(file))
    before = {row["task"]: float(row["other_text_loss"]) for row in rows if row["method"] == "base"}
    wanted = {"task": task, "steps": steps, "method": method}.items()
    return [
        {
            **{name: float(row[name]) for name in ("lr", "seed", "dev_loss", "test_loss")},
            "forgot": float(row["other_text_loss"]) - before[task],
        }
        for row in rows
        if wanted <= row.items() and row["test_loss"]
    ]


def best_seeds(task: str, steps: str, method: str) -> list[dict[str, float]]:
    """Return the runs of a method's best rate, which has all three seeds, in their order."""
    runs = compared_runs(task, steps, method)
    rates = {run["lr"] for run in runs}
    found = [sorted((r for r in runs if r["lr"] == lr), key=lambda r: r["seed"]) for lr in rates]
    whole = [runs for runs in found if len(runs) == 3]
    return min(whole, key=lambda runs: sum(run["dev_loss"] for run in runs))


PICTURES = {
    "pool": pool,
    "start": start,
    "matrices": matrices,
    "flow": flow,
    "known_rank": known_rank,
    "differences": differences,
    "forgetting": forgetting,
}


def draw_all() -> dict[str, str]:
    """Return the SVG text of every picture by file name without suffix. Runs are identical."""
    drawn = {}
    for suffix, colors in (("", LIGHT), ("-dark", DARK)):
        edges = {f"{axis}tick.color": colors["axes.edgecolor"] for axis in "xy"}
        style = {**STYLE, **colors, **edges, "axes.facecolor": "none"}
        with matplotlib.rc_context(style):
            for name, draw in PICTURES.items():
                figure, file = draw(), io.StringIO()
                metadata = {"Date": None, "Creator": None}
                figure.savefig(file, format="svg", metadata=metadata, transparent=True)
                pyplot.close(figure)
                lines = file.getvalue().splitlines()
                drawn[name + suffix] = "\n".join(line.rstrip() for line in lines) + "\n"
    return drawn


def square(axes: Axes, x: float, y: float, color: str, alpha: float = 1) -> None:
    """Draw one rank."""
    axes.add_patch(Rectangle((x, y), 0.8, 0.8, facecolor=color, alpha=alpha))


def block(axes: Axes, x: float, y: float, width: float, height: float, color: str, text: str):
    """Draw one matrix."""
    axes.add_patch(Rectangle((x, y), width, height, facecolor=color, alpha=0.75))
    axes.text(x + width / 2, y + height / 2, text, ha="center", va="center")


def box(axes: Axes, x: float, y: float, width: float, text: str, color: str) -> None:
    """Draw one step."""
    axes.add_patch(Rectangle((x, y), width, 1.2, facecolor=color, alpha=0.4))
    axes.text(x + width / 2, y + 0.6, text, ha="center", va="center")
