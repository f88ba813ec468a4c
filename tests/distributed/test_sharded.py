"""FSDP2 over a patched model in one process: files, trained rows, and what is refused."""

import copy
import dataclasses

import pytest
import torch
import torch.distributed as dist
from peft import get_peft_model
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import distribute_tensor

import rasa_ext
import rasa_ext.peft
from rasa_ext.base_layers.sharded import is_dtensor
from rasa_ext.base_layers.sharded import whole as gathered
from tests.helpers import experts
from tests.helpers.adapters import patched
from tests.helpers.models import GPT2, LLAMA, SEQUENTIAL, T5, TIED, ids
from tests.helpers.processes import adapter_difference
from tests.helpers.trained_tokens import with_moved_rows
from tests.workers.training import blocks


@pytest.fixture(scope="module", autouse=True)
def mesh():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    group = dist.group.WORLD
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()
    del group  # the last reference: see `group_of_one`


def shard(model: nn.Module, mesh: DeviceMesh, whole: bool = False, **options) -> nn.Module:
    """Shard the model by blocks, or as a ``whole``."""
    for each in (*([] if whole else blocks(model)), model):
        fully_shard(each, mesh=mesh, **options)
    return model


def call(model: nn.Module) -> torch.Tensor:
    return LLAMA.call(model, **LLAMA.inputs(0))


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    named = ((name, p.grad) for name, p in model.named_parameters() if p.grad is not None)
    return {name: gathered(grad) for name, grad in named}


OPTIONS = {
    "": {},
    "at once": {"whole": True},
    "gathered": {"reshard_after_forward": False},
    "offloaded": {"offload_policy": CPUOffloadPolicy(pin_memory=False)},
    "float64": {"mp_policy": MixedPrecisionPolicy(param_dtype=torch.float64)},
}


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("entry", [LLAMA, GPT2, T5, TIED, SEQUENTIAL], ids=ids)
def test_a_step_is_that_of_a_whole_model(entry, options, mesh):
    """Of several kinds of models; evaluations in between leave layers gathered."""
    alone = patched(entry.build()).train()
    model = shard(copy.deepcopy(alone), mesh, **OPTIONS[options])
    assert all(map(is_dtensor, model.parameters()))
    optimizers = [torch.optim.SGD(each.parameters(), 0.0) for each in (model, alone)]
    for seed in range(2):
        for each, optimizer in zip((model, alone), optimizers, strict=True):
            with torch.no_grad():
                entry.loss(each, entry.inputs(2))
            optimizer.zero_grad()  # as in any model, not model.zero_grad(): the root is gathered
            entry.loss(each, entry.inputs(seed))[1].backward()
        found, expected = gradients(model), gradients(alone)
        assert found.keys() == expected.keys()
        for name, grad in found.items():
            assert (grad - expected[name]).norm() <= 1e-5 * expected[name].norm(), name


@pytest.mark.parametrize("options", ["", "at once", "gathered"])
def test_a_file_has_the_values_after_a_step(options, mesh, tmp_path):
    """A forward has gathered the values before the step."""
    model = shard(patched(LLAMA.build(), modules_to_save=["lm_head"]), mesh, **OPTIONS[options])
    trained = [p for p in model.parameters() if p.requires_grad]
    with torch.no_grad():
        call(model)
        rasa_ext.save_adapter(model, tmp_path / "before")
        call(model)
        for parameter in trained:
            parameter.mul_(2)
    rasa_ext.save_adapter(model, tmp_path / "after")
    assert adapter_difference(tmp_path / "before", tmp_path / "after") > 0
    loaded = rasa_ext.load_adapter(LLAMA.build(), tmp_path / "after")
    torch.testing.assert_close(call(loaded), call(model))


@pytest.mark.filterwarnings("ignore:groups")
@pytest.mark.parametrize("entry", [LLAMA, GPT2, TIED], ids=ids)
def test_trained_rows(entry, mesh, tmp_path):
    alone, model = with_moved_rows(entry).train(), with_moved_rows(entry).train()
    entry.loss(alone, entry.inputs(0))[1].backward()
    entry.loss(shard(model, mesh), entry.inputs(0))[1].backward()
    rows = rasa_ext.adapter_parameters(model)[-1]
    torch.testing.assert_close(gathered(rows.grad), rasa_ext.adapter_parameters(alone)[-1].grad)
    rasa_ext.save_adapter(model, tmp_path)
    loaded = rasa_ext.load_adapter(entry.build(), tmp_path)
    assert torch.equal(rasa_ext.adapter_parameters(loaded)[-1], gathered(rows.detach()))


