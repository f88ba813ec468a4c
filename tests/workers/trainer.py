"""Train a patched model with transformers' Trainer, in one process or under `accelerate launch`.

accelerate launch ... tests/workers/trainer.py DIRECTORY writes an adapter and the logged losses.
"""

import json
import os
import sys
import time
from pathlib import Path

import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from transformers import Trainer, TrainingArguments

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import rasa_ext
from rasa_ext.base_layers.sharded import is_dtensor
from tests.helpers.adapters import patched
from tests.helpers.models import LLAMA
from tests.helpers.processes import refuse_views
from tests.helpers.trainers import QUIET

GLOBAL_BATCH = 8


def shard_on_cpus() -> None:
    """Make accelerate use FSDP on CPUs, where it always chooses DistributedDataParallel."""
    Accelerator(cpu=True)
    PartialState._shared_state["distributed_type"] = DistributedType.FSDP
    plugin = FullyShardedDataParallelPlugin()  # reads the launcher's environment
    AcceleratorState._shared_state["fsdp_plugin"] = plugin


def train(directory: Path, processes: int, fsdp2: bool = False) -> None:
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    data = [{"input_ids": torch.randint(0, 32, (9,), generator=generator)} for _ in range(32)]
    for row in data:
        row["labels"] = row["input_ids"]
    model = patched(LLAMA.build())
    settings = {**QUIET, "max_steps": 4, "learning_rate": 1e-3, "gradient_accumulation_steps": 2}
    settings["per_device_train_batch_size"] = GLOBAL_BATCH // 2 // processes
    arguments = TrainingArguments(directory, **settings)
    if fsdp2:
        shard_on_cpus()
    trainer = Trainer(model, arguments, train_dataset=data)
    assert trainer.is_fsdp_enabled == fsdp2
    trainer.train()
    assert trainer.accelerator.num_processes == processes
    for parameter in trainer.model.parameters():
        assert is_dtensor(parameter) == fsdp2
    if fsdp2 or trainer.is_world_process_zero():
        rasa_ext.save_adapter(trainer.model, directory)
    if trainer.is_world_process_zero():
        losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
        (directory / "losses.json").write_text(json.dumps(losses))
    trainer.accelerator.wait_for_everyone()


if __name__ == "__main__":
    refuse_views()
    train(Path(sys.argv[1]), processes=2, fsdp2="FSDP_VERSION" in os.environ)
    # All work is done. Exit at once, because gloo's shutdown has hung beyond a test's timeout.
    sys.stdout.flush()
    time.sleep(1)  # until the other process has left the barrier
    os._exit(0)
