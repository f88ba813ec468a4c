"""Subclasses of TRL's trainers that train an adapter of this package and save checkpoints."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import sys
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import torch
from peft import PeftModel
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import LambdaLR
from transformers import Trainer, set_seed
from trl import SFTConfig, SFTTrainer

import rasa_ext.peft
from rasa_ext.base_layers.sharded import is_sharded
from rasa_ext.checkpoint import read_adapter
from rasa_ext.checkpoint.card import CARD, adapter_card, write_card
from rasa_ext.checkpoint.files import PREFIX, WEIGHTS, read_tensors, write_files
from rasa_ext.checkpoint.loading import load_tensors_into
from rasa_ext.commands.options import TASKS, Options
from rasa_ext.commands.output import working
from rasa_ext.commands.run_folder import RUN
from rasa_ext.methods import AdapterConfig
from rasa_ext.patching.grouping import as_saved
from rasa_ext.patching.state import is_patched, patch_state
from rasa_ext.training import parameter_groups

IGNORE = -100  # label of a token without loss; the default of torch's cross entropy


class Training(Trainer):
    """What all trainers do differently from TRL's.

    - The linear schedule rises from the first step and reaches zero only after the last.
    - An evaluation does not change the random numbers that dropout draws afterwards.
    - No telemetry is sent, and saving makes no request to the hub. The model card is this
      package's and is written only into the output directory.
    - A checkpoint has the run's options, with which a run that continues compares its own.
    """

    lr_scheduler: Any
    record = "{}"
    skeleton: Any = None
    """The base on the meta device with the adapter, for the card."""
    counts: dict[str, str]
    """What is in the data, by option, for the card."""
    card = rasa_ext.Card()

    @property
    def base_model(self) -> Any:
        """The language model with adapted layers."""
        model: Any = self.model
        return model.get_base_model() if isinstance(model, PeftModel) else model

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Evaluate without changing the random state that dropout uses.

        So training losses do not depend on the evaluations, nor on one skipped at an interrupt.
        """
        rng = torch.random.fork_rng(devices=[])  # a data loader draws a seed on the CPU
        with rng, working("Measuring the held-out loss"):
            return super().evaluate(*args, **kwargs)

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Create a linear rise over the warm-up's share of the steps, and a linear fall.

        Other schedules are Trainer's, with this warm-up.
        """
        if self.args.lr_scheduler_type != "linear":
            self.args.warmup_steps = self._rise(num_training_steps)
            return super().create_scheduler(num_training_steps, optimizer)
        if self.lr_scheduler is None:
            rise = self._rise(num_training_steps)

            def rate(step: int) -> float:
                if step < rise:
                    return (step + 1) / (rise + 1)
                return max(0, num_training_steps - step) / max(1, num_training_steps - rise)

            self.lr_scheduler = LambdaLR(optimizer or self.optimizer, rate)
        return self.lr_scheduler

    def _rise(self, steps: int) -> int:
        given = self.args.warmup_steps
        return int(given if given >= 1 else given * steps)

    def compare_trainer_and_checkpoint_args(self, *args: Any) -> None:
        """Do nothing: the command compares its own options, and may change when it saves."""

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing: saving writes the card."""

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        super()._save(output_dir, state_dict)
        if not self.args.should_save:
            return
        directory = Path(output_dir if output_dir is not None else str(self.args.output_dir))
        self.note(directory)
        if directory == Path(str(self.args.output_dir)):
            settings, tensors = read_adapter(directory)
            plan = patch_state(self.skeleton).plan
            text = adapter_card(self.skeleton, settings, plan, tensors, self.card)
            (directory / CARD).unlink(missing_ok=True)  # PEFT's
            write_card(directory, text, directory)

    def note(self, directory: Path) -> None:
        """Write the run's options into a checkpoint."""
        if directory != Path(str(self.args.output_dir)):
            (directory / RUN).write_text(self.record, encoding="utf-8")

    def _send_telemetry(self) -> None:
        pass


def trainer_of(kind: str) -> Any:
    """Return TRL's trainer of a kind, such as "DPO", with the changes of ``Training``."""
    name = f"{kind}Trainer"
    trl: Any = importlib.import_module("trl")
    return type(name, (Training, getattr(trl, name)), {})


