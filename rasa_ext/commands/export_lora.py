"""``rasa-ext export-lora``: export an adapter as a plain LoRA."""

from __future__ import annotations

from pathlib import Path

from rasa_ext.commands.output import command, console, table_of, working
from rasa_ext.commands.parsing import Output, Overwrite, check_differs, check_least
from rasa_ext.commands.paths import note_template

LARGE = 2**30  # bytes; a larger LoRA of experts is written only with --yes


@command
def export_lora(
    adapter: Path,
    *,
    output: Output,
    model: str | None = None,
    rank: int | None = None,
    format: str = "peft",
    allow_dropped: bool = False,
    expert_layout: str | None = None,
    yes: bool = False,
    overwrite: Overwrite = False,
) -> None:
    """Write an adapter as a plain LoRA for PEFT, vLLM, SGLang, llama.cpp and mlx-lm.

    In PEFT's format, the tokenizer saved with the adapter goes along.

    Args:
        adapter: Adapter directory.
        model: Base model: hub id, directory or .gguf. [default: the one that the adapter names]
        rank: Rank of the LoRA. If set, the error of every layer is printed; a lower rank than the
            default is an approximation. [default: the largest effective rank]
        format: peft (also for vLLM and SGLang), gguf (llama.cpp), or mlx (mlx-lm).
        allow_dropped: Write the LoRA even if llama.cpp or SGLang would ignore a part of it.
        expert_layout: Layout of adapted experts: peft (PEFT, and vLLM for gpt-oss), per-expert
            (vLLM, SGLang, llama.cpp), or shared-outer (SGLang, pool-only experts). [default: peft]
        yes: Write a LoRA of experts even if it takes more than 1 GiB.
    """
    check_least(rank=(rank, 1))
    if format not in (formats := ("peft", "gguf", "mlx")):
        raise ValueError(f"format: expected one of {', '.join(formats)}, got {format!r}.")
    note_template(adapter)
    import torch

    import rasa_ext
    from rasa_ext.checkpoint.lora_readers import GGUF, serving_help
    from rasa_ext.commands.models import base_of, copy_tokenizer, load_model, scores
    from rasa_ext.patching.state import adapted_experts

    with base_of(adapter, model) as name, working(f"Exporting {adapter}"):
        check_differs((adapter, name), output, overwrite=overwrite)
        base = rasa_ext.load_adapter(load_model(name, score=scores(adapter)), adapter)
        size = rasa_ext.export_size(base, expert_layout=expert_layout, rank=rank)
        console.print(f"The LoRA takes {_bytes(size)}.")
        adapted = bool(adapted_experts(base))
        if adapted and size > LARGE and not yes:
            raise ValueError(
                f"yes: the LoRA would take {_bytes(size)}, as every expert repeats the pool's "
                "ranks; nothing was written; pass --yes to write it, use `rasa-ext merge` or, for "
                "pool-only experts (experts='shared', k = rank), --expert-layout shared-outer."
            )
        written = rasa_ext.export_lora(
            base,
            output,
            expert_layout=expert_layout,
            rank=rank,
            format=format,
            allow_dropped=allow_dropped,
            card=rasa_ext.Card.read(adapter),
        )
        if format == "peft":
            copy_tokenizer(adapter, output)
        elif format == "gguf":
            of_gguf = str(Path(name).resolve()) if name.endswith(".gguf") else "./base.gguf"
            (output / "Modelfile").write_text(f"FROM {of_gguf}\nADAPTER ./{GGUF}\n")
        truncation = None if rank is None else rasa_ext.export_error(base, rank)
    console.print(f"LoRA of rank {written} in {output}.")
    if truncation is not None:
        table = table_of("layer", "error")
        for layer, error in {**truncation.layers, "all": truncation.error}.items():
            table.add_row(layer, f"{error:.3g}")
        console.print(table)
        console.print("Errors are relative to the weight change, in the Frobenius norm.")
    if scores(adapter):
        return  # servers read adapters of language models
    text = serving_help(
        name,
        output.resolve(),
        written,
        float32=base.dtype == torch.float32,
        expert_layout=(expert_layout or "peft") if adapted else None,
        format=format,
    )
    console.print(text, markup=False)


def _bytes(size: int) -> str:
    return f"{size / 2**30:,.2f} GiB" if size >= 2**30 else f"{size / 2**20:,.2f} MiB"
