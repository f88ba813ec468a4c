"""The memory of one GPU that training takes, computed from shapes: nothing here is measured.

    python -m benchmarks.memory                     # the tables of docs/memory.md
    python -m benchmarks.memory --tokens 8192 --rank 32 --k 4

The methods of ``Model`` are the parts, with their formulas, in bytes.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

from benchmarks.shapes import Block, decoder

BITS = {"16": 2.0, "8": 1.0, "4": 0.5 + 4 / 64}
"""Bytes per weight of a linear layer: bfloat16, bitsandbytes' int8, and its nf4 with a float32
scale for every 64 weights."""
GPU_PADDING = 16  # a pack's rank is a multiple of this


@dataclass(frozen=True)
class Model:
    """A decoder with gated MLPs, adapted by RaSA in all linear layers."""

    block: Block
    vocabulary: int
    tied: bool

    @property
    def hidden(self) -> int:
        return self.block.linears[0].in_features

    def weights(self) -> tuple[int, int]:
        """Return the number of weights in linear layers, and in embedding, head and norms."""
        linears = sum(each.in_features * each.out_features for each in self.block.linears)
        rest = (1 if self.tied else 2) * self.vocabulary * self.hidden
        norms = (2 * self.block.layers + 1) * self.hidden
        return self.block.layers * linears, rest + norms

    def base(self, bits: str) -> float:
        """Return the bytes of the frozen base; embedding, head and norms stay in bfloat16."""
        linears, rest = self.weights()
        return BITS[bits] * linears + 2 * rest

    def _sides(self) -> int:
        """Return in + out, summed over a block's linear layers."""
        return sum(each.in_features + each.out_features for each in self.block.linears)

    def trained(self, rank: int, k: int) -> int:
        """Return the number of the adapter's parameters."""
        own = rank * self._sides() + len(self.block.linears) * self.block.effective_rank(rank, k)
        return self.block.layers * own

    def adapter(self, rank: int, k: int) -> int:
        """Return the bytes of parameters, gradients and two AdamW states, in float32."""
        return 16 * self.trained(rank, k)

    def packs(self, rank: int, k: int) -> int:
        """Return the bytes of the packs in bfloat16, and of their gradients in float32."""
        return (2 + 4) * self.block.layers * self._padded(rank, k) * self._sides()

    def _padded(self, rank: int, k: int) -> int:
        return -(-self.block.effective_rank(rank, k) // GPU_PADDING) * GPU_PADDING

    def block_activations(self, rank: int, k: int) -> int:
        """Return the bytes that one block saves of one token for the backward, in bfloat16.

        Two norms save their input in float32. The linear layers share three inputs: one for q, k
        and v, one for gate and up, and the product of the gated MLP. Each linear layer saves U.
        Attention saves q, k, v and its output, which is the input of o. The gated MLP saves gate,
        its SiLU and up.
        """
        shapes = {each.name: each for each in self.block.linears}
        hidden, inner = self.hidden, shapes["gate_proj"].out_features
        attention = 2 * shapes["q_proj"].out_features + 2 * shapes["k_proj"].out_features
        norms = 2 * (4 + 2) * hidden
        return norms + 2 * attention + 2 * 4 * inner + 2 * 7 * self._padded(rank, k)

    def activations(self, tokens: int, rank: int, k: int, checkpointing: bool) -> int:
        """Return the bytes that all blocks save of the tokens.

        With checkpointing, these are the inputs of all blocks, and everything of one block.
        """
        block = self.block_activations(rank, k)
        if checkpointing:
            return tokens * (2 * self.hidden * self.block.layers + block)
        return tokens * block * self.block.layers

    def logits(self, tokens: int) -> int:
        """Return the bytes of transformers' own loss, in float32.

        These are the log-softmax, its gradient and the gradient of the logits.
        """
        return (4 + 4 + 4) * tokens * self.vocabulary


MODELS = {
    "Llama-3.2-1B": Model(decoder("llama-3.2-1b", 16, 2048, 512, 8192), 128256, tied=True),
    "Llama-3.2-3B": Model(decoder("llama-3.2-3b", 28, 3072, 1024, 8192), 128256, tied=True),
    "Llama-3.1-8B": Model(decoder("llama-3.1-8b", 32, 4096, 1024, 14336), 128256, tied=False),
    "Qwen2.5-14B": Model(decoder("qwen2.5-14b", 48, 5120, 1024, 13824), 152064, tied=False),
    "Qwen2.5-32B": Model(decoder("qwen2.5-32b", 64, 5120, 1024, 27648), 152064, tied=False),
    "Llama-3.1-70B": Model(decoder("llama-3.1-70b", 80, 8192, 1024, 28672), 128256, tied=False),
}


def parts(tokens: int, rank: int, k: int) -> str:
    """Format the parts in GB as a markdown table, with a column for each model."""
    models = MODELS.values()
    rows = {f"base, {bits} bits": [each.base(bits) for each in models] for bits in BITS}
    rows["adapter"] = [each.adapter(rank, k) for each in models]
    rows["packs"] = [each.packs(rank, k) for each in models]
    for name, checkpointing in (("activations", False), ("the same, checkpointed", True)):
        rows[name] = [each.activations(tokens, rank, k, checkpointing) for each in models]
    rows["logits"] = [each.logits(tokens) for each in models]
    lines = [f"| | {' | '.join(MODELS)} |", "| --- " * (1 + len(MODELS)) + "|"]
    for name, row in rows.items():
        lines.append(f"| {name} | " + " | ".join(f"{each / 1e9:.2f}" for each in row) + " |")
    return "\n".join(lines)


def sums(tokens: int, rank: int, k: int) -> str:
    """Format the sums in GB as a markdown table, with a row for each model.

    Columns are the widths of the base, without and with checkpointing.
    """
    head = "16 bits | 8 bits | 4 bits | 16, checkpointed | 8, checkpointed | 4, checkpointed"
    lines = [f"| | {head} |", "| --- " * 7 + "|"]
    for name, model in MODELS.items():
        always = model.adapter(rank, k) + model.packs(rank, k) + model.logits(tokens)
        row = [
            always + model.base(bits) + model.activations(tokens, rank, k, checkpointing)
            for checkpointing in (False, True)
            for bits in BITS
        ]
        lines.append(f"| {name} | " + " | ".join(f"{each / 1e9:.1f}" for each in row) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tokens", type=int, default=2048, help="tokens: rows times length")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--k", type=int, default=1)
    given = parser.parse_args()
    for table in (parts, sums):
        print(table(given.tokens, given.rank, given.k), end="\n\n")


if __name__ == "__main__":
    main()