class AdapterTrainer(Training, SFTTrainer):
    """An SFTTrainer that patches the base model with a new adapter of any method.

    - The optimizer uses the method's own rates. Checkpoints contain only the adapter's weights.
    - Over a quantized base the adapter stays in float32, which TRL would round to bfloat16.
    - On a CPU, logits are computed only at positions where some row has a loss. TRL computes all of
      them, and some metrics. Forward and backward of SmolLM2-135M over four word problems, with a
      loss on a quarter of the tokens, take 3.2 s instead of 4.6 (one core of an EPYC, float32,
      median of six, CPU time, 2026-11-26).
    - The held-out loss is a mean over tokens, so it does not depend on the batch size.
    """

    optimizer: Any

    def __init__(
        self,
        model: Any,
        args: SFTConfig,
        *,
        adapter: AdapterConfig | None = None,
        **options: Any,
    ) -> None:
        set_seed(args.seed)
        if adapter is not None:
            rasa_ext.patch_model(model, config=adapter)
        exact = {p: p.data for p in model.parameters() if p.requires_grad}
        super().__init__(model, args, **options)
        for parameter, data in exact.items():
            if parameter.dtype != data.dtype:
                parameter.data = data.to(parameter.device)
        forward = type(self.base_model).forward
        self._compacts = (
            self.args.device.type == "cpu"
            and (self.args.loss_type, self.label_smoother) == ("nll", None)
            and not self.aux_loss_enabled
            and "logits_to_keep" in inspect.signature(forward).parameters
        )
        self._held_out = torch.zeros(2, dtype=torch.float64)
        self.counts = {}

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """Return the mean loss over the trained tokens of the batch, or of the whole step.

        ``num_items_in_batch``, if it is set, is the number of trained tokens in the step.
        """
        if not self._compacts or return_outputs:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        inputs = {**inputs, "use_cache": False}
        labels = inputs.pop("labels")[:, 1:]
        places = (labels != IGNORE).any(0).nonzero().flatten()
        logits = model(**inputs, logits_to_keep=places).logits
        labels = labels[:, places]
        trained = labels != IGNORE
        loss = cross_entropy(logits[trained].float(), labels[trained], reduction="sum")
        if num_items_in_batch is None:
            return loss / trained.sum().clamp(min=1)
        scale = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
        return loss * scale / num_items_in_batch

    def create_optimizer(self, model: Any = None) -> Any:
        """Create the optimizer that the arguments name, with the adapter method's rates."""
        if self.optimizer is None and is_patched(self.base_model):
            kind, settings = self.get_optimizer_cls_and_kwargs(self.args, model or self.model)
            groups = parameter_groups(
                self.base_model,
                self.args.learning_rate,
                weight_decay=self.args.weight_decay,
                eps=settings.get("eps"),  # not of optimizers that have none, or two
            )
            self.optimizer = kind(groups, **settings)
        return super().create_optimizer(model)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluate like Trainer's method, but average the loss over all trained tokens."""
        self._held_out.zero_()
        output = super().evaluation_loop(*args, **kwargs)
        loss, tokens = self.accelerator.reduce(self._held_out.to(self.args.device))
        prefix = kwargs.get("metric_key_prefix", "eval")
        output.metrics[f"{prefix}_loss"] = (loss / tokens.clamp(min=1)).item()
        return output

    def prediction_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """Predict like Trainer's method, and add the batch's loss and tokens to the totals.

        With several processes, the last batches repeat earlier rows, to be as large as the others.
        """
        rows, state = len(inputs["labels"]), self.accelerator.gradient_state
        left = state.remainder - rows * self.args.process_index  # in the last batch, if not full
        if state.end_of_dataloader and state.remainder > 0 and left < rows:
            rows = max(0, left)
            inputs = {name: value[: max(rows, 1)] for name, value in inputs.items()}
        tokens = (inputs["labels"][:rows, 1:] != IGNORE).sum().item()
        loss, *others = super().prediction_step(model, inputs, *args, **kwargs)
        self._held_out += torch.tensor([loss.item() * tokens, tokens], dtype=torch.float64)
        return loss, *others

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the adapter; if an engine shards the model, every process takes part."""
        self._save(output_dir)

    def _save(
        self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None
    ) -> None:
        sharded = any(map(is_sharded, self.base_model.parameters()))
        if not (self.args.should_save or sharded):
            return
        directory = output_dir if output_dir is not None else self.args.output_dir
        is_checkpoint = Path(directory) != Path(self.args.output_dir)
        rasa_ext.save_adapter(self.base_model, directory, card=None if is_checkpoint else self.card)
        if not self.args.should_save:
            return
        self.note(Path(directory))
        self.processing_class.save_pretrained(directory)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Load the adapter's tensors; dropout and scale are those of the present config."""
        tensors = read_tensors(Path(resume_from_checkpoint) / WEIGHTS)
        config = patch_state(self.base_model).config
        load_tensors_into(self.base_model, config, tensors, resume_from_checkpoint)

    def _load_best_model(self) -> None:
        name = Path(str(self.state.best_model_checkpoint)).name  # its folder may have moved
        self._load_from_checkpoint(str(Path(self.args.output_dir) / name))


