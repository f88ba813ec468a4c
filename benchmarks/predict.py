"""Predict a training step of a decoder layer's linears on a card that is not available.

    python -m benchmarks.predict [--card H100] [--model llama] [--dropout 0.05] [--markdown]
    python -m benchmarks.predict --cards 4096        # every card and model
    python -m benchmarks.predict --counts 4096       # bytes, launches, products
    python -m benchmarks.predict --write             # renews benchmarks/results/predicted.md
    python -m benchmarks.predict --check-cpu [--seconds 90]

Nothing here is measured. Each variant is a list of products and passes (benchmarks/passes.py) that
run one after the other. Each takes the time of its bytes or of its operations, at a share of the
card's published figures. ``Assumptions`` has the shares and the host's microseconds. A cell is the
time of a variant's step over the time of the frozen linears; ``h`` marks a step that the host holds
up, since Python takes longer than the device. Attention, norms and the rest of a layer are left
out.

``--check-cpu`` compares the lists with this machine: it measures the bandwidth and the rate, and
one decoder layer's variants (like ``benchmarks.block step``). Each row has the error of the
prediction.
"""

from __future__ import annotations

import argparse
import functools
import gc
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks import block, harness, passes, records, roofline
from benchmarks.linears import Case
from benchmarks.shapes import BLOCKS, Block, Linear, decoder

PAGE = Path(__file__).resolve().parent / "results" / "predicted.md"
TOKENS = (512, 1024, 2048, 4096, 8192, 16384)
# Shapes from the models' config.json.
MODELS = {
    "llama-3.1-8b": BLOCKS["llama-3.1-8b"],
    "qwen2.5-7b": decoder("qwen2.5-7b", 28, 3584, 512, 18944),
    "smollm2-135m": BLOCKS["smollm2-135m"],
}
BIASED = {"qwen2.5-7b": ("q_proj", "k_proj", "v_proj")}


@dataclass(frozen=True)
class Card(roofline.Peaks):
    """Published figures: bytes and dense bfloat16 operations per second, bytes of L2 cache."""

    l2: float = 0.0


CARDS = {
    # NVIDIA, H100 Tensor Core GPU datasheet (SXM) and Hopper architecture white paper.
    "H100": Card(3.35e12, 989.4e12, 50e6),
    # NVIDIA, H200 Tensor Core GPU datasheet (SXM): the H100's chip with faster memory.
    "H200": Card(4.8e12, 989.4e12, 50e6),
    # NVIDIA, A100 80GB datasheet (SXM) and Ampere architecture white paper.
    "A100-80G": Card(2.039e12, 312e12, 40e6),
    # NVIDIA, L40S datasheet; the L2 cache of AD102 in the Ada architecture white paper.
    "L40S": Card(0.864e12, 362.05e12, 96e6),
    # NVIDIA, Ada architecture white paper: accumulation in float32.
    "RTX-4090": Card(1.008e12, 165.2e12, 72e6),
}


def card_of(row: dict[str, Any]) -> Card:
    """Return the card on which ``benchmarks.block`` measured the peaks in ``row``.

    Assumed shares are of published figures, which measured copies and products do not reach.
    """
    bandwidth, flops = 1e9 * row["copy_gb_s"], 1e12 * row["gemm_tflop_s"]
    return Card(bandwidth / GPU.stream, flops / GPU.base_rate, 1e6 * row["l2_mb"])


