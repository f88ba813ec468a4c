"""The public names, which ``rasa_ext`` imports on first use, and ``patch_model``."""

import warnings
from collections.abc import Mapping, Sequence

import torch
from torch import nn

from rasa_ext import checkpoint, methods, patching, training
from rasa_ext._version import __version__
from rasa_ext.checkpoint.adapter import save_adapter
from rasa_ext.checkpoint.card import Card
from rasa_ext.checkpoint.loading import load_adapter
from rasa_ext.checkpoint.lora import import_lora
from rasa_ext.checkpoint.lora_export import export_error, export_lora, export_size
from rasa_ext.checkpoint.official import load_official
from rasa_ext.checkpoint.pretrained import let_it_save
from rasa_ext.checkpoint.push import push_to_hub
from rasa_ext.methods.base import ALL_LINEAR, AdapterConfig, GivenGroups
from rasa_ext.methods.keywords import suggests_keywords
from rasa_ext.methods.rasa import RasaConfig
from rasa_ext.nn.adapter import drop_packs
from rasa_ext.nn.rasa import RasaLinear
from rasa_ext.ops import cuda_status
from rasa_ext.patching.config_warnings import plan_warnings
from rasa_ext.patching.merge import (
    delta_weights,
    disable_adapter,
    merge,
    merge_and_unload,
    unmerge,
    unpatch,
)
from rasa_ext.patching.patch import apply_plan, check_unpatched
from rasa_ext.patching.state import adapter_parameters
from rasa_ext.patching.summary import summary
from rasa_ext.patching.targets import make_plan

__all__ = [
    "Card",
    "RasaConfig",
    "RasaLinear",
    "__version__",
    "adapter_parameters",
    "checkpoint",
    "cuda_status",
    "delta_weights",
    "disable_adapter",
    "drop_packs",
    "export_error",
    "export_lora",
    "export_size",
    "import_lora",
    "load_adapter",
    "load_official",
    "merge",
    "merge_and_unload",
    "methods",
    "patch_model",
    "patching",
    "push_to_hub",
    "save_adapter",
    "summary",
    "training",
    "unmerge",
    "unpatch",
]


@suggests_keywords
def patch_model(
    model: nn.Module,
    rank: int = 8,
    k: int | None = 1,
    *,
    alpha: float | None = None,
    start: str = "lora",
    dropout: float = 0.0,
    target_modules: str | Sequence[str] = ALL_LINEAR,
    exclude_modules: str | Sequence[str] = (),
    modules_to_save: Sequence[str] = (),
    trainable_token_indices: Sequence[int] | Mapping[str, Sequence[int]] = (),
    groups: GivenGroups = (),
    adapter_dtype: torch.dtype = torch.float32,
    experts: str | None = None,
    config: AdapterConfig | None = None,
) -> nn.Module:
    """Add RaSA adapters to a model's linear layers, in place, and freeze everything else.

    A layer with weight W (out, in) then computes x (W + dW)^T, with dW = [B | B_pool] diag(d)
    [A ; A_pool] of rank r-k+L*k. The L layers of one name and shape share the pool (arXiv
    2503.12576, section 3). The output stays the base's until training begins, since every B starts
    at zero. ``summary(model)`` shows which layers are adapted, how they are grouped and what was
    left out.

    Args:
        model: any module that holds ``nn.Linear`` or transformers ``Conv1D`` layers.
        rank, k, alpha, start, dropout, adapter_dtype: fields of ``RasaConfig``; the help texts
            there explain what each does and costs.
        target_modules, exclude_modules, modules_to_save, groups: fields of ``RasaConfig``: which
            layers are adapted or trained in full, and which share a pool.
        trainable_token_indices: tokens whose embedding rows are trained, such as new tokens.
        experts: also adapt the stacked expert weights of a mixture of experts. "slot", "layer" or
            "shared" sets which of them share a pool. None leaves them alone, with a warning.
        config: replaces all other arguments, which must then be left at their defaults.

    Returns:
        The same object.

    Raises:
        ValueError, TypeError: an argument is wrong; the message says what was expected and what
            was given. The model is then unchanged.

    Example:
        >>> model = rasa_ext.patch_model(model, rank=8, k=1, alpha=32.0)
        >>> trainable = [name for name, p in model.named_parameters() if p.requires_grad]
        >>> all(name.endswith(("A", "B", "d")) for name in trainable)
        True
        >>> optimizer = torch.optim.AdamW(rasa_ext.adapter_parameters(model), lr=5e-4)
    """
    given = RasaConfig(
        rank=rank,
        k=k,
        alpha=alpha,
        start=start,
        dropout=dropout,
        target_modules=target_modules,
        exclude_modules=exclude_modules,
        modules_to_save=modules_to_save,
        trainable_token_indices=trainable_token_indices,
        groups=groups,
        adapter_dtype=adapter_dtype,
        experts=experts,
    )
    if config is None:
        config = given
    elif not isinstance(config, AdapterConfig):
        raise TypeError(f"config: expected an AdapterConfig, got {type(config).__name__}.")
    elif given != RasaConfig():
        raise ValueError(
            "config: expected either config or the single arguments, got both; "
            f"single arguments, default: {'; '.join(given.differences(RasaConfig()))}."
        )
    check_unpatched(model)
    plan = make_plan(model, config)
    let_it_save(model, apply_plan(model, plan))
    for message in plan_warnings(model, plan):
        warnings.warn(message, stacklevel=3)
    return model
