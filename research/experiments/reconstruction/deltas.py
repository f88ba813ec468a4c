"""Weight changes between two models, grouped by the layers that would share a pool."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from rasa_ext.commands.models import find_smollm2, load_model
from rasa_ext.methods import RasaConfig
from rasa_ext.patching.targets import make_plan


def tuned_deltas(weights: Path) -> dict[str, list[Tensor]]:
    """Return the weight changes of the fine-tune stored in ``weights``; see ``deltas_of``."""
    return deltas_of(
        load_model(find_smollm2(), "float32"), load_model(str(weights / "tuned"), "float32")
    )


def deltas_of(base: Any, tuned: Any) -> dict[str, list[Tensor]]:
    """Return the layers' weight changes, each (out, in) float32, by module type such as q_proj.

    Groups and their order are like those of ``rasa_ext.patch_model`` with all linear layers.

    Raises ValueError if ``tuned`` lacks a layer of the base or has it in another shape.
    """
    before, after = dict(base.named_modules()), dict(tuned.named_modules())
    found = {}
    for group in make_plan(base, RasaConfig()).groups:
        for name in group.names:
            if name not in after or after[name].weight.shape != before[name].weight.shape:
                raise ValueError(f"tuned: expected layer {name} with the base's shape, got none.")
        found[group.names[0].rpartition(".")[2]] = [
            after[name].weight.detach().float() - before[name].weight.detach().float()
            for name in group.names
        ]
    return found