def test_patching_a_sharded_base(mesh):
    model = fully_shard(SEQUENTIAL.build(), mesh=mesh)
    with pytest.raises(ValueError, match=r"^target_modules: '0'.*sharded.*first"):
        rasa_ext.patch_model(model)


def test_patching_sharded_experts(mesh):
    model = experts.model()
    module = list(experts.experts_of(model).values())[1]
    module.down_proj = nn.Parameter(distribute_tensor(module.down_proj.data, mesh))
    with pytest.raises(ValueError, match=r"^experts: .*down_proj' is sharded"):
        rasa_ext.patch_model(model, 3, 1, experts="slot")
    assert not experts.adapted(model)


@pytest.mark.parametrize("ran", [False, True])
@pytest.mark.parametrize("merge", [rasa_ext.merge, rasa_ext.merge_and_unload])
def test_merging_into_a_sharded_base(merge, ran, mesh):
    """Gathered weights are refused, too, since writes to them are lost."""
    model = shard(patched(LLAMA.build()), mesh, reshard_after_forward=False)
    with torch.no_grad():
        if ran:
            before = call(model)
    with pytest.raises(ValueError, match=r"^model: expected whole base.*q_proj.*save the adapter"):
        merge(model)
    with torch.no_grad():
        after = call(model)
    if ran:
        torch.testing.assert_close(before, after)


def test_new_parameters_in_a_sharded_model(mesh):
    config = rasa_ext.methods.LoraConfig(rank=2, target_modules=["up_proj"])
    model = rasa_ext.patch_model(LLAMA.build(), config=config)
    config, layers = rasa_ext.training.adapter_of(model, rasa_ext.methods.LoraConfig)
    later = dataclasses.replace(config, rank=3)
    larger = {layer: later.layer_tensors(layer.spec) for layer in layers.values()}
    shard(model, mesh)
    with pytest.raises(ValueError, match=r"^model: expected.*not sharded"):
        rasa_ext.training.replace_tensors(model, later, larger)
    assert rasa_ext.training.adapter_of(model, type(config))[0] is config


def test_a_pool_that_another_block_has(mesh, monkeypatch):
    """Without a tuner, the first layer owns the pool."""
    # transformers 5.24 asks for a PEFT newer than 0.21 without needing it.
    monkeypatch.setattr("transformers.integrations.peft.check_peft_version", lambda **_: None)
    model = LLAMA.build()
    model.add_adapter(rasa_ext.peft.RasaConfig(r=4))
    with pytest.raises(RuntimeError, match=r"its pool is a DTensor.*get_peft_model"):
        call(shard(model, mesh))
    call(shard(get_peft_model(LLAMA.build(), rasa_ext.peft.RasaConfig(r=4)), mesh))


@pytest.mark.parametrize("front", ["patch", "peft"])
def test_a_pool_that_is_left_out(front, mesh, tmp_path):
    """Blocks are sharded, and nothing around them: a step would train a pool in each process."""
    if front == "patch":
        model = net = patched(LLAMA.build())
    else:
        model = get_peft_model(LLAMA.build(), rasa_ext.peft.RasaConfig(r=4))
        net = model.get_base_model()
    for block in net.model.layers:
        fully_shard(block, mesh=mesh)
    trained = [p for p in model.parameters() if p.requires_grad]
    before = [gathered(parameter).detach().clone() for parameter in trained]
    call(model).square().mean().backward()
    with pytest.raises(RuntimeError, match=r"pool.*fully_shard\(model\)"):
        torch.optim.AdamW(trained).step()
    assert all(map(torch.equal, map(gathered, trained), before))
    if front == "patch":
        with pytest.raises(RuntimeError, match=r"pool.*fully_shard\(model\)"):
            rasa_ext.save_adapter(model, tmp_path / "adapter")
        assert not (tmp_path / "adapter").exists()


def test_a_layer_outside_of_its_block(mesh):
    model = shard(patched(LLAMA.build()), mesh)
    layer = model.model.layers[1].mlp.up_proj
    with pytest.raises(RuntimeError, match=r"its A is a DTensor.*into a whole model"):
        layer.adapter().factors()


def test_wrappers_around_parts(tmp_path):
    model = patched(LLAMA.build())
    model.model.layers[0] = nn.Sequential(model.model.layers[0])
    with pytest.raises(ValueError, match=r"^model: expected the adapted layer"):
        rasa_ext.save_adapter(model, tmp_path / "adapter")
