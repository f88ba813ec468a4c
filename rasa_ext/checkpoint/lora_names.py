"""What the formats of a LoRA beside PEFT's have in common: plain pairs, and families of models."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from rasa_ext.checkpoint.files import PREFIX
from rasa_ext.patching.state import adapted_layers, check_no_experts
from rasa_ext.patching.tokens import ROWS

_A, _B = ".lora_A.weight", ".lora_B.weight"
INSTEAD = "save what rasa_ext.merge_and_unload(model) returns"


def pairs_of(tensors: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """Give A (R, in) and B (out, R) by the layer's name in the model, from PEFT's tensors."""
    return {
        key.removeprefix(PREFIX).removesuffix(_A): (A, tensors[key.removesuffix(_A) + _B])
        for key, A in tensors.items()
        if key.endswith(_A)
    }


def check_plain(
    form: str,
    reader: str,
    root: nn.Module,
    saved: Mapping[str, Tensor],
    families: tuple[str, ...],
) -> None:
    """Raise ValueError where a reader of pairs alone would not compute the adapted model."""
    kind = getattr(getattr(root, "config", None), "model_type", None)
    if kind not in families:
        raise ValueError(
            f"format: {form!r} is written for the model types {', '.join(families)}, whose names "
            f"in {reader} are known, got {kind!r}; {INSTEAD}, or write 'peft'."
        )
    check_no_experts(root, f"the format {form!r}")
    if rows := next((key for key in saved if key.endswith(ROWS)), None):
        raise ValueError(
            f"format: {form!r} holds low-rank pairs alone, but trainable_token_indices has trained "
            f"rows of {rows.removesuffix(ROWS)}; {INSTEAD}, or write 'peft'."
        )
    embeddings = {id(m.weight) for m in root.modules() if isinstance(m, nn.Embedding)}
    for name, layer in adapted_layers(root):
        if id(layer.weight) in embeddings:
            raise ValueError(
                f"format: {name} is tied to the embedding, and {reader} has no place for its LoRA, "
                f"so that {form!r} cannot hold it; leave it out of target_modules, or untie the "
                "two and merge."
            )
    if saved:
        raise ValueError(
            f"format: {form!r} holds low-rank pairs alone, but modules_to_save has trained "
            f"{next(iter(saved))}; {INSTEAD}, or write 'peft'."
        )
