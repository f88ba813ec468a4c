"""PackSet: the packs of all layers of a group, made in one call for a whole forward.

The first layer that needs a pack packs every layer of the group: one call for the values, and one
autograd node, through which the gradients of all packs come back. The node runs once they are
complete, and sums the pool's gradients over the layers in a fixed order.

A gradient reaches the node as that of a *port*: a tensor of the pack's shape in the accumulation
dtype, expanded from one element. So autograd carries it in float32 whatever the pack's dtype. Where
PyTorch differentiates the products of a pack, the pack is the port.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from operator import methodcaller
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.compiler import is_compiling
from torch.nn.parallel import DistributedDataParallel
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from rasa_ext import ops
from rasa_ext.base_layers.sharded import (
    check_not_reentrant,
    check_sharded_together,
    gather,
    is_sharded,
)
from rasa_ext.nn.adapter import OFFLOADED, Adapter, Packed
from rasa_ext.nn.function import Function, is_transformed
from rasa_ext.nn.precision import is_sharing, restored
from rasa_ext.ops import Factors

_Stamp: TypeAlias = "tuple[Tensor, int, bool, torch.dtype]"
_Port: TypeAlias = "tuple[Tensor | None, Tensor | None]"

_last_step = object()  # replaced after every step of any optimizer in the process


def _stepped(*_: Any) -> None:
    global _last_step
    _last_step = object()


# Fused optimizers of torch and bitsandbytes write without raising a tensor's version.
register_optimizer_step_post_hook(_stepped)

_sharded: weakref.WeakSet[PackSet] = weakref.WeakSet()
"""Sets of layers that an engine shards, and that no optimizer has stepped yet."""


def _check_pools(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    """Raise RuntimeError before the first step if an engine left a pool out."""
    if not _sharded:
        return
    stepped = {id(p) for group in optimizer.param_groups for p in group["params"]}
    while _sharded:
        for adapter in _sharded.pop().adapters():
            # An engine steps shards, even while a gathered pool is in the place of its shard.
            left_out = [tensor for tensor in adapter.pool.values() if id(tensor) in stepped]
            check_sharded_together(adapter.own.values(), left_out)


register_optimizer_step_pre_hook(_check_pools)


class PackSet:
    """The packs of a group's layers. Layers ``join`` it, and adapters ask it with ``take``.

    Every forward packs anew, since PyTorch does not see writes through ``.data``. A layer that
    reads again, or one below the first reader, begins a forward. The first reader packs the group;
    any other layer packs only itself, until the first one reads. A forward inside a backward, such
    as a checkpoint's, reads the packs again. So do steps of ``generate``, without grad: see
    ``Decoding``. Packs are stale, too, after a backward through them, a step of any
    optimizer, or a change of a tensor's identity, version, dtype or ``requires_grad``. So a write
    through ``.data`` is missed by a step of ``generate``, and by a forward that begins at a later
    layer that has not read since the group was packed.

    A layer packs for itself while ``torch.compile`` traces or a CUDA graph is captured, so that
    graphs see new values; if it is a copy that did not join, as a replica of ``nn.DataParallel``;
    if an engine shards the layers, such as FSDP, since it gathers a layer only while the layer
    runs; and with grad if a factor is computed from trained tensors. Copies and pickles of a set
    are empty: a layer joins again as it is copied.

    Args:
        decoding: says whether the model's forward is a step of ``generate``; by default never.
        ask: gives a layer's adapter.
    """

    def __init__(
        self,
        decoding: Decoding | None = None,
        ask: Callable[[Any], Adapter] = methodcaller("adapter"),
    ) -> None:
        self._decoding, self._ask = decoding or Decoding(), ask
        self._members: dict[int, weakref.ref[nn.Module]] = {}
        # Replaced in one assignment, since threads share it.
        self._caches: dict[tuple[torch.dtype, torch.device], _PackCache] = {}
        self._computed = False
        # An engine may leave layers gathered, and still reduce gradients layer by layer.
        self._sharded = False
        self._ddp: Callable[[], Any] = lambda: None  # the last one that ran

    def join(self, index: int, owner: nn.Module) -> None:
        """Make ``owner`` the group's layer number ``index``."""
        self._members[index] = weakref.ref(owner)
        self.drop()

    def drop(self) -> None:
        """Drop the packs."""
        self._caches, self._computed = {}, False

    def take(self, adapter: Adapter, dtype: torch.dtype) -> Packed:
        """Return an adapter's pack in ``dtype``, with ports if gradients are needed."""
        index, sources, grad = adapter.spec.index, adapter.sources(), torch.is_grad_enabled()
        device = sources[0].device
        if is_transformed():
            wide = ops.differentiable_pack(by_expert(adapter.factors()), dtype)
            pack = [matrix.to(dtype) for matrix in wide]
            return Packed(*pack, *pack)
        if is_compiling():
            return _alone(adapter, dtype)
        if _is_capturing(device):
            return _alone(adapter, dtype, by_group=True)
        cache = self._caches.get((dtype, device))
        entry = None if cache is None else cache.entry(index, sources, grad, self._decoding.now)
        if entry is None:
            if (grad and self._computed) or self._sharded:
                return _alone(adapter, dtype)
            only = cache is not None and cache.over and index != cache.first
            cache = self._pack(adapter, dtype, device, only)
            entry = cache.entries.get(index)
            if entry is None:
                return _alone(adapter, dtype)
            if not only:
                self._caches = {**self._caches, (dtype, device): cache}
        assert cache is not None
        cache.read.add(index)
        if cache.made is not None:
            _wait(entry.pack[:2], *cache.made)
        if not grad or not entry.trained:
            return entry.pack
        if not cache.linked:  # a re-entrant checkpoint packs without grad
            # DistributedDataParallel would take a group's gradients as complete too early.
            if is_sharing():
                return _alone(adapter, dtype)
            self._link(cache, self._layers(device))
        if entry.ported is None:
            self._computed = True
            return _alone(adapter, dtype)
        return entry.ported

    def _layers(self, device: torch.device) -> Mapping[int, tuple[Sequence[Tensor], Factors]]:
        """Return the tensors and factors of all layers on ``device`` that still exist."""
        layers = {}
        # A checkpoint around one layer must not count what the others' factors save.
        with saved_tensors_hooks(_unchanged, _unchanged):
            for index, member in self._members.items():
                owner = member()
                if owner is None:
                    continue
                adapter = self._ask(owner)
                sources = adapter.sources()
                if any(map(is_sharded, sources)):
                    self._sharded = True
                    _sharded.add(self)
                    return {}
                if sources[0].device == device and not any(map(Tensor.is_inference, sources)):
                    layers[index] = sources, adapter.factors()
        return layers

    def _pack(
        self, adapter: Adapter, dtype: torch.dtype, device: torch.device, only: bool
    ) -> _PackCache:
        """Pack the adapter's layer, and unless ``only``, all others on ``device``.

        The result is empty if the layer is not of the group.
        """
        cache = _PackCache(adapter.spec.index)
        if device.type == "meta" and any("_hf_hook" in vars(m) for m in adapter.owner.modules()):
            raise RuntimeError(OFFLOADED)
        if torch.is_grad_enabled() and any(hasattr(s, "grad_sample") for s in adapter.sources()):
            raise RuntimeError(
                "expected a model without Opacus, which takes an example's gradients from single "
                "layers and would miss the pools; use torch.func.vmap over torch.func.grad."
            )
        if torch.is_grad_enabled() and adapter.sources()[0].dtype != adapter.config.adapter_dtype:
            self._restore(adapter)
        member = self._members.get(adapter.spec.index)
        if member is None or member() is not adapter.owner:
            return cache
        layers = self._layers(device)
        if layers:
            self._check_averaged(adapter)
        if only:
            layers = {key: layers[key] for key in layers if key == adapter.spec.index}
        for index, (sources, _) in layers.items():
            # Read before packing, so that a write by another thread meanwhile makes it stale.
            cache.entries[index] = _Entry(sources)
        # A pack made in inference mode could not be saved for a backward.
        with torch.inference_mode(False):
            for group in _alike(layers):
                packs = pack_layers([layers[index][1] for index in group], dtype)
                for index, Ap, Bp in zip(group, *packs, strict=True):
                    cache.entries[index].pack = Packed(Ap, Bp)
                cache.groups.append((group, packs))
        if torch.is_grad_enabled():
            self._link(cache, layers)
        if device.type == "cuda":
            stream = torch.cuda.current_stream(device)
            cache.made = stream, stream.record_event()
        return cache

    def adapters(self) -> list[Adapter]:
        """Return the adapters of all layers that still exist."""
        owners = (member() for member in self._members.values())
        return [self._ask(owner) for owner in owners if owner is not None]

    def _restore(self, adapter: Adapter) -> None:
        """Restore dtypes in all layers; copies that FSDP casts for the computation stay."""
        if not is_sharing():
            for of_layer in (adapter, *self.adapters()):
                restored(of_layer.sources(), of_layer.config.adapter_dtype)

    def _check_averaged(self, adapter: Adapter) -> None:
        """Raise RuntimeError if several processes would train a pool each on its own."""
        if not torch.is_grad_enabled() or not is_sharing() or dist.get_world_size() == 1:
            return
        pool = [tensor for tensor in adapter.pool.values() if tensor.requires_grad]
        ddp = DistributedDataParallel._active_ddp_module
        if ddp is None:
            if pool and len(self.adapters()) < adapter.spec.num_layers:
                raise RuntimeError(
                    "expected all layers that share a pool in this process, as several processes "
                    "train, but some are gone, as in a stage of a pipeline, which is not "
                    "supported; use FSDP, or pass groups= to share pools within a stage."
                )
        elif ddp is not self._ddp():
            if not set(map(id, pool)) <= set(map(id, ddp.parameters())):
                raise RuntimeError(
                    "expected DistributedDataParallel around a module that has the pool of the "
                    "layers inside, but it would average only the layers; wrap the module around "
                    "all layers, which has the rasa_pool parameters, or the whole model."
                )
            self._ddp = weakref.ref(ddp)

    def _link(
        self, cache: _PackCache, layers: Mapping[int, tuple[Sequence[Tensor], Factors]]
    ) -> None:
        """Make the ports of all packs, unless a factor is computed from trained tensors.

        If one is, every layer packs alone, both in a forward and when a checkpoint recomputes it.
        """
        if all(
            index in layers and _is_direct(*layers[index])
            for group, _ in cache.groups
            for index in group
        ):
            for group, packs in cache.groups:
                factors = [layers[index][1] for index in group]
                group_ports = ports(packs, factors, weakref.ref(cache))
                for index, pair in zip(group, group_ports, strict=True):
                    entry = cache.entries[index]
                    entry.ported = Packed(*entry.pack[:2], *pair)
        cache.linked = True

    def __reduce__(self) -> tuple[type[PackSet], tuple[Any, Any]]:
        return type(self), (self._decoding, self._ask)


