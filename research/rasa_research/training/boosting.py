"""Gradient boosting of low-rank adapters over a frozen stack (XGBLoRA, arXiv 2410.19694)."""

from __future__ import annotations

import dataclasses
import math
import random
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from rasa_ext import RasaLinear
from rasa_ext.methods import checked_integer, checked_number
from rasa_ext.nn import RasaPool
from rasa_ext.training import adapter_of, replace_tensors, step_callback
from rasa_research.methods import BoostedLoraConfig, BoostedPoolConfig
from rasa_research.methods.boosted_lora import Boosted
from rasa_research.methods.stack import pushed

if TYPE_CHECKING:
    from transformers import TrainerCallback


class Boosting:
    """Gradient boosting: of W + s B_1 A_1 + s B_2 A_2 + ..., only the last pair is trained.

    After ``steps`` optimizer steps, the current pair of every drawn layer is pushed to the layer's
    stack. A fresh pair starts, with B at zero and without optimizer state or step count, and new
    layers are drawn. The base weights never change, so the base may be quantized and no rounding
    errors add up. There is still only one adapter: ``merge_and_unload`` or ``export_lora`` at the
    end has the result of T separate merges.

    With ``BoostedPoolConfig``, all layers of a group share a booster's pair, and each drawn layer
    has an entry of d that weights it. Layers that are not drawn have a zero there. A group without
    drawn layers keeps the current pair for a later booster.

    Args:
        model: patched with ``BoostedLoraConfig`` or ``BoostedPoolConfig``.
        optimizer: an optimizer of the adapter's parameters. If it has a method ``forget``, like
            ``rasa_research.optim.LoraPro``, that is called with the parameters that start again.
        steps: optimizer steps per booster.
        layers: number of layers in a booster, drawn at random; defaults to all layers.
        alpha: factor on a booster when it is pushed. Unless it is 1, outputs jump then.
        seed: seed for drawing layers and fresh factors; must be equal on every process.

    Raises:
        TypeError, ValueError: naming the argument; the model is patched with another method.

    Example:
        >>> from rasa_research import methods, training
        >>> model = rasa_ext.patch_model(model, config=methods.BoostedLoraConfig())
        >>> optimizer = torch.optim.AdamW(rasa_ext.adapter_parameters(model), lr=5e-4)
        >>> boosting = training.Boosting(model, optimizer, steps=2)
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
        names = list(_adapter(model)[1])
        if checked_integer("steps", steps) < 1:
            raise ValueError(f"steps: expected an integer >= 1, got {steps}.")
        if layers is not None and not 1 <= checked_integer("layers", layers) <= len(names):
            raise ValueError(
                f"layers: expected 1 to {len(names)}, the number of adapted layers, got {layers}."
            )
        self.alpha = checked_number("alpha", alpha)
        self._seed = checked_integer("seed", seed)
        self._model, self._optimizer = model, _checked_optimizer(optimizer, model)
        self._steps, self._count, self._layers = steps, 0, layers
        self._drawn = self._draw(self._generator())
        self._freeze()

    def step(self) -> bool:
        """Count an optimizer step; return whether it was the booster's last step.

        Raises:
            RuntimeError: the adapter is merged; or ``layers`` or ``train_past`` is used in several
                processes.
        """
        if self._layers is not None:
            _check_one_process("layers")
        if getattr(_adapter(self._model)[0], "train_past", False):
            _check_one_process("train_past")
        self._count += 1
        if self._count % self._steps:
            return False
        generator = self._generator()
        drawn = self._draw(generator)
        self._push(generator)
        self._drawn = drawn
        self._freeze()
        return True

    def penalty(self) -> Tensor:
        """Return the sum of ||A||^2 + ||B||^2 over the current booster's pairs, differentiable.

        This is the paper's regularisation. The paper does not specify a weight for it.
        """
        parts = [part for pair in self._live() for part in (pair.owner.A, pair.owner.B)]
        return torch.stack([part.square().sum().to(parts[0].device) for part in parts]).sum()

    @property
    def drawn(self) -> tuple[str, ...]:
        """Names of the current booster's layers."""
        return self._drawn

    def state_dict(self) -> dict[str, int]:
        """Return the state for resuming training, besides the model and the optimizer."""
        return {"count": self._count, "seed": self._seed, "pushed": self._pushed()}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Restore a state from ``state_dict``; the model needs the adapter saved at that step.

        Raises:
            ValueError: the model has more, or fewer, ranks of pushed boosters.
        """
        if state["pushed"] != (pushed := self._pushed()):
            raise ValueError(
                f"state: expected a model with the {state['pushed']} ranks of former boosters, "
                f"got {pushed}; load the adapter that was saved at that step with "
                "rasa_ext.load_adapter(base, directory)."
            )
        self._count, self._seed = state["count"], state["seed"]
        self._drawn = self._draw(self._generator())
        self._freeze()

    def callback(self) -> TrainerCallback:
        """Return a callback for transformers' Trainer that runs the steps.

        Trainer's checkpoints contain the state. To resume, build the model with ``load_adapter``
        from the adapter that was saved at the checkpoint's step, so that it has the boosters.
        """
        return step_callback(self)

    def _pushed(self) -> int:
        return sum(dict(_adapter(self._model)[0].stack).values())

    def _generator(self) -> torch.Generator:
        """Return the current booster's random generator, equal on every process."""
        mixed = random.Random(f"{self._seed} {self._count // self._steps}")
        return torch.Generator().manual_seed(mixed.getrandbits(63))

    def _pairs(self) -> list[_Pair]:
        """Return the current pair of every layer or pool."""
        found: dict[RasaLinear | RasaPool, _Pair] = {}
        for name, layer in _adapter(self._model)[1].items():
            owner = layer if layer.pool is None else layer.pool
            found.setdefault(owner, _Pair(owner, {})).layers[name] = layer
        return list(found.values())

    def _live(self) -> list[_Pair]:
        """Return the pairs that the current booster trains."""
        return [pair for pair in self._pairs() if pair.layers.keys() & set(self._drawn)]

    def _draw(self, generator: torch.Generator) -> tuple[str, ...]:
        names = list(_adapter(self._model)[1])
        if self._layers is None:
            return tuple(names)
        order = torch.randperm(len(names), generator=generator)[: self._layers]
        return tuple(names[i] for i in sorted(order.tolist()))

    @torch.no_grad()
    def _freeze(self) -> None:
        """Train only drawn layers; if a pool's B is zero, set d: scale if drawn, otherwise 0."""
        for owner, layers in self._pairs():
            drawn = layers.keys() & set(self._drawn)
            for parameter in (owner.A, owner.B):
                parameter.requires_grad_(bool(drawn))
            for layer in layers.values():  # train() did not restore what was frozen
                layer.restore()
            if not isinstance(owner, RasaPool):
                continue
            begins = not owner.B.any()
            for name, layer in layers.items():
                for tensor in layer.own_tensors().values():
                    if isinstance(tensor, nn.Parameter):
                        tensor.requires_grad_(name in drawn)
                if begins:
                    scale = _adapter(self._model)[0].scale
                    layer.d.fill_(scale if name in drawn else 0.0)

    @torch.no_grad()
    def _push(self, generator: torch.Generator) -> None:
        config, live = _adapter(self._model)[0], self._live()
        counts = dict(config.stack)
        changed: dict[RasaLinear | RasaPool, dict[str, Tensor]] = {}
        grown: dict[Tensor, Tensor] = {}
        for owner, layers in live:
            first = next(iter(layers.values()))
            own = first.own_tensors() if owner is first else first.pool_tensors()
            changed[owner] = own | pushed(own, owner.A, self.alpha * owner.B)
            for name, layer in layers.items():
                counts[name] = counts.get(name, 0) + config.rank
                if owner is not first:
                    past = layer.own_tensors()["stack_d"]
                    behind = torch.cat((past, layer.d)).detach()
                    if isinstance(past, nn.Parameter):
                        behind = grown[past] = nn.Parameter(behind)
                    changed[layer] = {"d": layer.d, "stack_d": behind}
        replace_tensors(self._model, dataclasses.replace(config, stack=counts), changed)
        self._forget(list(grown))
        for group in self._optimizer.param_groups:
            group["params"] = [grown.get(each, each) for each in group["params"]]
        for owner, layers in live:
            bound = 1 / math.sqrt(next(iter(layers.values())).spec.in_features)
            drawn = torch.empty(owner.A.shape, dtype=owner.A.dtype)
            owner.A.copy_(drawn.uniform_(-bound, bound, generator=generator))
            owner.B.zero_()
            entries = [layer.d for layer in layers.values()] if isinstance(owner, RasaPool) else []
            self._forget([owner.A, owner.B, *entries])

    def _forget(self, parameters: list[Tensor]) -> None:
        """Drop the optimizer's state and the gradients of parameters that start again."""
        for parameter in parameters:
            parameter.grad = None
            self._optimizer.state.pop(parameter, None)
        forget = getattr(self._optimizer, "forget", None)
        if forget is not None:
            forget(parameters)


