"""A step of TRL's SFTTrainer: RaSA through PEFT, RaSA by patch_model, and PEFT's LoRA with r = 8.

    python -m benchmarks.sft [--steps 6] [--rounds 6] [--dtype float32] [--json FILE] [--seconds S]

A step is the time between a callback's on_step_begin and on_step_end: forward, TRL's metrics,
backward, clipping, the optimizer. Every variant has its own trainer over the same base weights and
trains on the same batches of 2 x 160 tokens, with all linear layers adapted, no dropout and no
gradient checkpointing. Each round runs ``--steps`` steps of all variants in a random order. A first
round, and the first step of every other round, are not timed. The base is random, with
SmolLM2-135M's shapes; this does not change the time. "official" is the official formula in a
patched model.

Before the first step the three forms of RaSA must compute the same logits, and in the first round
the same losses. The benchmark prints how far rounding drives the losses apart until the end.
``--quick`` runs with a tiny model.
"""

from __future__ import annotations

import argparse
import math
import random
import statistics
import tempfile
import time
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model, set_peft_model_state_dict
from safetensors.torch import load_file
from tokenizers import Tokenizer, models
from torch import nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    PrinterCallback,
    TrainerCallback,
)
from trl import SFTConfig, SFTTrainer

import rasa_ext
from benchmarks import baselines, harness, records
from benchmarks.model import base_model
from rasa_ext.peft import RasaConfig

RANK = 8
LORA, OURS, PATCHED, OFFICIAL = f"peft LoRA r={RANK}", "get_peft_model", "patch_model", "official"
VARIANTS = (LORA, OURS, PATCHED, OFFICIAL)
BATCH, LENGTH = 2, 160
WARM_UP = 3
"""Steps of the first round: layers that read one input run together from the second step on."""
LIMITS = {"float32": 1e-4, "bfloat16": 5e-2}
"""Largest relative difference of logits and of first losses between two forms of RaSA.

Later losses are not checked: Adam's steps are signs of gradients, which rounding flips near zero.
"""


class StepTimer(TrainerCallback):
    """The seconds of every step in one call of train()."""

    def on_train_begin(self, *_, **__) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, *_, **__) -> None:
        self.begin = time.perf_counter()

    def on_step_end(self, *_, **__) -> None:
        self.seconds.append(time.perf_counter() - self.begin)


def tiny_model(dtype: torch.dtype) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return LlamaForCausalLM(config).to(dtype).requires_grad_(False)


