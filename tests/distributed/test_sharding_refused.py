"""Calls that would break an adapter or lose their effect are refused with advice."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

import rasa_ext
from rasa_ext.distributed import no_sync, replicate_adapter, shard_model
from tests.helpers.adapters import patched
from tests.helpers.models import LLAMA, SEQUENTIAL
from tests.helpers.refusals import refused


@pytest.fixture(scope="module", autouse=True)
def mesh():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def call(model: nn.Module) -> torch.Tensor:
    return LLAMA.call(model, **LLAMA.inputs(0))


def llama() -> nn.Module:
    return patched(LLAMA.build())


def merged() -> nn.Module:
    model = llama()
    rasa_ext.merge(model)
    return model


HALF = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
REFUSED = {
    "mesh": (llama, {"mesh": 2}, "mesh: expected a DeviceMesh, got int"),
    "mp_policy": (llama, {"mp_policy": HALF}, "mp_policy: expected none"),
    "blocks": (llama, {"blocks": [nn.Linear(2, 2)]}, "blocks: expected.*inside.*got Linear"),
    "plain": (SEQUENTIAL.build, {}, "model: expected.*patch_model.*Sequential"),
    "ddp": (lambda: DistributedDataParallel(llama()), {}, "expected.*itself, got Distributed"),
    "compiled": (lambda: torch.compile(llama()), {}, "expected.*itself, got OptimizedModule"),
    "merged": (merged, {}, r"merged.*rasa_ext\.unmerge"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_sharded(case, mesh):
    make, options, said = REFUSED[case]
    model, options = make(), {"mesh": mesh, **options}
    kinds = (TypeError, ValueError, RuntimeError)
    refused(lambda: shard_model(model, **options), model, said, kind=kinds)


def test_what_is_no_module(mesh):
    with pytest.raises(TypeError, match="model: expected"):
        shard_model(3, mesh)


def test_an_adapter_without_values(mesh):
    with torch.device("meta"):
        model = rasa_ext.patch_model(LLAMA.make(), 4, 1)
    with pytest.raises(ValueError, match=r"model: expected an adapter with values.*to_empty"):
        shard_model(model, mesh)


def test_sharding_twice(mesh):
    model = shard_model(patched(SEQUENTIAL.build()), mesh)
    with pytest.raises(ValueError, match=r"model: expected.*not sharded, but '0\.base_layer\.wei"):
        shard_model(model, mesh)


def test_no_sync_of_another_model():
    model = llama()
    refused(lambda: no_sync(model).__enter__(), model, "model: expected.*shard_model.*got Llama")


def test_patching_a_sharded_base(mesh):
    model = fully_shard(SEQUENTIAL.build(), mesh=mesh)
    with pytest.raises(ValueError, match=r"target_modules: '0'.*sharded.*shard_model"):
        rasa_ext.patch_model(model)


@pytest.mark.parametrize("gathered", [False, True])
@pytest.mark.parametrize("merge", [rasa_ext.merge, rasa_ext.merge_and_unload])
def test_merging_into_a_sharded_base(merge, gathered, mesh):
    """Gathered weights are refused, too, since writes to them are lost."""
    model = shard_model(llama(), mesh, reshard_after_forward=False)
    with torch.no_grad():
        if gathered:
            before = call(model)
    with pytest.raises(ValueError, match=r"model: expected whole base.*q_proj.*save the adapter"):
        merge(model)
    with torch.no_grad():
        after = call(model)
    if gathered:
        torch.testing.assert_close(before, after)


def by_block(model: nn.Module, wrap) -> nn.Module:
    for position, layer in enumerate(model.model.layers):
        model.model.layers[position] = wrap(layer)
    return wrap(model)


def test_fully_shard_over_the_adapter(mesh, tmp_path):
    def sharded() -> nn.Module:
        return by_block(llama(), lambda module: fully_shard(module, mesh=mesh))

    said = r"(A|pool) is a DTensor, placed as.*shard_model"
    with pytest.raises(RuntimeError, match=f"expected an adapter that is whole.*{said}"):
        call(sharded())
    for write in (rasa_ext.save_adapter, rasa_ext.load_adapter):
        rasa_ext.save_adapter(llama(), tmp_path / "there")
        with pytest.raises(ValueError, match=r"model: expected an adapter of whole.*a DTensor"):
            write(sharded(), tmp_path / "there")


@pytest.mark.parametrize("saved", [(), ("lm_head",)])
def test_fully_shard_over_everything_at_once(saved, mesh, tmp_path):
    """The forward works, but saving is refused: an optimizer does not update gathered copies."""
    model = patched(LLAMA.build(), modules_to_save=saved)
    mine = {p for p in model.parameters() if p.requires_grad}
    mine -= set(model.lm_head.parameters())
    fully_shard(model, mesh=mesh, ignored_params=mine if saved else set())
    torch.testing.assert_close(call(model), call(llama()))
    name = "lm_head" if saved else "q_proj"
    with pytest.raises(ValueError, match=f"model: expected .*{name}.*shard_model"):
        rasa_ext.save_adapter(model, tmp_path / "adapter")
    assert not list(tmp_path.iterdir())


def test_wrappers_around_parts(tmp_path):
    """nn.Sequential stands for FullyShardedDataParallel by block, which needs an accelerator."""
    model = llama()
    model.model.layers[0] = nn.Sequential(model.model.layers[0])
    with pytest.raises(ValueError, match=r"model: expected the adapted layer.*shard_model"):
        rasa_ext.save_adapter(model, tmp_path / "adapter")


def emptied(model: nn.Module, *names: str) -> nn.Module:
    """Empty parameters as ZeRO-3 does between uses."""
    for number, name in enumerate(names):
        parameter = model.get_parameter(name)
        parameter.data, parameter.ds_id = torch.empty(0), number
    return model


@pytest.mark.parametrize("name", ["self_attn.q_proj.pool.B", "mlp.up_proj.A", "mlp.up_proj.d"])
def test_zero_3_on_saving(name, tmp_path):
    model = emptied(llama(), f"model.layers.0.{name}")
    key = name.rpartition(".")[2]
    with pytest.raises(ValueError, match=f"model: expected.*{key} is empty on .*ZeRO-3.*shard"):
        rasa_ext.save_adapter(model, tmp_path / "adapter")
    assert not list(tmp_path.iterdir())


def test_zero_3_over_a_trained_module(tmp_path):
    model = emptied(patched(LLAMA.build(), modules_to_save=["lm_head"]), "lm_head.weight")
    with pytest.raises(ValueError, match=r"model: expected trained modules.*'lm_head'"):
        rasa_ext.save_adapter(model, tmp_path / "adapter")
    assert not list(tmp_path.iterdir())


def test_zero_3_in_a_forward_and_a_merge():
    pool = "model.layers.0.self_attn.q_proj.pool.A"
    with pytest.raises(RuntimeError, match="its pool is empty on this process"):
        call(emptied(llama(), pool))
    weight = "model.layers.1.mlp.up_proj.base_layer.weight"
    with pytest.raises(ValueError, match=r"whole base weights.*layers\.1\.mlp\.up_proj"):
        rasa_ext.merge(emptied(llama(), weight))


def test_an_adapter_without_own_ranks_is_whole(tmp_path):
    """Matrices that are empty by design are not mistaken for ZeRO-3's."""
    model = patched(LLAMA.build(), 2, 2)
    rasa_ext.save_adapter(model, tmp_path)
    assert rasa_ext.load_adapter(LLAMA.build(), tmp_path)


