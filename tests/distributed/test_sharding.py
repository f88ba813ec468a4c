"""shard_model in one process: sharded parameters and reductions. Two processes: test_ddp.py."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import rasa_ext
from rasa_ext.distributed import blocks_of, no_sync, shard_model
from tests.helpers.adapters import content, patched
from tests.helpers.models import GPT2, LLAMA, SEQUENTIAL, T5, TIED, Entry, ids
from tests.helpers.trained_tokens import with_moved_rows


@pytest.fixture(scope="module", autouse=True)
def mesh():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.fixture
def sharded(mesh) -> nn.Module:
    return shard_model(patched(LLAMA.build()), mesh)


@pytest.fixture
def reductions(monkeypatch) -> list[int]:
    """Sizes of the all-reduced tensors."""
    sizes, real = [], dist.all_reduce

    def spy(tensor, *args, **options):
        sizes.append(tensor.numel())
        return real(tensor, *args, **options)

    monkeypatch.setattr(dist, "all_reduce", spy)
    return sizes


def step(model: nn.Module, entry: Entry = LLAMA) -> torch.Tensor:
    logits, loss = entry.loss(model, entry.inputs(0))
    loss.backward()
    return logits.detach()


def test_the_base_is_sharded_and_the_adapter_is_not(mesh):
    model = patched(LLAMA.build(), modules_to_save=["lm_head"])
    before = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert shard_model(model, mesh) is model
    after = dict(model.named_parameters())
    trained = {name: p for name, p in after.items() if not isinstance(p, DTensor)}
    assert trained.keys() == before.keys()
    assert all(trained[name] is p for name, p in before.items())
    assert all(type(p) is nn.Parameter for p in trained.values())
    assert "lm_head.weight" in trained


@pytest.mark.parametrize("entry", [LLAMA, GPT2, T5, SEQUENTIAL], ids=ids)
def test_every_block_is_gathered_by_itself(entry, mesh):
    model = patched(entry.build())
    blocks = blocks_of(model)
    names = {name for name, module in model.named_modules() if module in blocks}
    assert (
        names
        == {
            "llama": {f"model.layers.{i}" for i in range(3)},
            "gpt2": {f"transformer.h.{i}" for i in range(3)},
            "t5": {f"{part}.block.{i}" for part in ("encoder", "decoder") for i in range(2)},
            "sequential": {"0", "2", "4", "6"},
        }[entry.name]
    )
    expected = step(patched(entry.build()), entry)
    shard_model(model, mesh)
    wrapped = {name for name, module in model.named_modules() if isinstance(module, FSDPModule)}
    assert wrapped == names | {""}
    torch.testing.assert_close(step(model, entry), expected, rtol=0, atol=1e-6)


def test_blocks_of_one_s_own(mesh):
    model = patched(LLAMA.build())
    layers = model.model.layers
    shard_model(model, mesh, blocks=[layers[0], layers[0].mlp])  # in any order
    wrapped = {name for name, module in model.named_modules() if isinstance(module, FSDPModule)}
    assert wrapped == {"", "model.layers.0", "model.layers.0.mlp"}
    step(model)


@pytest.mark.parametrize("use_reentrant", [None, False, True])
def test_one_all_reduce_a_backward(use_reentrant, sharded, reductions):
    sharded.train()
    if use_reentrant is not None:
        sharded.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    with no_sync(sharded):
        step(sharded)
    assert reductions == []
    step(sharded)
    trained = [p for p in sharded.parameters() if p.requires_grad]
    assert reductions == [sum(p.numel() for p in trained) + len(trained)]
    with torch.no_grad():
        LLAMA.call(sharded, **LLAMA.inputs(0))
    assert len(reductions) == 1


def test_a_backward_that_was_broken_off(sharded, reductions):
    """An interrupted backward does not affect the next one."""

    def stop(grad):
        raise KeyboardInterrupt

    hook = sharded.model.embed_tokens.register_forward_hook(lambda *a: a[2].requires_grad_())
    breaking = sharded.model.layers[0].self_attn.q_proj.A.register_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        step(sharded)
    hook.remove()
    breaking.remove()
    sharded.reset_iter_state()
    assert reductions == []
    step(sharded)
    assert len(reductions) == 1


def test_files_hold_what_those_of_a_whole_model_do(sharded, tmp_path):
    plain = patched(LLAMA.build())
    for model, where in ((plain, "plain"), (sharded, "sharded")):
        rasa_ext.save_adapter(model, tmp_path / where)
        rasa_ext.export_lora(model, tmp_path / f"{where}-lora")
    for kind in ("", "-lora"):
        assert content(tmp_path / f"plain{kind}") == content(tmp_path / f"sharded{kind}")
    both = zip(rasa_ext.delta_weights(plain), rasa_ext.delta_weights(sharded), strict=True)
    assert all(torch.equal(left, right) for (_, left), (_, right) in both)


def test_taking_the_adapter_off(sharded, reductions):
    inputs = LLAMA.inputs(0)
    base = LLAMA.call(LLAMA.build(), **inputs)
    with rasa_ext.disable_adapter(sharded), torch.no_grad():
        torch.testing.assert_close(LLAMA.call(sharded, **inputs), base)
    rasa_ext.unpatch(sharded)
    logits = LLAMA.call(sharded, **inputs)
    torch.testing.assert_close(logits, base)
    logits.sum().backward()  # FSDP2 reduces the base's gradients
    assert isinstance(sharded.lm_head.weight.grad, DTensor)
    assert reductions == []


def test_a_model_of_peft(mesh, tmp_path):
    from peft import PeftModel, get_peft_model

    from rasa_ext.peft import RasaConfig

    torch.manual_seed(0)
    config = RasaConfig(r=4, rasa_k=1, init_weights=False, modules_to_save=["lm_head"])
    plain = get_peft_model(LLAMA.build(), config)
    plain.save_pretrained(tmp_path / "plain")
    expected = step(plain)
    model = PeftModel.from_pretrained(LLAMA.build(), tmp_path / "plain", is_trainable=True)
    shard_model(model, mesh)
    torch.testing.assert_close(step(model), expected, rtol=0, atol=1e-6)
    for name, parameter in model.named_parameters():
        assert isinstance(parameter, DTensor) != parameter.requires_grad, name
    model.save_pretrained(tmp_path / "sharded")
    assert content(tmp_path / "plain") == content(tmp_path / "sharded")


@pytest.mark.filterwarnings("ignore:groups")
@pytest.mark.parametrize("entry", [LLAMA, GPT2, TIED], ids=ids)
@pytest.mark.parametrize("sharded", [True, False])
def test_trained_rows(entry, sharded, mesh, tmp_path):
    """Trained rows work with a sharded base and under DistributedDataParallel."""
    alone, model = with_moved_rows(entry).train(), with_moved_rows(entry).train()
    entry.loss(alone, entry.inputs(0))[1].backward()
    model = shard_model(model, mesh) if sharded else DistributedDataParallel(model)
    entry.loss(model, entry.inputs(0))[1].backward()
    rows = rasa_ext.adapter_parameters(model)[-1]
    torch.testing.assert_close(rows.grad, rasa_ext.adapter_parameters(alone)[-1].grad)
    rasa_ext.save_adapter(model, tmp_path)
    loaded = rasa_ext.load_adapter(entry.build(), tmp_path)
    assert torch.equal(rasa_ext.adapter_parameters(loaded)[-1], rows)