class Decoding:
    """Whether the model's current forward is a step of ``generate``: its cache holds tokens.

    Hooks on the model set it. Under ``torch.compile`` it stays False.
    """

    now = False

    def watch(self, model: nn.Module) -> list[Any]:
        """Watch a model's forwards; return the hooks to remove."""
        return [
            model.register_forward_pre_hook(self._begin, with_kwargs=True),
            model.register_forward_hook(self._end, always_call=True),
        ]

    def _begin(self, model: nn.Module, args: Any, kwargs: Mapping[str, Any]) -> None:
        if not is_compiling():
            self.now = any(map(_holds_tokens, kwargs.values()))  # transformers renamed the cache

    def _end(self, model: nn.Module, args: Any, output: Any) -> None:
        if not is_compiling():
            self.now = False


def _holds_tokens(cache: Any) -> bool:
    """Return whether an argument is a cache of transformers that holds tokens."""
    if not hasattr(cache, "get_seq_length"):
        return False
    try:
        return bool(cache.get_seq_length() > 0)
    except ValueError:  # a cache without attention counts no tokens
        return False


class _PackCache:
    """Packs of several layers in one dtype and on one device, and what they were made of."""

    def __init__(self, first: int) -> None:
        self.step, self.first = _last_step, first
        self.entries: dict[int, _Entry] = {}
        self.groups: list[tuple[list[int], tuple[Tensor, Tensor]]] = []
        self.read: set[int] = set()
        """The layers that have read."""
        self.over = False
        """Whether a new forward has begun, and not with the first layer."""
        self.linked = False
        """Whether there are ports."""
        self.spent = False
        """Whether a backward has gone through a port."""
        self.made: tuple[Any, Any] | None = None
        """On a GPU, the stream that packed, and an event after the kernels."""

    def entry(
        self, index: int, sources: Sequence[Tensor], grad: bool, decoding: bool
    ) -> _Entry | None:
        """Return a layer's entry, or None if it is stale.

        Every forward of every layer calls this, and microseconds count: hence one loop over plain
        comparisons.
        """
        entry = self.entries.get(index)
        if entry is None or self.step is not _last_step or len(entry.stamps) != len(sources):
            return None
        grad = grad and entry.trained
        again = (not decoding or grad) and (index in self.read or index < self.first)
        old = self.spent or again or (grad and not self.linked)
        if old and torch._C._current_graph_task_id() == -1:  # not inside a backward
            self.over = self.over or (again and index != self.first)
            return None
        if self.over:  # inside a backward, too, as in the forward that it repeats
            return None
        for source, (stamped, version, trained, dtype) in zip(sources, entry.stamps, strict=True):
            if source is not stamped or source._version != version:
                return None
            if source.requires_grad is not trained or source.dtype is not dtype:
                return None
        return entry


