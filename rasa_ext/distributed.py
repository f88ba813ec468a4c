"""Training in many processes: the base is sharded, and every process has the whole adapter.

An adapter is small and a pool belongs to many layers, so all trained parameters are replicated.
``shard_model`` shards the base with ``fully_shard`` (FSDP2). ``replicate_adapter`` is for a base
that others shard: transformers by ``tp_plan``, or accelerate.
"""

from __future__ import annotations

import contextlib
import functools
import math
import warnings
import weakref
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_leaves

from rasa_ext.base_layers.sharded import is_dtensor
from rasa_ext.nn.adapter import AdaptedModule
from rasa_ext.nn.split import SplitLinear
from rasa_ext.patching.state import (
    is_patched,
    parameters_of_adapters,
    patch_state,
    unwrap,
)

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

__all__ = ["check_averaged", "no_sync", "replicate_adapter", "shard_model", "unwrap"]


def shard_model(
    model: nn.Module,
    mesh: DeviceMesh,
    *,
    blocks: Sequence[nn.Module] | None = None,
    **options: Any,
) -> nn.Module:
    """Shard a patched model's base over the processes of a mesh, and replicate the adapter.

    ``fully_shard`` shards the frozen parameters block by block, and gathers them while their block
    runs. Trained parameters (A, B, d, pools, ``modules_to_save``) stay whole on every process. They
    move to the mesh's device and get the first process's values. At the end of every backward their
    gradients are averaged over the mesh. So clipping, optimizers, ``save_adapter`` and
    ``load_adapter`` work as in a single process. Every process must have built an equal base.

    Args:
        model: a model that ``patch_model`` patched, or a PEFT model with RaSA adapters, not
            wrapped. It may be on the CPU: parts move to the mesh's device as they are sharded.
        mesh: from ``torch.distributed.init_device_mesh``. With two dimensions, the base is
            replicated over the first and sharded over the second.
        blocks: the modules to gather as one each. Defaults to the outermost items of the model's
            ``ModuleList`` and ``Sequential`` that hold an adapted layer. All else is gathered with
            the model itself.
        options: options of ``fully_shard``, such as ``reshard_after_forward``; not ``mp_policy``:
            give the base its dtype before patching.

    Returns:
        The same object.

    Raises:
        TypeError, ValueError, RuntimeError: the model is not patched, or is wrapped, sharded or
            merged already, or the adapter is on the meta device. The model is then unchanged.

    Example:
        One process; ``torchrun`` starts one per device.

        >>> import torch.distributed as dist
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> mesh = dist.init_device_mesh("cpu", (1,))
        >>> model = rasa_ext.patch_model(model, rank=8, k=1)
        >>> model = rasa_ext.distributed.shard_model(model, mesh)
        >>> tokens = torch.tensor([[1, 2, 3]])
        >>> model(tokens, labels=tokens).loss.backward()
        >>> rasa_ext.save_adapter(model, "adapter")
        >>> dist.destroy_process_group()
    """
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import fully_shard

    if not isinstance(mesh, DeviceMesh):
        raise TypeError(
            f"mesh: expected a DeviceMesh, got {type(mesh).__name__}; make one with "
            "torch.distributed.init_device_mesh."
        )
    if options.get("mp_policy") is not None:
        raise ValueError(
            "mp_policy: expected none, got one, which would cast tensors between the base and the "
            "float32 adapter; call model.to(torch.bfloat16) before patching, or use autocast."
        )
    replicated = _checked(model)
    for name, parameter in model.named_parameters():
        if is_dtensor(parameter):
            raise ValueError(
                f"model: expected a model that is not sharded, but {name!r} is a DTensor; call "
                "shard_model once, on the patched model, instead of fully_shard."
            )
    chosen = blocks_of(model) if blocks is None else _ordered(model, blocks)
    groups = [mesh.get_group(dim) for dim in range(mesh.ndim)]
    _place(replicated, groups, mesh.device_type)
    ignored = set(replicated)
    for module in (*chosen, model):
        fully_shard(module, mesh=mesh, ignored_params=ignored, **options)
    _average(model, replicated, groups)
    return model


