"""Continual learning: a sequence of tasks with one SD-LoRA (arXiv 2501.13198)."""

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
"""Magnitudes at the start of every task in the official code."""


@torch.no_grad()
def next_task(model: nn.Module, start: str = "continuous") -> nn.Module:
    """Start a task: freeze the current pair with the former ones, and train a fresh pair.

    With ``start="continuous"`` the pair keeps the learned magnitude, so outputs stay equal. With
    ``norm="product"`` they jump, because that norm divides only former pairs.

    Args:
        model: patched with ``SdLoraConfig``.
        start: "continuous" keeps the learned magnitudes and starts the new one at alpha / r.
            "official" sets all magnitudes to 0.8, like the official code.

    Returns:
        The same object. The parameters are new: make a new optimizer, and wrap the model in
        DistributedDataParallel again.

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
    """Remove the newest former direction if the other directions can express it.

    Least squares over all layers that share magnitudes fits D_t = sum_k c_k D_k with
    D_k = B_k A_k / n_k. If the squared residual is at most ``threshold`` times ||D_t||^2
    everywhere, the direction is removed and m_k grows by m_t c_k. The paper calls this "knowledge
    distillation"; the default threshold is from the paper.

    Args:
        model: patched with ``SdLoraConfig``, with at least two former tasks.
        threshold: the largest squared relative residual at which a direction is removed.

    Returns:
        Whether the direction was removed. If so, make a new optimizer, and wrap the model again.

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
                "stack_B": own["stack_B"][:, :keep].clone(memory_format=torch.contiguous_format),
            }
        m = (members[0].own_tensors() | members[0].pool_tensors())["m"]
        m = nn.Parameter(torch.cat((m[:-2] + m[-2] * c.to(m), m[-1:])))
        changed.setdefault(owner, {})["m"] = m
    replace_tensors(model, later, changed)
    return True


def _grown(layer: RasaLinear, later: SdLoraConfig) -> dict[str, Tensor]:
    """Return a layer's tensors for the next task, without magnitudes; push the current pair."""
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
    """Return all <D_k, D_l> of a layer's former directions, (tasks, tasks) in float64."""
    own = layer.own_tensors()
    A, B, norms = (own[name].double() for name in ("stack_A", "stack_B", "norms"))
    entries = (B.t() @ B) * (A @ A.t())
    blocks = [
        torch.stack([b.sum() for b in row.split(config.past, 1)])
        for row in entries.split(config.past)
    ]
    return torch.stack(blocks) / (norms.unsqueeze(1) * norms)
