"""Train a small model with DeepSpeed's ZeRO in two processes, or with PyTorch in one.

torchrun --nproc-per-node 2 tests/workers/zero.py DIRECTORY writes adapter, losses and gradient
norms of every case to DIRECTORY/CASE, or an error to DIRECTORY/CASE.txt.
"""

from __future__ import annotations

import os
import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import rasa_ext
from tests.helpers import experts
from tests.helpers.adapters import RANK, patched
from tests.helpers.models import LLAMA


@dataclass(frozen=True)
class Case:
    stage: int
    dtype: torch.dtype = torch.float32
    """The base's dtype."""
    threshold: int = 0
    """For ZeRO-3: tensors with fewer elements stay whole."""
    experts: str | None = None
    """Grouping of stacked experts; None: the model has none."""


CASES = {
    "zero1": Case(1),
    "zero2": Case(2),
    "zero1-bfloat16": Case(1, torch.bfloat16),
    "zero2-bfloat16": Case(2, torch.bfloat16),
    "zero3": Case(3),
    "zero3-threshold": Case(3, threshold=200),
    "zero3-experts": Case(3, experts="slot"),
}
MICRO = 2
CLIP = 0.01


def build(case: Case) -> nn.Module:
    if case.experts:
        base = experts.entry().build()
        return experts.patched(base, case.experts, 2, target_modules="all-linear").train()
    # The head has a group of its own, so its B_pool has one column.
    base = LLAMA.build().to(case.dtype)
    return patched(base, RANK, 1, target_modules=r".*(_proj|lm_head)").train()


def loss_of(model, tokens: Tensor) -> Tensor:
    logits = model(input_ids=tokens).logits.float()
    return nn.functional.cross_entropy(logits.flatten(0, 1), tokens.flatten())


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    # Without this eps, float32 rounding of a gradient near zero would change the step.
    return torch.optim.AdamW(rasa_ext.adapter_parameters(model), 0.01, eps=1e-5)


def alone(case: Case) -> tuple[nn.Module, Tensor, Tensor]:
    """Train in one process on all rows; in bfloat16, on the rows of one process at a time."""
    model = build(case)
    optimizer, (losses, norms) = optimizer_of(model), torch.zeros(2, 3)
    parts = 2 * MICRO if case.dtype == torch.bfloat16 else MICRO
    for step in range(len(losses)):
        for part in LLAMA.inputs(step)["input_ids"].chunk(parts):
            loss = loss_of(model, part) / parts
            loss.backward()
            losses[step] += loss.detach()
        norms[step] = nn.utils.clip_grad_norm_(rasa_ext.adapter_parameters(model), CLIP)
        optimizer.step()
        optimizer.zero_grad()
    return model, losses, norms


def together(case: Case) -> tuple[nn.Module, Tensor, Tensor]:
    import deepspeed

    model = build(case)
    zero = {"stage": case.stage, "stage3_param_persistence_threshold": case.threshold}
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": MICRO,
        "gradient_clipping": CLIP,
        "zero_optimization": zero,
        "zero_force_ds_cpu_optimizer": False,
    }
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer_of(model), config=config)
    losses, norms = torch.zeros(2, 3)
    for step in range(len(losses)):
        for part in LLAMA.inputs(step)["input_ids"].chunk(MICRO):
            loss = loss_of(engine, part.chunk(2)[dist.get_rank()])
            engine.backward(loss)
            engine.step()
            losses[step] += loss.detach() / (2 * MICRO)
        norms[step] = float(engine.get_global_grad_norm())
    dist.all_reduce(losses)
    if case.stage == 3:
        emptied = {p.numel() == 0 for p in model.parameters() if p.requires_grad or case.threshold}
        assert emptied == ({True, False} if case.threshold else {True})
    return model, losses, norms


def main(directory: Path) -> None:
    torch.set_num_threads(1)
    import deepspeed

    deepspeed.init_distributed("gloo")
    for name, case in CASES.items():
        try:
            model, *steps = together(case)
            rasa_ext.save_adapter(model, directory / name)
            if dist.get_rank() == 0:
                torch.save(steps, directory / name / "steps.pt")
        except (ValueError, RuntimeError, AssertionError) as error:
            if dist.get_rank() == 0:
                (directory / f"{name}.txt").write_text(f"{type(error).__name__}: {error}")
                traceback.print_exc()
    dist.barrier()
    # All work is done. Exit at once: DeepSpeed's threads have aborted a process that ends.
    sys.stdout.flush()
    time.sleep(1)  # until the other process has left the barrier
    os._exit(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
