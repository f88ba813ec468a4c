"""The measured shapes: a decoder layer's linears, numbers of tokens, ranks."""

from __future__ import annotations

from dataclasses import dataclass

TOKENS = (1, 16, 512, 2048, 4096, 8192)
# rank and k by the rule k = rank / 8; with 32 layers R = 39, 78, 156.
RANKS = ((8, 1), (16, 2), (32, 4))


@dataclass(frozen=True)
class Linear:
    """One linear layer; linears of a block with the same ``reads`` take the same tensor."""

    name: str
    in_features: int
    out_features: int
    reads: str


@dataclass(frozen=True)
class Block:
    """The linears of one decoder layer, in a model with ``layers`` such layers."""

    name: str
    layers: int
    linears: tuple[Linear, ...]

    def effective_rank(self, rank: int, k: int) -> int:
        """Return R = r - k + L*k."""
        return rank - k + self.layers * k


def decoder(name: str, layers: int, hidden: int, kv: int, inner: int) -> Block:
    """Return a block with grouped-query attention, keys and values ``kv`` wide, and a gated MLP."""
    return Block(
        name,
        layers,
        (
            Linear("q_proj", hidden, hidden, "hidden"),
            Linear("k_proj", hidden, kv, "hidden"),
            Linear("v_proj", hidden, kv, "hidden"),
            Linear("o_proj", hidden, hidden, "attention"),
            Linear("gate_proj", hidden, inner, "normed"),
            Linear("up_proj", hidden, inner, "normed"),
            Linear("down_proj", inner, hidden, "gated"),
        ),
    )


def single(in_features: int, out_features: int, layers: int) -> Block:
    """Return a block of one linear, in a model with ``layers`` such linears."""
    linear = Linear("proj", in_features, out_features, "x")
    return Block(f"{in_features}x{out_features}, L={layers}", layers, (linear,))


BLOCKS = {
    block.name: block
    for block in (
        decoder("llama-3.1-8b", 32, 4096, 1024, 14336),
        decoder("smollm2-135m", 30, 576, 192, 1536),
        decoder("tiny", 4, 32, 16, 48),
    )
}


def default_blocks(device: str, quick: bool) -> list[str]:
    """Return the blocks to measure; a CPU skips layers that take seconds per step."""
    if quick:
        return ["tiny"]
    return ["llama-3.1-8b", "smollm2-135m"] if device.startswith("cuda") else ["smollm2-135m"]
