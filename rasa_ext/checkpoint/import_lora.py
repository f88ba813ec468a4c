"""import_lora: a LoRA that PEFT wrote as a RaSA adapter that computes the same function."""

from __future__ import annotations

import os

import torch
from torch import Tensor, nn

from rasa_ext.checkpoint.adapter import AdapterState, own_key, saved_tensors
from rasa_ext.checkpoint.files import PREFIX, check_tensors
from rasa_ext.checkpoint.lora import Lora, read_lora
from rasa_ext.config import RasaConfig
from rasa_ext.methods.base import Place, fresh_A, fresh_B
from rasa_ext.patching.patch import plan_layers
from rasa_ext.patching.targets import Plan, matches
from rasa_ext.patching.tokens import rows_key


def import_lora(model: nn.Module, directory: str | os.PathLike[str]) -> AdapterState:
    """Patch a model, in place, with a LoRA that PEFT wrote.

    The adapter is the LoRA, exactly: RaSA of k = 0, its diagonals the LoRA's scale, its rank the
    largest of any layer. Modules that were trained in full come along as ``modules_to_save``,
    trained rows of embeddings as ``trainable_token_indices``; the LoRA's dropout, too.

    Args:
        model: an unpatched base model.
        directory: what PEFT's ``save_pretrained`` wrote.

    Returns:
        The adapter that the model was patched with.

    Raises:
        FileNotFoundError, ValueError, TypeError: a file is missing or damaged, does not fit the
            model, or is not a plain LoRA; the message says what to do, and the model is unchanged.

    Example:
        >>> import copy
        >>> rasa_ext.export_lora(rasa_ext.patch_model(copy.deepcopy(model), rank=8, k=1), "lora")
        9
        >>> found = rasa_ext.import_lora(model, "lora")
        >>> found.config.rank, found.config.k
        (9, 0)
    """
    found = convert_lora(model, read_lora(directory), str(directory))
    found.install(model)
    return found


@torch.no_grad()
def convert_lora(model: nn.Module, lora: Lora, where: str) -> AdapterState:
    """Turn a LoRA into the RaSA adapter of k = 0 that computes the same function.

    Args:
        model: the unpatched base, for names and shapes; it may lie on the meta device.
        lora: what ``read_lora`` gave.
        where: with what errors begin.

    Returns:
        The adapter; ``model`` is unchanged.

    Raises:
        ValueError: the LoRA does not fit the model.

    Example:
        >>> import copy
        >>> rasa_ext.export_lora(rasa_ext.patch_model(copy.deepcopy(model), rank=8, k=1), "lora")
        9
        >>> from rasa_ext.checkpoint import convert_lora, read_lora
        >>> convert_lora(model, read_lora("lora"), "lora").save(model, "adapter")
    """
    shapes = {name: (B.shape[0], A.shape[1]) for name, (B, A) in lora.factors.items()}
    config = RasaConfig(
        rank=lora.rank,
        k=0,
        alpha=_alpha(lora),
        dropout=lora.config.get("lora_dropout") or 0.0,
        modules_to_save=_saved_modules(model, lora, where),
        trainable_token_indices=lora.config.get("trainable_token_indices"),
    )
    config, plan = plan_layers(model, config, shapes, where)
    tensors = _exact(lora, plan)
    expected = {name: tuple(t.shape) for name, t in saved_tensors(model, plan).items()}
    expected |= {rows_key(rows.names[0]): (len(rows.ids), rows.width) for rows in plan.tokens}
    found = {**lora.saved, **lora.rows}
    check_tensors(found, expected, where)
    tensors.update((f"{PREFIX}{name}", found[name]) for name in expected)
    return AdapterState(config, plan, tensors)


def _exact(lora: Lora, plan: Plan) -> dict[str, Tensor]:
    """The LoRA's factors, filled up to one rank: a fresh A beside a B of zeros changes nothing."""
    tensors = {}
    for group in plan.groups:
        for name in group.names:
            B, A = (factor.float() for factor in lora.factors[name])
            own = A.shape[0]
            place = Place(0, len(group.names), *group.shape, A.device)
            fresh, zeros = (make(lora.rank - own, place, A.dtype) for make in (fresh_A, fresh_B))
            tensors[own_key(name, "A")] = torch.cat([A, fresh])
            tensors[own_key(name, "B")] = torch.cat([B, zeros], 1)
            tensors[own_key(name, "d")] = A.new_full((lora.rank,), lora.scales[name])
    return tensors


def _alpha(lora: Lora) -> float:
    """One under which a new adapter of k = 0 would begin with the LoRA's scale, if that is one."""
    scales = set(lora.scales.values())
    scale = scales.pop() if len(scales) == 1 else 0.0
    return scale * lora.rank if scale > 0 else 8.0


def _saved_modules(model: nn.Module, lora: Lora, where: str) -> tuple[str, ...]:
    """Names of the modules that the LoRA's file holds in full."""
    modules = {name for name, _ in model.named_modules() if name}
    listed = [m for m in modules if matches(m, tuple(lora.config.get("modules_to_save") or ()))]
    found: dict[str, None] = {}
    for key in lora.saved:
        owner = next((m for m in listed if key.startswith(f"{m}.")), key.rpartition(".")[0])
        if owner not in modules:
            raise ValueError(
                f"{where}: expected tensors of this model, which has no {owner!r} for {key}."
            )
        found[owner] = None
    return tuple(found)