def an_accelerator(version: int | None = 2, **changes) -> SimpleNamespace:
    """Return an object with the fields that replicate_adapter reads from an Accelerator."""
    plugin = SimpleNamespace(
        fsdp_version=version, ignored_modules=None, cpu_ram_efficient_loading=False
    )
    vars(plugin).update(changes)
    state = SimpleNamespace(
        distributed_type="FSDP", fsdp_plugin=None if version is None else plugin
    )
    return SimpleNamespace(state=state, device=torch.device("cpu"))


@pytest.mark.parametrize(
    ("accelerator", "said"),
    [
        (3, "expected an accelerate.Accelerator, got int"),
        (an_accelerator(None), "got one that does not shard"),
        (an_accelerator(1), "got FSDP1.*--fsdp_version 2"),
        (an_accelerator(ignored_modules="norm"), "ignored_modules='norm'.*FSDP_IGNORED_MODULES"),
        (an_accelerator(cpu_ram_efficient_loading=True), "--fsdp_cpu_ram_efficient_loading false"),
    ],
)
def test_accelerators_that_would_not_do(accelerator, said):
    model = llama()
    with pytest.raises((TypeError, ValueError), match=f"^accelerator: .*{said}"):
        replicate_adapter(model, accelerator)
    with (
        pytest.raises(ValueError, match=r"result of .*shard_model or replicate_adapter"),
        no_sync(model),
    ):
        pass


def test_models_that_no_adapter_can_be_replicated_of(mesh):
    with pytest.raises(ValueError, match=r"model: expected.*patch_model.*Sequential"):
        replicate_adapter(SEQUENTIAL.build())
    model = shard_model(llama(), mesh)
    with pytest.raises(ValueError, match=r"model: expected a model whose gradients.*only once"):
        replicate_adapter(model)


def test_a_model_that_is_patched_again():
    model = patched(LLAMA.build(), modules_to_save=["lm_head"])
    replicate_adapter(model)
    rasa_ext.unpatch(model)
    assert not model._forward_hooks
    rasa_ext.patch_model(model, 2, 1, modules_to_save=["lm_head"])
    assert replicate_adapter(model) is model
    with pytest.raises(ValueError, match="only once"):
        replicate_adapter(model)
