"""Gradient boosting of rank-1 adapters over a stack that stays (XGBLoRA, arXiv 2410.19694)."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from rasa_ext.methods.base import checked_integer, checked_number, fresh_A
from rasa_ext.methods.lora import LoraConfig
from rasa_ext.nn.rasa import RasaLinear
from rasa_ext.patching.state import adapted_layers, check_unmerged, patch_state

if TYPE_CHECKING:
    from transformers import TrainerCallback


class Boosting:
    """Train one booster after the other: W + s B_1 A_1 + s B_2 A_2 + ..., only the last of them.

    After so many steps the present pair of every drawn layer is pushed to the layer's stack and a
    fresh one begins, B at zero and without the optimizer's state, its step count included; other
    layers are drawn. The base is never written, so that it may be quantized, no rounding adds up
    and the adapter stays one: ``merge_and_unload`` or ``export_lora`` at the end give what T
    merges would have.

    Args:
        model: patched with ``LoraConfig``, usually of rank 1, whose scale s every booster has.
        optimizer: that of the adapter's parameters.
        steps: the optimizer's steps of a booster.
        layers: of how many layers, drawn at random, a booster consists; all unless given.
        alpha: what a booster counts once it is pushed. Other than 1 the outputs jump then.
        seed: of the draws.

    Raises:
        TypeError, ValueError: naming the argument; the model is patched with another method.

    Example:
        >>> from rasa_ext.methods import LoraConfig
        >>> model = rasa_ext.patch_model(model, config=LoraConfig(rank=1, alpha=1.0))
        >>> optimizer = torch.optim.AdamW(rasa_ext.adapter_parameters(model), lr=5e-4)
        >>> boosting = rasa_ext.training.Boosting(model, optimizer, steps=2)
        >>> tokens = torch.tensor([[1, 2, 3]])
        >>> for _ in range(4):
        ...     model(tokens, labels=tokens).loss.backward()
        ...     optimizer.step()
        ...     pushed = boosting.step()
        ...     optimizer.zero_grad()
        >>> {row.R for row in rasa_ext.summary(model)}  # two boosters pushed, one begun
        {3}
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        steps: int,
        layers: int | None = None,
        alpha: float = 1.0,
        seed: int = 0,
    ) -> None:
        config = patch_state(model).config
        if not isinstance(config, LoraConfig) or not config.train_A:
            raise ValueError(
                "model: expected one patched with LoraConfig(train_A=True), got "
                f"{type(config).__name__}."
            )
        names = [name for name, _ in adapted_layers(model)]
        if checked_integer("steps", steps) < 1:
            raise ValueError(f"steps: expected an integer >= 1, got {steps}.")
        if layers is not None and not 1 <= checked_integer("layers", layers) <= len(names):
            raise ValueError(
                f"layers: expected 1 to {len(names)}, as many as the model has, got {layers}."
            )
        self.alpha = checked_number("alpha", alpha)
        self._model, self._optimizer = model, optimizer
        self._steps, self._count, self._layers = steps, 0, layers
        self._generator = torch.Generator().manual_seed(seed)
        self._drawn = self._draw(names)
        self._freeze()

    def step(self) -> bool:
        """Count a step of the optimizer; tell whether it was a booster's last."""
        self._count += 1
        if self._count % self._steps:
            return False
        self._push()
        self._drawn = self._draw([name for name, _ in adapted_layers(self._model)])
        self._freeze()
        return True

    def penalty(self) -> Tensor:
        """Give the sum of ||A||^2 + ||B||^2 of the present booster, differentiable.

        The paper's regularisation of a booster, whose weight it leaves to its user.
        """
        parts = [part for _, layer in self._live() for part in (layer.A, layer.B)]
        return torch.stack([part.square().sum().to(parts[0].device) for part in parts]).sum()

    @property
    def drawn(self) -> tuple[str, ...]:
        """The layers of the present booster."""
        return self._drawn

    def state_dict(self) -> dict[str, Any]:
        """Give what a resumed training needs beside the model and the optimizer."""
        state = self._generator.get_state()
        return {"count": self._count, "drawn": list(self._drawn), "generator": state}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up what ``state_dict`` gave, over a model with the adapter of that moment."""
        self._count, self._drawn = state["count"], tuple(state["drawn"])
        self._generator.set_state(state["generator"])
        self._freeze()

    def callback(self) -> TrainerCallback:
        """Give a callback for transformers' Trainer that does the steps."""
        from transformers import TrainerCallback

        boosting = self

        class BoostingCallback(TrainerCallback):  # type: ignore[misc]  # untyped without it
            def on_optimizer_step(self, *_: Any, **__: Any) -> None:
                boosting.step()

        return BoostingCallback()

    def _live(self) -> list[tuple[str, RasaLinear]]:
        return [each for each in adapted_layers(self._model) if each[0] in self._drawn]

    def _draw(self, names: list[str]) -> tuple[str, ...]:
        if self._layers is None:
            return tuple(names)
        order = torch.randperm(len(names), generator=self._generator)[: self._layers]
        return tuple(names[i] for i in sorted(order.tolist()))

    def _freeze(self) -> None:
        for name, layer in adapted_layers(self._model):
            for parameter in (layer.A, layer.B):
                parameter.requires_grad_(name in self._drawn)

    @torch.no_grad()
    def _push(self) -> None:
        check_unmerged(self._model)
        state = patch_state(self._model)
        config = state.config
        assert isinstance(config, LoraConfig)  # what the constructor has seen to
        live = self._live()
        counts = dict(config.stack)
        counts |= {name: counts.get(name, 0) + config.rank for name, _ in live}
        state.config = dataclasses.replace(config, stack=counts)
        for _, layer in adapted_layers(self._model):
            layer.config = state.config
        for _, layer in live:
            own = layer.own_tensors()
            down, up = layer.A.clone(), (self.alpha * layer.B).t()
            if "stack_A" in own:
                down, up = torch.cat((own["stack_A"], down)), torch.cat((own["stack_B"].t(), up))
            tensors = {"A": layer.A, "B": layer.B, "stack_A": down, "stack_B": up.t()}
            layer.replace(state.config, tensors)
            layer.A.copy_(fresh_A(config.rank, layer.place, layer.A.dtype))
            layer.B.zero_()
            for parameter in (layer.A, layer.B):
                parameter.grad = None
                self._optimizer.state.pop(parameter, None)
