"""LoraSet: several LoRAs of one base over one shared basis, stored in one file."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from rasa_ext import RasaConfig, __version__
from rasa_ext.checkpoint import (
    PREFIX,
    AdapterState,
    check_finite,
    check_tensors,
    own_key,
    plain_settings,
    read_adapter,
    write_adapter,
)
from rasa_ext.patching import plan_layers
from rasa_research.solver.shared_basis import SharedBasis

LORA_SET = "LORA_SET"
"""The peft_type of a set."""


@dataclasses.dataclass(frozen=True)
class LoraSet:
    """Several LoRAs of one base over one basis: adapter i changes a layer by B diag(d_i) A.

    A layer has one B (out, R) and one A (R, in) for all adapters, and d (n, R) with one row per
    adapter. A row of zeros means that the adapter does not change the layer. ``compress_many``
    makes a set; ``save`` writes it and ``load`` reads it. ``expand`` writes LoRAs for servers.

    Example:
        >>> from rasa_research import solver, training
        >>> import copy
        >>> for name in ("maths", "code"):
        ...     tuned = rasa_ext.patch_model(copy.deepcopy(model), rank=8, k=1)
        ...     rasa_ext.save_adapter(tuned, f"{name}-adapter")
        ...     _ = rasa_ext.export_lora(tuned, name)
        >>> solver.compress_many(["maths", "code"], rank=12).loras.save("set")
        >>> loras = solver.LoraSet.load("set")
        >>> loras.names, loras.rank
        (('maths', 'code'), 12)
        >>> loras.expand("maths", "maths-12")  # a LoRA of rank 12, for PEFT and servers
        >>> model = loras.install(model, "maths")
        >>> model = training.load_diagonals(model, loras.diagonals("code"))
    """

    names: tuple[str, ...]
    """The names of the adapters."""
    layers: dict[str, SharedBasis]
    """B, A and d by the layer's name in the model, in one dtype."""
    lora: dict[str, Any]
    """Settings about the base model that ``expand`` writes into PEFT's configuration."""

    @property
    def rank(self) -> int:
        """R, equal in every layer."""
        return next(iter(self.layers.values())).A.shape[0]

    @property
    def num_parameters(self) -> int:
        """Number of parameters in the file: R * (in + out) + n * R for every layer."""
        return sum(tensor.numel() for layer in self.layers.values() for tensor in layer)

    def diagonals(self, name: str) -> dict[str, Tensor]:
        """Return one adapter's diagonal (R,) of every layer, for ``load_diagonals``."""
        i = self.index(name)
        return {layer: basis.d[i].clone() for layer, basis in self.layers.items()}

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Write the set into a directory, for ``load``; an error leaves an old set unchanged."""
        tensors = {
            _key(name, field): tensor
            for name, basis in self.layers.items()
            for field, tensor in basis._asdict().items()
        }
        settings = {
            "peft_type": LORA_SET,
            "adapters": list(self.names),
            "r": self.rank,
            "lora": self.lora,
            "rasa_ext_version": __version__,
        }
        write_adapter(directory, settings, tensors)

    @classmethod
    def load(cls, directory: str | os.PathLike[str]) -> LoraSet:
        """Read what ``save`` wrote; raise FileNotFoundError or ValueError if it is damaged."""
        (config, tensors), where = read_adapter(directory), str(directory)
        if (kind := config.get("peft_type")) != LORA_SET:
            raise ValueError(
                f"{where}: expected the output of compress_many or `rasa-ext compress-many`, with "
                f"peft_type {LORA_SET!r} in adapter_config.json, got {kind!r}."
            )
        check_finite(tensors, where)
        names, rank, lora = (config.get(key) for key in ("adapters", "r", "lora"))
        if (
            not isinstance(names, list)
            or not all(isinstance(name, str) for name in names)
            or type(rank) is not int
            or not isinstance(lora, dict)
            or not tensors
        ):
            raise ValueError(
                f"{where}: expected tensors, and in adapter_config.json a list of names as "
                f"adapters, an integer r and an object lora, got {names!r}, {rank!r} and {lora!r}; "
                "use a complete copy of it."
            )
        layers = dict.fromkeys(key.rpartition(".")[0].removeprefix(PREFIX) for key in tensors)
        expected = {}
        for name in layers:
            B, A, d = (_key(name, field) for field in "BAd")
            expected[B] = (*(tensors[B].shape[:1] if B in tensors else ()), rank)
            expected[A] = (rank, *(tensors[A].shape[-1:] if A in tensors else ()))
            expected[d] = (len(names), rank)
        check_tensors(tensors, expected, where)
        found = {
            name: SharedBasis(**{field: tensors[_key(name, field)] for field in "BAd"})
            for name in layers
        }
        return cls(tuple(names), found, {key: lora[key] for key in _TOLD if key in lora})

    def expand(self, name: str, directory: str | os.PathLike[str]) -> None:
        """Write one adapter as a LoRA of rank R in PEFT's format, for every layer of the set.

        lora_B = B diag(d_i), lora_A = A, and the scale is 1. Raises ValueError for an unknown name.
        """
        i = self.index(name)
        tensors = {}
        for layer, basis in self.layers.items():
            tensors[f"{PREFIX}{layer}.lora_A.weight"] = basis.A
            tensors[f"{PREFIX}{layer}.lora_B.weight"] = basis.B * basis.d[i]
        write_adapter(directory, plain_settings(self.rank, **self.lora), tensors)

    @torch.no_grad()
    def install(self, model: nn.Module, name: str) -> nn.Module:
        """Patch a base model, in place, with one adapter: RaSA with k = 0 over shared B and A.

        ``training.load_diagonals(model, loras.diagonals(other))`` then switches to another adapter.
        Raises ValueError or TypeError if the set does not fit the model, which is then unchanged.
        """
        i = self.index(name)
        shapes = {key: (B.shape[0], A.shape[1]) for key, (B, A, _) in self.layers.items()}
        plan = plan_layers(model, RasaConfig(rank=self.rank, k=0), shapes, "loras")
        tensors = {}
        for key, basis in self.layers.items():
            tensors[own_key(key, "A")], tensors[own_key(key, "B")] = basis.A, basis.B
            tensors[own_key(key, "d")] = basis.d[i]
        return AdapterState(plan, tensors).install(model)

    def index(self, name: str) -> int:
        """Return the index of an adapter by name; raise ValueError if there is none."""
        if name not in self.names:
            raise ValueError(f"name: expected one of {', '.join(self.names)}, got {name!r}.")
        return self.names.index(name)


def lora_settings(configs: Mapping[str, Mapping[str, Any]], layers: list[str]) -> dict[str, Any]:
    """Return PEFT's settings about the base model for the LoRAs that a set expands to.

    ``configs`` has the adapters' PEFT configs by name. If all of them have equal lists of
    target_modules and no setting that excludes layers, the set uses that list; otherwise it lists
    every layer by full name.
    """
    first = next(iter(configs.values()))
    chosen = [config.get("target_modules") for config in configs.values()]
    lists = [sorted(each) for each in chosen if isinstance(each, list)]
    by_names = len(lists) == len(chosen) and all(each == lists[0] for each in lists)
    narrowed = any(config.get(key) for config in configs.values() for key in _NARROWING)
    tasks = {config.get("task_type") for config in configs.values()}
    return {
        "task_type": tasks.pop() if len(tasks) == 1 else None,
        "base_model_name_or_path": first.get("base_model_name_or_path"),
        "target_modules": chosen[0] if by_names and not narrowed else layers,
        "fan_in_fan_out": any(config.get("fan_in_fan_out") for config in configs.values()),
    }


_TOLD = ("task_type", "base_model_name_or_path", "target_modules", "fan_in_fan_out")
"""Settings about the base model in a set's file."""

# Settings besides target_modules that exclude layers.
_NARROWING = ("exclude_modules", "layers_to_transform", "layers_pattern")


def _key(name: str, field: str) -> str:
    return f"{PREFIX}{name}.lora_set_{field}"
