"""Prepare the base model, the optimizer and the work between steps for one method."""

from __future__ import annotations

import copy
import itertools
import math
import operator
import tempfile
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

import rasa_ext
from rasa_ext import training
from rasa_ext.methods import method_named
from rasa_ext.nn.rasa_experts import RasaExpertWeight
from rasa_research.optim import LoraPro
from rasa_research.ranks import hidden_dimensions, rank_pattern
from rasa_research.training import Boosting, ProximalGates
from research.experiments.experts.upcycled import STACKS


def prepared(
    base: Any,
    spec: Mapping[str, Any],
    seed: int,
    *,
    bfloat16: bool,
    ranks: Mapping[str, int] | None = None,
) -> Any:
    """Return a copy of ``base`` (float32) in which only the method's parameters require grad.

    All linear layers except the output head are adapted. Trainable parameters are float32. With
    ``bfloat16`` the frozen weights are rounded, which autocast would do anyway. ``ranks`` are the
    planned ranks by layer name, for methods that plan them: see ``planned``.
    """
    torch.manual_seed(seed)
    model = copy.deepcopy(base)
    if spec["kind"] == "full":
        return model.requires_grad_(True)
    if bfloat16 and spec["kind"] != "continued":  # whose model has a LoRA in float32
        model = model.to(torch.bfloat16)
    if spec["kind"] == "rasa":
        given = {"alpha": float(spec["alpha"]), "start": spec.get("start", "paper")}
        return rasa_ext.patch_model(model, rank=spec["rank"], k=spec["k"], **given)
    if spec["kind"] == "started":
        model = rasa_ext.patch_model(
            model, rank=spec["rank"], k=spec["k"], target_modules=targets(spec)
        )
        return _started(model, spec["k"], *spec["start"])
    if spec["kind"] == "continued":
        return _continued(model, spec["rank"], spec["as"])
    if spec["kind"] == "experts":
        given = {"target_modules": list(STACKS), "experts": "layer"}
        model = rasa_ext.patch_model(model, rank=spec["rank"], k=spec["k"], **given)
        return _fixed(model) if spec.get("fixed") else model
    if spec["kind"] == "ours":
        kind = method_named(spec["method"])
        config = kind(**{**kind.absent, **spec["options"]})  # the paper's start, unless given
        return rasa_ext.patch_model(model, config=config)
    from peft import LoraConfig, VeraConfig, get_peft_config, get_peft_model

    if spec["kind"] == "peft":
        chosen = {"peft_type": spec["method"].upper(), "target_modules": "all-linear"}
        config = get_peft_config(chosen | spec["options"])
    elif spec["kind"] == "lora":
        config = LoraConfig(
            r=spec["rank"],
            lora_alpha=spec["alpha"],
            target_modules=targets(spec),
            rank_pattern=dict(ranks or {}),
        )
    else:
        config = VeraConfig(r=spec["rank"], projection_prng_key=seed, target_modules="all-linear")
    return get_peft_model(model, config)


def targets(spec: Mapping[str, Any]) -> Any:
    """Return the layers to adapt: those of ``blocks``, ``targets``, or all linear ones."""
    if "blocks" not in spec:
        return spec.get("targets", "all-linear")
    return rf".*\.layers\.({'|'.join(map(str, spec['blocks']))})\..*_proj"


def _continued(lora: Any, rank: int, kind: str) -> Any:
    """Return a LoRA of PEFT, with alpha = r, as the adapter to train on, with the same function."""
    if kind == "lora":
        return lora
    if kind not in ("rasa", "wider"):
        raise ValueError(f"as: expected lora, rasa or wider, got {kind!r}.")
    from peft import LoraConfig, get_peft_model, get_peft_model_state_dict

    if kind == "rasa":
        with tempfile.TemporaryDirectory() as folder:
            lora.save_pretrained(folder)
            base = lora.unload()
            rasa_ext.import_lora(base, folder, k=rank)
            return base
    trained = get_peft_model_state_dict(lora)
    given = {"target_modules": lora.peft_config["default"].target_modules}
    wider = LoraConfig(r=2 * rank, lora_alpha=2 * rank, **given)
    return _filled(get_peft_model(lora.unload(), wider), trained, rank)


@torch.no_grad()
def _filled(wide: Any, trained: Mapping[str, Any], rank: int) -> Any:
    """Set the first ``rank`` ranks of a LoRA. The others have B = 0, as at the start."""
    for name, value in trained.items():
        parameter = wide.get_parameter(name.replace(".weight", ".default.weight"))
        part = parameter[:rank] if ".lora_A." in name else parameter[:, :rank]
        part.copy_(value)
    return wide


