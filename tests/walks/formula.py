"""A small network with adapters, and its formula in float64, from the parameters alone."""

import functools
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

BLOCKS = 3
LINEARS = ("q", "k", "v", "o", "up", "down")


class Block(nn.Module):
    """Six linear layers; q, k and v read one input."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(8, 8) for _ in range(4))
        self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        return block(x, *(getattr(self, name) for name in LINEARS))


def block(x: Tensor, q, k, v, o, up, down) -> Tensor:
    """Compute a block from its six linear functions."""
    x = x + o(q(x).tanh() * k(x) + v(x))
    return x + down(up(x).sigmoid())


class Net(nn.Module):
    """Blocks in a row. ``reentrant`` sets how blocks are checkpointed; None: they are not."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(BLOCKS))
        self.reentrant: bool | None = None

    def forward(self, x: Tensor, chosen: Sequence[int] = range(BLOCKS)) -> Tensor:
        for index in chosen:
            run = self.blocks[index]
            if self.reentrant is not None and torch.is_grad_enabled():
                x = checkpoint(run, x, use_reentrant=self.reentrant)
            else:
                x = run(x)
        return x


def network() -> Net:
    torch.manual_seed(0)
    return Net().requires_grad_(False)


@functools.cache
def _wide() -> Net:
    return network().double()


Part = tuple[Tensor, Tensor | None, Tensor, Tensor | None, Tensor]
"""A, A_pool, B, B_pool and d of one adapter of one layer."""


def formula(
    x: Tensor, chosen: Sequence[int], parts: Callable[[int, str], Iterable[Part]]
) -> Tensor:
    """Compute the network in float64, with W + sum of [B | B_pool] diag(d) [A ; A_pool]."""
    base = _wide()

    def linear(index: int, name: str) -> Callable[[Tensor], Tensor]:
        layer = getattr(base.blocks[index], name)
        weight = layer.weight
        for A, A_pool, B, B_pool, d in parts(index, name):
            down = A if A_pool is None else torch.cat([A, A_pool])
            up = B if B_pool is None else torch.cat([B, B_pool], 1)
            weight = weight + (up * d) @ down
        return lambda x: F.linear(x, weight, layer.bias)

    x = x.double()
    for index in chosen:
        x = block(x, *(linear(index, name) for name in LINEARS))
    return x


class Copies:
    """Leaves in float64 for parameters, one for each."""

    def __init__(self) -> None:
        self._of: dict[int, tuple[Tensor, Tensor]] = {}

    def __call__(self, tensor: Tensor | None) -> Tensor | None:
        if tensor is None:
            return None
        if id(tensor) not in self._of:
            leaf = tensor.detach().double().requires_grad_(tensor.requires_grad)
            self._of[id(tensor)] = tensor, leaf
        return self._of[id(tensor)][1]

    def pairs(self) -> Iterable[tuple[Tensor, Tensor]]:
        """Return every parameter with its leaf."""
        return self._of.values()