class _Entry:
    """One layer's pack."""

    pack: Packed

    def __init__(self, sources: Sequence[Tensor]) -> None:
        # Holding the tensors ensures that no other tensor gets their identities.
        self.stamps: list[_Stamp] = [(s, s._version, s.requires_grad, s.dtype) for s in sources]
        self.trained = any(source.requires_grad for source in sources)
        self.ported: Packed | None = None
        """The pack with ports; None if a factor is computed."""


def _unchanged(tensor: Tensor) -> Tensor:
    return tensor


def _is_direct(sources: Sequence[Tensor], factors: Factors) -> bool:
    """Return whether every trained factor is itself one of the adapter's tensors."""
    known = set(map(id, sources))
    return all(t is None or id(t) in known or not t.requires_grad for t in factors)


def _alone(adapter: Adapter, dtype: torch.dtype, by_group: bool = False) -> Packed:
    """Pack one layer, with grad by PyTorch's operations or, if possible, ``by_group``'s.

    The group's operations are two kernels of 14, but slower for one layer on a CPU.
    """
    gather(adapter.sources())
    if torch.is_grad_enabled() and adapter.spec.num_layers > 1:
        check_not_reentrant(adapter.pool.values())
    factors, sources = adapter.factors(), adapter.sources()
    trained = torch.is_grad_enabled() and any(source.requires_grad for source in sources)
    if trained and not (by_group and _is_direct(sources, factors)):
        return pack_alone(factors, dtype)
    packs = pack_layers([factors], dtype)
    return Packed(packs[0][0], packs[1][0], *(ports(packs, [factors])[0] if trained else ()))


