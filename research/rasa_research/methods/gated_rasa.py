"""RaSA with gates on pooled ranks: a proximal step closes gates, and pruning removes their ranks.

The proximal step is from SoRA (arXiv 2311.11696). SoRA's config derives from this one.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from torch import Tensor, nn

from rasa_ext import RasaConfig, RasaLinear
from rasa_ext.methods import (
    Factors,
    LayerSpec,
    Rate,
    checked_choice,
    checked_integer,
    checked_number,
    document_fields,
    option,
)
from rasa_ext.nn import RasaPool
from rasa_ext.patching import owners
from rasa_ext.training import adapter_of, replace_tensors, step_callback

if TYPE_CHECKING:
    from transformers import TrainerCallback

Kept = tuple[tuple[str, tuple[int, int, int]], ...] | Mapping[str, Sequence[int]]
"""Three counts for each pruned layer, by name: private ranks, pooled ranks that the layer reads,
and ranks of the pool. A config stores them as pairs."""


@dataclasses.dataclass(frozen=True)
class GatedRasaConfig(RasaConfig):
    """The config of a RaSA with gates: the entries of d for pooled ranks. Not in any paper.

    ``rasa_research.training.ProximalGates`` drives gates to zero like SoRA (arXiv 2311.11696), and
    ``prune`` removes the ranks of closed gates. A pruned layer has ``slots``, the ranks that it
    reads from the remaining pool. Adapted experts have no gates.

    Raises:
        TypeError, ValueError: naming the field, what was expected and what was given.

    Example:
        >>> from rasa_research.methods import GatedRasaConfig
        >>> model = rasa_ext.patch_model(model, config=GatedRasaConfig(rank=8, k=1))
        >>> from rasa_research.training import ProximalGates
        >>> gates = ProximalGates(model, threshold=1e-3)
    """

    method: ClassVar[str] = "gated-rasa"
    title: ClassVar[str] = "RaSA with gates"
    paper: ClassVar[str] = "2503.12576"

    k: int | None = option(
        None,
        "Number of the r ranks that every layer gives to the group's shared pool, as in RaSA. None "
        "means max(rank // 8, 1).",
    )
    start: str = option(
        "paper",
        "Where the diagonal starts, as in RaSA. With 'paper' every gate starts at one, with 'lora' "
        "the gates of ranks that other layers gave start at 1/L.",
    )
    gate_threshold: float | None = option(
        None,
        "Distance by which `rasa-ext sft` moves each gate towards zero in a step, such as "
        "1e-3; required there. In your own loop, pass it to ProximalGates.",
    )
    prune: bool = option(
        False, "Whether `rasa-ext sft` removes the ranks of closed gates at the end."
    )
    gate_rate: float = option(
        1.0,
        "Factor on the learning rate for d, which has the gates, in the optimizer's groups from "
        "rasa_ext.training.parameter_groups.",
    )
    kept: Kept = option(
        (),
        "Ranks of pruned layers: private, pooled, and of the pool. prune sets it, and so does "
        "load_official_experts when it joins an expert's gate and up in one adapter.",
        counts=3,
    )

    def __post_init__(self) -> None:
        """Check every field and convert it to the canonical form."""
        super().__post_init__()
        threshold = self.gate_threshold
        if threshold is not None:
            _checked_size("gate_threshold", threshold)
            if self.experts:
                raise ValueError(
                    f"gate_threshold: expected None with experts={self.experts!r}, whose pools "
                    f"cannot be pruned, got {threshold}."
                )
        if not 0 < checked_number("gate_rate", self.gate_rate) < math.inf:
            raise ValueError(f"gate_rate: expected a number above 0, got {self.gate_rate}.")
        for name, counts in dict(self.kept).items():
            if not isinstance(counts, Sequence) or len(counts) != 3:
                raise ValueError(f"kept: expected three counts for {name!r}, got {counts}.")
        self._set(kept=tuple((name, tuple(counts)) for name, counts in dict(self.kept).items()))

    def kept_at(self, name: str) -> tuple[int, int, int] | None:
        """Return a pruned layer's counts of ranks (private, pooled, of the pool), or None."""
        return _by_name(self.kept).get(name)

    def layer_tensors(self, spec: LayerSpec) -> dict[str, Tensor]:
        """Make A (r-k, in), B (out, r-k) and d, all trained, and slots if the layer is pruned."""
        tensors = super().layer_tensors(spec)
        if kept := self.kept_at(spec.name):
            tensors["slots"] = torch.arange(kept[1], device=spec.device)
        return tensors

    def factors(self, own: Mapping[str, Tensor], pool: Mapping[str, Tensor], spec: Any) -> Factors:
        """Return A, B, d and the ranks of the pool that the layer reads."""
        slots = own.get("slots")
        if slots is None or not pool:
            return super().factors(own, pool, spec)
        A_pool, B_pool = pool["A"].index_select(-2, slots), pool["B"].index_select(-1, slots)
        return Factors(own["A"], A_pool, own["B"], B_pool, own["d"])

    def ranks_at(self, spec: LayerSpec) -> tuple[int, int]:
        """Return a layer's numbers of private and pooled ranks, after any pruning."""
        kept = self.kept_at(spec.name)
        return super().ranks_at(spec) if kept is None else kept[:2]

    def pool_size(self, spec: LayerSpec) -> int:
        """Return the number of ranks in a layer's pool, after any pruning."""
        kept = self.kept_at(spec.name)
        return super().pool_size(spec) if kept is None else kept[2]

    def learning_rates(self, spec: LayerSpec) -> dict[str, Rate]:
        """Return ``gate_rate`` and no weight decay for d, if it has gates."""
        entries = self.gate_entries(*self.ranks_at(spec))
        gates = entries.stop > entries.start
        return {"d": Rate(lr=self.gate_rate, weight_decay=0.0)} if gates else {}

    def callbacks(self, model: nn.Module) -> Sequence[TrainerCallback]:
        """Return the callback that moves gates after each step and, with ``prune``, prunes."""
        if self.gate_threshold is None:
            raise ValueError(
                f"gate_threshold: expected a number with the method {self.method!r}, because "
                "nothing else closes its gates, got none; try 1e-3."
            )
        return [ProximalGates(model, self.gate_threshold).callback(prune=self.prune)]

    def gate_entries(self, own: int, pooled: int) -> slice:
        """Return which entries of d are gates: the entries of pooled ranks."""
        return slice(own, own + pooled)

    def gate_scale(self, num_layers: int) -> float:
        """Return where d starts on a rank that the layer gave; a gate is an entry divided by it."""
        if self.start == "lora":
            return cast(float, self.alpha) / self.rank
        return cast(float, self.alpha) / 2 / max(num_layers * cast(int, self.k), 1)


