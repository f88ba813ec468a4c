"""What the cards of this folder's commands say beside what is read off a model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from rasa_ext import Card, __version__
from rasa_ext.checkpoint.adapter import base_name
from rasa_ext.checkpoint.card import Base, about, compose, head_fields, title
from rasa_ext.patching.state import patch_state
from rasa_ext.train.memory import describe_memory

if TYPE_CHECKING:
    from rasa_ext.train.options import FinetuneOptions
    from rasa_ext.train.outcome import FinetuneResult
    from rasa_ext.train.trainer import AdapterTrainer


def run_card(trainer: AdapterTrainer, options: FinetuneOptions, result: FinetuneResult) -> Card:
    """Tell of a fine-tuning run: its data, what was chosen, and how it went."""
    named = {options.data: trainer.train_dataset}
    if options.eval_data is not None:
        named[options.eval_data] = trainer.eval_dataset
    return Card(
        datasets=[source for source in named if not Path(source).is_file()],
        sections={
            "Data": _data(options, trainer),
            "Training": _table(_choices(trainer, options, result)),
            "Figures of the run": _table(_figures(result)),
        },
    )


def merged_card(model: Any, adapter: Path) -> str:
    """Give the whole card of a model that ``model``, patched, is about to be merged into."""
    base, config = Base.of(base_name(model)), patch_state(model).config
    told = Card.read(adapter)
    fields = head_fields(base, "CAUSAL_LM", told, "transformers", [config.method, "lora"])
    if base.id:
        fields["base_model_relation"] = "finetune"
    name = config.title
    dtype = " --dtype float32" if model.dtype == torch.float32 else ""  # vLLM would round it
    return compose(
        fields,
        title(f"{name}, merged,", base),
        f"An adapter of the method {name}, merged into its base by rasa_ext {__version__}.",
        about(base, config),
        {"Load": _LOAD, "Serve": f"```bash\nvllm serve .{dtype}\n```", **told.sections},
    )


_LOAD = """`"."` is the folder of this card.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained(".")
tokenizer = AutoTokenizer.from_pretrained(".")
```"""


def local_name(source: str) -> str:
    """Give what a card may call a source: a path of this machine by its last part alone."""
    path = Path(source).expanduser()
    return path.resolve().name if path.exists() else source


def _data(options: FinetuneOptions, trainer: AdapterTrainer) -> str:
    rows: dict[str, Any] = {
        "trained on": f"`{local_name(options.data)}`, {len(trainer.train_dataset):,} rows"
    }
    if options.eval_data is not None:
        held_out = f"`{local_name(options.eval_data)}`, {len(trainer.eval_dataset):,} rows"
        rows["held out"] = held_out
    rows["cut after"] = f"{options.seq_len:,} tokens"
    rows["packing"] = "several examples to a row" if options.packing else None
    rows["chat template"] = "the model's" if options.template else "none"
    return _table(rows)


def _choices(
    trainer: AdapterTrainer, options: FinetuneOptions, result: FinetuneResult
) -> dict[str, Any]:
    batch = str(options.batch_size)
    if options.grad_accum > 1:
        batch += f" x {options.grad_accum} forward passes"
    if trainer.args.world_size > 1:
        batch += f" x {trainer.args.world_size} processes"
    steps = f"{result.step:,}"
    if result.step != result.total_steps:
        steps += f" of {result.total_steps:,}: the run was stopped"
    return {
        "steps": steps,
        "batch": batch,
        "optimizer": "AdamW, without weight decay",
        "learning rate": f"{options.lr:g}, linear, warm-up over {options.warmup:g} of the steps",
        "seed": options.seed,
        "dtype of the base": str(trainer.base_model.dtype).removeprefix("torch."),
        "trainable parameters": f"{result.trainable:,}",
    }


def _figures(result: FinetuneResult) -> dict[str, Any]:
    figures: dict[str, Any] = {}
    if result.first_loss is not None:
        losses = f"{result.first_loss:.4f} -> {result.last_loss:.4f}"
        figures["training loss"] = f"{losses} (means of the first and the last tenth of the steps)"
    if result.eval_loss is not None:
        figures["held-out loss"] = f"{result.eval_loss_before:.4f} -> {result.eval_loss:.4f}"
    if result.tokens_per_s is not None:
        figures["time in steps"] = f"{result.seconds:,.0f} s, {result.tokens_per_s:,.0f} tokens/s"
    figures["peak memory"] = describe_memory(result.peak_memory)
    return figures


def _table(rows: dict[str, Any]) -> str:
    told = [f"| {name} | {value} |" for name, value in rows.items() if value is not None]
    return "\n".join(["| | |", "| --- | --- |", *told])