class Assumptions(NamedTuple):
    """Everything that is neither counted nor published. None of it has been measured on a GPU."""

    base_rate: float = 0.70  # share of the rate that products with W reach
    skinny_rate: float = 0.70  # share of the rate of products with one side as wide as the rank
    skinny_read: float = 0.65  # share of the bandwidth, if such a product mostly reads
    skinny_write: float = 0.85  # share of the bandwidth, if it mostly writes
    kernel: float = 0.85  # share of the bandwidth, in the kernels for such products
    kernel_rate: float = 0.45  # share of the rate in these kernels, with mma.sync
    stream: float = 0.90  # share of the bandwidth of passes
    hidden: float = 0.5  # share of the reads of Y and dX that the base's product hides
    l2: float = 0.5  # share of the L2 that can hold a tensor of the previous operation
    launch_us: float = 1.5  # a kernel's time beyond its work: start, and last blocks
    graph_launch_us: float = 1.0  # launch_us within a CUDA graph
    # Host time in microseconds. Python's is from benchmarks.host, without the stubs.
    torch_us: float = 8.0  # an operator of PyTorch with its share of autograd, and its launch
    cublas_us: float = 4.4  # a product of the compiled library
    kernel_us: float = 2.5  # a kernel of the compiled library
    python_us: float = 43.0  # an adapted linear, with its share of packing a group
    fused_us: float = 53.0  # one more linear among fused projections
    graph_us: float = 10.0  # a replay
    graph_node_us: float = 0.1  # each kernel of a replay
    in_line: bool = False  # whether the host does the work itself


GPU = Assumptions()
# A measured rate is reached in full; there are no launches, and an operator costs its dispatch.
CPU = Assumptions(
    base_rate=1.0,
    skinny_read=1.0,
    skinny_write=1.0,
    stream=1.0,
    launch_us=0.0,
    torch_us=5.0,
    cublas_us=5.0,
    kernel_us=5.0,
    in_line=True,
)

VARIANTS = (
    "frozen",
    "official",
    "peft r",
    "peft R",
    "addmm",
    "ours",
    "ours fused",
    "ours fused cublas",
    "ours fused graph",
)


class Prediction(NamedTuple):
    """A step of one decoder layer's linears, forward and backward."""

    device_ms: float
    host_ms: float
    bytes: float
    launches: float
    products: int

    @property
    def ms(self) -> float:
        """The longer of both times: host or device waits for the other."""
        return max(self.device_ms, self.host_ms)


def step(
    model: str, tokens: int, rank: int, card: str | Card, variant: str, dropout: float = 0.0
) -> Prediction:
    """Predict a training step.

    Args:
        model: name in ``MODELS``, or its beginning.
        tokens: M of one micro-batch.
        rank: r of the adapter, with k = max(r // 8, 1). "peft r" has this rank; all others but
            the frozen layer have R = r - k + L*k.
        card: a card, a name in ``CARDS``, or "cpu" for this machine, measured, in float32.
        variant: name in ``VARIANTS``.
        dropout: probability on the adapter's input.

    Raises:
        ValueError: a name is unknown, or a number is out of range.
    """
    layer = find(model)
    if isinstance(card, str) and card not in (*CARDS, "cpu"):
        raise ValueError(f"card: expected one of {', '.join((*CARDS, 'cpu'))}, got {card!r}.")
    if variant not in VARIANTS:
        raise ValueError(f"variant: expected one of {', '.join(VARIANTS)}, got {variant!r}.")
    if tokens < 1 or rank < 1:
        raise ValueError(f"tokens, rank: expected at least 1, got {tokens} and {rank}.")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout: expected a number in [0, 1), got {dropout}.")
    if card == "cpu":
        if variant.endswith(" graph"):
            raise ValueError(f"variant: expected one that runs on a CPU, got {variant!r}.")
        return timed(operations(layer, tokens, rank, variant, dropout, 4), variant, this_cpu(), CPU)
    known = CARDS[card] if isinstance(card, str) else card
    return timed(operations(layer, tokens, rank, variant, dropout), variant, known, GPU)


def find(model: str) -> Block:
    found = [name for name in MODELS if name.startswith(model)]
    if len(found) != 1 or not model:
        raise ValueError(f"model: expected one of {', '.join(MODELS)}, got {model!r}.")
    return MODELS[found[0]]


