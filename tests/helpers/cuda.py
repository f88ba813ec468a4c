"""CUDA graphs and streams, and what stands in for ``torch.cuda``'s on a CPU."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rasa_ext.nn import packs
from rasa_ext.patching import merge


class Captured:
    """``run()`` as a graph. Its results are the graph's own memory."""

    def __init__(self, run: Callable[[], list[Tensor]]) -> None:
        # What a first call allocates for good, such as cuBLAS's workspace, must not be the graph's.
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                run()
        torch.cuda.current_stream().wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.results = run()

    def replay(self) -> list[Tensor]:
        """Copies of a replay's results, where nothing of an earlier run is left.

        Nor does anything of what stood in memory that torch has ready.
        """
        spoil_memory(self.results[0].device)
        with torch.no_grad():
            for result in self.results:
                result.fill_(float("nan"))
        self.graph.replay()
        return [result.detach().clone() for result in self.results]


def spoil_memory(device: torch.device) -> None:
    """Fills free blocks of torch's allocators, pinned ones and the device's, with ones."""
    for size in (64, 512, 4096, 1 << 16):
        pinned = [torch.full((size,), 255, dtype=torch.uint8).pin_memory() for _ in range(32)]
        moved = [part.to(device, non_blocking=True) for part in pinned]
        torch.cuda.synchronize()
        del pinned, moved


def assert_close(
    found: Sequence[Tensor], expected: Sequence[Tensor], dtype: torch.dtype | None = None
) -> None:
    """To a few roundings of ``dtype``, their own unless given.

    What is stale or torn is off by as much as it is large.
    """
    for mine, theirs in zip(found, expected, strict=True):
        rounding = torch.finfo(dtype or theirs.dtype).eps
        tolerance = 32 * rounding * theirs.abs().max().item()
        torch.testing.assert_close(mine, theirs, rtol=0, atol=tolerance)


class Graph(TorchDispatchMode):
    """While it captures it runs and notes every operation; a replay runs them again.

    Results stay where they were, and what Python has worked out in between is as fixed as in a
    CUDA graph.
    """

    capturing = False

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple] = []

    def __enter__(self) -> Graph:
        Graph.capturing = True
        return super().__enter__()

    def __exit__(self, *raised) -> None:
        Graph.capturing = False
        super().__exit__(*raised)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.calls.append((function, args, kwargs or {}, result))
        return result

    @torch.no_grad()
    def replay(self) -> None:
        for function, args, kwargs, result in self.calls:
            again = function(*args, **kwargs)
            for old, new in zip(tree_leaves(result), tree_leaves(again), strict=True):
                if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


class Stream:
    """On a CPU all is in the order in which it is called."""

    def wait_stream(self, other: Stream) -> None: ...


def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """Puts them in the places of ``torch.cuda``'s."""
    current = Stream()
    parts = {
        "CUDAGraph": Graph,
        "Stream": Stream,
        "_sleep": lambda cycles: None,
        "current_stream": lambda: current,
        "graph": lambda graph: graph,
        "is_current_stream_capturing": lambda: Graph.capturing,
        "stream": lambda stream: contextlib.nullcontext(),
        "synchronize": lambda: None,
    }
    for name, part in parts.items():
        monkeypatch.setattr(torch.cuda, name, part)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self)
    # They ask only where there is a CUDA device.
    monkeypatch.setattr(packs, "_is_capturing", lambda device: Graph.capturing)
    monkeypatch.setattr(merge, "_is_capturing", lambda: Graph.capturing)
