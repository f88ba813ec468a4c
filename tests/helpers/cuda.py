"""CUDA graphs and streams, and stand-ins for them on a CPU."""

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
    """``run()`` captured as a CUDA graph; ``results`` are in the graph's memory."""

    def __init__(self, run: Callable[[], list[Tensor]]) -> None:
        # Warm up first, so that lasting allocations such as cuBLAS's workspace are not the graph's.
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
        """Replay and return copies of the results.

        Results of earlier runs and torch's free memory are overwritten first, so that stale values
        show.
        """
        spoil_memory(self.results[0].device)
        with torch.no_grad():
            for result in self.results:
                result.fill_(float("nan"))
        self.graph.replay()
        return [result.detach().clone() for result in self.results]


def spoil_memory(device: torch.device) -> None:
    """Fill free blocks of torch's pinned and device allocators with 0xFF bytes."""
    for size in (64, 512, 4096, 1 << 16):
        pinned = [torch.full((size,), 255, dtype=torch.uint8).pin_memory() for _ in range(32)]
        moved = [part.to(device, non_blocking=True) for part in pinned]
        torch.cuda.synchronize()
        del pinned, moved


def assert_close(
    found: Sequence[Tensor], expected: Sequence[Tensor], dtype: torch.dtype | None = None
) -> None:
    """Assert equality within a few roundings of ``dtype``, by default the tensors' own.

    Stale or half-written values have much larger errors.
    """
    for mine, theirs in zip(found, expected, strict=True):
        rounding = torch.finfo(dtype or theirs.dtype).eps
        tolerance = 32 * rounding * theirs.abs().max().item()
        torch.testing.assert_close(mine, theirs, rtol=0, atol=tolerance)


class Graph(TorchDispatchMode):
    """A stand-in for a CUDA graph: a capture runs and records operations, a replay repeats them.

    As in a CUDA graph, results stay in the same memory, and values that Python computed during the
    capture are fixed.
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
    """A stand-in for a stream: on a CPU, operations run in the order of the calls."""

    def wait_stream(self, other: Stream) -> None: ...


def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace ``torch.cuda``'s graphs and streams by the stand-ins."""
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
    # Without a CUDA device, the package's own functions would not call torch.cuda.
    monkeypatch.setattr(packs, "_is_capturing", lambda device: Graph.capturing)
    monkeypatch.setattr(merge, "_is_capturing", lambda: Graph.capturing)
