"""A small mixture-of-experts base model: the tokenizer, the text and the full training."""

from __future__ import annotations

import functools
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
from research.experiments.training import Recipe, Run, mean_loss, save

PAD = "<|end|>"
TEMPLATE = (
    "{% for m in messages %}{% if m['role'] != 'system' %}{{ m['content'] }}"
    "{% if m['role'] == 'user' %}\n>{% else %}<|end|>{% endif %}{% endif %}{% endfor %}"
)
"""Chat template: text, mark, answer, end token. It omits system messages, which name the task."""

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
"""Limit of tokens in a row of the base's text."""
HELD_OUT = 64
EVERY = 100
"""Steps between checkpoints of the base's training."""


@functools.cache
def make_tokenizer(vocab_size: int = 512) -> Any:
    """Train byte-level BPE on the training text of both tasks.

    Equal Python releases give equal tokenizers.
    """
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
    """Encode the base's text, functions with summaries; every token except the first has a loss."""
    found = []
    for text in _texts(split):
        ids = list(tokenizer(text + PAD, add_special_tokens=False)["input_ids"])[:LONGEST]
        found.append({"input_ids": ids, "labels": ids})
    return found


def _texts(split: docstrings.Split) -> list[str]:
    return [f"{f.code}\n>{f.summary}" for f in docstrings.functions(split)]


def make_model(seed: int = 0, **shape: Any) -> Any:
    """Make a Qwen3-MoE with random weights and the config ``SHAPE``, updated by ``shape``."""
    torch.manual_seed(seed)
    given = {**SHAPE, "max_position_embeddings": 512, "tie_word_embeddings": True, **shape}
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**given, norm_topk_prob=True))


def make_base(path: Path, recipe: Recipe = RECIPE, **shape: Any) -> tuple[Any, float]:
    """Train the base or read it from ``path``; return it with its held-out loss in nats per token.

    Interrupted training resumes from ``path``, which is written every ``EVERY`` steps.
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
            save(run.state_dict(), path)
    model.requires_grad_(False)
    held_out = text_rows("test", tokenizer)[:HELD_OUT]
    return model.eval(), mean_loss(model, held_out, pad, bfloat16=False)


@torch.no_grad()
def experts_used(model: Any, rows: Sequence[Row], pad: int) -> float:
    """Return the effective number of experts that a layer uses, as a mean over layers.

    It is the exponential of the entropy of the layer's choices, so a layer that chooses all experts
    equally often uses all of them.
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
