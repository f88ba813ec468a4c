"""Train a small model with DeepSpeed's ZeRO in two processes, or with PyTorch in one.

torchrun --nproc-per-node 2 tests/workers/zero.py DIRECTORY writes adapter, losses and gradient
norms of every case to DIRECTORY/CASE, or an error to DIRECTORY/CASE.txt.
"""

import os
import sys
import time
import traceback
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import rasa_ext
from tests.helpers.models import LLAMA
from tests.workers import training

# The head has a group of its own, so its B_pool has one column.
LINEARS = training.Case(LLAMA, micro=2, targets=r".*(_proj|lm_head)")
BFLOAT16 = replace(LINEARS, dtype=torch.bfloat16)


@dataclass(frozen=True)
class Case:
    stage: int
    model: training.Case = LINEARS
    threshold: int = 0
    """For ZeRO-3: tensors with fewer elements stay whole."""
    reentrant: bool | None = None
    """How activations are checkpointed, if they are. TRL's trainers ask for re-entrant ones."""


CASES = {
    "zero1": Case(1),
    "zero2": Case(2),
    "zero1-bfloat16": Case(1, BFLOAT16),
    "zero2-bfloat16": Case(2, BFLOAT16),
    "zero3": Case(3),
    "zero3-threshold": Case(3, threshold=200),
    "zero3-checkpoints": Case(3, reentrant=False),
    "zero3-experts": Case(3, replace(training.CASES["experts"], micro=2)),
}
REFUSED = {"zero3-reentrant": Case(3, reentrant=True)}


def alone(case: Case) -> tuple[nn.Module, Tensor, Tensor]:
    return training.train(training.alone(case.model))


def together(case: Case) -> tuple[nn.Module, Tensor, Tensor]:
    import deepspeed

    model, micro = training.build(case.model), case.model.micro
    if case.reentrant is not None:
        model.gradient_checkpointing_enable({"use_reentrant": case.reentrant})
        model.enable_input_require_grads()
    zero = {"stage": case.stage, "stage3_param_persistence_threshold": case.threshold}
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": micro,
        "gradient_clipping": training.CLIP,
        "zero_optimization": zero,
        "zero_force_ds_cpu_optimizer": False,
    }
    optimizer = training.optimizer_of(model)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    losses, norms = torch.zeros(2, 3)
    for step in range(len(losses)):
        ((name, tokens),) = case.model.entry.inputs(step).items()
        for part in tokens.chunk(micro):
            mine = part.chunk(2)[dist.get_rank()]
            loss = training.loss_of(case.model, engine, {name: mine})
            engine.backward(loss)
            engine.step()
            losses[step] += loss.detach() / (2 * micro)
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
    for name, case in {**CASES, **REFUSED}.items():
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
