"""fit_adapter: patch a model with the adapter closest to given weight changes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast, overload

import torch
from torch import Tensor, nn

from rasa_ext import RasaConfig
from rasa_ext.checkpoint import AdapterState, own_key, pool_key
from rasa_ext.methods import LayerSpec, fresh_A
from rasa_ext.patching import Group, Plan, plan_layers
from rasa_research.solver.decompose import Decomposition, Delta, check_delta, decompose


def fit_adapter(
    model: nn.Module,
    deltas: Mapping[str, Delta],
    rank: int = 8,
    k: int | None = 1,
    *,
    groups: Any = (),
    iterations: int = 50,
    init: str = "svd",
    dtype: torch.dtype = torch.float64,
    tol: float = 0.0,
    progress: Callable[[Group, int, int], None] | None = None,
) -> dict[Group, Decomposition]:
    """Patch a model, in place, with the decomposition of given weight changes.

    Only the layers in ``deltas`` are adapted. ``decompose`` decomposes each group separately (arXiv
    2503.12576, section 3 and appendix A). The adapter can be trained further, saved, merged and
    exported like any other.

    Args:
        model: an unpatched model.
        deltas: weight changes by layer name in ``model.named_modules()``: (out, in), for Conv1D
            too, or factors (B, A) of (out, s) and (s, in).
        rank, k, iterations, init, dtype, tol: as in ``decompose``.
        groups: as in ``patch_model``.
        progress: called with (group, iterations done, iterations) after each iteration.

    Returns:
        The decomposition of every group, with the errors of it and of LoRA.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what was given; the model
            is then unchanged.

    Example:
        >>> from rasa_research import solver
        >>> names = [f"model.layers.{i}.mlp.down_proj" for i in range(2)]
        >>> deltas = {name: torch.randn(32, 48) for name in names}
        >>> found = solver.fit_adapter(model, deltas, rank=8, k=1, iterations=5)
        >>> [group.pattern for group in found]
        ['model.layers.*.mlp.down_proj']
        >>> change = dict(rasa_ext.delta_weights(model))[names[0]]  # (out, in)
        >>> change.shape
        torch.Size([32, 48])
    """
    config = RasaConfig(rank=rank, k=k, groups=groups)
    plan = plan_layers(model, config, _shapes(model, deltas), "deltas")
    solver = Solver(iterations=iterations, init=init, dtype=dtype, tol=tol, progress=progress)
    found, tensors = solver.approximate(plan, deltas)
    AdapterState(plan, tensors).install(model)
    return found


@dataclasses.dataclass(frozen=True)
class Solver:
    """Options of ``decompose`` for every group of a plan."""

    iterations: int = 50
    init: str = "svd"
    dtype: torch.dtype = torch.float64
    tol: float = 0.0
    progress: Callable[[Group, int, int], None] | None = None

    def approximate(
        self, plan: Plan, deltas: Mapping[str, Delta]
    ) -> tuple[dict[Group, Decomposition], dict[str, Tensor]]:
        """Return every group's decomposition, and all factors by key in an adapter file.

        If ``deltas`` computes values on access, only one group's changes are in memory at a time.
        """
        config = cast(RasaConfig, plan.config)
        found: dict[Group, Decomposition] = {}
        tensors: dict[str, Tensor] = {}
        for group in plan.groups:
            found[group] = decompose(
                _InOrder(deltas, group.names),
                config.rank,
                config.k,
                iterations=self.iterations,
                init=self.init,
                dtype=self.dtype,
                tol=self.tol,
                progress=_for_group(self.progress, group),
            )
            tensors.update(group_tensors(group, found[group], config.adapter_dtype))
        return found, tensors


class _InOrder(Sequence[Delta]):
    """The values of some keys, read from a mapping on every access."""

    def __init__(self, values: Mapping[str, Delta], keys: Sequence[str]) -> None:
        self._values, self._keys = values, keys

    @overload
    def __getitem__(self, i: int) -> Delta: ...

    @overload
    def __getitem__(self, i: slice) -> Sequence[Delta]: ...

    def __getitem__(self, i: int | slice) -> Delta | Sequence[Delta]:
        if isinstance(i, slice):
            return _InOrder(self._values, self._keys[i])
        return self._values[self._keys[i]]

    def __len__(self) -> int:
        return len(self._keys)


def group_tensors(group: Group, result: Decomposition, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return one group's factors in ``dtype``, by key in an adapter file.

    If the target does not need a rank, both factors are zero. Such a rank gets a fresh A, like in a
    new adapter, so that it can be trained.
    """
    tensors: dict[str, Tensor] = {}
    if result.pool_A.shape[0]:
        tensors[pool_key(group.names[0], "A")] = result.pool_A
        tensors[pool_key(group.names[0], "B")] = result.pool_B
    for i, name in enumerate(group.names):
        A = result.A[i]
        fresh = fresh_A(A.shape[0], LayerSpec(i, len(group.names), *group.shape, A.device), A.dtype)
        tensors[own_key(name, "A")] = torch.where(A.any(1, keepdim=True), A, fresh.detach())
        tensors[own_key(name, "B")] = result.B[i]
        tensors[own_key(name, "d")] = result.d[i]
    return {key: tensor.to(dtype) for key, tensor in tensors.items()}


def _shapes(model: nn.Module, deltas: Mapping[str, Delta]) -> dict[str, tuple[int, int]]:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}.")
    if not isinstance(deltas, Mapping):
        raise TypeError(
            "deltas: expected a mapping of module names to weight changes, got "
            f"{type(deltas).__name__}."
        )
    if not deltas:
        raise ValueError("deltas: expected at least one weight change, got none.")
    shapes = {}
    for name, delta in deltas.items():
        factors = check_delta(f"deltas[{name!r}]", delta)
        shapes[name] = factors[0].shape[0], factors[-1].shape[1]
    return shapes


def _for_group(
    progress: Callable[[Group, int, int], None] | None, group: Group
) -> Callable[[int, int], None] | None:
    if progress is None:
        return None
    return lambda done, total: progress(group, done, total)
