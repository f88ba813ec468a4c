"""LoRAs of PEFT: ``export_lora`` and ``import_lora``, like those of ``rasa_ext``."""

from __future__ import annotations

import os
import tempfile

from peft import PeftModel
from torch import nn

from rasa_ext.checkpoint.adapter import task_type
from rasa_ext.checkpoint.card import PLAIN, Card
from rasa_ext.checkpoint.lora import convert_lora, read_lora
from rasa_ext.checkpoint.lora_file import write_lora
from rasa_ext.checkpoint.lora_formats import PEFT_FILES
from rasa_ext.checkpoint.lora_view import WEIGHT, Adapted, Export
from rasa_ext.patching.state import unwrap
from rasa_ext.patching.tokens import rows_key
from rasa_ext.peft.experts import RasaPeftExperts
from rasa_ext.peft.layer import RasaPeftLinear
from rasa_ext.peft.named import NamedAdapters
from rasa_ext.peft.targets import trained_in_full
from rasa_ext.peft.tokens import rows_of


def export_lora(
    model: nn.Module,
    directory: str | os.PathLike[str],
    adapter_name: str = "default",
    *,
    expert_layout: str | None = None,
    rank: int | None = None,
    format: str = PEFT_FILES,
    allow_dropped: bool = False,
    card: Card | None = PLAIN,
) -> int:
    """Write one adapter of a PEFT model as a plain LoRA, like ``rasa_ext.export_lora``.

    The LoRA's product is the adapter's dW in float32 (arXiv 2503.12576, section 3). It is built
    from the adapter's tensors, a layer at a time, whereas PEFT's ``convert_to_lora`` decomposes
    every dW. The adapter may be inactive or merged.

    Args:
        model: result of ``peft.get_peft_model`` or ``inject_adapter_in_model``, also inside
            ``torch.compile`` or DistributedDataParallel.
        directory: created if missing; an adapter in it is replaced.
        adapter_name: the adapter's name in the model.
        expert_layout, rank, format, allow_dropped, card: as in ``rasa_ext.export_lora``.

    Returns:
        The written rank.

    Raises:
        TypeError, ValueError: the model has no such adapter of this package, or for the reasons
            of ``rasa_ext.export_lora``.

    Example:
        Two layers: R = 8 - 1 + 2 * 1 = 9.

        >>> import peft, rasa_ext.peft
        >>> model = peft.get_peft_model(model, rasa_ext.peft.RasaConfig(r=8, rasa_k=1))
        >>> rasa_ext.peft.export_lora(model, "lora")
        9
    """
    export = _export_of(model, adapter_name)
    return write_lora(export, directory, expert_layout, rank, format, allow_dropped, card)


def import_lora(
    model: nn.Module,
    directory: str | os.PathLike[str],
    k: int = 0,
    adapter_name: str = "default",
) -> PeftModel:
    """Make a PEFT model from a LoRA that PEFT wrote, to train it further as a RaSA.

    Args:
        model: the base model; it is changed in place, as by ``peft.get_peft_model``.
        directory, k: as in ``rasa_ext.import_lora``.
        adapter_name: the adapter's name in the result.

    Returns:
        The model, whose adapter is trained and computes the LoRA's function.

    Raises:
        FileNotFoundError, ValueError, TypeError: for the reasons of ``rasa_ext.import_lora``.

    Example:
        >>> import copy, peft, rasa_ext.peft
        >>> lora = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(r=2))
        >>> lora.save_pretrained("lora")
        >>> model = rasa_ext.peft.import_lora(model, "lora", k=1)
        >>> model.peft_config["default"].r, model.peft_config["default"].rasa_k
        (2, 1)
    """
    state = convert_lora(model, read_lora(directory), str(directory), k)
    with tempfile.TemporaryDirectory() as folder:
        state.save(model, folder, card=None)
        return PeftModel.from_pretrained(model, folder, adapter_name, is_trainable=True)


def _export_of(model: nn.Module, adapter_name: str) -> Export:
    """Describe an adapter of a PEFT model, without changing the model."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}.")
    outer = unwrap(model)
    root: nn.Module = outer.get_base_model() if isinstance(outer, PeftModel) else outer
    modules = dict(root.named_modules())
    owners = [each for each in modules.values() if isinstance(each, NamedAdapters)]
    configs = {name: each for owner in owners for name, each in owner.configs.items()}
    if adapter_name not in configs:
        raise ValueError(
            f"adapter_name: expected one of the model's RaSA adapters "
            f"({', '.join(map(repr, configs)) or 'it has none'}), got {adapter_name!r}."
        )
    bias = outer.peft_config[adapter_name].bias if isinstance(outer, PeftModel) else "none"
    if bias != "none":
        raise ValueError(
            f"model: expected an adapter without trained biases, got bias={bias!r}; save what "
            "merge_and_unload() returns."
        )
    experts = {}
    for path, each in modules.items():
        if isinstance(each, RasaPeftExperts):
            stacks = [item for item in each.stacks().items() if adapter_name in item[1].configs]
            if stacks:
                factors = {name: stack.named(adapter_name).factors() for name, stack in stacks}
                experts[path] = Adapted(each.base_layer, factors)
    task = outer.peft_config[adapter_name].task_type if isinstance(outer, PeftModel) else None
    trained = trained_in_full(root, adapter_name)
    rows = rows_of(root, adapter_name)
    return Export(
        root=root,
        config=configs[adapter_name],
        linears={
            name: Adapted(layer.base_layer, {WEIGHT: layer.named(adapter_name).factors()})
            for name, layer in modules.items()
            if isinstance(layer, RasaPeftLinear) and adapter_name in layer.configs
        },
        experts=experts,
        saved={
            **{rows_key(table.names[0]): tensor for table, tensor in rows.items()},
            **{
                f"{name}.{key}": tensor.detach()
                for name, module in trained.items()
                for key, tensor in module.state_dict().items()
            },
        },
        modules_to_save=tuple(trained),
        tokens=tuple(rows),
        task_type=str(getattr(task, "value", task)) if task else task_type(root),
        fast_path=any(
            isinstance(m, nn.TransformerEncoderLayer)
            and any(isinstance(child, RasaPeftLinear) for child in m.modules())
            for m in modules.values()
        ),
    )
