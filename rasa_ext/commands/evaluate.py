"""``rasa-ext evaluate``: loss and exact match of several models, side by side."""

from __future__ import annotations

from rasa_ext.commands.data import conversation, files_of, questions, read_examples
from rasa_ext.commands.output import command, console, table_of, working
from rasa_ext.commands.parsing import check_dtype, check_least
from rasa_ext.commands.paths import trained_with_template


@command
def evaluate(
    targets: list[str],
    *,
    data: list[str],
    model: str | None = None,
    prompt_field: str = "prompt",
    completion_field: str = "completion",
    template: bool | None = None,
    answers: bool = True,
    answer_pattern: str | None = None,
    limit: int | None = None,
    show: int = 0,
    max_new_tokens: int = 256,
    seq_len: int = 1024,
    batch_size: int = 8,
    dtype: str = "auto",
) -> None:
    """Measure loss and exact match of adapters and models on held-out data, side by side.

    Args:
        targets: Adapters and models: directory (adapter, merged or other model), hub id, .gguf
            file, or smollm2.
        data: Held-out data, in the forms that sft takes; repeat the option for several.
        model: Base model of the adapters. [default: the one that each adapter names]
        prompt_field: As in sft.
        completion_field: As in sft.
        template: Use the chat template, if there is one. [default: as the adapter was trained]
        answers: Generate answers and count exact matches, if every completion has an answer to
            match, by default its last number. For plain text only the loss is measured.
        answer_pattern: Regular expression whose last match in a text is the answer: its first
            group, or the whole match, such as '#### *(.+)'. [default: the last number]
        limit: Number of examples to use, from the top. [default: all]
        show: Number of questions to print with the answers.
        max_new_tokens: Maximum length of an answer in tokens.
        seq_len: Maximum length of an example in tokens; the rest is cut off.
        batch_size: Examples per forward pass.
        dtype: Dtype of the base: float32, bfloat16, float16, or auto (the stored dtype).
    """
    check_least(limit=(limit, 1), batch_size=(batch_size, 1), seq_len=(seq_len, 1))
    check_least(show=(show, 0), max_new_tokens=(max_new_tokens, 1))
    check_dtype(dtype)
    files_of(data, "data")
    from rasa_ext.commands import measuring

    rule = measuring.by_pattern(answer_pattern) if answer_pattern else measuring.last_number
    examples = read_examples(data, prompt_field, completion_field)[:limit]
    if "text" in examples[0] and not (show or answer_pattern):
        answers = False  # plain text has no answers to match
    expected = [rule(conversation(row)[-1]["content"]) for row in examples if answers or show]
    judged = answers and None not in expected
    table = table_of(f"{len(examples):,} examples of {', '.join(data)}", "loss", "exact match")
    given: dict[str, list[str]] = {}
    for name, loaded, tokenizer in measuring.each_model(targets, model, dtype):
        console.print(f"{name}: {len(examples):,} examples", markup=False)
        uses = trained_with_template(name) if template is None else template
        loss = measuring.held_out_loss(loaded, tokenizer, examples, uses, seq_len, batch_size)
        matched = "-"
        if judged:
            prompts = [prompt for prompt, _ in questions(examples, tokenizer, uses)]
            with working(f"Answering {len(prompts)} questions"):
                given[name] = measuring.greedy_answers(
                    loaded,
                    tokenizer,
                    prompts,
                    max_new_tokens,
                    batch_size=batch_size,
                    special_tokens=not (uses and tokenizer.chat_template),
                )
            matched = f"{measuring.exact_match(given[name], expected, rule):.1%}"
        table.add_row(name, f"{loss:.4f}", matched)
    console.print(table)
    if answers and not judged:
        console.print(
            "No exact match: some completions have no answer to match, by the rule "
            f"{answer_pattern or 'last number'}; see --answer-pattern."
        )
    for i, row in enumerate(examples[:show]):
        *turns, right = conversation(row)
        console.print(f"\n{turns[-1]['content']}  [{right['content']}]", markup=False)
        for name, texts in given.items():
            console.print(f"  {name}: {texts[i]}", markup=False)
