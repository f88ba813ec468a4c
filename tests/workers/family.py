"""Training every method over a small model, in one process or in several on parts of one batch.

torchrun --nproc-per-node 2 tests/workers/family.py DIRECTORY leaves DIRECTORY/outputs.pt.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import rasa_ext
from tests.helpers.methods import CASES, case, inputs


def train(name: str) -> Tensor:
    """The outputs after five steps."""
    rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    model, x = case(name), inputs(20)
    trained = [p for p in rasa_ext.adapter_parameters(model) if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.1)
    wrapped = DistributedDataParallel(model) if dist.is_initialized() else model
    for step in range(5):
        rows = x.roll(step, 0)[rank::size]
        (wrapped(rows) - rows.flip(1)).square().mean().backward()
        torch.nn.utils.clip_grad_norm_(trained, 0.5)  # drawn adapters are steep
        optimizer.step()
        optimizer.zero_grad()
    return model(x).detach()


def main() -> None:
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    outputs = {name: train(name) for name in CASES}
    if dist.get_rank() == 0:
        directory = Path(sys.argv[1])
        directory.mkdir(parents=True, exist_ok=True)
        torch.save(outputs, directory / "outputs.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