def pack_alone(factors: Factors, dtype: torch.dtype) -> Packed:
    """Pack one layer by operations that autograd differentiates; the ports are wide packs."""
    wide = ops.differentiable_pack(by_expert(factors), dtype, _multiple(factors, dtype))
    Ap, Bp = (matrix.detach().to(dtype) for matrix in wide)
    return Packed(Ap, Bp, *(matrix if matrix.requires_grad else None for matrix in wide))


def _alike(layers: Mapping[int, tuple[Any, Factors]]) -> list[list[int]]:
    """Group layers that one call can pack: equal shapes and dtypes, and one pool."""
    groups: dict[Any, list[int]] = {}
    for index, (_, (A, A_pool, B, B_pool, d)) in layers.items():
        key: Any = index
        if A.dim() == 2:
            diagonal = None if d is None else (d.shape, d.dtype)
            key = A.shape, A.dtype, B.shape, B.dtype, diagonal, id(A_pool), id(B_pool)
        groups.setdefault(key, []).append(index)
    return list(groups.values())


@torch.no_grad()
def pack_layers(
    factors: Sequence[Factors], dtype: torch.dtype, multiple: int | None = None
) -> tuple[Tensor, Tensor]:
    """Pack layers of equal shapes with one pool to Ap (L, Rp, in) and Bp (L, Rp, out).

    Stacked experts come alone, and the packs are (1, E, Rp, in) and (1, E, Rp, out). The rank is
    padded to ``multiple``, by default as the products like it. Not differentiable.
    """
    first, multiple = factors[0], multiple or _multiple(factors[0], dtype)
    if first.A.dim() == 3:
        Ap, Bp = ops.differentiable_pack(by_expert(first), dtype, multiple)
        return Ap.to(dtype)[None], Bp.to(dtype)[None]
    A, _, B, _, d = map(list, zip(*factors, strict=True))
    d = [] if first.d is None else d
    return ops.pack_group(A, first.A_pool, B, first.B_pool, d, dtype, multiple)


