"""Training small models in one process or in several, each taking its part of the same batches.

torchrun --nproc-per-node N tests/workers/training.py DIRECTORY trains every case by every recipe
of RECIPES and leaves an adapter and its losses in DIRECTORY/RECIPE-CASE.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS.parent), str(TESTS)]

from common import patched  # noqa: E402
from zoo import GPT2, LLAMA, TIED, Entry  # noqa: E402

import rasa_ext  # noqa: E402


@dataclass(frozen=True)
class Case:
    """What is trained, and how."""

    entry: Entry
    micro: int = 1
    """Backwards before each step."""
    use_reentrant: bool | None = None
    """The kind of gradient checkpointing, None for none."""
    saved: tuple[str, ...] = ()


CASES = {
    "llama": Case(LLAMA),
    "conv1d": Case(GPT2),
    "tied": Case(TIED),
    "accumulation": Case(LLAMA, micro=2),
    "checkpointing": Case(LLAMA, micro=2, use_reentrant=False),
    "re-entrant": Case(LLAMA, micro=2, use_reentrant=True),
    "saved": Case(LLAMA, saved=("lm_head", "norm")),
}

Wrap = Callable[[nn.Module, Case], nn.Module]


def build(case: Case) -> nn.Module:
    model = patched(case.entry.build(), modules_to_save=case.saved).train()
    if case.use_reentrant is not None:
        model.gradient_checkpointing_enable({"use_reentrant": case.use_reentrant})
    return model


def train(case: Case, wrap: Wrap = lambda model, case: model) -> tuple[nn.Module, Tensor]:
    """The model after three steps, and the loss of each of their batches over all processes."""
    rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    model = wrap(build(case), case)
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 0.01)
    losses = torch.zeros(3)
    for step in range(len(losses)):
        ((field, tokens),) = case.entry.inputs(step).items()
        for number, part in enumerate(tokens.chunk(case.micro)):
            mine = part.chunk(size)[rank]
            last = number == case.micro - 1
            with contextlib.nullcontext() if last else quiet(model, case):
                logits = case.entry.call(model, **{field: mine})
                loss = nn.functional.cross_entropy(logits.flatten(0, 1), mine.flatten())
                (loss / case.micro).backward()
            losses[step] += loss.detach() / (case.micro * size)
        optimiser.step()
        optimiser.zero_grad()
    if size > 1:
        dist.all_reduce(losses)
    return model, losses


def quiet(model: nn.Module, case: Case) -> contextlib.AbstractContextManager:
    """DDP may be told which backwards a step does not follow, but for a static graph."""
    if case.use_reentrant or not isinstance(model, DistributedDataParallel):
        return contextlib.nullcontext()
    return model.no_sync()


def ddp(model: nn.Module, case: Case) -> nn.Module:
    # Re-entrant checkpoints run a backward each, and a pool takes part in all of them.
    return DistributedDataParallel(model, static_graph=bool(case.use_reentrant))


RECIPES: dict[str, Wrap] = {"ddp": ddp}


def main(directory: Path) -> None:
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    for recipe, wrap in RECIPES.items():
        for name, case in CASES.items():
            model, losses = train(case, wrap)
            if dist.get_rank() == 0:
                rasa_ext.save_adapter(model, directory / f"{recipe}-{name}")
                torch.save(losses, directory / f"{recipe}-{name}" / "losses.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
