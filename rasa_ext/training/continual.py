"""Tasks one after the other over an SD-LoRA (arXiv 2501.13198)."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn

from rasa_ext.distributed import check_unwrapped, follow
from rasa_ext.methods.base import checked_choice, checked_number, fresh_A, fresh_B
from rasa_ext.methods.sd_lora import SdLoraConfig
from rasa_ext.nn.rasa import RasaLinear
from rasa_ext.patching.state import adapted_layers, check_unmerged, patch_state

OFFICIAL_START = 0.8
"""The magnitudes with which the official code begins every task."""


@torch.no_grad()
def next_task(model: nn.Module, start: str = "continuous") -> nn.Module:
    """Begin a task: the present pair joins the former ones, and a fresh one is trained.

    With ``norm="none"`` and a continuous start the outputs stay what they were. With "frobenius"
    and magnitudes of its own a layer's pair goes on at its size; with tied ones the paper's
    magnitude of one is taken, and the outputs jump, as they do with "product".

    Args:
        model: patched with ``SdLoraConfig``.
        start: "continuous" leaves the magnitudes of former tasks as they were learned; "official"
            sets all to 0.8, as the official code does.

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
    rank, scale = config.present_rank, config.scale
    later = dataclasses.replace(config, past=(*config.past, rank))
    made: list[tuple[RasaLinear, dict[str, Tensor], Tensor]] = []
    for _, layer in layers:
        norm = _norm(layer.A, layer.B, config.norm)
        # Without a norm the scale goes with the pair; with one it is a part of the magnitude.
        up = layer.B * scale if config.norm == "none" else layer.B
        magnitude = torch.ones_like(norm)
        if config.norm == "frobenius" and not config.tied:
            magnitude = scale * norm
        made.append((layer, _grown(layer, later, up, norm), magnitude))
    for layer, tensors, magnitude in made:
        if not config.tied:
            tensors["m"] = _magnitudes(layer.own_tensors().get("m"), magnitude, start)
        elif layer.place.index == 0 and layer.pool is not None:
            layer.pool.replace({"m": _magnitudes(layer.pool_tensors()["m"], magnitude, start)})
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
        grown = nn.Parameter(m[:-1] + m[-1] * c.to(m))
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


def _grown(layer: RasaLinear, later: SdLoraConfig, up: Tensor, norm: Tensor) -> dict[str, Tensor]:
    """Give a layer's own tensors for the next task, magnitudes left out; its pair is pushed."""
    own, place, dtype = layer.own_tensors(), layer.place, layer.A.dtype
    down, up, norms = layer.A.clone(), up.t(), norm.unsqueeze(0)
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


def _norm(A: Tensor, B: Tensor, kind: str) -> Tensor:
    """Give what a direction B A is divided by, from r x r matrices; one for a direction of zero."""
    if kind == "none":
        return A.new_ones(())
    down, up = A.double() @ A.double().t(), B.double().t() @ B.double()
    square = (up * down).sum() if kind == "frobenius" else up.trace() * down.trace()
    norm = square.clamp(min=0).sqrt().to(A.dtype)
    return torch.where(norm > 0, norm, 1.0)


def _magnitudes(before: Tensor | None, newest: Tensor, start: str) -> nn.Parameter:
    newest = newest.unsqueeze(0)
    m = newest if before is None else torch.cat((before.detach().to(newest), newest))
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