def _multiple(factors: Factors, dtype: torch.dtype) -> int:
    """Return the multiple to which the rank is padded."""
    if factors.A.dim() == 3:
        return ops.experts_rank_multiple(dtype)
    return ops.rank_multiple(factors.A.device.type)


def by_expert(factors: Factors) -> Factors:
    """Return the factors that are packed: for stacked experts, all but a shared pool."""
    A, A_pool, B, _, d = factors
    if A.dim() == 2 or A_pool is None or A_pool.dim() == 3:
        return factors
    return Factors(A, None, B, None, None if d is None else d[:, : A.shape[1]])


def ports(
    packs: tuple[Tensor, Tensor],
    factors: Sequence[Factors],
    cache: Callable[[], _PackCache | None] = lambda: None,
) -> list[_Port]:
    """Return the ports of every layer in what ``pack_layers`` made; gradients go to the factors.

    A port is None if no gradient is needed. A backward makes ``cache()`` spent.
    """
    first, layers = factors[0], len(factors)
    A, _, B, _, d = zip(*factors, strict=True)
    outputs = _Gate.apply(packs, factors, cache, first.A_pool, first.B_pool, *A, *B, *d)
    A_pool, B_pool = (p is not None and p.requires_grad for p in (first.A_pool, first.B_pool))
    return [
        (
            down if A_pool or a.requires_grad else None,
            up if B_pool or b.requires_grad or (v is not None and v.requires_grad) else None,
        )
        for down, up, a, b, v in zip(outputs[:layers], outputs[layers:], A, B, d, strict=True)
    ]


