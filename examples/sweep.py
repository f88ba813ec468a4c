"""Sweep method, learning rate and alpha with Optuna, over one base. python examples/sweep.py

pip install optuna. First run examples/orders.py, which writes the data. Successive halving stops
the worse runs early.
"""

import copy
import json
import logging
from pathlib import Path

import matplotlib.pyplot as plt
import optuna
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import rasa_ext
from rasa_ext.methods import LoraConfig, RasaConfig

NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
METHODS = {"rasa": RasaConfig, "lora": LoraConfig}
RUNGS = (2, 4, 8)  # steps after which the held-out loss is measured
ROWS, HELD_OUT, TRIALS = 2, 4, 6


def encode(rows, tokenizer):
    """Return a batch in which only the completions carry a loss."""
    turns = [[{"role": "user", "content": row["prompt"]}] for row in rows]
    prompts = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    texts = [prompt + row["completion"] for prompt, row in zip(prompts, rows, strict=True)]
    batch = tokenizer(texts, padding=True, padding_side="right", return_tensors="pt")
    batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    for labels, prompt in zip(batch["labels"], prompts, strict=True):
        labels[: len(tokenizer(prompt)["input_ids"])] = -100
    return batch


@torch.no_grad()
def held_out(model, batch):
    """Return the loss of the held-out rows."""
    return model(**batch).loss.item()


def train(base, batches, test, method, lr, alpha):
    """Train an adapter over the base, and yield steps and held-out loss at every rung.

    The copy of the base has its weights in common with it, so it costs only the adapter.
    """
    model = copy.deepcopy(base, {id(t): t for t in (*base.parameters(), *base.buffers())})
    torch.manual_seed(0)
    rasa_ext.patch_model(model, config=METHODS[method](rank=8, alpha=alpha))
    optimizer = torch.optim.AdamW(rasa_ext.adapter_parameters(model), lr=lr)
    for step in range(1, RUNGS[-1] + 1):
        model(**batches[step - 1]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step in RUNGS:
            yield step, held_out(model, test)


def sweep(base, batches, test):
    """Return a study of the choices."""

    def objective(trial):
        choice = {
            "method": trial.suggest_categorical("method", list(METHODS)),
            "lr": trial.suggest_float("lr", 3e-4, 3e-2, log=True),
            "alpha": trial.suggest_categorical("alpha", [8.0, 16.0, 32.0]),
        }
        for step, loss in train(base, batches, test, **choice):
            trial.report(loss, step)
            if trial.should_prune():
                raise optuna.TrialPruned
        return loss

    optuna.logging.set_verbosity(logging.WARNING)
    study = optuna.create_study(
        sampler=optuna.samplers.TPESampler(seed=0, n_startup_trials=TRIALS // 2),
        pruner=optuna.pruners.SuccessiveHalvingPruner(RUNGS[0], reduction_factor=2),
    )
    study.optimize(objective, TRIALS)
    return study


def main():
    """Sweep, print a table, and plot the losses."""
    tokenizer = AutoTokenizer.from_pretrained(NAME)
    base = AutoModelForCausalLM.from_pretrained(NAME, dtype=torch.float32)
    rows, held = (Path(name).read_text().splitlines() for name in ("train.jsonl", "test.jsonl"))
    rows, held = (list(map(json.loads, lines)) for lines in (rows, held))
    batches = [encode(rows[i * ROWS : (i + 1) * ROWS], tokenizer) for i in range(RUNGS[-1])]
    test = encode(held[:HELD_OUT], tokenizer)
    study = sweep(base, batches, test)

    trials = sorted(study.trials, key=lambda t: (-max(t.intermediate_values), t.value))
    print("method       lr  alpha  steps  held-out loss")
    for trial in trials:
        method, lr, alpha = (trial.params[key] for key in ("method", "lr", "alpha"))
        steps, loss = max(trial.intermediate_values.items())
        print(f"{method:6} {lr:8.1e} {alpha:6g} {steps:6} {loss:14.4f}")
        stopped = steps < RUNGS[-1]
        color = f"C{list(METHODS).index(method)}"
        plt.plot(lr, loss, "o", color=color, fillstyle="none" if stopped else "full")
    plt.xscale("log")
    plt.yscale("log")
    plt.xlabel("learning rate")
    plt.ylabel("held-out loss")
    plt.title("blue: rasa, orange: lora; hollow: stopped early")
    plt.savefig("sweep.png")
    print(f"held-out loss: {held_out(base, test):.4f} -> {study.best_value:.4f}")


if __name__ == "__main__":
    main()
