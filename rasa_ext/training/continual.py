"""Tasks one after the other over an SD-LoRA (arXiv 2501.13198)."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn

from rasa_ext.distributed import check_unwrapped, follow
from rasa_ext.methods.base import checked_choice, checked_number, fresh_A, fresh_B
from rasa_ext.methods.sd_lora import SdLoraConfig, direction_norm
from rasa_ext.nn.rasa import RasaLinear
from rasa_ext.patching.state import adapted_layers, check_unmerged, patch_state

OFFICIAL_START = 0.8
"""The magnitudes with which the official code begins every task."""


@torch.no_grad()
def next_task(model: nn.Module, start: str = "continuous") -> nn.Module:
    """Begin a task: the present pair joins the former ones, and a fresh one is trained.

    The magnitude of the pair goes on, so that the outputs stay what they were; with
    ``norm="product"``, by which the present pair is not divided, they jump.

    Args:
        model: patched with ``SdLoraConfig``.
        start: "continuous" leaves the magnitudes of former tasks as they were learned, and begins
            with alpha / r; "official" sets all to 0.8, as the official code does.

    Returns:
        The same object. Parameters are new ones: make a new optimizer, and wrap the model in
        DistributedDataParallel anew.

    Raises:
        TypeError, ValueError: the model is not patched with ``SdLoraConfig``, or is wrapped in
            DistributedDataParallel; ``start`` is unknown.
        RuntimeError: the adapter is merged.

    Example:
        >>> from rasa_ext.methods import SdLoraConfig
        >>> model = rasa_ext.patch_model(model, config=SdLoraConfig(rank=4))
        >>> model = rasa_ext.training.next_task(model)
        >>> optimizer = torch.optim.AdamW(rasa_ext.adapter_parameters(model), lr=5e-4)
    """
    checked_choice("start", start, ("continuous", "official"))
    config, layers = _config(model), adapted_layers(model)
    later = dataclasses.replace(config, past=(*config.past, config.present_rank))
    for layer, tensors in [(layer, _grown(layer, later)) for _, layer in layers]:
        if not config.tied:
            tensors["m"] = _magnitudes(layer.own_tensors()["m"], later, start)
        elif layer.place.index == 0 and layer.pool is not None:
            layer.pool.replace({"m": _magnitudes(layer.pool_tensors()["m"], later, start)})
        layer.replace(later, tensors)
    patch_state(model).config = later
    follow(model, drawn=True)
    return model


@torch.no_grad()
def absorb(model: nn.Module, threshold: float = 9e-4) -> bool:
    """Take the newest former direction out, if the others can express it.

    Least squares over all layers that share magnitudes: D_t = sum_k c_k D_k, D_k = B_k A_k / n_k.
    Where the square of what is left is at most ``threshold`` of D_t's everywhere, the direction
    goes, and m_k grows by m_t c_k ("knowledge distillation" in the paper, whose threshold this is).

    Args:
        model: patched with ``SdLoraConfig``, with at least two former tasks.
        threshold: the largest relative residual, squared, at which a direction goes.

    Returns:
        Whether it went. If so, make a new optimizer, and wrap the model anew.

    Raises:
        TypeError, ValueError: the model is not patched with ``SdLoraConfig``, is wrapped in
            DistributedDataParallel, or has too few tasks.
        RuntimeError: the adapter is merged.

    Example:
        >>> from rasa_ext.methods import SdLoraConfig
        >>> model = rasa_ext.patch_model(model, config=SdLoraConfig(rank=4))
        >>> model = rasa_ext.training.next_task(rasa_ext.training.next_task(model))
        >>> went = rasa_ext.training.absorb(model)
    """
    if not 0 <= checked_number("threshold", threshold) <= 1:
        raise ValueError(f"threshold: expected a number in [0, 1], got {threshold}.")
    config, layers = _config(model), [layer for _, layer in adapted_layers(model)]
    tasks = len(config.past)
    if tasks < 2:
        raise ValueError(f"model: expected at least two former tasks, got {tasks}.")
    sharing: dict[int, list[RasaLinear]] = {}
    for layer in layers:
        sharing.setdefault(id(layer.pool) if config.tied else id(layer), []).append(layer)
    found = []
    for members in sharing.values():
        gram = torch.stack([_gram(layer, config).cpu() for layer in members]).sum(0)
        c = torch.linalg.lstsq(gram[:-1, :-1], gram[:-1, -1:], driver="gelsd").solution[:, 0]
        left = gram[-1, -1] - 2 * c @ gram[:-1, -1] + c @ gram[:-1, :-1] @ c
        if left > threshold * gram[-1, -1]:
            return False
        found.append((members, c))
    later = dataclasses.replace(config, past=config.past[:-1])
    keep = sum(later.past)
    for members, c in found:
        first = members[0]
        m = (first.pool_tensors() if config.tied else first.own_tensors())["m"]
        grown = nn.Parameter(torch.cat((m[:-2] + m[-2] * c.to(m), m[-1:])))
        if config.tied and first.pool is not None:
            first.pool.replace({"m": grown})
        for layer in members:
            own = dict(layer.own_tensors())
            own["norms"] = own["norms"][:-1].clone()
            own["stack_A"] = own["stack_A"][:keep].clone()
            own["stack_B"] = own["stack_B"].t()[:keep].clone().t()
            layer.replace(later, own if config.tied else {**own, "m": grown})
    patch_state(model).config = later
    follow(model)
    return True


def _config(model: nn.Module) -> SdLoraConfig:
    state = patch_state(model)
    if not isinstance(state.config, SdLoraConfig):
        raise ValueError(
            f"model: expected one patched with SdLoraConfig, got {type(state.config).__name__}."
        )
    check_unwrapped(model)
    check_unmerged(model)
    return state.config


def _grown(layer: RasaLinear, later: SdLoraConfig) -> dict[str, Tensor]:
    """Give a layer's own tensors for the next task, magnitudes left out; its pair is pushed."""
    own, place, dtype = layer.own_tensors(), layer.place, layer.A.dtype
    down, up = layer.A.clone(), layer.B.t()
    norms = direction_norm(layer.A, layer.B, later.norm).unsqueeze(0)
    if "stack_A" in own:
        down, up = torch.cat((own["stack_A"], down)), torch.cat((own["stack_B"].t(), up))
        norms = torch.cat((own["norms"], norms))
    return {
        "A": fresh_A(later.present_rank, place, dtype),
        "B": fresh_B(later.present_rank, place, dtype),
        "stack_A": down,
        "stack_B": up.clone().t(),
        "norms": norms,
    }


def _magnitudes(before: Tensor, later: SdLoraConfig, start: str) -> nn.Parameter:
    m = torch.cat((before.detach(), before.new_tensor([later.scale])))
    return nn.Parameter(torch.full_like(m, OFFICIAL_START) if start == "official" else m)


def _gram(layer: RasaLinear, config: SdLoraConfig) -> Tensor:
    """Give <D_k, D_l> for the former directions of a layer (tasks, tasks), in float64."""
    own = layer.own_tensors()
    A, B, norms = (own[name].double() for name in ("stack_A", "stack_B", "norms"))
    entries = (B.t() @ B) * (A @ A.t())
    blocks = [
        torch.stack([b.sum() for b in row.split(config.past, 1)])
        for row in entries.split(config.past)
    ]
    return torch.stack(blocks) / (norms.unsqueeze(1) * norms)
