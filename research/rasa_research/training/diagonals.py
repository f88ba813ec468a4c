"""Tasks as diagonals: tasks share A, B and the pools, and each task has one d per layer."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from rasa_ext import RasaConfig
from rasa_ext.patching import check_unmerged, owners
from rasa_ext.training import adapter_of


def train_diagonals(model: nn.Module) -> nn.Module:
    """Freeze A, B and the pools, so that only the layers' diagonals d are trained from now on.

    A new task then costs R parameters per layer: ``diagonals`` returns them, and ``load_diagonals``
    loads them. The directions remain from earlier training. Not in any paper.

    Args:
        model: patched with ``RasaConfig``, ``GatedRasaConfig`` or ``SoraConfig``, and trained.

    Returns:
        The same object. Make a new optimizer, of ``adapter_parameters`` that require a gradient.

    Raises:
        TypeError, ValueError: the model is no module, not patched, or has a method without d.

    Example:
        >>> from rasa_research.training import train_diagonals
        >>> model = train_diagonals(rasa_ext.patch_model(model, rank=8, k=1))
        >>> trained = [name for name, p in model.named_parameters() if p.requires_grad]
        >>> {name.rpartition(".")[2] for name in trained}
        {'d'}
    """
    adapter_of(model, RasaConfig)
    for _, layer in owners(model):
        tensors = {
            **layer.own_tensors(),
            **{f"pool {k}": t for k, t in layer.pool_tensors().items()},
        }
        for name, tensor in tensors.items():
            if isinstance(tensor, nn.Parameter):
                tensor.requires_grad_(name == "d")
    return model


def diagonals(model: nn.Module) -> dict[str, Tensor]:
    """Return a copy of every layer's diagonal d (R,), by the layer's name.

    Args:
        model: patched with ``RasaConfig``, ``GatedRasaConfig`` or ``SoraConfig``.

    Returns:
        Tensors by name, which safetensors and ``torch.save`` can store; (E, R) for stacked experts.

    Raises:
        TypeError, ValueError: the model is no module, not patched, or has a method without d.

    Example:
        >>> from rasa_research.training import diagonals
        >>> model = rasa_ext.patch_model(model, rank=8, k=1)
        >>> task = diagonals(model)
        >>> task["model.layers.0.self_attn.q_proj"].shape  # 7 ranks of its own, 2 of the pool
        torch.Size([9])
    """
    adapter_of(model, RasaConfig)
    return {name: layer.d.detach().clone() for name, layer in owners(model)}


@torch.no_grad()
def load_diagonals(model: nn.Module, task: Mapping[str, Tensor]) -> nn.Module:
    """Load a task's diagonals into a model that has the directions the task was trained with.

    Args:
        model: patched with ``RasaConfig``, ``GatedRasaConfig`` or ``SoraConfig``.
        task: result of ``diagonals``: a d (R,) for every adapted layer, (E, R) for stacked experts.

    Returns:
        The same object.

    Raises:
        TypeError, ValueError: the model is no module, not patched, or ``task`` does not fit it; the
            model is then unchanged.
        RuntimeError: the adapter is merged.

    Example:
        >>> from rasa_research.training import diagonals, load_diagonals
        >>> model = rasa_ext.patch_model(model, rank=8, k=1)
        >>> first = diagonals(model)
        >>> model = load_diagonals(model, first)
    """
    adapter_of(model, RasaConfig)
    check_unmerged(model)
    layers = dict(owners(model))
    if not isinstance(task, Mapping):
        raise TypeError(f"task: expected a mapping of layer names, got {type(task).__name__}.")
    if differ := sorted(task.keys() ^ layers.keys()):
        raise ValueError(
            f"task: expected a diagonal for each of {len(layers)} adapted layers and no other, but "
            f"{differ[0]!r} is only in the task or only in the model."
        )
    for name, layer in layers.items():
        if not isinstance(task[name], Tensor):
            raise TypeError(
                f"task: expected a tensor for {name!r}, got {type(task[name]).__name__}."
            )
        if task[name].shape != layer.d.shape:
            raise ValueError(
                f"task: expected a diagonal of shape {tuple(layer.d.shape)} for {name!r}, got "
                f"{tuple(task[name].shape)}; load it into a model with the A and B that it was "
                "trained with."
            )
    for name, layer in layers.items():
        layer.d.copy_(task[name])
    return model