class _Gate(Function):
    """One node for the packs of L layers, with two ports a layer, which take no memory.

    The node holds the factors itself instead of saving them for the backward, so that several
    backwards can run through it, and a checkpoint does not count them. So it checks versions.
    """

    @staticmethod
    def forward(
        ctx: Any,
        packs: tuple[Tensor, Tensor],
        factors: Sequence[Factors],
        cache: Callable[[], _PackCache | None],
        *tensors: Tensor | None,
    ) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.factors, ctx.cache = factors, cache
        ctx.versions = [_versions(of_layer) for of_layer in factors]
        if ops.differentiates_products(packs[0]):
            return *packs[0].unbind(0), *packs[1].unbind(0)
        zero = packs[0].new_zeros((), dtype=ops.accumulation_dtype(packs[0].dtype))
        down, up = (zero.expand(pack.shape).unbind(0) for pack in packs)
        return *down, *up

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        factors: Sequence[Factors] = ctx.factors
        layers, cache = len(factors), ctx.cache()
        if cache is not None:
            cache.spent = True
        downs, ups = grads[:layers], grads[layers:]
        live = [i for i in range(layers) if downs[i] is not None or ups[i] is not None]
        if any(_versions(factors[i]) != ctx.versions[i] for i in live):
            raise RuntimeError(
                "expected an adapter that is unchanged since the forward, but it has been modified "
                "by an inplace operation, such as an optimizer's step; run the forward again."
            )
        results: list[Tensor | None] = [None] * (2 + 3 * layers)
        if live:
            chosen = (_complete([side[i] for i in live]) for side in (downs, ups))
            results[:2], own = _unpack([factors[i] for i in live], *chosen)
            for i, of_layer in zip(live, own, strict=True):
                results[2 + i :: layers] = of_layer
        needs = ctx.needs_input_grad[3:]
        wanted = (grad if need else None for grad, need in zip(results, needs, strict=True))
        return None, None, None, *wanted


def _versions(factors: Factors) -> list[int]:
    return [-1 if tensor is None else tensor._version for tensor in factors]


def _complete(grads: Sequence[Tensor | None]) -> list[Tensor]:
    """Replace None by zeros; return an empty list if all are None."""
    some = next((grad for grad in grads if grad is not None), None)
    return [] if some is None else [torch.zeros_like(some) if g is None else g for g in grads]


def _unpack(
    factors: Sequence[Factors], downs: list[Tensor], ups: list[Tensor]
) -> tuple[Sequence[Tensor | None], list[Sequence[Tensor | None]]]:
    """Return the gradients of A_pool and B_pool, and of every layer's A, B and d."""
    A, _, B, B_pool, d = by_expert(factors[0])
    if A.dim() == 3:
        down, up = (grads[0] if grads else None for grads in (downs, ups))
        dA, dA_pool, dB, dB_pool, dd = ops.pack_experts_backward(down, up, B, B_pool, d)
        if dd is not None and factors[0].d is not None:
            dd = torch.nn.functional.pad(dd, (0, factors[0].d.shape[1] - dd.shape[1]))
        return (dA_pool, dB_pool), [(dA, dB, dd)]
    diagonals = [f.d for f in factors if f.d is not None]
    # For second derivatives, by PyTorch's operations alone.
    unpack = ops.unpack_group if torch.is_grad_enabled() else ops.pack_group_backward
    results = unpack(downs, ups, [f.B for f in factors], B_pool, diagonals)
    wanted = [bool(downs), bool(downs), bool(ups), bool(ups), bool(ups and diagonals)]
    dA, dA_pool, dB, dB_pool, dd = (r if w else None for r, w in zip(results, wanted, strict=True))
    none = [None] * len(factors)
    own = zip(*(none if grads is None else grads for grads in (dA, dB, dd)), strict=True)
    return (dA_pool, dB_pool), list(own)


def _wait(pack: tuple[Tensor, Tensor], maker: Any, packed: Any) -> None:
    """Make this stream wait until the pack is written, and keep the memory until it has read.

    Otherwise a stream other than the maker's could read the pack too early, and the memory could be
    reused as soon as the maker drops the pack.
    """
    stream = torch.cuda.current_stream(pack[0].device)
    if stream != maker:
        stream.wait_event(packed)
        for tensor in pack:
            tensor.record_stream(stream)


def _is_capturing(device: torch.device) -> bool:
    if device.type != "cuda":
        return False
    # This asks about the current device, which may not be the pack's.
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()