def _checked_optimizer(optimizer: Any, model: nn.Module) -> torch.optim.Optimizer:
    """Return ``optimizer``; raise if it is not one, or misses an A or B of ``model``."""
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(
            f"optimizer: expected a torch.optim.Optimizer, got {type(optimizer).__name__}."
        )
    stepped = {id(each) for group in optimizer.param_groups for each in group["params"]}
    for name, layer in _adapter(model)[1].items():
        owner = layer if layer.pool is None else layer.pool
        if not {id(owner.A), id(owner.B)} <= stepped:
            raise ValueError(
                "optimizer: expected one of rasa_ext.adapter_parameters(model), got one without "
                f"the parameters of {name!r}."
            )
    return optimizer


def _check_one_process(what: str) -> None:
    """Raise RuntimeError in several processes, whose engines do not follow what is trained."""
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        raise RuntimeError(
            f"{what}: expected one process, got several, and it changes which parameters are "
            "trained; engines average the gradients of those that were trained at first."
        )


def _adapter(model: nn.Module) -> tuple[Boosted, dict[str, RasaLinear]]:
    return adapter_of(model, BoostedLoraConfig, BoostedPoolConfig)


class _Pair(NamedTuple):
    """The owner of a current pair, and the layers that read the pair, by name."""

    owner: RasaLinear | RasaPool
    layers: dict[str, RasaLinear]
