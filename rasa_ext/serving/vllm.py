"""The plug-in of vLLM: its worker reads the folders of this package's adapters, expanded."""

from __future__ import annotations

import copy
import functools
import inspect
import logging
import os
import re
import tempfile
from pathlib import Path
from typing import Any

import torch

TESTED = ("0.32.0",)
"""Versions of vLLM that the tests ran."""
POOLS = "RASA_EXT_VLLM_POOLS"
_log = logging.getLogger("vllm.rasa_ext")  # a child of vLLM's logger, which prints


def install() -> None:
    """Wrap vLLM's loading of adapters, once; do nothing if there is no vLLM that has it."""
    k = _pooled_ranks(os.environ.get(POOLS, ""))
    try:
        from vllm.lora.worker_manager import WorkerLoRAManager as Manager

        if hasattr(Manager, "rasa_ext"):
            return
        if list(inspect.signature(Manager._load_adapter).parameters) != ["self", "lora_request"]:
            raise AttributeError("_load_adapter has other arguments")
        if k is not None:
            from rasa_ext.serving.vllm_pools import share_pools

            share_pools(k)
    except (ImportError, AttributeError) as error:
        _log.warning(
            "rasa_ext: this vLLM cannot load RaSA adapters (%s); versions that were tested: %s",
            error,
            ", ".join(TESTED),
        )
        return
    Manager._load_adapter, Manager.rasa_ext = _reading(Manager._load_adapter), TESTED


def _pooled_ranks(text: str) -> int | None:
    """Return the largest k to keep pools for, or None to expand them."""
    if not text:
        return None
    if (match := re.fullmatch(r"shared(?::([1-9]\d*))?", text)) is None:
        raise ValueError(
            f'{POOLS}: expected nothing, "shared", or "shared:K" for adapters of k up to K, got '
            f"{text!r}."
        )
    return int(match[1] or 1)


def _reading(load: Any) -> Any:
    """Return vLLM's ``_load_adapter``, able to read folders of this package's adapters."""

    @functools.wraps(load)
    def _load_adapter(self: Any, lora_request: Any) -> Any:
        from vllm.lora.utils import get_adapter_absolute_path

        from rasa_ext.checkpoint.files import check_files, read_config, write_files
        from rasa_ext.methods import AdapterConfig
        from rasa_ext.serving.expansion import expand

        folder = Path(get_adapter_absolute_path(lora_request.lora_path))
        check_files(folder)
        try:
            ours = read_config(folder).get("peft_type") == AdapterConfig.peft_type
        except FileNotFoundError:
            ours = False  # vLLM's own error has the kind that its server expects
        if not ours:
            return load(self, lora_request)
        manager, config = self._adapter_manager, self.lora_config
        pools = getattr(manager, "rasa_pools", None)

        def check(settings: Any, shapes: Any, rank: int) -> None:
            _check_rank(rank, config.max_lora_rank, lora_request.lora_name)
            _check_base(manager, settings, shapes, lora_request.lora_name)

        skeleton = functools.partial(_skeleton, manager.model.config)
        found = expand(folder, skeleton, pools and pools.keeps, check)
        kept = pools and pools.ready(found.pools, lora_request.lora_name)
        tensors = {key: tensor.to(config.lora_dtype) for key, tensor in found.tensors.items()}
        request = copy.copy(lora_request)
        # vLLM reads a folder, so that all its checks and names of layers are those of any LoRA.
        with tempfile.TemporaryDirectory(prefix="rasa_ext-") as request.lora_path:
            write_files(Path(request.lora_path), found.settings, tensors)
            lora = load(self, request)
        lora.rasa_pools = kept or {}
        return lora

    return _load_adapter


def _skeleton(config: Any) -> Any:
    """Return transformers' model of a config on the meta device, for names and shapes."""
    import transformers

    with torch.device("meta"):
        return getattr(transformers, config.architectures[0])(config)


def _check_base(
    manager: Any, settings: dict[str, Any], shapes: dict[str, tuple[int, ...]], adapter: str
) -> None:
    """Raise ValueError if an adapter is of a base of another width or depth."""
    from rasa_ext.serving.vllm_pools import layers_of, vllm_name

    sites = {
        layer: module
        for name, module in getattr(manager, "modules", {}).items()
        for layer in layers_of(manager, name)
    }
    ours = {vllm_name(manager, name): shape for name, shape in shapes.items()} if sites else {}
    which = f"{adapter!r}: expected an adapter of this base, but"
    for name, (_, width) in ours.items():
        base = getattr(sites.get(name), "base_layer", None)
        if (size := getattr(base, "input_size", width)) != width:
            raise ValueError(f"{which} {name} has {width} inputs in the adapter, here {size}.")
    depth, theirs = _depths(sites), _depths(ours)
    every = getattr(manager.model.config.get_text_config(), "num_hidden_layers", 0) if sites else 0
    chosen = f"{settings.get('target_modules')} {settings.get('exclude_modules') or ''}"
    for kind in theirs.keys() & depth.keys():
        # A stage of a pipeline has a part of the layers.
        few = theirs[kind] < depth[kind] and not re.search(r"\d|\[\^|\\", chosen)
        if few or theirs[kind] > max(depth[kind], every):
            raise ValueError(
                f"{which} it has {theirs[kind]} layers {kind}, here {max(depth[kind], every)}."
            )


def _depths(names: Any) -> dict[str, int]:
    """Return one more than the largest index, by the names of layers without the index."""
    from rasa_ext.patching.grouping import pattern

    found: dict[str, int] = {}
    for name in names:
        if index := re.search(r"(?<=\.)\d+(?=\.)", name):
            found[pattern(name)] = max(found.get(pattern(name), 0), int(index[0]) + 1)
    return found


def _check_rank(rank: int, limit: int, name: str) -> None:
    from rasa_ext.checkpoint.lora_readers import VLLM_RANKS

    if rank > limit:
        needed = next((r for r in VLLM_RANKS if r >= rank), None)
        way = f"start vLLM with --max-lora-rank {needed}" if needed else "merge it: rasa-ext merge"
        raise ValueError(
            f"--max-lora-rank: expected at least {rank} for the adapter {name!r}, whose effective "
            f"rank this is, got {limit}; {way}."
        )