def replicate_adapter(model: nn.Module, accelerator: Any = None) -> nn.Module:
    """Replicate an adapter on all processes, over a base that others shard.

    Trained parameters (A, B, d, pools, ``modules_to_save``) get the first process's values. At the
    end of every backward their gradients are averaged over all processes, as in ``shard_model``. So
    clipping, optimizers, ``save_adapter`` and ``load_adapter`` work as in a single process.

    For tensor parallelism, load the base with transformers' ``DistributedConfig(tp_plan="auto")``,
    patch it, and call this before training. A layer of style "colwise" uses part of the rows of B,
    a layer of style "rowwise" part of the columns of A; the mean gradient is the whole layer's.
    Processes that share a base need equal tokens, and equal seeds if there is dropout.

    For accelerate's FSDP2, also under transformers' ``Trainer``, pass the accelerator before it
    prepares the model. The FSDP2 plugin is then set to ignore the adapter. The environment variable
    ``FSDP_IGNORED_MODULES`` cannot do that, since the base's weight is inside the module that has
    A, B and d.

    Args:
        model: a model that ``patch_model`` patched, or a PEFT model with RaSA adapters, not
            wrapped. Every process of the default group must call this.
        accelerator: an ``accelerate.Accelerator`` with FSDP2, such as ``trainer.accelerator``, that
            has not prepared the model yet; None for tensor parallelism.

    Returns:
        The same object.

    Raises:
        TypeError, ValueError, RuntimeError: the model is not patched, or is wrapped or merged; the
            adapter is sharded or on the meta device; the accelerator has no FSDP2, ignores modules
            already or loads the base on one process alone; or there is no process group. The model
            is then unchanged.

    Example:
        One process; ``torchrun`` starts one per device.

        >>> import torch.distributed as dist
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> model = rasa_ext.patch_model(model, rank=8, k=1)
        >>> model = rasa_ext.distributed.replicate_adapter(model)
        >>> tokens = torch.tensor([[1, 2, 3]])
        >>> model(tokens, labels=tokens).loss.backward()
        >>> dist.destroy_process_group()
    """
    replicated = _checked(model)
    if model in _AVERAGING and not parameters_of_adapters(model).keys().isdisjoint(
        _AVERAGING[model].parameters
    ):
        raise ValueError(
            "model: expected a model whose gradients are not averaged yet; call either "
            "shard_model or replicate_adapter, and only once."
        )
    for name, parameter in model.named_parameters():
        if is_dtensor(parameter) and any(parameter is each for each in replicated):
            raise ValueError(
                f"model: expected trained parameters that are whole on every process, but {name!r} "
                "is a DTensor; leave it out of modules_to_save."
            )
    plugin = None if accelerator is None else _fsdp2_plugin(accelerator)
    if not dist.is_initialized():
        raise RuntimeError(
            "expected a process group, got none; start the script with torchrun or accelerate "
            "launch, or call torch.distributed.init_process_group."
        )
    if plugin is not None:
        plugin.ignored_modules = [nn.ParameterList(replicated)]
    world = dist.group.WORLD
    _place(replicated, [world], None if accelerator is None else accelerator.device)
    _average(model, replicated, [world])
    return model


def _fsdp2_plugin(accelerator: Any) -> Any:
    """Return the FSDP2 plugin of an accelerator; raise ValueError or TypeError if unsuitable."""
    if not hasattr(getattr(accelerator, "state", None), "distributed_type"):
        raise TypeError(
            f"accelerator: expected an accelerate.Accelerator, got {type(accelerator).__name__}; "
            "a Trainer's is trainer.accelerator."
        )
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if plugin is None or getattr(plugin, "fsdp_version", 1) != 2:
        found = "one that does not shard" if plugin is None else "FSDP1"
        raise ValueError(
            f"accelerator: expected one that shards with FSDP2, got {found}; launch with "
            "`accelerate launch --use_fsdp --fsdp_version 2`. DistributedDataParallel needs no "
            "call."
        )
    if plugin.ignored_modules is not None:
        raise ValueError(
            "accelerator: expected a plugin that ignores no modules, got "
            f"ignored_modules={plugin.ignored_modules!r}; leave FSDP_IGNORED_MODULES unset, since "
            "this call makes FSDP ignore all trained parameters, and frozen modules may be sharded."
        )
    if plugin.cpu_ram_efficient_loading:
        raise ValueError(
            "accelerator: expected cpu_ram_efficient_loading to be false, got true, which loads "
            "the base on one process and drops the adapter's values on the others; launch "
            "with --fsdp_cpu_ram_efficient_loading false."
        )
    return plugin


def _average(
    model: nn.Module, replicated: list[nn.Parameter], groups: Sequence[dist.ProcessGroup | None]
) -> None:
    """Average gradients at the end of every backward through the model from now on."""
    averaging = _Averaging(model, replicated, groups)
    layers = [module for module in model.modules() if isinstance(module, AdaptedModule)]
    for layer in layers:
        layer.drop_pack()
        if isinstance(layer, SplitLinear):
            layer.averaged = True
    if is_patched(model):
        patch_state(model).hooks.append(averaging)
    _AVERAGING[model] = averaging