def variants(base: LlamaForCausalLM) -> dict[str, nn.Module]:
    """Build models over the base's own parameters; all with RaSA get equal nonzero adapters."""
    torch.manual_seed(1)
    found: dict[str, nn.Module] = {name: baselines.sharing_copy(base) for name in VARIANTS}
    lora = LoraConfig(r=RANK, lora_alpha=RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    found[LORA] = get_peft_model(found[LORA], lora)
    found[OURS] = get_peft_model(found[OURS], RasaConfig(r=RANK, task_type="CAUSAL_LM"))
    baselines.lively(rasa_ext.patch_model(found[PATCHED], rank=RANK))
    with tempfile.TemporaryDirectory() as folder:
        rasa_ext.save_adapter(found[PATCHED], folder)
        rasa_ext.load_adapter(found[OFFICIAL], folder)
        set_peft_model_state_dict(
            found[OURS], load_file(Path(folder) / "adapter_model.safetensors")
        )
    baselines.swap(found[OFFICIAL], baselines.OfficialLinear)
    return found


def tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """Return a tokenizer, which TRL requires although the data are token ids."""
    words = {f"<{number}>": number for number in range(vocabulary)}
    core = Tokenizer(models.WordLevel(words, unk_token="<0>"))
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<0>", eos_token="<1>")


def rows(vocabulary: int, steps: int, length: int) -> Dataset:
    """Return the token ids of ``steps`` batches."""
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(2, vocabulary, (steps * BATCH, length), generator=generator)
    return Dataset.from_dict({"input_ids": ids.tolist()})


def make_trainer(model: nn.Module, data: Dataset, steps: int, folder: str) -> SFTTrainer:
    arguments = SFTConfig(
        folder,
        max_steps=steps,
        per_device_train_batch_size=BATCH,
        learning_rate=1e-4,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
        dataloader_pin_memory=False,
        gradient_checkpointing=False,
    )
    trainer = SFTTrainer(
        model,
        args=arguments,
        train_dataset=data,
        processing_class=tokenizer(model.config.vocab_size),
        callbacks=[StepTimer],
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def a_round(trainer: SFTTrainer, seed: int) -> tuple[list[float], list[float]]:
    """Run one train(), and return the seconds and losses of the steps."""
    torch.manual_seed(seed)  # for the order of the batches
    trainer.train()
    timer = next(c for c in trainer.callback_handler.callbacks if isinstance(c, StepTimer))
    return timer.seconds, [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def agree(values: dict[str, torch.Tensor], limit: float, what: str) -> None:
    """Exit with an error unless all forms of RaSA compute the same values."""
    for name in (OURS, OFFICIAL):
        error = ((values[name] - values[PATCHED]).norm() / values[PATCHED].norm()).item()
        if not error <= limit:
            raise SystemExit(f"{what} of {name} and {PATCHED} differ by {error:.1e}, over {limit}")
        print(f"verified: {what} of {name} and {PATCHED} agree to {error:.1e} (relative)")


@torch.no_grad()
def logits(models: dict[str, nn.Module], length: int) -> dict[str, torch.Tensor]:
    ids = torch.arange(2, length + 2).remainder(models[LORA].config.vocab_size)[None]
    return {name: models[name].eval()(input_ids=ids).logits.float() for name in VARIANTS}


def measure(
    trainers: dict[str, SFTTrainer], steps: int, rounds: int, seconds: float
) -> tuple[dict[str, list[list[float]]], dict[str, torch.Tensor]]:
    """Return the seconds of the timed steps by variant and round, and all losses by variant."""
    took: dict[str, list[list[float]]] = {name: [] for name in trainers}
    losses: dict[str, list[float]] = {name: [] for name in trainers}
    order, generator = list(trainers), random.Random(0)
    end = time.perf_counter() + seconds
    for index in range(rounds + 1):
        if index > 1 and time.perf_counter() > end:
            break
        generator.shuffle(order)
        for name in order:
            trainers[name].args.max_steps = steps if index else WARM_UP
            step_seconds, step_losses = a_round(trainers[name], seed=index)
            losses[name] += step_losses
            if index:
                took[name].append(step_seconds[1:])
    return took, {name: torch.tensor(values) for name, values in losses.items()}


def summary(dtype: str, took: dict[str, list[list[float]]]) -> list[dict]:
    """Return a row for each variant: quartiles over all steps, and ratios to LoRA of the run."""
    steps = {
        name: [1e3 * second for part in parts for second in part] for name, parts in took.items()
    }
    middles = {name: [statistics.median(part) for part in parts] for name, parts in took.items()}
    found = []
    for name in took:
        ratios = [mine / lora for mine, lora in zip(middles[name], middles[LORA], strict=True)]
        row = {"dtype": dtype, "variant": name, "ms": harness.quartiles(steps[name])}
        row |= {"steps": len(steps[name]), "rounds": len(ratios)}
        row |= {"over_lora": statistics.median(steps[name]) / statistics.median(steps[LORA])}
        found.append(row | {"over_lora_by_rounds": harness.quartiles(ratios)})
    return found


def report(dtype: str, steps: int, rounds: int, seconds: float, quick: bool) -> list[dict]:
    """Print a table and return the rows; the rounds take at most ``seconds``."""
    length = 8 if quick else LENGTH
    base = (tiny_model if quick else base_model)(getattr(torch, dtype))
    found = variants(base)
    print(f"\n{dtype}, {harness.machine()}")
    agree(logits(found, length), LIMITS[dtype], "logits")
    data = rows(base.config.vocab_size, steps, length)
    with tempfile.TemporaryDirectory() as folder:
        trainers = {name: make_trainer(found[name], data, steps, folder) for name in VARIANTS}
        took, losses = measure(trainers, steps, rounds, seconds)
    agree({n: each[:WARM_UP] for n, each in losses.items()}, LIMITS[dtype], "first losses")
    drift = (losses[OFFICIAL] - losses[PATCHED]).norm() / losses[PATCHED].norm()
    print(f"over all {len(losses[PATCHED])} steps the losses of {OFFICIAL} drift by {drift:.1e}")
    made = summary(dtype, took)
    print(f"{'variant':16} {'ms a step':>10} {'quartiles':>17} {'/LoRA':>7}   by rounds")
    for row in made:
        (low, middle, high), (first, second, third) = row["ms"], row["over_lora_by_rounds"]
        print(
            f"{row['variant']:16} {middle:10.1f} {f'{low:.1f} - {high:.1f}':>17} "
            f"{row['over_lora']:7.3f}   {second:.3f} ({first:.3f} - {third:.3f})"
        )
    return made


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, help="steps of each variant per round; default: 6")
    parser.add_argument("--rounds", type=int, help="default: 6")
    parser.add_argument("--dtype", nargs="+", default=["float32"], choices=list(LIMITS))
    parser.add_argument("--json", metavar="FILE", type=Path)
    parser.add_argument("--seconds", type=float, default=math.inf, help="start no round after this")
    parser.add_argument("--quick", action="store_true", help="a tiny model, to test the benchmark")
    given = parser.parse_args()
    steps, rounds = (
        given.steps or (3 if given.quick else 6),
        given.rounds or (2 if given.quick else 6),
    )
    if steps < 2 or rounds < 2:
        parser.error("--steps and --rounds: expected at least 2, to show a spread")
    harness.pin_allocator()
    budget, found = records.Budget(given.seconds), []
    for index, dtype in enumerate(given.dtype):
        share = budget.share(len(given.dtype) - index)
        found += report(dtype, steps, rounds, share, given.quick)
        if given.json:
            head = records.environment("cpu")
            records.write_json(given.json, {"machine": head, "rows": found})


if __name__ == "__main__":
    main()
