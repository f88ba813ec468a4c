"""``rasa-ext merge``: merge an adapter into its base model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rasa_ext.commands.output import command, console, working
from rasa_ext.commands.parsing import Output, Overwrite, check_differs, check_dtype
from rasa_ext.commands.paths import note_template


@command
def merge(
    adapter: Path,
    *,
    output: Output,
    model: str | None = None,
    dtype: str = "auto",
    overwrite: Overwrite = False,
) -> None:
    """Merge an adapter into its base model and write a standalone model.

    The tokenizer is the one saved with the adapter, or else the base's.

    Args:
        adapter: Adapter directory.
        model: Base model: hub id, directory or .gguf. [default: the one that the adapter names]
        dtype: Dtype of the base: float32, bfloat16, float16, or auto (the stored dtype).
    """
    check_dtype(dtype)
    note_template(adapter)
    import rasa_ext
    from rasa_ext.checkpoint.card import write_card
    from rasa_ext.checkpoint.files import read_config
    from rasa_ext.commands.models import (
        base_of,
        load_model,
        load_tokenizer,
        own_tokenizer,
        save_model,
        scores,
    )
    from rasa_ext.methods import read_method
    from rasa_ext.writing import CONFIG, STALE, TOKENIZER, new_folder

    with base_of(adapter, model) as name, working(f"Merging {adapter}"):
        check_differs((adapter, name), output, overwrite=overwrite, beside=[CONFIG])
        read_method(read_config(adapter))  # refuses a LoRA before the base is loaded
        base = load_model(name, dtype, score=scores(adapter))
        tokenizer = own_tokenizer(adapter, needed=False) or load_tokenizer(name)
        if scores(adapter):  # a score is that of the last token before the padding
            base.config.pad_token_id = tokenizer.pad_token_id
        rasa_ext.load_adapter(base, adapter)
        change = max(delta.abs().max().item() for _, delta in rasa_ext.delta_weights(base))
        card = _card(base, adapter)
        merged = rasa_ext.merge_and_unload(base)
        whole = "the adapter and the base are whole"
        with new_folder(output, whole, (*STALE, *TOKENIZER)) as folder:
            save_model(merged, tokenizer, folder)
            write_card(folder, card, output)
    console.print(f"Merged model in {output}; the largest change of a weight is {change:.3g}.")


def _card(model: Any, adapter: Path) -> str:
    """Write the merged model's card; ``model`` is the patched model before merging."""
    import torch

    from rasa_ext import Card, __version__
    from rasa_ext.checkpoint.adapter import base_name, task_type
    from rasa_ext.checkpoint.card import BaseName, about, compose, head_fields, title
    from rasa_ext.patching.state import patch_state

    base, config = BaseName.of(base_name(model)), patch_state(model).config
    card = Card.read(adapter)
    task = task_type(model)
    fields = head_fields(base, task, card, "transformers", [config.method, "lora"])
    if base.id:
        fields["base_model_relation"] = "finetune"
    dtype = " --dtype float32" if model.dtype == torch.float32 else ""  # vLLM's default rounds it
    kind = "AutoModelForCausalLM" if task else "AutoModelForSequenceClassification"
    sections = {"Load": _LOAD.format(kind=kind), "Serve": f"```bash\nvllm serve .{dtype}\n```"}
    if task is None:
        del sections["Serve"]
    return compose(
        fields,
        title(f"{config.title}, merged,", base),
        f"An adapter of the method {config.title}, merged into its base by rasa_ext {__version__}.",
        about(base, config),
        {**sections, **card.sections},
    )


_LOAD = """`"."` is the folder of this card.

```python
from transformers import {kind}, AutoTokenizer

model = {kind}.from_pretrained(".")
tokenizer = AutoTokenizer.from_pretrained(".")
```"""
