"""Tasks one after the other over an SD-LoRA (arXiv 2501.13198)."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn

from rasa_ext import RasaLinear
from rasa_ext.methods import checked_choice, checked_number, fresh_A, fresh_B
from rasa_ext.nn import RasaPool
from rasa_ext.training import adapter_of, replace_tensors
from rasa_research.methods import SdLoraConfig
from rasa_research.methods.sd_lora import direction_norm
from rasa_research.methods.stack import pushed

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
        >>> from rasa_research import methods, training
        >>> model = rasa_ext.patch_model(model, config=methods.SdLoraConfig(rank=4))
        >>> model = training.next_task(model)
        >>> optimizer = torch.optim.AdamW(rasa_ext.adapter_parameters(model), lr=5e-4)
    """
    checked_choice("start", start, ("continuous", "official"))
    config, layers = adapter_of(model, SdLoraConfig)
    later = dataclasses.replace(config, past=(*config.past, config.present_rank))
    changed: dict[RasaLinear | RasaPool, dict[str, Tensor]] = {}
    for layer in layers.values():
        changed[layer] = _grown(layer, later)
        owner = layer if layer.pool is None else layer.pool
        if "m" not in changed.setdefault(owner, {}):
            m = (layer.own_tensors() | layer.pool_tensors())["m"]
            changed[owner]["m"] = _magnitudes(m, later, start)
    replace_tensors(model, later, changed)
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
        >>> from rasa_research import methods, training
        >>> model = rasa_ext.patch_model(model, config=methods.SdLoraConfig(rank=4))
        >>> model = training.next_task(training.next_task(model))
        >>> went = training.absorb(model)
    """
    if not 0 <= checked_number("threshold", threshold) <= 1:
        raise ValueError(f"threshold: expected a number in [0, 1], got {threshold}.")
    config, layers = adapter_of(model, SdLoraConfig)
    tasks = len(config.past)
    if tasks < 2:
        raise ValueError(f"model: expected at least two former tasks, got {tasks}.")
    sharing: dict[RasaLinear | RasaPool, list[RasaLinear]] = {}
    for layer in layers.values():
        sharing.setdefault(layer if layer.pool is None else layer.pool, []).append(layer)
    later = dataclasses.replace(config, past=config.past[:-1])
    keep = sum(later.past)
    changed: dict[RasaLinear | RasaPool, dict[str, Tensor]] = {}
    for owner, members in sharing.items():
        gram = torch.stack([_gram(layer, config).cpu() for layer in members]).sum(0)
        c = torch.linalg.lstsq(gram[:-1, :-1], gram[:-1, -1:], driver="gelsd").solution[:, 0]
        left = gram[-1, -1] - 2 * c @ gram[:-1, -1] + c @ gram[:-1, :-1] @ c
        if left > threshold * gram[-1, -1]:
            return False
        for layer in members:
            own = layer.own_tensors()
            changed[layer] = own | {
                "norms": own["norms"][:-1].clone(),
                "stack_A": own["stack_A"][:keep].clone(),
                "stack_B": own["stack_B"].t()[:keep].clone().t(),
            }
        m = (members[0].own_tensors() | members[0].pool_tensors())["m"]
        m = nn.Parameter(torch.cat((m[:-2] + m[-2] * c.to(m), m[-1:])))
        changed.setdefault(owner, {})["m"] = m
    replace_tensors(model, later, changed)
    return True


def _grown(layer: RasaLinear, later: SdLoraConfig) -> dict[str, Tensor]:
    """Give a layer's own tensors for the next task, magnitudes left out; its pair is pushed."""
    own, spec, dtype = layer.own_tensors(), layer.spec, layer.A.dtype
    norm = direction_norm(layer.A, layer.B, later.norm).unsqueeze(0)
    return {
        "A": fresh_A(later.present_rank, spec, dtype),
        "B": fresh_B(later.present_rank, spec, dtype),
        **pushed(own, layer.A, layer.B),
        "norms": torch.cat((own.get("norms", norm[:0]), norm)),
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
