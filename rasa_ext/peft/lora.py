"""Writing an adapter of a PEFT model as a plain LoRA, as ``rasa_ext.export_lora`` does others."""

from __future__ import annotations

import dataclasses
import functools
import os
from typing import Any, cast

import torch
from peft import PeftModel
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn

from rasa_ext import ops
from rasa_ext.checkpoint.adapter import base_name, task_type
from rasa_ext.checkpoint.card import PLAIN, Card
from rasa_ext.checkpoint.lora_experts import chosen_layout
from rasa_ext.checkpoint.lora_export import written_rank
from rasa_ext.checkpoint.lora_file import Export, Pair, write_export
from rasa_ext.methods.base import Place
from rasa_ext.nn.adapter import Adapter
from rasa_ext.ops import Pack
from rasa_ext.peft.experts import RasaPeftBank, RasaPeftExperts
from rasa_ext.peft.layer import RasaPeftLinear
from rasa_ext.peft.named import NamedAdapters
from rasa_ext.peft.tokens import rows_of, tokens_of


def export_lora(
    model: nn.Module,
    directory: str | os.PathLike[str],
    adapter_name: str = "default",
    pad_to: int | None = None,
    *,
    experts: str | None = None,
    allow_dropped: bool = False,
    card: Card | None = PLAIN,
) -> int:
    """Write one adapter of a PEFT model as the LoRA that ``rasa_ext.export_lora`` would write.

    The LoRA's product is the adapter's dW in float32 (arXiv 2503.12576, section 3). It is made of
    the adapter's own tensors, a layer at a time: PEFT's ``convert_to_lora`` decomposes every dW
    instead. The adapter need not be active, and may be merged.

    Args:
        model: what ``peft.get_peft_model`` returned, or ``inject_adapter_in_model``; also inside
            ``torch.compile`` or DistributedDataParallel.
        directory: made if it is missing; an adapter that is there is replaced.
        adapter_name: the adapter's name in the model.
        pad_to, experts, allow_dropped, card: as in ``rasa_ext.export_lora``.

    Returns:
        The rank that was written.

    Raises:
        TypeError, ValueError: the model has no such adapter of this package, or as
            ``rasa_ext.export_lora``.

    Example:
        Two layers: R = 8 - 1 + 2 * 1 = 9.

        >>> import peft, rasa_ext.peft
        >>> model = peft.get_peft_model(model, rasa_ext.peft.RasaConfig(r=8, rasa_k=1))
        >>> rasa_ext.peft.export_lora(model, "lora")
        9
    """
    export = _make_export(model, adapter_name, pad_to, experts)
    return write_export(
        export, directory, allow_dropped=allow_dropped, default=experts is None, card=card
    )


def _make_export(
    model: nn.Module, adapter_name: str, pad_to: int | None, experts: str | None
) -> Export:
    root = _root(model)
    modules = dict(root.named_modules())
    owners = [m for m in modules.values() if isinstance(m, NamedAdapters)]
    every = list(dict.fromkeys(name for owner in owners for name in owner.configs))
    if adapter_name not in every:
        raise ValueError(
            f"adapter_name: expected one of the model's RaSA adapters "
            f"({', '.join(map(repr, every)) or 'it has none'}), got {adapter_name!r}."
        )
    pairs = {
        name: Pair(
            layer.places[adapter_name],
            layer.transposed,
            layer.base_layer.weight,
            functools.partial(_packed, layer, adapter_name),
        )
        for name, layer in modules.items()
        if isinstance(layer, RasaPeftLinear) and adapter_name in layer.configs
    }
    banks = [
        (name, cast(Any, _Experts(each.base_layer, each.banks(), adapter_name)))
        for name, each in modules.items()
        if isinstance(each, RasaPeftExperts)
    ]
    banks = [(name, each) for name, each in banks if each.banks()]
    layout = chosen_layout(banks, experts)
    configs = [o.configs[adapter_name] for o in owners if adapter_name in o.configs]
    ranks = [o.named(adapter_name).factors().rank for o in owners if adapter_name in o.configs]
    saved = {
        name: cast(Any, wrapper.modules_to_save)[adapter_name]
        for name, wrapper in modules.items()
        if isinstance(wrapper, ModulesToSaveWrapper) and adapter_name in wrapper.modules_to_save
    }
    return Export(
        root=root,
        config=configs[0],
        pairs=pairs,
        rank=written_rank(max(ranks), pad_to),
        saved={**rows_of(root, adapter_name), **_tensors(saved)},
        tokens=tokens_of(root, adapter_name),
        modules_to_save=tuple(saved),
        task_type=_task_type(model, adapter_name) or task_type(root),
        base=base_name(root),
        experts=banks,
        layout=layout,
        fast_path=any(
            isinstance(m, nn.TransformerEncoderLayer)
            and any(isinstance(child, RasaPeftLinear) for child in m.modules())
            for m in modules.values()
        ),
    )


def _unwrapped(model: nn.Module) -> nn.Module:
    """Find the model inside the wrappers of torch.compile and data parallelism."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}.")
    while not isinstance(model, PeftModel):
        inner = getattr(model, "_orig_mod", None) or getattr(model, "module", None)
        if not isinstance(inner, nn.Module):
            break
        model = inner
    return model


def _root(model: nn.Module) -> nn.Module:
    """Find the module in which layers have the names that they have without PEFT."""
    model = _unwrapped(model)
    base: nn.Module = model.get_base_model() if isinstance(model, PeftModel) else model
    return base


def _task_type(model: nn.Module, adapter_name: str) -> str | None:
    found = _unwrapped(model)
    told = found.peft_config[adapter_name].task_type if isinstance(found, PeftModel) else None
    return None if told is None else str(getattr(told, "value", told))


@torch.no_grad()
def _packed(layer: RasaPeftLinear, adapter_name: str) -> Pack:
    return Pack(*ops.pack(*layer.named(adapter_name).factors(), torch.float32, 1))


def _tensors(modules: dict[str, nn.Module]) -> dict[str, Tensor]:
    """Name the tensors of trained modules as the model without PEFT does."""
    return {
        f"{name}.{key}": tensor.detach()
        for name, module in modules.items()
        for key, tensor in module.state_dict().items()
    }


@dataclasses.dataclass(frozen=True)
class _Bank:
    """One adapter of a stacked weight, as the writer of experts looks at it."""

    bank: RasaPeftBank
    name: str

    @property
    def place(self) -> Place:
        return self.bank.places[self.name]

    def adapter(self) -> Adapter:
        return self.bank.named(self.name)


@dataclasses.dataclass(frozen=True)
class _Experts:
    """Experts with that adapter alone."""

    base_layer: nn.Module
    every: dict[str, RasaPeftBank]
    name: str

    def banks(self) -> dict[str, _Bank]:
        return {
            key: _Bank(bank, self.name)
            for key, bank in self.every.items()
            if self.name in bank.configs
        }