def dataset(rows: list[dict[str, Any]]) -> datasets.Dataset:
    """Make a data set of rows in memory, and turn off the progress bars of passes over it."""
    datasets.disable_progress_bars()
    return datasets.Dataset.from_list(rows, on_mixed_types="use_json")  # arguments of tool calls


def make_trainer(
    options: Options,
    model: Any,
    tokenizer: Any,
    config: AdapterConfig,
    tensors: Mapping[str, Any],
    rows: Sequence[list[dict[str, Any]]],
    marks: bool,
) -> Any:
    """Return the task's trainer, over the model with the adapter."""
    arguments = options.training
    given: dict[str, Any] = {
        "train_dataset": dataset(rows[0]),
        "eval_dataset": dataset(rows[1]) if len(rows) > 1 else None,
        "processing_class": tokenizer,
    }
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "(rasa_)?(rank|groups): ")  # the skeleton gave them
        if options.task == "sft":
            plain = "text" in rows[0][0]
            if plain:  # evaluate and generate read this in the config
                config = dataclasses.replace(config, template=False)
            _for_sft(arguments, marks, plain)
            adapter = as_saved(config) if tensors else config
            trainer = AdapterTrainer(model, arguments, adapter=adapter, **given)
            if tensors:
                load_tensors_into(
                    trainer.base_model, config, tensors, str(options.data.init_adapter)
                )
            return trainer
        if options.task in ("grpo", "rloo"):
            given["reward_funcs"] = _rewards(options)
        given |= _peft(options, model, config, tensors)
        exact = {p: p.data for p in given["model"].parameters() if p.requires_grad}
        trainer = trainer_of(TASKS[options.task].kind)(args=arguments, **given)
        if options.base.load_in_4bit or options.base.load_in_8bit:
            _unround(trainer.model, exact, model.dtype, config.adapter_dtype)
        return trainer


def _unround(
    model: Any, exact: Mapping[Any, Any], dtype: torch.dtype, of_adapter: torch.dtype
) -> None:
    """Undo TRL's cast of what is trained to bfloat16, before processes share the parameters."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            own = dtype if "modules_to_save" in name else of_adapter
            parameter.data = exact.get(parameter, parameter).data.to(parameter.device, own)


def _for_sft(arguments: Any, marks: bool, plain: bool) -> None:
    arguments.assistant_only_loss = marks
    arguments.packing_strategy = "bfd_split" if plain else "bfd"  # bfd cuts longer examples
    arguments.eval_packing, arguments.prediction_loss_only = False, True


def _peft(
    options: Options, model: Any, config: AdapterConfig, tensors: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the trainer's model and adapter under PEFT, which gives TRL its reference."""
    score = options.task == "reward"
    kind = "SEQ_CLS" if score else "CAUSAL_LM"
    peft_config = rasa_ext.peft.RasaConfig.of(config, task_type=kind)
    if why := peft_config.why_not_trained():
        raise ValueError(f"method: expected one for {options.task}, but {why}.")
    if not tensors:
        return {"model": model, "peft_config": peft_config}
    head = {f"{PREFIX}score.weight": model.score.weight.detach()} if score else {}
    with tempfile.TemporaryDirectory() as folder:  # the tensors may be a LoRA's, which PEFT wrote
        settings = {**config.to_dict(), "task_type": kind}
        write_files(Path(folder), settings, {**head, **tensors})
        return {"model": PeftModel.from_pretrained(model, folder, is_trainable=True)}


def _rewards(options: Options) -> list[Any]:
    """Return the reward functions by name: TRL's, or those of a module in the working folder."""
    rewards: Any = importlib.import_module("trl.rewards")
    known = {name: getattr(rewards, name) for name in rewards.__all__}
    if "get_soft_overlong_punishment" in known:
        make = known["get_soft_overlong_punishment"]
        known["get_soft_overlong_punishment"] = make(1280, 256)  # as TRL's script
    found: list[Any] = [name for name in [options.rewards.reward_model_name_or_path] if name]
    for name in options.rewards.reward_funcs or ():
        module, _, function = name.rpartition(".")
        if name in known:
            found.append(known[name])
            continue
        if not module:
            names = f"MODULE.FUNCTION or one of {', '.join(known)}"
            raise ValueError(f"reward_funcs: expected {names}, got {name!r}.")
        sys.path.insert(0, str(Path.cwd()))
        try:
            found.append(getattr(importlib.import_module(module), function))
        except (ImportError, AttributeError) as error:
            raise ValueError(f"reward_funcs: {name}: {error}.") from None
    return found
