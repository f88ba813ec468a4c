"""Adapted experts under PEFT: parameters by adapter name, computation by ``AdaptedExperts``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor, nn

from rasa_ext.base_layers.experts import is_transposed
from rasa_ext.nn.adapted_experts import AdaptedExperts
from rasa_ext.nn.adapter import Adapter
from rasa_ext.patching.parts import Part, deltas_of, stack_parts
from rasa_ext.peft.layer import RasaPeftLinear
from rasa_ext.peft.named import NamedAdapters


class RasaPeftExpertWeight(NamedAdapters):
    """Named adapters of one stacked weight (E, out, in), which PEFT switches, merges and saves.

    It is a child of ``RasaPeftExperts`` under the weight's name. The base still owns the weight.
    """

    experts: RasaPeftExperts

    def __init__(self, experts: RasaPeftExperts, name: str) -> None:
        super().__init__()
        self.__dict__["experts"] = experts  # a reference, not a submodule
        self.name = name
        # While merged: the original weights.
        self.merged_base: dict[tuple[str, int], Tensor] | None = None
        self._reset()
        self.train(experts.training)

    def get_base_layer(self) -> nn.Module:
        """Return the experts without adapters."""
        base: nn.Module = self.experts.base_layer
        return base

    @property
    def weight(self) -> Tensor:
        """The stacked weight in the base's layout."""
        weight: Tensor = getattr(self.get_base_layer(), self.name)
        return weight

    def forget(self) -> None:
        """Clear the experts' cached packs."""
        self.experts.drop_pack()

    def parts(self, adapter_names: Sequence[str]) -> list[Part]:
        """Return one part per expert, with the changes of these adapters."""
        adapters = [self.named(name) for name in adapter_names]
        base = self.get_base_layer()
        return stack_parts(adapters[0].spec.name, base, self.name, adapters, self)

    def get_delta_weight(self, adapter: str) -> Tensor:
        """Compute an adapter's dW of all experts, in the layout of the stacked weight.

        It is in float32, or float64 over a float64 base, and as large as the whole weight.
        """
        delta = deltas_of(self.parts([adapter]))
        return delta.mT if is_transposed(self.get_base_layer()) else delta


class RasaPeftExperts(AdaptedExperts):
    """Frozen stacked experts with any number of named adapters on each weight.

    The adapters are children under the weights' names. They are PEFT's layers; this module is not,
    and computes with the active ones.
    """

    unmerging = RasaPeftLinear.unmerging

    def stacks(self) -> dict[str, RasaPeftExpertWeight]:
        """Return the adapter owners by the name of the weight."""
        children = self._modules.items()
        return {name: each for name, each in children if isinstance(each, RasaPeftExpertWeight)}

    def add_stack(self, name: str) -> None:
        """Prepare a weight for adapters, unless that is done already."""
        if name not in self._modules:
            # add_module refuses a name that the base resolves.
            self._modules[name] = RasaPeftExpertWeight(self, name)

    def live_adapters(self, name: str) -> list[Adapter]:
        """Return the adapters that a forward adds to a stacked weight."""
        stack = self._modules.get(name)
        if not isinstance(stack, RasaPeftExpertWeight):
            return []
        return [stack.named(each) for each in stack.live_names()]

    def adapters(self) -> Iterator[Adapter]:
        """Return every adapter of the experts, active or not."""
        for stack in self.stacks().values():
            yield from stack.adapters()

    @property
    def merged(self) -> bool:
        """Whether adapters are merged into the weights, so that a forward adds none."""
        stacks = self.stacks().values()
        return any(stack.merged for stack in stacks) and not any(
            stack.live_names() for stack in stacks
        )

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Compute (T, H) from the base and every active adapter."""
        stacks = self.stacks().values()
        for stack in stacks:
            if stack.disable_adapters and stack.merged:
                stack.unmerge()
        self.disabled = not any(stack.live_names() for stack in stacks)
        return super().forward(*args, **kwargs)

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """Return the base to PEFT, with adapters merged if asked."""
        for stack in self.stacks().values() if merge else ():
            stack.merge(safe_merge, adapter_names)
        base: nn.Module = self.base_layer
        return base
