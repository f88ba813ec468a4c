"""fit: a model patched with the adapter that comes closest to given weight changes."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from rasa_ext.config import RasaConfig
from rasa_ext.decomposition import Decomposition, Delta, check_delta, decompose
from rasa_ext.export import suffixes
from rasa_ext.modules import linear_shape
from rasa_ext.patch import apply_plan, refuse_patched
from rasa_ext.record import rasa_layers
from rasa_ext.targets import Group, Plan, is_linear, make_plan


def fit(
    model: nn.Module,
    deltas: Mapping[str, Delta],
    rank: int = 8,
    k: int = 1,
    *,
    iterations: int = 50,
    init: str = "svd",
    dtype: torch.dtype = torch.float64,
    tol: float = 0.0,
    progress: Callable[[Group, int, int], None] | None = None,
) -> dict[Group, Decomposition]:
    """Patch a model, in place, with the decomposition of given weight changes.

    The adapted layers are those that ``deltas`` names; each group of them is decomposed by itself.
    The adapter can be trained further, saved, merged and exported like any other.

    Args:
        model: an unpatched model.
        deltas: for every layer to adapt, by its name in ``model.named_modules()``, its weight
            change: (out, in), for Conv1D too, or factors (B, A) of (out, s) and (s, in).
        rank, k, iterations, init, dtype, tol: as in ``decompose``.
        progress: called with (group, iterations done, iterations) after each.

    Returns:
        The decomposition of every group, with its errors beside LoRA's.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came; the model is
            then unchanged.
    """
    config = RasaConfig(rank=rank, k=k)
    _check_deltas(model, deltas)
    config, plan = _plan_for(model, config, deltas)
    found = {
        group: decompose(
            [deltas[name] for name in group.names],
            config.rank,
            config.k,
            iterations=iterations,
            init=init,
            dtype=dtype,
            tol=tol,
            progress=_for_group(progress, group),
        )
        for group in plan.groups
    }
    apply_plan(model, config, plan)
    layers = dict(rasa_layers(model))
    with torch.no_grad():
        for group, result in found.items():
            for i, name in enumerate(group.names):
                layer = layers[name]
                # A rank that the target does not need keeps its fresh A, so that it can be trained.
                needed = result.A[i].any(dim=1, keepdim=True)
                layer.A.copy_(torch.where(needed, result.A[i], layer.A.to(result.A[i])))
                layer.B.copy_(result.B[i])
                layer.d.copy_(result.d[i])
            if layer.pool is not None:
                layer.pool.A.copy_(result.pool_A)
                layer.pool.B.copy_(result.pool_B)
    return found


def _check_deltas(model: nn.Module, deltas: Mapping[str, Delta]) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}.")
    refuse_patched(model)
    if not isinstance(deltas, Mapping):
        raise TypeError(
            "deltas: expected a mapping of module names to weight changes, got "
            f"{type(deltas).__name__}."
        )
    if not deltas:
        raise ValueError("deltas: expected at least one weight change, got none.")
    modules = dict(model.named_modules())
    for name, delta in deltas.items():
        if name not in modules or not is_linear(modules[name]):
            got = type(modules[name]).__name__ if name in modules else "no such module"
            raise ValueError(f"deltas: expected names of linear layers; {name!r} is {got}.")
        factors = check_delta(f"deltas[{name!r}]", delta)
        shape = factors[0].shape[0], factors[-1].shape[1]
        if shape != linear_shape(modules[name]):
            raise ValueError(
                f"deltas[{name!r}]: expected the layer's (out, in) {linear_shape(modules[name])}, "
                f"got {shape}."
            )


def _plan_for(
    model: nn.Module, config: RasaConfig, deltas: Mapping[str, Tensor]
) -> tuple[RasaConfig, Plan]:
    """The config, and its plan, that adapts just the layers of these names."""
    exact = "|".join(re.escape(name) for name in deltas)
    for targets in (tuple(suffixes(list(deltas), model)), exact):
        chosen = RasaConfig(rank=config.rank, k=config.k, target_modules=targets)
        plan = make_plan(model, chosen)
        if {name for group in plan.groups for name in group.names} == set(deltas):
            break
    return chosen, plan


def _for_group(
    progress: Callable[[Group, int, int], None] | None, group: Group
) -> Callable[[int, int], None] | None:
    if progress is None:
        return None
    return lambda done, total: progress(group, done, total)
