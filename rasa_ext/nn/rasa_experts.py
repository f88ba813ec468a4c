"""RasaExperts and RasaBank: the modules of a patched model that own the adapters of experts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from rasa_ext.base_layers.experts import bank_shape
from rasa_ext.nn.adapted_experts import AdaptedExperts
from rasa_ext.nn.adapter import Adapter, Method
from rasa_ext.nn.rasa import AdapterOwner, RasaPool


class RasaBank(AdapterOwner):
    """The adapter of one stacked weight (E, out, in): dW[e] is that of a linear layer for every e.

    Under RaSA it owns A (E, r-k, in), B (E, out, r-k) and d (E, R), and reads the pool of its
    group, A (L*k, in) and B (out, L*k), or (E, L*k, in) and (E, out, L*k) where each expert has a
    pool of its own over the layers. It stands in its ``RasaExperts`` under the weight's name.

    Args:
        config: the method's config, which says what the bank owns.
        place: its place in its group; that of index 0 registers ``pool``.
        pool: the group's.

    Example:
        >>> config = rasa_ext.RasaConfig(rank=4, k=1, experts="shared")
        >>> model = rasa_ext.patch_model(moe_model, config=config)
        >>> bank = model.get_submodule("model.layers.0.mlp.experts.gate_up_proj")
        >>> bank.A.shape[:2], bank.effective_rank  # four experts, two layers
        (torch.Size([4, 3]), 5)
    """

    def __init__(self, config: Method, place: Any, pool: RasaPool | None) -> None:
        super().__init__()
        self.begin(config, place, pool)

    def extra_repr(self) -> str:
        """Show shapes and ranks."""
        return (
            f"experts={self.place.experts}, in_features={self.place.in_features}, "
            f"out_features={self.place.out_features}, effective_rank={self.effective_rank}"
        )


class RasaExperts(AdaptedExperts):
    """Frozen stacked experts, with an adapter over each of their weights, or over one of them.

    It stands where the experts stood: forward(hidden states (T, H), chosen experts (T, k), their
    weights (T, k)) gives (T, H). The adapters are children under the weights' own names.

    Args:
        base_layer: the experts.
        banks: the adapters by the name of the weight.

    Raises:
        RuntimeError: in a forward, the adapter is sharded over processes; or it is merged, and the
            forward is one of training with grad.

    Example:
        >>> config = rasa_ext.RasaConfig(rank=4, k=1, experts="shared")
        >>> model = rasa_ext.patch_model(moe_model, config=config)
        >>> experts = model.get_submodule("model.layers.0.mlp.experts")
        >>> sorted(experts.banks())
        ['down_proj', 'gate_up_proj']
    """

    def __init__(self, base_layer: nn.Module, banks: Mapping[str, RasaBank]) -> None:
        super().__init__(base_layer)
        for name, bank in banks.items():
            _, out_features, in_features = bank_shape(base_layer, name)
            if (bank.place.out_features, bank.place.in_features) != (out_features, in_features):
                raise ValueError(f"banks: the adapter of {name!r} is made for another shape.")
            self._modules[name] = bank  # add_module refuses a name that the base answers for
        self._banks = tuple(banks)
        self.train(base_layer.training)

    def banks(self) -> dict[str, RasaBank]:
        """Give the adapters by the name of the weight."""
        return {name: self._modules[name] for name in self._banks}  # type: ignore[misc]  # banks

    def adapter(self, name: str) -> Adapter | None:
        """Give the adapter of a stacked weight, or None."""
        bank: Any = self._modules.get(name)
        return None if bank is None else bank.adapter()

    def adapters(self) -> Iterator[Adapter]:
        """Give every adapter of the experts."""
        for bank in self.banks().values():
            yield bank.adapter()
