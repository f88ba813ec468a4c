"""compress: the RaSA adapter closest to a full fine-tuning or a LoRA."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rasa_ext import RasaConfig
from rasa_ext.checkpoint import (
    PREFIX,
    AdapterState,
    Lora,
    convert_lora,
    read_lora,
    saved_tensors,
)
from rasa_ext.patching import Group, Plan, check_unpatched, make_plan
from rasa_research.solver.decompose import Decomposition
from rasa_research.solver.fit import Solver
from rasa_research.solver.weights import Changes, ParameterWeights, pair, squared_change

CHANGED = "changed"
"""Value of ``modules_to_save`` for every module that changed and is not adapted."""


@dataclasses.dataclass(frozen=True)
class Residual:
    """The change of a parameter that the adapter does not contain."""

    change: float
    """||finetuned - base||."""
    base: float
    """||base||."""


@dataclasses.dataclass(frozen=True)
class CompressedAdapter(AdapterState):
    """An adapter, not yet in a model or a file, and the errors of the approximation.

    Errors are relative, in squared Frobenius norms; see ``Decomposition``.

    Example:
        >>> from rasa_research import solver
        >>> base = {name: t.clone() for name, t in model.state_dict().items()}
        >>> finetuned = {name: t + 0.01 * torch.randn_like(t) for name, t in base.items()}
        >>> found = solver.compress(model, base, finetuned, rank=8, k=1, iterations=2)
        >>> found.error < found.lora_error
        True
        >>> found.save(model, "adapter")
        >>> model = rasa_ext.load_adapter(model, "adapter")
    """

    groups: dict[Group, Decomposition] = dataclasses.field(default_factory=dict)
    """The decomposition of every group."""
    lost: dict[str, Residual] = dataclasses.field(default_factory=dict)
    """Parameters that changed outside the adapted layers and ``modules_to_save``."""

    @property
    def error(self) -> float:
        """sum ||M - M^||^2 / sum ||M||^2 over the adapted layers; 0 for zero changes."""
        return self._total(lambda result: result.errors[-1])

    @property
    def lora_error(self) -> float:
        """``error`` of the best LoRA of equal rank."""
        return self._total(lambda result: result.lora_error)

    @property
    def lora_error_equal(self) -> float:
        """``error`` of the best LoRA with equally many parameters; see ``Decomposition``."""
        return self._total(lambda result: result.lora_error_equal)

    @property
    def num_parameters(self) -> int:
        """Number of trainable parameters of the adapter, without ``modules_to_save``."""
        return sum(t.numel() for key, t in self.tensors.items() if ".rasa_" in key)

    @property
    def lora_num_parameters(self) -> int:
        """Number of trainable parameters of a LoRA of equal rank on the adapted layers."""
        return sum(self.config.rank * len(g.names) * sum(g.shape) for g in self.plan.groups)

    @property
    def residual_share(self) -> float:
        """Share of ``lost`` in the squared change of ``lost`` and the adapted layers."""
        lost = sum(each.change**2 for each in self.lost.values())
        total = lost + sum(result.norm**2 for result in self.groups.values())
        return lost / total if total else 0.0

    def _total(self, error: Callable[[Decomposition], float]) -> float:
        total = sum(result.norm**2 for result in self.groups.values())
        found = sum(error(result) * result.norm**2 for result in self.groups.values())
        return found / total if total else 0.0


@torch.no_grad()
def compress(
    model: nn.Module,
    base: Mapping[str, Tensor],
    finetuned: Mapping[str, Tensor],
    rank: int = 8,
    k: int | None = 1,
    *,
    target_modules: str | Sequence[str] = "all-linear",
    exclude_modules: str | Sequence[str] = (),
    modules_to_save: str | Sequence[str] = (),
    groups: Any = (),
    iterations: int = 50,
    init: str = "svd",
    dtype: torch.dtype = torch.float64,
    tol: float = 0.0,
    progress: Callable[[Group, int, int], None] | None = None,
) -> CompressedAdapter:
    """Find the RaSA adapter closest to a full fine-tuning, without loading either model.

    ``decompose`` approximates each group of layers (arXiv 2503.12576, section 3 and appendix A).
    Weights are read when needed, so only one group's weights are in memory at a time.

    Args:
        model: an unpatched model of this kind, for names and shapes; it may be on the meta device,
            and is not changed.
        base, finetuned: the weights before and after, under the names of ``model``'s parameters:
            a ``state_dict()``, or ``SafetensorsFolder(directory)``.
        rank, k, target_modules, exclude_modules, modules_to_save, groups: as in ``patch_model``.
            The adapter stores the modules in ``modules_to_save`` in full, with the values of
            ``finetuned``; "changed" selects every module that changed and is not adapted.
        iterations, init, dtype, tol: as in ``decompose``.
        progress: called with (group, iterations done, iterations) after each iteration.

    Returns:
        The adapter, the errors of it and of LoRA, and the parameters that changed but are in
        neither the adapted layers nor ``modules_to_save``.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what was given.

    Example:
        >>> from rasa_research import solver
        >>> model.save_pretrained("base")
        >>> base = solver.SafetensorsFolder("base")
        >>> finetuned = {name: t + 0.01 * torch.randn_like(t) for name, t in base.items()}
        >>> found = solver.compress(
        ...     model, base, finetuned, rank=8, k=1, modules_to_save="changed", iterations=2
        ... )
        >>> 0 < found.error < found.lora_error < 1
        True
        >>> model = found.install(model)
    """
    check_unpatched(model)
    saved = () if modules_to_save == CHANGED else modules_to_save
    config = RasaConfig(
        rank=rank,
        k=k,
        target_modules=target_modules,
        exclude_modules=exclude_modules,
        modules_to_save=saved,
        groups=groups,
    )
    plan = make_plan(model, config)
    before = ParameterWeights(model, base, "base")
    after = ParameterWeights(model, finetuned, "finetuned")
    lost = _lost(before, after, _carried(model, plan, after))
    if modules_to_save == CHANGED:
        config = dataclasses.replace(config, modules_to_save=_owners(lost, plan))
        plan = make_plan(model, config)
        carried = _carried(model, plan, after)
        lost = {name: each for name, each in lost.items() if name not in carried}
    linears = {name: model.get_submodule(name) for g in plan.groups for name in g.names}
    solver = Solver(iterations=iterations, init=init, dtype=dtype, tol=tol, progress=progress)
    found, tensors = solver.approximate(plan, Changes(linears, before, after, dtype))
    names = saved_tensors(model, plan)
    tensors.update((f"{PREFIX}{name}", after.value(name)) for name in names)
    return CompressedAdapter(plan, tensors, found, lost)


def compress_lora(
    model: nn.Module,
    directory: str | os.PathLike[str],
    rank: int = 8,
    k: int = 1,
    *,
    iterations: int = 50,
    init: str = "svd",
    dtype: torch.dtype = torch.float64,
    tol: float = 0.0,
    progress: Callable[[Group, int, int], None] | None = None,
) -> CompressedAdapter:
    """Find the RaSA adapter closest to a LoRA, with fewer parameters.

    ``decompose`` approximates each group of layers from the LoRA's factors, without forming an
    (out, in) matrix. The adapter also gets the LoRA's dropout, modules trained in full, and trained
    rows of embeddings. ``rasa_ext.import_lora`` converts a LoRA exactly instead.

    Args:
        model: an unpatched model of this kind, for names and shapes; it may be on the meta device,
            and is not changed.
        directory: a directory that PEFT's ``save_pretrained`` wrote.
        rank, k: rank and pooled ranks of the adapter, 0 <= k <= rank.
        iterations, init, dtype, tol: as in ``decompose``.
        progress: called with (group, iterations done, iterations) after each iteration.

    Returns:
        The adapter, with the errors of it and of LoRA.

    Raises:
        FileNotFoundError, ValueError, TypeError: a file is missing or damaged, does not fit the
            model, or is not a plain LoRA; the message says what to do.

    Example:
        >>> from rasa_research import solver
        >>> import copy
        >>> rasa_ext.export_lora(rasa_ext.patch_model(copy.deepcopy(model), rank=8, k=1), "lora")
        9
        >>> found = solver.compress_lora(model, "lora", rank=4, k=1, iterations=2)
        >>> model = found.install(model)
    """
    way = Solver(iterations=iterations, init=init, dtype=dtype, tol=tol, progress=progress)
    return nearest_to(model, read_lora(directory), str(directory), rank, k, way)


@torch.no_grad()
def nearest_to(
    model: nn.Module, lora: Lora, where: str, rank: int, k: int, solver: Solver
) -> CompressedAdapter:
    """Do ``compress_lora`` for a LoRA in memory; error messages begin with ``where``."""
    exact = convert_lora(model, lora, where)
    plan = dataclasses.replace(exact.plan, config=dataclasses.replace(exact.config, rank=rank, k=k))
    scaled = {name: (lora.scales[name] * B, A) for name, (B, A) in lora.factors.items()}
    groups, tensors = solver.approximate(plan, scaled)
    tensors.update((key, t) for key, t in exact.tensors.items() if ".rasa_" not in key)
    return CompressedAdapter(plan, tensors, groups)


def _carried(model: nn.Module, plan: Plan, weights: ParameterWeights) -> set[str]:
    """Return the parameters that an adapter of this plan changes or stores, by first name."""
    adapted = [f"{name}.weight" for group in plan.groups for name in group.names]
    return {weights.first(name) for name in (*adapted, *saved_tensors(model, plan))}


def _owners(lost: Mapping[str, Residual], plan: Plan) -> tuple[str, ...]:
    """Return the modules with these parameters, except adapted layers, whose bias is not saved."""
    adapted = {name for group in plan.groups for name in group.names}
    owners = dict.fromkeys(name.rpartition(".")[0] for name in lost)
    return tuple(name for name in owners if name and name not in adapted)


def _lost(
    before: Mapping[str, Tensor], after: Mapping[str, Tensor], carried: set[str]
) -> dict[str, Residual]:
    lost = {}
    for name in before:
        if name not in carried:
            change, base = squared_change(*pair(name, before, after))
            if change:
                lost[name] = Residual(change**0.5, base**0.5)
    return lost
