"""Two local processes train like one process with the same global batches."""

import copy
import json
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import rasa_ext
from tests.helpers.adapters import patched
from tests.helpers.models import LLAMA
from tests.helpers.processes import PARITY, accelerate, adapter_difference, check_parity, torchrun
from tests.workers import trainer, training


@pytest.fixture(scope="module")
def trained(tmp_path_factory, forked_python) -> Path:
    """torchrun's output: one directory for each recipe and case."""
    directory = tmp_path_factory.mktemp("trained")
    torchrun(forked_python, "training.py", directory)
    return directory


@pytest.mark.parametrize(("recipe", "case"), training.RUNS)
def test_two_processes_train_as_one(recipe, case, trained, tmp_path, figure):
    model, *steps = training.train(training.alone(training.CASES[case]))
    training.save(model, training.CASES[case], tmp_path)
    there = trained / f"{recipe}-{case}"
    check_parity(f"{recipe}, {case}", steps, training.CLIP, tmp_path, there, figure)


@pytest.mark.parametrize("name", ["fsdp2", "fsdp1"])
def test_an_adapter_from_one_process_in_a_sharded_model(name, trained, figure):
    assert adapter_difference(trained / "start", trained / name) == 0
    model = rasa_ext.load_adapter(LLAMA.build(), trained / name).eval()
    with torch.no_grad():
        logits = LLAMA.call(model, **LLAMA.inputs(0))
    apart = (torch.load(trained / f"{name}.pt") - logits).abs().max().item()
    figure(f"{name}, loaded: logits of two processes differ by {apart:.1e}")
    assert apart <= PARITY


@pytest.mark.parametrize("rank", [0, 1])
def test_pools_that_nobody_averages(rank, trained):
    said = json.loads((trained / f"left_out.{rank}.json").read_text())
    assert said["blocks in DDP"].startswith("expected DistributedDataParallel around a module")
    assert said["blocks in FSDP1"].startswith("expected an engine that shards layers together")
    assert said["stages"].startswith("expected all layers that share a pool in this process")


class Skipping(nn.Module):
    """Three layers of one group; the forward skips the middle one."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers[2](self.layers[0](x))


@pytest.mark.parametrize("find_unused", [True, False])
def test_ddp_over_a_layer_that_takes_no_part(find_unused, group_of_one):
    """DDP finds the skipped layer's tensors, since the group's packs are one graph node."""
    model, x = patched(Skipping()), torch.randn(5, 6)
    alone = copy.deepcopy(model)
    wrapped = DistributedDataParallel(model, find_unused_parameters=find_unused)
    for each in (alone, wrapped, wrapped):
        each.zero_grad()
        each(x).square().sum().backward()
    for (name, mine), other in zip(model.named_parameters(), alone.parameters(), strict=True):
        if ".1." in name:
            assert mine.grad is None or not mine.grad.any()
            assert (mine.grad is None) or not find_unused
        elif mine.requires_grad:
            torch.testing.assert_close(mine.grad, other.grad)


# --multi_gpu only means several processes; the script selects CPUs.
DDP = "--multi_gpu --mixed_precision no --dynamo_backend no"
CONFIG = """
compute_environment: LOCAL_MACHINE
distributed_type: FSDP
fsdp_config:
  fsdp_version: 2
  fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP
  fsdp_transformer_layer_cls_to_wrap: LlamaDecoderLayer
  fsdp_cpu_ram_efficient_loading: false
mixed_precision: "no"
"""


@pytest.mark.parametrize("how", ["ddp", "fsdp2"])
def test_accelerate_launch_with_trainer(how, tmp_path, figure, forked_python):
    """DDP comes from options, FSDP2 from a config file."""
    one, two, config = tmp_path / "one", tmp_path / "two", tmp_path / "config.yaml"
    config.write_text(CONFIG)
    options = DDP.split() if how == "ddp" else ["--config_file", str(config)]
    accelerate(forked_python, "trainer.py", two, *options)
    trainer.train(one, processes=1)
    losses = [torch.tensor(json.loads((d / "losses.json").read_text())) for d in (one, two)]
    apart = (losses[0] - losses[1]).abs().max().item()
    adapters = adapter_difference(one, two)
    figure(f"accelerate, Trainer, {how}: two processes differ by {apart:.1e}, {adapters:.1e}")
    assert len(losses[0]) == 4
    assert losses[0][0] > losses[0][-1]
    assert apart <= PARITY
    assert adapters <= PARITY
