"""Train with LoraPro in one process, or under torchrun in several that share the batches.

torchrun --nproc-per-node 2 research/tests/optim/worker.py DIRECTORY MOMENTS writes the parameters
that each process trained to DIRECTORY/RANK.pt.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers import TrainerCallback

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

from rasa_research.optim import LoraPro
from tests.helpers.adapters import patched
from tests.helpers.models import LLAMA


class StopAfter(TrainerCallback):
    """A callback that stops training after ``steps`` steps, like an interrupt."""

    def __init__(self, steps: int):
        self.steps = steps

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= self.steps


def train(moments: str) -> nn.Module:
    """Train a model for four steps; each process takes its rows of every batch.

    It is float64, because the steps enlarge the difference between the sums of one and of two
    processes.
    """
    rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    model = patched(LLAMA.build().double(), adapter_dtype=torch.float64).train()
    wrapped = DistributedDataParallel(model) if size > 1 else model
    optimizer = LoraPro(wrapped, torch.optim.Adam, lr=1e-3, moments=moments)
    for step in range(4):
        ((name, tokens),) = LLAMA.inputs(step).items()
        mine = tokens.chunk(size)[rank]
        optimizer.zero_grad()
        logits = LLAMA.call(wrapped, **{name: mine})
        nn.functional.cross_entropy(logits.flatten(0, 1), mine.flatten()).backward()
        optimizer.step()
    return model


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    model = train(sys.argv[2])
    trained = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
    torch.save(trained, Path(sys.argv[1]) / f"{dist.get_rank()}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
