"""Trained rows beside a sharded base and under DistributedDataParallel, in a group of one."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

import rasa_ext
from tests.helpers.models import GPT2, LLAMA, TIED, ids
from tests.patching.test_trained_tokens import moved

pytestmark = pytest.mark.filterwarnings("ignore:groups")


@pytest.fixture
def mesh():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.mark.parametrize("entry", [LLAMA, GPT2, TIED], ids=ids)
@pytest.mark.parametrize("sharded", [True, False])
def test_gradients_and_files(entry, sharded, mesh, tmp_path):
    alone = moved(entry).train()
    entry.loss(alone, entry.inputs(0))[1].backward()
    model = moved(entry).train()
    if sharded:
        rasa_ext.distributed.shard_model(model, mesh)
    else:
        model = torch.nn.parallel.DistributedDataParallel(model)
    entry.loss(model, entry.inputs(0))[1].backward()
    rows = rasa_ext.adapter_parameters(model)[-1]
    torch.testing.assert_close(rows.grad, rasa_ext.adapter_parameters(alone)[-1].grad)
    rasa_ext.save_adapter(model, tmp_path)
    loaded = rasa_ext.load_adapter(entry.build(), tmp_path)
    assert torch.equal(rasa_ext.adapter_parameters(loaded)[-1], rows)
