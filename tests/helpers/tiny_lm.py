"""A random two-layer Llama and a byte-level tokenizer, built here: no download, milliseconds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_tokenizer(chat_template: str | None = CHATML) -> PreTrainedTokenizerFast:
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<|end|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(["user assistant system what is plus the answer is"] * 4, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|end|>")
    tokenizer.pad_token = "<|end|>"
    tokenizer.chat_template = chat_template
    return tokenizer


def make_model(seed: int = 0, **options: Any) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=320,
        hidden_size=options.pop("hidden_size", 32),
        intermediate_size=options.pop("intermediate_size", 48),
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
        initializer_range=0.2,  # logits far enough apart to tell models apart
        **options,
    )
    return LlamaForCausalLM(config).eval()


def save_base(directory: Path, **options: Any) -> Path:
    """Model and tokenizer in a directory that from_pretrained reads."""
    make_model(**options).save_pretrained(directory)
    make_tokenizer().save_pretrained(directory)
    return directory


def write_jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def sums(count: int) -> list[dict[str, str]]:
    """Prompt/completion pairs of different lengths."""
    return [
        {"prompt": f"what is {i} plus {i * 7 % 120}? ", "completion": f"{i + i * 7 % 120}"}
        for i in range(count)
    ]
