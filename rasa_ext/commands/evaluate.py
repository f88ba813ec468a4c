"""``rasa-ext evaluate``."""

from __future__ import annotations

from typing import Annotated

import typer

from rasa_ext.commands.output import command, console, table_of

Targets = Annotated[
    list[str],
    typer.Argument(
        help="Adapter directories, merged models, or models: hub id, directory, .gguf or smollm2.",
        show_default=False,
    ),
]
Base = Annotated[
    str | None,
    typer.Option("--model", help="Base model of the adapters. [default: as each of them says]"),
]
Dtype = Annotated[
    str, typer.Option(help="Of the base: float32, bfloat16, float16, or auto, as it is stored.")
]
Template = Annotated[
    bool | None,
    typer.Option(
        "--template/--no-template",
        help="Use the chat template, where there is one. [default: as an adapter was trained]",
    ),
]


@command
def evaluate(
    targets: Targets,
    data: Annotated[str, typer.Option(help="Held-out data, in a form that finetune takes.")],
    model: Base = None,
    prompt_field: Annotated[str, typer.Option(help="As in finetune.")] = "prompt",
    completion_field: Annotated[str, typer.Option(help="As in finetune.")] = "completion",
    template: Template = None,
    answers: Annotated[
        bool,
        typer.Option(
            help="Let the models answer and count exact matches, where every completion has an "
            "answer to match: by default its last number."
        ),
    ] = True,
    answer_pattern: Annotated[
        str | None,
        typer.Option(
            help="Regular expression whose last match in a text is the answer: its first group, "
            "or all of it, such as '#### *(.+)'. [default: the last number]"
        ),
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Take so many examples from the top.")] = None,
    show: Annotated[int, typer.Option(help="Print the answers to so many questions.")] = 0,
    max_new_tokens: Annotated[int, typer.Option(help="Room for an answer.")] = 256,
    seq_len: Annotated[int, typer.Option(help="Tokens after which an example is cut.")] = 1024,
    batch_size: Annotated[int, typer.Option(help="Examples at a time.")] = 8,
    dtype: Dtype = "auto",
) -> None:
    """Measure adapters and models on held-out data, side by side: loss and exact match."""
    from rasa_ext.commands.data import Fields, read_examples
    from rasa_ext.commands.measure import (
        by_pattern,
        each_model,
        last_number,
        measure,
        trained_with_template,
    )

    for name, value in (("limit", limit), ("batch_size", batch_size), ("seq_len", seq_len)):
        if value is not None and value < 1:
            raise ValueError(f"{name}: expected at least 1, got {value}.")
    rule = last_number if answer_pattern is None else by_pattern(answer_pattern)
    examples = read_examples(data, Fields(prompt_field, completion_field))[:limit]
    found = {}
    for name, each, tokenizer in each_model(targets, model, dtype, console):
        console.print(f"{name}: {len(examples):,} examples", markup=False)
        found[name] = measure(
            each,
            tokenizer,
            examples,
            console,
            template=trained_with_template(name) if template is None else template,
            rule=rule if answers else None,
            seq_len=seq_len,
            batch_size=batch_size,
            max_new_tokens=max_new_tokens,
        )
    table = table_of(f"{len(examples):,} examples of {data}", "loss", "exact match")
    for name, result in found.items():
        matched = "-" if result.matched is None else f"{result.matched:.1%}"
        table.add_row(name, f"{result.loss:.4f}", matched)
    console.print(table)
    if answers and all(result.matched is None for result in found.values()):
        console.print(
            "No exact match: not every completion has an answer by "
            f"{answer_pattern or 'its last number'}; see --answer-pattern."
        )
    for i, example in enumerate(examples[:show]):
        *turns, right = example.conversation()
        console.print(f"\n{turns[-1]['content']}  [{right['content']}]", markup=False)
        for name, result in found.items():
            if result.answers:
                console.print(f"  {name}: {result.answers[i]}", markup=False)
