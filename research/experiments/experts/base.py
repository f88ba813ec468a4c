"""A small mixture of experts that is made here: its tokenizer, its text, its training in full."""

from __future__ import annotations

import functools
import os
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen3MoeConfig, Qwen3MoeForCausalLM

from benchmarks.batches import IGNORE, Row, collate
from rasa_ext.commands.problems import make_problems
from research.experiments import docstrings
from research.experiments.training import Recipe, Run, mean_loss

PAD = "<|end|>"
TEMPLATE = (
    "{% for m in messages %}{% if m['role'] != 'system' %}{{ m['content'] }}"
    "{% if m['role'] == 'user' %}\n>{% else %}<|end|>{% endif %}{% endif %}{% endfor %}"
)
"""A text, a mark, the answer, and the token that ends it; what the task is stands nowhere."""

SHAPE = {
    "vocab_size": 512,
    "hidden_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "num_experts": 16,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 128,
    "intermediate_size": 128,
}
RECIPE = Recipe(steps=400, batch_size=16, lr=3e-3, bfloat16=False)
LONGEST = 96
"""Tokens of a row of the base's text."""
HELD_OUT = 64
EVERY = 100
"""Steps after which the training of the base is kept."""


@functools.cache
def make_tokenizer(vocab_size: int = 512) -> Any:
    """Byte-level BPE over the training text of both tasks, the same for the same Python release."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    problems = (f"{p.question}\n>{p.working}" for p in make_problems(500, split="train"))
    core.train_from_iterator([*_texts("train")[:1000], *problems], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token=PAD, pad_token=PAD)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def text_rows(split: docstrings.Split, tokenizer: Any) -> list[Row]:
    """The text that the base is trained on: functions with their summaries, every token learnt."""
    found = []
    for text in _texts(split):
        ids = list(tokenizer(text + PAD, add_special_tokens=False)["input_ids"])[:LONGEST]
        found.append({"input_ids": ids, "labels": ids})
    return found


def _texts(split: docstrings.Split) -> list[str]:
    return [f"{f.code}\n>{f.summary}" for f in docstrings.functions(split)]


def make_model(seed: int = 0, **shape: Any) -> Any:
    """A Qwen3-MoE of random numbers, of ``SHAPE`` but for what is given."""
    torch.manual_seed(seed)
    given = {**SHAPE, "max_position_embeddings": 512, "tie_word_embeddings": True, **shape}
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**given, norm_topk_prob=True))


def make_base(path: Path, recipe: Recipe = RECIPE, **shape: Any) -> tuple[Any, float]:
    """The base, trained or read from ``path``, and its loss on held-out text in nats a token.

    A training that is cut goes on from ``path``, which is written every ``EVERY`` steps.
    """
    tokenizer, model = make_tokenizer(), make_model(**shape)
    pad = tokenizer.pad_token_id
    run = Run(model, text_rows("train", tokenizer), pad, recipe)
    if path.is_file():
        run.load_state_dict(torch.load(path))
    while run.going:
        run.advance()
        if run.step % EVERY == 0 or not run.going:
            last = statistics.mean(run.losses[-50:])
            print(f"base: step {run.step} of {recipe.steps}, loss {last:.3f}", flush=True)
            path.parent.mkdir(parents=True, exist_ok=True)
            beside = path.with_name(path.name + ".part")
            torch.save(run.state_dict(), beside)
            os.replace(beside, path)
    model.requires_grad_(False)
    held_out = text_rows("test", tokenizer)[:HELD_OUT]
    return model.eval(), mean_loss(model, held_out, pad, bfloat16=False)


@torch.no_grad()
def experts_used(model: Any, rows: Sequence[Row], pad: int) -> float:
    """How many experts a layer uses: the exponential of the entropy of its choices, layers' mean.

    A layer that gives every expert the same share uses all of them.
    """
    counts: dict[str, torch.Tensor] = {}
    hooks = []
    batch = collate(rows, pad)
    kept = batch["labels"].flatten() != IGNORE

    def count(name: str, inputs: tuple[Any, ...]) -> None:
        chosen = inputs[1][kept].flatten()
        counts[name] = torch.bincount(chosen, minlength=model.config.num_experts).double()

    for name, module in model.named_modules():
        if name.endswith("mlp.experts"):
            hook = functools.partial(lambda n, m, inputs: count(n, inputs), name)
            hooks.append(module.register_forward_pre_hook(hook))
    try:
        model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    finally:
        for hook in hooks:
            hook.remove()
    shares = [each / each.sum() for each in counts.values()]
    return statistics.mean(torch.special.entr(share).sum().exp().item() for share in shares)
