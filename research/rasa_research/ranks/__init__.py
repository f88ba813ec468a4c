"""Rank planning before training, from the dimension of a model's hidden states (GeLoRA)."""

from rasa_research.ranks.hidden_states import POOLINGS, Pooling
from rasa_research.ranks.intrinsic import (
    block_ranks,
    find_blocks,
    hidden_dimensions,
    intrinsic_ranks,
    rank_pattern,
    twonn,
)

__all__ = [
    "POOLINGS",
    "Pooling",
    "block_ranks",
    "find_blocks",
    "hidden_dimensions",
    "intrinsic_ranks",
    "rank_pattern",
    "twonn",
]