def check_unwrapped(model: nn.Module) -> None:
    """Raise ValueError for DistributedDataParallel, which does not average new parameters.

    A wrapper around the model cannot be seen, so in several processes a warning is given.
    """
    if any(isinstance(module, DistributedDataParallel) for module in model.modules()):
        raise ValueError(
            "model: expected the model inside DistributedDataParallel, which does not average the "
            "gradients of new parameters; pass model.module on every process, then wrap it again."
        )
    if _is_several() and unwrap(model) not in _AVERAGING:
        warnings.warn(
            "model: it has new parameters, whose gradients an earlier DistributedDataParallel does "
            "not average; wrap the model again.",
            stacklevel=3,
        )


def _is_several() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def check_averaged(model: nn.Module, what: str) -> None:
    """Raise RuntimeError if gradients of newly trained parameters would not be averaged.

    With several processes, ``shard_model`` or ``replicate_adapter`` must average them.

    Args:
        model: a patched model, wrapped or not.
        what: the argument that makes other parameters trainable, for the error.

    Example:
        >>> model = rasa_ext.patch_model(model, rank=8, k=1)
        >>> rasa_ext.distributed.check_averaged(model, "layers")  # one process
    """
    if _is_several() and unwrap(model) not in _AVERAGING:
        raise RuntimeError(
            f"{what}: changes which parameters are trained, but DistributedDataParallel averages "
            "only the gradients of parameters that were trained when it was created; call "
            "rasa_ext.distributed.replicate_adapter(model) before training."
        )


def follow(model: nn.Module) -> None:
    """Average the gradients of parameters that replaced others.

    Every process must call this, because the parameters get the first process's values.
    """
    root = unwrap(model)
    averaging = _AVERAGING.get(root)
    if averaging is not None:
        parameters = _replicated(root)
        _place(parameters, averaging.groups, None)
        averaging.watch(parameters)


@contextlib.contextmanager
def no_sync(model: nn.Module) -> Iterator[None]:
    """Do not average the adapter's gradients within the context.

    Use it for gradient accumulation: the first backward after it averages what has accumulated, so
    only the last backward before an optimizer step communicates. Without it the result is equal:
    averages are averaged again.

    Args:
        model: result of ``shard_model`` or ``replicate_adapter``.

    Raises:
        ValueError: it is another model.

    Example:
        >>> import torch.distributed as dist
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> mesh = dist.init_device_mesh("cpu", (1,))
        >>> model = rasa_ext.patch_model(model, rank=8, k=1)
        >>> model = rasa_ext.distributed.shard_model(model, mesh)
        >>> tokens = torch.tensor([[1, 2, 3]])
        >>> with rasa_ext.distributed.no_sync(model):
        ...     model(tokens, labels=tokens).loss.backward()
        >>> model(tokens, labels=tokens).loss.backward()
        >>> dist.destroy_process_group()
    """
    averaging = _AVERAGING.get(model)
    if averaging is None:
        raise ValueError(
            "model: expected the result of rasa_ext.distributed.shard_model or replicate_adapter, "
            f"got {type(model).__name__}; for DistributedDataParallel, use its own no_sync()."
        )
    before, averaging.wanted = averaging.wanted, False
    try:
        yield
    finally:
        averaging.wanted = before


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """Return the outermost items of module lists and sequences that hold an adapted layer."""
    found: list[nn.Module] = []
    item = isinstance(model, (nn.ModuleList, nn.Sequential))
    for child in model.children():
        whole = not isinstance(child, (nn.ModuleList, nn.ModuleDict))  # these have no forward
        found += [child] if item and whole and _adapted(child) else blocks_of(child)
    return list(dict.fromkeys(found))


def _adapted(module: nn.Module) -> bool:
    return any(isinstance(each, AdaptedModule) for each in module.modules())


def _ordered(model: nn.Module, blocks: Sequence[nn.Module]) -> list[nn.Module]:
    """Return the given blocks, inner ones first, as ``fully_shard`` requires."""
    inner_first, wanted = dict.fromkeys(reversed(list(model.modules()))), set(blocks)
    for block in blocks:
        if block is model or block not in inner_first:
            raise ValueError(
                "blocks: expected modules inside the model, got "
                f"{type(block).__name__}, which is not inside; leave out the model itself."
            )
    return [module for module in inner_first if module in wanted]


def _checked(model: nn.Module) -> list[nn.Parameter]:
    """Return the replicated parameters; raise if the adapter cannot be trained in processes."""
    if not isinstance(model, nn.Module) or not _adapted(model):
        patch_state(model)  # raises
    if unwrap(model) is not model:
        raise ValueError(
            f"model: expected the patched model itself, got {type(model).__name__} around it; "
            "shard first, then compile; DistributedDataParallel is not needed."
        )
    for name, module in model.named_modules():
        if isinstance(module, AdaptedModule) and module.merged:
            raise RuntimeError(
                f"model: the adapter of {name!r} is merged into a weight that would be sharded; "
                "call rasa_ext.unmerge(model) first."
            )
    replicated = _replicated(model)
    if any(parameter.is_meta for parameter in replicated):
        raise ValueError(
            "model: expected an adapter with values, got one on the meta device; patch a base "
            "with values, or initialise the adapter after model.to_empty(device=...)."
        )
    return replicated