@torch.no_grad()
def _fixed(model: Any) -> Any:
    """Set the diagonals of experts to 1, LoRA's scale at alpha = r, and freeze them."""
    for module in model.modules():
        if isinstance(module, RasaExpertWeight):
            module.d.fill_(1).requires_grad_(False)
    return model


@torch.no_grad()
def _started(
    model: Any, k: int, private: float, given: float, others: float | str | None = None
) -> Any:
    """Set the diagonals of a patched model: private ranks, the k ranks given to the pool, others.

    ``others`` is that of the ranks that the other layers gave: by default ``given``, and with
    "1/L" one over the layers that share the pool.
    """
    for module in model.modules():
        if isinstance(module, rasa_ext.RasaLinear):
            d, spec = module.d, module.spec
            own = len(d) - spec.num_layers * k
            at = own + spec.index * k
            rest = given if others is None else others
            d[:own], d[own:] = private, 1 / spec.num_layers if rest == "1/L" else rest
            d[at : at + k] = given
    return model


def planned(base: Any, batches: Iterable[Mapping[str, Any]], rank: int) -> dict[str, int]:
    """Plan GeLoRA's ranks from a task's rows, scaled to the size of a LoRA of ``rank``.

    The formula's values, max(d_{i+1} - d_i, 0) + 1, are only slightly above 1 here, so unscaled
    ranks would compare sizes instead of methods. All values are multiplied by one factor and
    rounded to at least 1. The factor makes the sum of r (in + out) over the layers as close as
    possible to that of a LoRA of ``rank``.
    """
    gains = [max(b - a, 0.0) + 1 for a, b in itertools.pairwise(hidden_dimensions(base, batches))]
    blocks = rank_pattern(base, range(len(gains)))
    sizes = [0] * len(gains)
    for name, block in blocks.items():
        sizes[block] += sum(base.get_submodule(name).weight.shape)

    def scaled(factor: float) -> list[int]:
        return [max(1, math.floor(factor * gain + 0.5)) for gain in gains]

    def off(factor: float) -> int:
        return abs(sum(map(operator.mul, scaled(factor), sizes)) - rank * sum(sizes))

    return rank_pattern(base, scaled(min((i / 100 for i in range(1, 100 * rank + 1)), key=off)))


def optimizer(model: Any, spec: Mapping[str, Any]) -> Callable[..., torch.optim.Optimizer] | None:
    """Return a factory for the method's optimizer, or None for AdamW.

    ``optimizer: {lora_pro: {...}}`` has the options of ``LoraPro``, which wraps AdamW, and
    ``optimizer: {lion: {...}}`` those of bitsandbytes' Lion.
    """
    given = spec.get("optimizer") or {}
    if "lion" in given:
        from bitsandbytes.optim import Lion32bit  # here, since it takes seconds

        return lambda parameters, fused, **inner: Lion32bit(parameters, **given["lion"], **inner)
    if "lora_pro" not in given:
        return None

    def make(parameters: Any, **inner: Any) -> torch.optim.Optimizer:
        return LoraPro(model, torch.optim.AdamW, params=parameters, **given["lora_pro"], **inner)

    return make


def groups(model: Any, spec: Mapping[str, Any], lr: float) -> list[dict[str, Any]] | None:
    """Return the method's parameter groups for the optimizer, or None if it has none."""
    ratio = spec.get("d_lr_ratio", 1.0)
    own = spec["kind"] == "ours" or ratio != 1
    return training.parameter_groups(model, lr, d_lr_ratio=ratio) if own else None


def between(
    model: Any, spec: Mapping[str, Any], seed: int
) -> Callable[[torch.optim.Optimizer], Callable[[], object]] | None:
    """Return a factory for the function to call after each optimizer step, or None.

    ``steps: {gates: {...}}`` has the options of ``ProximalGates``, ``steps: {boosting: {...}}``
    those of ``Boosting``.
    """
    steps = spec.get("steps") or {}
    if "gates" in steps:
        gates = ProximalGates(model, **steps["gates"])
        return lambda optimizer: gates.step
    if "boosting" in steps:
        options = {"seed": seed, **steps["boosting"]}
        return lambda optimizer: Boosting(model, optimizer, **options).step
    return None