@functools.lru_cache(maxsize=8)
def _by_name(
    pairs: tuple[tuple[str, tuple[int, int, int]], ...],
) -> dict[str, tuple[int, int, int]]:
    return dict(pairs)


document_fields(GatedRasaConfig)


Threshold = float | Callable[[int], float]
"""A threshold for gates, or a callable from the number of steps so far to a threshold."""


class ProximalGates:
    """The proximal step of SoRA: after each optimizer step, gates move towards zero.

    With the rule "soft", a gate g becomes sign(g) max(|g| - threshold, 0), the proximal point of
    threshold * |g|. The rule "official" follows the official code: gates with |g| > threshold
    shrink by the threshold, then gates with |g| < threshold become zero. So every gate with
    |g| < 2 threshold vanishes. A gate at zero still gets a gradient and may open again.

    A gate is an entry of d divided by a scale. Under ``SoraConfig`` every entry is a gate,
    g = d / s. Under ``GatedRasaConfig`` only entries of pooled ranks are gates; they start at one.

    Args:
        model: patched with ``SoraConfig`` or ``GatedRasaConfig``.
        threshold: how far every gate moves in a step, not multiplied by the learning rate. Or a
            callable from the number of steps so far, such as ``threshold_schedule`` returns.
        rule: "soft" or "official".
        l1: the weight of ``penalty()``, which the official code also adds to the loss.

    Raises:
        TypeError, ValueError: naming the argument; the model has no gates.

    Example:
        >>> from rasa_research.methods import GatedRasaConfig
        >>> from rasa_research.training import ProximalGates
        >>> model = rasa_ext.patch_model(model, config=GatedRasaConfig(rank=8, k=1))
        >>> optimizer = torch.optim.AdamW(rasa_ext.training.parameter_groups(model, lr=5e-4))
        >>> gates = ProximalGates(model, threshold=1e-3)
        >>> tokens = torch.tensor([[1, 2, 3]])
        >>> loss = model(tokens, labels=tokens).loss
        >>> loss.backward()
        >>> optimizer.step()
        >>> gates.step()
    """

    def __init__(
        self, model: nn.Module, threshold: Threshold, rule: str = "soft", l1: float = 0.0
    ) -> None:
        if not callable(threshold):
            _checked_size("threshold", threshold)
        _checked_size("l1", l1)
        self.rule = checked_choice("rule", rule, ("soft", "official"))
        self.threshold, self.l1, self.steps = threshold, l1, 0
        self._model = model
        _gates(model)

    def step(self) -> None:
        """Move every gate; call it after ``optimizer.step()``.

        Raises:
            TypeError, ValueError: a callable threshold returned no number >= 0, or the model has
                no gates left.
        """
        threshold = self.threshold(self.steps) if callable(self.threshold) else self.threshold
        _checked_size("threshold", threshold)
        self.steps += 1
        with torch.no_grad():
            for d, entries, scale in _gates(self._model):
                gates, by = d[entries], threshold * scale
                if self.rule == "soft":
                    gates.copy_(nn.functional.softshrink(gates, by))
                else:
                    shrunk = torch.where(gates.abs() > by, gates - by * gates.sign(), gates)
                    gates.copy_(torch.where(shrunk.abs() < by, 0.0, shrunk))

    def penalty(self) -> Tensor:
        """Return l1 times the mean |g| over all gates, differentiable, to add to a loss."""
        sizes = [d[entries].abs() / scale for d, entries, scale in _gates(self._model)]
        device = sizes[0].device
        return self.l1 * torch.cat([size.to(device) for size in sizes]).mean()

    def add_penalty_gradient(self) -> None:
        """Add the gradient of ``penalty()`` to d.grad, if you cannot change the loss itself.

        Call it between ``loss.backward()`` and ``optimizer.step()``. It equals ``penalty()`` in the
        loss if gradients are clipped after it or not at all; Trainer's callback comes after.
        """
        gates = _gates(self._model)
        count = sum(entries.stop - entries.start for _, entries, _ in gates)
        for d, entries, scale in gates:
            if self.l1 and d.grad is not None:
                d.grad[entries] += self.l1 / (scale * count) * d.detach()[entries].sign()

    def open_gates(self) -> tuple[int, int]:
        """Return the number of gates that are not zero, and the number of all gates."""
        flags = [d.detach()[entries] != 0 for d, entries, _ in _gates(self._model)]
        return sum(int(flag.sum()) for flag in flags), sum(map(len, flags))

    def state_dict(self) -> dict[str, int]:
        """Return the state for resuming training: the number of steps so far."""
        return {"steps": self.steps}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Restore a state from ``state_dict``."""
        self.steps = state["steps"]

    def callback(self, *, prune: bool = False) -> TrainerCallback:
        """Return a callback for transformers' Trainer that runs the steps and adds the penalty.

        Trainer's checkpoints contain the state. At the end, if training was not stopped early, the
        callback prints how many gates are open; with ``prune`` it removes the others.
        """
        end = functools.partial(self._end, prune)
        return step_callback(self, before=self.add_penalty_gradient, end=end)

    def _end(self, pruned: bool) -> str:
        """Prune if ``pruned``; return a sentence on the gates and ranks that are left."""
        text = "{:,} of {:,} gates are open".format(*self.open_gates())
        if pruned:
            before, after = prune(self._model)
            text += f"; without the others the effective rank is {after}, from {before}"
        return f"{text}."


def threshold_schedule(
    first: float, last: float, stages: int, steps: int, kind: str = "linear"
) -> Callable[[int], float]:
    """Make a threshold that rises in stages, like the schedules of SoRA's official code.

    Args:
        first, last: the thresholds of the first and of the last stage.
        stages: the number of stages.
        steps: optimizer steps per stage; the last stage never ends.
        kind: the quantity that grows evenly from stage to stage: the threshold ("linear"), its
            exponential ("log"; the official code's "log_linear"), or its logarithm ("exp"; the
            official code's "exp_linear").

    Returns:
        A callable from the number of steps so far to the threshold.

    Raises:
        TypeError, ValueError: naming the argument.

    Example:
        >>> from rasa_research.training import threshold_schedule
        >>> schedule = threshold_schedule(0.0, 6e-4, stages=4, steps=100)
        >>> [round(1e4 * schedule(step), 1) for step in (0, 99, 100, 350, 999)]
        [0.0, 0.0, 2.0, 6.0, 6.0]
    """
    checked_choice("kind", kind, ("linear", "log", "exp"))
    for name, count in (("stages", stages), ("steps", steps)):
        if checked_integer(name, count) < 1:
            raise ValueError(f"{name}: expected an integer >= 1, got {count}.")
    for name, size in (("first", first), ("last", last)):
        if _checked_size(name, size) == 0 and kind == "exp":
            raise ValueError(f"{name}: expected a number above 0 with kind='exp', got {size}.")

    def threshold(step: int) -> float:
        part = min(step // steps, stages - 1) / max(stages - 1, 1)
        if kind == "log":
            return last + math.log(part + (1 - part) * math.exp(first - last))
        if kind == "exp":
            return float(first * (last / first) ** part)
        return first + (last - first) * part

    return threshold


def _checked_size(name: str, value: Any) -> float:
    """Return ``value``; raise TypeError or ValueError if it is not a finite number >= 0."""
    size = checked_number(name, value)
    if not 0 <= size < math.inf:
        raise ValueError(f"{name}: expected a finite number >= 0, got {size}.")
    return size


@torch.no_grad()
def balance(model: nn.Module) -> None:
    """Normalize the rows of A and columns of B and multiply d by their norms; outputs stay equal.

    Training can evade a penalty on d by growing A and B. After balancing, d measures the
    contribution of each rank. The norms of a pool's slot multiply the d of all layers. Ranks with a
    zero row or column, such as those of a fresh B, do not change. The optimizer's moments are not
    adjusted.

    Args:
        model: patched with ``RasaConfig``, ``GatedRasaConfig`` or ``SoraConfig``.

    Raises:
        TypeError, ValueError: the model is no module, not patched, of another method, or has
            adapted experts.

    Example:
        >>> from rasa_research.training import balance
        >>> model = rasa_ext.patch_model(model, rank=8, k=1)
        >>> balance(model)
    """
    config, layers = adapter_of(model, RasaConfig)
    _check_no_experts(model, "balance")
    pools: dict[RasaPool, Tensor] = {}
    for layer in layers.values():
        own = config.ranks_at(layer.spec)[0]
        layer.d[:own] *= _normalize(layer.A, layer.B)
        if layer.pool is not None and layer.pool_tensors():
            if layer.pool not in pools:
                pools[layer.pool] = _normalize(layer.pool.A, layer.pool.B)
            layer.d[own:] *= pools[layer.pool].to(layer.d)[_slots(layer)]


def _normalize(A: Tensor, B: Tensor) -> Tensor:
    """Normalize rows of A (R, in) and columns of B (out, R); return products of norms (R,)."""
    down, up = A.norm(dim=1), B.norm(dim=0)
    whole = (down > 0) & (up > 0)
    down, up = torch.where(whole, down, 1.0), torch.where(whole, up, 1.0)
    A /= down.unsqueeze(1)
    B /= up
    return down * up


@torch.no_grad()
def prune(model: nn.Module) -> tuple[int, int]:
    """Remove ranks with a gate of exactly zero; outputs stay equal, and layers get cheaper.

    A layer loses private ranks with a zero gate, and no longer reads pooled ranks with a zero gate.
    A slot that no layer reads leaves the pool. Pruning makes new parameters: make a new optimizer,
    and wrap the model in DistributedDataParallel again. Saving, loading, merging and exporting work
    as before.

    Args:
        model: patched with ``SoraConfig`` or ``GatedRasaConfig``.

    Returns:
        The largest effective rank of a layer before and after.

    Raises:
        TypeError, ValueError: the model is no module, not patched, wrapped in
            DistributedDataParallel, or has no gates.
        RuntimeError: the adapter is merged.

    Example:
        >>> from rasa_research.methods import GatedRasaConfig
        >>> from rasa_research.training import prune
        >>> model = rasa_ext.patch_model(model, config=GatedRasaConfig(rank=8, k=1))
        >>> before, after = prune(model)
        >>> before == after  # no gate is zero yet
        True
    """
    _gates(model)
    config, layers = adapter_of(model, GatedRasaConfig)
    before = max(layer.effective_rank for layer in layers.values())
    groups: dict[RasaPool | RasaLinear, dict[str, RasaLinear]] = {}
    for name, layer in layers.items():
        groups.setdefault(layer.pool or layer, {})[name] = layer
    kept: dict[str, tuple[int, int, int]] = {}
    left: dict[RasaPool | RasaLinear, dict[str, Tensor]] = {}
    for owner, members in groups.items():
        slots = _used_slots(members.values(), config)
        for name, layer in members.items():
            left[layer] = _pruned(layer, config, slots)
            kept[name] = (left[layer]["A"].shape[0], len(left[layer]["slots"]), len(slots))
        if isinstance(owner, RasaPool):
            rows = {"A": owner.A[slots], "B": owner.B[:, slots]} if len(slots) else {}
            left[owner] = {name: nn.Parameter(t.contiguous()) for name, t in rows.items()}
    replace_tensors(model, dataclasses.replace(config, kept=kept), left)
    return before, max(layer.effective_rank for layer in layers.values())


def _used_slots(layers: Iterable[RasaLinear], config: GatedRasaConfig) -> Tensor:
    """Return the slots (n,) of a group's pool that at least one layer still reads."""
    used: set[int] = set()
    for layer in layers:
        own = config.ranks_at(layer.spec)[0]
        used.update(_slots(layer)[layer.d[own:] != 0].tolist())
    return torch.tensor(sorted(used), dtype=torch.long)


def _pruned(layer: RasaLinear, config: GatedRasaConfig, slots: Tensor) -> dict[str, Tensor]:
    """Return a layer's tensors without zero gates; ``slots`` are places in the remaining pool.

    A private rank without a gate stays, even if its entry of d is zero.
    """
    ranks = config.ranks_at(layer.spec)
    own, entries = ranks[0], config.gate_entries(*ranks)
    left = layer.d != 0
    left[: entries.start] = True
    private, pooled = left[:own], left[own:]
    where = torch.searchsorted(slots.to(layer.d.device), _slots(layer)[pooled])
    return {
        "A": nn.Parameter(layer.A[private]),
        "B": nn.Parameter(layer.B[:, private].contiguous()),
        "d": nn.Parameter(layer.d[left]),
        "slots": where,
    }


def _slots(layer: RasaLinear) -> Tensor:
    """Return the slots of the pool that a layer reads now."""
    slots = layer.own_tensors().get("slots")
    if slots is not None:
        return slots
    return torch.arange(layer.d.shape[0] - layer.A.shape[0], device=layer.d.device)


def _gates(model: nn.Module) -> list[tuple[Tensor, slice, float]]:
    """Return every layer's d, the slice of gates in it, and the scale that divides them.

    Raises ValueError if there are no gates, or adapted experts, whose pools cannot be pruned.
    """
    config, layers = adapter_of(model, GatedRasaConfig)
    _check_no_experts(model, "moving or pruning gates")
    found = []
    for layer in layers.values():
        entries = config.gate_entries(*config.ranks_at(layer.spec))
        if entries.stop > entries.start:
            found.append((layer.d, entries, config.gate_scale(layer.spec.num_layers)))
    if not found:
        raise ValueError(
            "model: expected gates, from SoraConfig or from GatedRasaConfig with k > 0, but "
            f"{type(config).__name__} has none{' left' if config.kept else ''}."
        )
    return found


def _check_no_experts(model: nn.Module, what: str) -> None:
    """Raise ValueError if a model has adapted experts, which the operation ``what`` rejects."""
    for name, owner in owners(model):
        if not isinstance(owner, RasaLinear):
            raise ValueError(
                f"model: {what} is for adapters of linear layers, but {name!r} has adapted "
                "experts; patch it with experts=None."
            )
