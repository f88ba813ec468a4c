"""``rasa-ext demo``: train, merge and export an adapter of a small real model."""

from __future__ import annotations

import shlex
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from rasa_ext.commands.output import command, console, table_of, working
from rasa_ext.commands.parsing import check_seed

if TYPE_CHECKING:
    from rasa_ext.commands.problems import Problem

INSTRUCTION = "Solve the problem step by step."

# Largest allowed difference of a logit between the adapter, the merged model and the LoRA. They sum
# equal products in different orders, in float32. Logits are around 10.
AGREEMENT = 1e-3


@dataclass(frozen=True)
class DemoSize:
    """Sizes of a demo run."""

    steps: int
    batch_size: int
    held_out: int
    lr: float
    max_new_tokens: int


FULL = DemoSize(steps=112, batch_size=2, held_out=40, lr=2e-3, max_new_tokens=48)
SHORT = DemoSize(steps=5, batch_size=4, held_out=8, lr=3e-3, max_new_tokens=24)


@command
def demo(
    *,
    output: Path = Path("rasa-demo"),
    short: bool = False,
    seed: int = 0,
    overwrite: bool = False,
) -> None:
    """Train SmolLM2-135M-Instruct on word problems; merge, export, reload and compare the result.

    Args:
        output: Directory for all files of the demo.
        short: Train a few steps only. This checks that everything works, but improves little.
        seed: Seed of the problems, the adapter and the data order.
        overwrite: Delete an earlier demo in --output first.
    """
    check_seed(seed)
    if output.exists() and any(output.iterdir()):
        # Delete only a directory that looks like a demo's.
        if not (output / "test.jsonl").is_file() or not overwrite:
            raise ValueError(
                f"output: {output} is not empty; pass --overwrite if it holds an earlier demo, or "
                "choose another --output."
            )
        shutil.rmtree(output)
    largest = run_demo(output, SHORT if short else FULL, seed)
    if not largest <= AGREEMENT:
        console.print(
            f"Adapter, merged model and LoRA differ by more than {AGREEMENT:g}.", style="bold red"
        )
        raise typer.Exit(1)


def run_demo(output: Path, size: DemoSize, seed: int = 0) -> float:
    """Run the demo, write its files into `output` and print the measurements.

    Returns the largest difference of a logit of the merged model or the LoRA from the adapter's.
    Raises ModelError, with the command that installs the model, if the model is missing.
    """
    import torch
    from peft import PeftModel

    import rasa_ext
    from rasa_ext.commands.data import write_examples
    from rasa_ext.commands.measuring import exact_match, greedy_answers
    from rasa_ext.commands.models import load_model, load_tokenizer, save_model
    from rasa_ext.commands.options import parse
    from rasa_ext.commands.paths import SMOLLM2
    from rasa_ext.commands.problems import make_problems
    from rasa_ext.commands.results import describe
    from rasa_ext.commands.training import train

    with working("Loading SmolLM2-135M-Instruct"):
        model, tokenizer = load_model(SMOLLM2, "float32"), load_tokenizer(SMOLLM2)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    adapter, merged, lora = (output / name for name in ("adapter", "merged", "lora"))
    output.mkdir(parents=True, exist_ok=True)
    test = make_problems(size.held_out, split="test", seed=seed)
    learnt = make_problems(size.steps * size.batch_size, split="train", seed=seed)
    for name, problems in (("train.jsonl", learnt), ("test.jsonl", test)):
        write_examples(output / name, ({"messages": conversation(problem)} for problem in problems))
    prompts = [
        tokenizer.apply_chat_template(
            conversation(problem)[:-1], tokenize=False, add_generation_prompt=True
        )
        for problem in test
    ]

    def answers() -> list[str]:
        with working(f"Answering {len(test)} held-out problems"):
            return greedy_answers(model, tokenizer, prompts, size.max_new_tokens, len(prompts))

    before = answers()
    given = {
        "model": SMOLLM2,
        "data": output / "train.jsonl",
        "eval_data": output / "test.jsonl",
        "output": adapter,
        "lr": size.lr,
        "max_steps": size.steps,
        "batch_size": size.batch_size,
        "max_length": 256,
        "dtype": "float32",
        "seed": seed,
    }
    options = parse(
        "sft", [word for name, value in given.items() for word in (f"--{name}", str(value))]
    )
    result = train(options, console, model=model, tokenizer=tokenizer)
    if result["interrupted"]:
        raise KeyboardInterrupt
    rasa_ext.load_adapter(model, adapter)
    after = answers()
    with working("Exporting and merging the adapter, and loading both again"):
        texts = [prompt + p.working for prompt, p in zip(prompts[:8], test, strict=False)]
        batch = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
        batch = batch.to(model.device)
        real = batch["attention_mask"].bool()

        @torch.inference_mode()
        def logits(network: torch.nn.Module) -> torch.Tensor:
            return network(**batch).logits[real]

        expected = logits(model)
        rank = rasa_ext.export_lora(model, lora, card=rasa_ext.Card.read(adapter))
        reloaded = PeftModel.from_pretrained(rasa_ext.unpatch(model), str(lora)).eval()
        by_lora = (logits(reloaded) - expected).abs().max().item()
        rasa_ext.load_adapter(reloaded.unload(), adapter)
        save_model(rasa_ext.merge_and_unload(model), tokenizer, merged)
        again = load_model(str(merged), "float32").to(model.device)
        by_merged = (logits(again) - expected).abs().max().item()

    right = [problem.answer for problem in test]
    table = table_of(f"{len(test)} held-out problems", "before", "after")
    table.add_row("exact match", *(f"{exact_match(said, right):.0%}" for said in (before, after)))
    losses = (f"{loss:.3f}" for loss in (result["eval_loss_before"], result["eval_loss"]))
    table.add_row("loss per solution token", *losses)
    console.print(table)
    for problem, *said in list(zip(test, before, after, strict=True))[:2]:
        console.print(f"\n{problem.question}  [{problem.answer}]", markup=False)
        for when, text in zip(("before:", "after: "), said, strict=True):
            console.print(f"  {when} {' '.join(text.split())}", markup=False)
    console.print(
        "\nlargest difference of any logit from the adapter's: "
        f"merged model {by_merged:.1e}, LoRA of rank {rank} in PEFT {by_lora:.1e}"
    )
    for line in describe(result):
        console.print(line)
    console.print(f"adapter/ with loss.png, lora/, merged/, train.jsonl, test.jsonl: {output}")
    ask = f"--system {shlex.quote(INSTRUCTION)} --prompt {shlex.quote(test[0].question)}"
    console.print(
        "\nContinue with the model, or with your own data:\n"
        f"  rasa-ext generate {shlex.quote(str(adapter))} smollm2 {ask}\n"
        "  rasa-ext sft --model smollm2 --data your.jsonl --output your-adapter",
        markup=False,
    )
    return max(by_merged, by_lora)


def conversation(problem: Problem) -> list[dict[str, str]]:
    """Return a problem and its worked solution as chat messages."""
    return [
        {"role": "system", "content": INSTRUCTION},
        {"role": "user", "content": problem.question},
        {"role": "assistant", "content": problem.working},
    ]