def operations(
    layer: Block,
    tokens: int,
    rank: int,
    variant: str,
    dropout: float = 0.0,
    itemsize: int = 2,
    layers: int | None = None,
) -> list[list[passes.Op]]:
    """Return what a variant runs, for each X that some linears of the layer read.

    ``layers`` layers are packed at once, by default all of the model; one in a CUDA graph.
    """
    name = variant.removesuffix(" graph").removesuffix(" cublas")
    graph = variant.endswith(" graph")
    of_rank, peft = name == "peft r", name.startswith("peft")
    k = max(rank // 8, 1)
    R = rank if of_rank else layer.effective_rank(rank, k)
    biased = BIASED.get(layer.name, ())
    made = []
    for linears in groups(layer.linears):
        setting = passes.Setting(
            tokens,
            R,
            pooled=0 if peft else R - (rank - k),
            itemsize=itemsize,
            multiple=16 if itemsize == 2 else 8,
            dropout=dropout > 0,
            biased=linears[0].name in biased,
            layers=1 if graph else layers or layer.layers,
            kernels=not variant.endswith(" cublas"),
        )
        alone = name == "ours fused" and len(linears) == 1
        its = "ours" if alone else "peft" if peft else name
        chosen = passes.BY_NAME[its]
        made.append(passes.ops(passes.captured(chosen) if graph else chosen, linears, setting))
    return made


def groups(linears: Iterable[Linear]) -> list[list[Linear]]:
    """Group linears that read one tensor."""
    found: dict[str, list[Linear]] = {}
    for linear in linears:
        found.setdefault(linear.reads, []).append(linear)
    return list(found.values())


def timed(
    made: list[list[passes.Op]], variant: str, card: Card, assumed: Assumptions
) -> Prediction:
    """Predict the time of operations that run one after the other."""
    graph = variant.endswith(" graph")
    flat = [op for group in made for op in group]
    launches = sum(op.launches for op in flat)
    host = 1e-3 * (
        assumed.graph_us + assumed.graph_node_us * launches
        if graph
        else sum(host_us(group, variant, assumed) for group in made)
    )
    each = assumed.graph_launch_us if graph else assumed.launch_us
    device = 1e3 * sum(
        seconds(op, before, card, assumed)
        for group in made
        for before, op in zip([None, *group], group, strict=False)
    )
    device += 1e-3 * each * launches
    if assumed.in_line:
        host += device
    products = sum(op.kind == "product" for op in flat)
    return Prediction(device, host, sum(op.bytes for op in flat), launches, products)


def seconds(op: passes.Op, before: passes.Op | None, card: Card, assumed: Assumptions) -> float:
    """Return one operation's time on the device, without the launch."""
    near = {t.name for t in (*before.reads, *before.writes)} if before else set()

    def far(tensors: Iterable[passes.Tensor]) -> float:
        """Return the bytes that come from memory and not from the L2."""
        return sum(t.bytes for t in tensors if t.name not in near or t.bytes > assumed.l2 * card.l2)

    written = sum(t.bytes for t in op.writes)
    if op.kind in passes.KERNELS:
        memory = (far(op.reads) + written) / (card.bandwidth * assumed.kernel)
        return max(memory, op.flops / (card.flops * assumed.kernel_rate))
    if op.kind != "product":
        return (far(op.reads) + written) / (card.bandwidth * assumed.stream)
    if not op.base:
        read = max(t.bytes for t in op.reads)
        share = assumed.skinny_write if written >= read else assumed.skinny_read
        memory = (far(op.reads) + written) / (card.bandwidth * share)
        return max(memory, op.flops / (card.flops * assumed.skinny_rate))
    added = [t for t in op.reads if t is op.added_to]
    others = [t for t in op.reads if t is not op.added_to]
    stream = card.bandwidth * assumed.stream
    alone = max((far(others) + written) / stream, op.flops / (card.flops * assumed.base_rate))
    return alone + (1 - assumed.hidden) * far(added) / stream


def host_us(group: list[passes.Op], variant: str, assumed: Assumptions) -> float:
    """Return the host time of the linears that read one X."""
    if not variant.startswith("ours"):
        return assumed.torch_us * len(group)
    library = {"product": assumed.cublas_us}
    ours = ("pack", "pack_backward", "dropout", "keep", "add_parts", *passes.KERNELS)
    library |= dict.fromkeys(ours, assumed.kernel_us)
    linears = sum(op.base and op.writes[0].name.startswith("Y") for op in group)
    more = assumed.fused_us if variant.startswith("ours fused") else assumed.python_us
    calls = sum(op.launches * library.get(op.kind, assumed.torch_us) for op in group)
    return calls + assumed.python_us + more * (linears - 1)


@functools.cache
def this_cpu() -> Card:
    """Measure this machine by a float32 copy and product; nothing is assumed to stay in cache."""
    peaks = roofline.measure("cpu", torch.float32)
    return Card(peaks.bandwidth, peaks.flops)


def over_tokens(model: str, card: str, rank: int, dropout: float) -> list[dict[str, object]]:
    """Return one row for each number of tokens."""
    return [{"tokens": tokens, **ratios(model, tokens, rank, card, dropout)} for tokens in TOKENS]


def over_cards(tokens: int, rank: int, dropout: float) -> list[dict[str, object]]:
    """Return one row for each card and model."""
    return [
        {"card": card, "model": model, **ratios(model, tokens, rank, card, dropout)}
        for card in CARDS
        for model in MODELS
    ]


def ratios(model: str, tokens: int, rank: int, card: str, dropout: float) -> dict[str, object]:
    """Return the frozen step's time, and the ratios of the other steps to it."""
    frozen = step(model, tokens, rank, card, "frozen")
    row: dict[str, object] = {"frozen, ms": f"{frozen.ms:.2f}{held(frozen)}"}
    for variant in VARIANTS[1:]:
        found = step(model, tokens, rank, card, variant, dropout)
        row[variant] = f"{found.ms / frozen.ms:.2f}{held(found)}"
    return row


def held(prediction: Prediction) -> str:
    """Return ``h`` if the host takes longer than the device."""
    return " h" if prediction.host_ms > prediction.device_ms else ""


def counts(model: str, card: str, rank: int, tokens: int) -> list[dict[str, object]]:
    """Return one row for each variant, without and with dropout."""
    made = []
    for variant in VARIANTS:
        row: dict[str, object] = {"variant": variant}
        for name, dropout in (("", 0.0), (", dropout", 0.05)):
            found = step(model, tokens, rank, card, variant, dropout)
            row |= {
                f"GB{name}": f"{found.bytes / 1e9:.2f}",
                f"launches{name}": f"{found.launches:.3g}",
                f"products{name}": found.products,
                f"host ms{name}": f"{found.host_ms:.2f}",
            }
        made.append(row)
    return made


# The benchmark's names of variants, and the names here.
CHECKED = {
    "frozen": "frozen",
    "official": "official",
    "peft r=8": "peft r",
    "peft r={R}": "peft R",
    "addmm": "addmm",
    "ours, each alone": "ours",
    "ours": "ours fused",
}
# The names if separate projections are the default: few tokens on a CPU.
ALONE = {"ours": "ours", "ours, fused": "ours fused"}


def check_cpu(budget: float, quick: bool = False) -> list[dict[str, object]]:
    """Measure and predict steps of a decoder layer on this CPU, in float32."""
    layer = BLOCKS["tiny" if quick else "smollm2-135m"]
    cases = [(8, 1, 40)] if quick else [(8, 1, 512), (32, 4, 512), (8, 1, 2048)]
    print(harness.machine())
    made = []
    for rank, k, tokens in cases:
        gc.collect()
        case = Case(layer, tokens, rank, k, torch.float32, "cpu")
        results = records.Results(None, "cpu")
        before = roofline.measure("cpu", torch.float32, quick)
        share = budget * tokens / sum(tokens for _, _, tokens in cases)
        block.step(case, results, before, lambda share=share: share, 2 if quick else 30, "step")
        # The better of before and after, since other programs lower a rate for a moment.
        peaks = before.best(roofline.measure("cpu", torch.float32, quick))
        print(f"{peaks.bandwidth / 1e9:.1f} GB/s, {peaks.flops / 1e9:.0f} GFLOP/s")
        measured = {row["variant"]: row["us"] / 1e3 for row in results.rows if "us" in row}
        predicted = {}
        named = CHECKED
        if "ours, fused" in measured:
            named = {k: v for k, v in CHECKED.items() if "ours" not in k} | ALONE
        for theirs, variant in named.items():
            of_rank = 8 if variant == "peft r" else rank  # r = 8 is measured beside any R
            ops = operations(layer, tokens, of_rank, variant, itemsize=4, layers=1)
            found = timed(ops, variant, Card(peaks.bandwidth, peaks.flops), CPU)
            predicted[theirs.format(R=case.R)] = found.ms
        for name, ms in predicted.items():
            made.append(
                {
                    "tokens": tokens,
                    "R": case.R,
                    "variant": name,
                    "measured": f"{measured[name]:.3g}",
                    "predicted": f"{ms:.3g}",
                    "miss": f"{ms / measured[name] - 1:+.0%}",
                    "measured / frozen": f"{measured[name] / measured['frozen']:.2f}",
                    "predicted / frozen": f"{ms / predicted['frozen']:.2f}",
                }
            )
    return made


def with_tables(page: str) -> str:
    """Return the page with the current table under each command; measured tables stay."""
    pattern = r"(`python -m benchmarks\.predict([^`]*) --markdown`[^|`]*\n\n)((?:\|.*\n)+)"

    def replaced(match: re.Match[str]) -> str:
        given = parser().parse_args(match[2].split())
        return match[0] if given.check_cpu else match[1] + records.table(rows(given)) + "\n"

    return re.sub(pattern, replaced, page)


def rows(given: argparse.Namespace) -> list[dict[str, object]]:
    """Return the table that the arguments ask for."""
    if given.check_cpu:
        harness.pin_allocator()
        return check_cpu(given.seconds, given.quick)
    if given.cards:
        return over_cards(given.cards, given.rank, given.dropout)
    if given.counts:
        return counts(given.model, given.card, given.rank, given.counts)
    return over_tokens(given.model, given.card, given.rank, given.dropout)


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--card", choices=[*CARDS], default="H100")
    made.add_argument("--model", default="llama", help="beginning of a model's name")
    made.add_argument("--rank", type=int, default=8)
    made.add_argument("--dropout", type=float, default=0.0)
    made.add_argument("--cards", type=int, metavar="TOKENS", help="compare every card and model")
    made.add_argument("--counts", type=int, metavar="TOKENS", help="count bytes and launches")
    made.add_argument("--markdown", action="store_true", help="print a markdown table")
    made.add_argument("--write", action="store_true", help="renew tables in benchmarks/results")
    made.add_argument("--check-cpu", action="store_true", help="compare with this machine")
    made.add_argument("--seconds", type=float, default=90, help="time limit of --check-cpu")
    made.add_argument("--quick", action="store_true", help="tiny shapes, to test --check-cpu")
    return made


def main() -> None:
    given = parser().parse_args()
    if given.write:
        PAGE.write_text(with_tables(PAGE.read_text()))
        return
    made = rows(given)
    if given.markdown:
        print(records.table(made))
        return
    for line in (made[0].keys(), *(row.values() for row in made)):
        print(*(f"{cell!s:>18}" for cell in line))


if __name__ == "__main__":
    main()
