"""FinetuneOptions: every choice of a fine-tuning run, declared once.

The command line, its help, the YAML file of ``--config`` and the record of a run are made from it.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rasa_ext.commands.parsing import (
    DTYPES,
    check_differs,
    check_least,
    parse_targets,
    parse_yaml,
)

if TYPE_CHECKING:
    from rasa_ext.methods import AdapterConfig

RECORD = "finetune.yaml"  # the file in the output directory that holds the options of a run


@dataclasses.dataclass(frozen=True)
class FinetuneOptions:
    """Options of a fine-tuning run; their help on the command line is this text.

    Args:
        model: Hub id, local directory, .gguf file, or smollm2: the demo's model.
        data: File (.jsonl, .json, .csv, .parquet, .txt) or hub data set: rows with prompt and
            completion, messages, conversations as ShareGPT has them, or text.
        output: Directory for the adapter.
        prompt_field: Name of the prompt's field in the data; several are joined by an empty
            line.
        completion_field: Name of the completion's field in the data.
        template: Put prompt and completion through the model's chat template, if it has
            one, as a turn of the user and one of the assistant. Without, the text is
            <prompt><completion><EOS>, joined as it stands: a space or line break between
            the two must be in the data.
        method: The adapter's method: rasa, lora or another that rasa_ext.methods or an
            installed package has, by the name in its files.
        rank: LoRA rank r per layer.
        k: How many of them go to the shared pool, where the method has one. [default: rank
            // 8, at least 1, under rasa; else the method's own]
        experts: Under rasa: slot, layer or shared adapts the stacked experts of a mixture
            of experts as well, and says which of them share a pool; under lora: own.
        alpha: Under rasa the size of the initial diagonal; the paper has 8 and 32. Under
            the others the scale times the rank.
        method_options: Other fields of the method's config, as YAML:
            'trainable_token_indices: [5, 9]', or 'rslora: true, train_A: false' under lora.
        dropout: On the adapter's input, in [0, 1).
        target_modules: all-linear, name suffixes with commas, or regex: and a regular
            expression.
        lr: Peak learning rate; RaSA likes it higher than LoRA does.
        warmup: Share of the steps over which the rate rises to --lr; it falls to zero
            afterwards.
        max_steps: Optimizer steps; overrides --epochs.
        epochs: Passes over the data.
        batch_size: Examples per device and forward pass.
        grad_accum: Forward passes per optimizer step.
        seq_len: Tokens after which an example is cut.
        packing: Join examples into rows of up to --seq-len tokens, without padding; each
            still sees only itself. A batch then has --batch-size such rows.
        dtype: Of the frozen base: float32, bfloat16, float16 (GPU), or auto, as it is
            stored.
        gradient_checkpointing: Recompute activations in the backward: less memory, more
            time.
        eval_data: Held-out data, in the form of --data.
        eval_every: Steps between evaluations. [default: before and after training]
        seed: For the adapter's initialization, data order and dropout.
        training_arguments: Other arguments of TRL's SFTConfig, as YAML: 'report_to:
            tensorboard', or 'lr_scheduler_type: cosine, weight_decay: 0.01'.
        resume: Go on from the newest checkpoint in --output, with the options of its run.
        overwrite: Replace what the output directory holds.

    Raises:
        ValueError: naming the option, what was expected and what came.
        OSError: the output cannot be written (a ``WriteError``).
    """

    model: str
    data: str
    output: str = "rasa-out"
    prompt_field: str = "prompt"
    completion_field: str = "completion"
    template: bool = True
    method: str = "rasa"
    rank: int = 8
    k: int | None = None
    experts: str | None = None
    alpha: float = 8.0
    method_options: str = ""
    dropout: float = 0.0
    target_modules: str = "all-linear"
    lr: float = 5e-4
    warmup: float = 0.03
    max_steps: int | None = None
    epochs: float = 1.0
    batch_size: int = 8
    grad_accum: int = 1
    seq_len: int = 1024
    packing: bool = False
    dtype: str = "auto"
    gradient_checkpointing: bool = False
    eval_data: str | None = None
    eval_every: int | None = None
    seed: int = 0
    training_arguments: str = ""
    resume: bool = False
    overwrite: bool = False

    def __post_init__(self) -> None:
        """Check all that can be checked without the model and the data."""
        check_least(
            batch_size=(self.batch_size, 1),
            grad_accum=(self.grad_accum, 1),
            max_steps=(self.max_steps, 1),
            eval_every=(self.eval_every, 1),
            seq_len=(self.seq_len, 2),
        )
        for name in ("lr", "epochs"):
            value = getattr(self, name)
            if not 0 < value < float("inf"):
                raise ValueError(f"{name}: expected a number above 0, got {value}.")
        if not 0 <= self.warmup < 1:
            raise ValueError(f"warmup: expected a share in [0, 1), got {self.warmup}.")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype: expected one of {', '.join(DTYPES)}, got {self.dtype!r}.")
        if self.eval_every is not None and self.eval_data is None:
            raise ValueError("eval_every: expected eval_data to evaluate on as well, got none.")
        self.adapter()
        parse_yaml("training_arguments", self.training_arguments)
        self._check_output()

    def adapter(self) -> AdapterConfig:
        """The adapter's config. Raises ValueError where its options are no good."""
        from rasa_ext import methods  # needs torch, as help does not

        config = methods.method_named(self.method)
        if config.loop:
            raise ValueError(
                f"method: expected one that an optimizer trains, got {self.method!r}: train it in "
                f"a loop of yours, by {config.loop}."
            )
        known = {field.name for field in dataclasses.fields(config)}
        given = parse_yaml("method_options", self.method_options)
        given |= {n: v for n, v in (("k", self.k), ("experts", self.experts)) if v is not None}
        for name in given.keys() - known:
            raise ValueError(
                f"{name}: expected none with the method {self.method!r}, got {given[name]!r}."
            )
        usual = {name: getattr(self, name) for name in ("rank", "alpha", "dropout", "seed")}
        usual["target_modules"] = parse_targets(self.target_modules)
        if config is methods.RasaConfig:
            usual["k"] = None  # by the paper's rule
        return config(**{name: usual[name] for name in usual.keys() & known} | given)

    def _check_output(self) -> None:
        """Raise where the output is no place for this run."""
        from rasa_ext.commands.checkpoints import checkpoints_in  # needs torch, as help does not

        output = Path(self.output)
        if self.resume and self.overwrite:
            raise ValueError("overwrite: expected it without resume, which goes on with a run.")
        if not (self.resume or self.overwrite) and checkpoints_in(output):
            raise ValueError(
                f"output: {output} holds checkpoints of an earlier run; pass --resume to continue "
                "it, --overwrite to replace it, or choose another --output."
            )
        check_differs((self.model,), output, overwrite=self.resume or self.overwrite)

    def to_dict(self) -> dict[str, Any]:
        """Plain values under the option names, less `resume` and `overwrite`: `finetune.yaml`."""
        values = dataclasses.asdict(self)
        del values["resume"], values["overwrite"]
        return values