def _replicated(model: nn.Module) -> list[nn.Parameter]:
    """Return every parameter that is trained, an adapter's, or a saved module's; each once."""
    found = [p for p in model.parameters() if p.requires_grad]
    found += parameters_of_adapters(model)
    if is_patched(model):
        for name in patch_state(model).plan.modules_to_save:
            found += model.get_submodule(name).parameters()
    return list(dict.fromkeys(found))


@torch.no_grad()
def _place(
    parameters: list[nn.Parameter],
    groups: Sequence[dist.ProcessGroup | None],
    device: torch.device | str | None,
) -> None:
    """Move parameters to a device, and broadcast the values of each group's first process."""
    for parameter in parameters:
        parameter.data = parameter.data.to(device)
        values = parameter.data.contiguous()  # B is a transposed view, which NCCL refuses
        for group in groups:
            dist.broadcast(values, group=group, group_src=0)
        parameter.data.copy_(values)


class _Averaging:
    """Averages gradients over processes, once at the end of each backward.

    The whole accumulated gradient is averaged, not the last backward's part. What earlier backwards
    left is either equal everywhere, so the mean does not change it, or not averaged yet.
    """

    def __init__(
        self,
        model: nn.Module,
        parameters: list[nn.Parameter],
        groups: Sequence[dist.ProcessGroup | None],
    ) -> None:
        self.groups = groups  # one per dimension of the mesh
        self.wanted = True
        self._queued = False
        self._hooks: list[Any] = [
            model.register_forward_pre_hook(self._begin),
            model.register_forward_hook(self._watch),
        ]
        self.watch(parameters)

    def watch(self, parameters: list[nn.Parameter]) -> None:
        """Average these parameters from now on, also after a backward through part of the model."""
        for hook in self._hooks[2:]:
            hook.remove()
        self.parameters = parameters
        trained = (p for p in parameters if p.requires_grad)
        self._hooks[2:] = [p.register_post_accumulate_grad_hook(self._queue) for p in trained]

    def remove(self) -> None:
        """Stop averaging."""
        for hook in self._hooks:
            hook.remove()

    def _begin(self, *_: Any) -> None:
        """Forward pre-hook: reset the flag, which an interrupted backward may have left set."""
        self._queued = False

    def _watch(self, module: nn.Module, args: Any, output: Any) -> None:
        """Forward hook: queue the average when gradients of the outputs arrive.

        They arrive first, and in the outermost backward. Parameter hooks alone would average once
        per re-entrant checkpoint, because each runs a nested backward.
        """
        if torch.is_grad_enabled():
            for tensor in tree_leaves(output):
                if isinstance(tensor, Tensor) and tensor.requires_grad:
                    tensor.register_hook(self._queue)

    def _queue(self, _: Tensor) -> None:
        if self.wanted and not self._queued:
            self._queued = True
            torch.autograd.Variable._execution_engine.queue_callback(self.average)

    @torch.no_grad()
    def average(self) -> None:
        """Replace every gradient by the mean over the processes, in one all-reduce.

        A gradient that only other processes have is created here, and counts as zero.
        """
        self._queued = False
        trained = [p for p in self.parameters if p.requires_grad]
        if not trained:
            return
        here = [p.grad is not None for p in trained]
        dtypes = {p.dtype for p in trained}
        wide = functools.reduce(torch.promote_types, dtypes, torch.float32)
        device = trained[0].device
        parts = [p.grad if p.grad is not None else torch.zeros_like(p) for p in trained]
        flags = torch.tensor(here, dtype=wide, device=device)
        flat = torch.cat([*(part.reshape(-1).to(wide) for part in parts), flags])
        for group in self.groups:
            dist.all_reduce(flat, group=group)
        flat /= math.prod(dist.get_world_size(group) for group in self.groups)
        *means, counts = flat.split([*(p.numel() for p in trained), len(here)])
        # Reading the counts waits for the device, so it is done only if one is in question.
        somewhere = here if all(here) else counts.gt(0).tolist()
        for parameter, part, mean, found in zip(trained, parts, means, somewhere, strict=True):
            if found:
                parameter.grad = part.copy_(mean.view(part.shape))


_AVERAGING: weakref.WeakKeyDictionary[nn.Module, _Averaging] = weakref.WeakKeyDictionary()
