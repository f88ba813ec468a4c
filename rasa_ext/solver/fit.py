"""fit_adapter: a model patched with the adapter that comes closest to given weight changes."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import overload

import torch
from torch import Tensor, nn

from rasa_ext.base_layers.linear import is_linear, linear_shape
from rasa_ext.checkpoint.adapter import adapter_tensors, own_key, pool_key
from rasa_ext.config import RasaConfig
from rasa_ext.methods.base import GivenGroups, Place, fresh_A
from rasa_ext.patching.grouping import Group
from rasa_ext.patching.patch import apply_plan, check_unpatched
from rasa_ext.patching.targets import Plan, make_plan, suffixes
from rasa_ext.solver.decompose import Decomposition, Delta, check_delta, decompose


def fit_adapter(
    model: nn.Module,
    deltas: Mapping[str, Delta],
    rank: int = 8,
    k: int | None = 1,
    *,
    groups: GivenGroups = (),
    iterations: int = 50,
    init: str = "svd",
    dtype: torch.dtype = torch.float64,
    tol: float = 0.0,
    progress: Callable[[Group, int, int], None] | None = None,
) -> dict[Group, Decomposition]:
    """Patch a model, in place, with the decomposition of given weight changes.

    The adapted layers are those that ``deltas`` names; each group of them is decomposed by itself,
    by ``decompose`` (arXiv 2503.12576, section 3 and appendix A). The adapter can be trained
    further, saved, merged and exported like any other.

    Args:
        model: an unpatched model.
        deltas: for every layer to adapt, by its name in ``model.named_modules()``, its weight
            change: (out, in), for Conv1D too, or factors (B, A) of (out, s) and (s, in).
        rank, k, iterations, init, dtype, tol: as in ``decompose``.
        groups: as in ``patch_model``.
        progress: called with (group, iterations done, iterations) after each.

    Returns:
        The decomposition of every group, with its errors beside LoRA's.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came; the model is
            then unchanged.

    Example:
        >>> names = [f"model.layers.{i}.mlp.down_proj" for i in range(2)]
        >>> deltas = {name: torch.randn(32, 48) for name in names}
        >>> found = rasa_ext.fit_adapter(model, deltas, rank=8, k=1, iterations=5)
        >>> [group.pattern for group in found]
        ['model.layers.*.mlp.down_proj']
        >>> change = rasa_ext.delta_weight(model.get_submodule(names[0]))  # (out, in)
        >>> change.shape
        torch.Size([32, 48])
    """
    config = RasaConfig(rank=rank, k=k, groups=groups)
    _check_deltas(model, deltas)
    config, plan = plan_for(model, config, deltas)
    solver = Solver(iterations=iterations, init=init, dtype=dtype, tol=tol, progress=progress)
    found, tensors = solver.approximate(config, plan, deltas)
    apply_plan(model, config, plan)
    with torch.no_grad():
        for key, tensor in adapter_tensors(model).items():
            tensor.copy_(tensors[key])
    return found


@dataclasses.dataclass(frozen=True)
class Solver:
    """How ``decompose`` is to run, for each group of a plan."""

    iterations: int = 50
    init: str = "svd"
    dtype: torch.dtype = torch.float64
    tol: float = 0.0
    progress: Callable[[Group, int, int], None] | None = None

    def approximate(
        self, config: RasaConfig, plan: Plan, deltas: Mapping[str, Delta]
    ) -> tuple[dict[Group, Decomposition], dict[str, Tensor]]:
        """Every group's decomposition, and all factors under the names of an adapter's file.

        The weight changes of one group are held at a time, if ``deltas`` makes them when asked.
        """
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
    """The values of some keys, none of them held here."""

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
    """One group's factors under the names of an adapter's file, in ``dtype``.

    A rank that the target does not need has zeros for both factors; it gets a fresh A, as a new
    adapter has, so that it can be trained.
    """
    tensors: dict[str, Tensor] = {}
    if result.pool_A.shape[0]:
        tensors[pool_key(group.names[0], "A")] = result.pool_A
        tensors[pool_key(group.names[0], "B")] = result.pool_B
    for i, name in enumerate(group.names):
        A = result.A[i]
        fresh = fresh_A(A.shape[0], Place(i, len(group.names), *group.shape, A.device), A.dtype)
        tensors[own_key(name, "A")] = torch.where(A.any(1, keepdim=True), A, fresh.detach())
        tensors[own_key(name, "B")] = result.B[i]
        tensors[own_key(name, "d")] = result.d[i]
    return {key: tensor.to(dtype) for key, tensor in tensors.items()}


def _check_deltas(model: nn.Module, deltas: Mapping[str, Delta]) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}.")
    check_unpatched(model)
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
    check_names(model, shapes, "deltas")


def check_names(model: nn.Module, shapes: Mapping[str, tuple[int, int]], where: str) -> None:
    """ValueError, beginning with ``where``, unless all are linear layers of these (out, in)."""
    modules = dict(model.named_modules())
    for name, shape in shapes.items():
        module = modules.get(name)
        if module is None or not is_linear(module):
            got = "no such module" if module is None else type(module).__name__
            raise ValueError(f"{where}: expected names of linear layers; {name!r} is {got}.")
        if shape != linear_shape(module):
            raise ValueError(
                f"{where}: expected {name!r} of the layer's (out, in) {linear_shape(module)}, "
                f"got {shape}."
            )


def plan_for(model: nn.Module, config: RasaConfig, names: Iterable[str]) -> tuple[RasaConfig, Plan]:
    """``config``, its targets replaced, and its plan, such that just these layers are adapted."""
    names = list(names)
    exact = "|".join(re.escape(name) for name in names)
    for targets in (tuple(suffixes(names, model)), exact):
        chosen = dataclasses.replace(config, target_modules=targets)
        plan = make_plan(model, chosen)
        if {name for group in plan.groups for name in group.names} == set(names):
            break
    return chosen, plan


def _for_group(
    progress: Callable[[Group, int, int], None] | None, group: Group
) -> Callable[[int, int], None] | None:
    if progress is None:
        return None
    return lambda done, total: progress(group, done, total)
