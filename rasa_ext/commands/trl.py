"""``rasa-ext trl``: TRL's scripts with TRL's options, and RaSA in the place of LoRA.

TRL's ``ModelConfig`` is subclassed: the fields of LoRA leave the command line, and the fields of
PEFT's ``RasaConfig`` come. The rest, such as data mixtures and configs of accelerate, is TRL's own.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import importlib.util
import json
import sys
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any

import typer
import yaml

TESTED = "1.16"
"""The version of TRL that the tests ran."""

_held: list[Any] = []

_OURS = {"r": "r", "alpha": "rasa_alpha", "dropout": "rasa_dropout"}
_OURS |= {name: name for name in ("target_modules", "modules_to_save")}
"""Names in LoRA's options, after ``lora_``, and ours."""

_SWITCHES = ("use_peft", "use_rslora", "use_dora")

_TYPES: dict[str, Any] = {
    **dict.fromkeys(("r", "rasa_k"), int | None),
    **dict.fromkeys(("rasa_alpha", "rasa_dropout"), float | None),
    **dict.fromkeys(("target_modules", "exclude_modules", "modules_to_save"), list[str] | None),
    **dict.fromkeys(("trainable_token_indices", "layers_to_transform"), list[int] | None),
    **dict.fromkeys(
        ("rasa_start", "rasa_experts", "bias", "adapter_dtype", "rasa_options"), str | None
    ),
}
"""The fields of ``RasaConfig`` that are options; ``rasa_options`` is JSON."""

app = typer.Typer(help="Run TRL's scripts with RaSA in the place of LoRA.", no_args_is_help=True)


def _add(script: str) -> None:
    passed = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}
    text = f"TRL's {script}; `rasa-ext trl {script} --help` lists the options."

    @app.command(script, context_settings=passed, help=text)
    def run_it(context: typer.Context) -> None:
        launch(script, context.args)


for _script in ("sft", "dpo", "grpo", "kto", "reward", "rloo"):
    _add(_script)


def launch(script: str, arguments: list[str]) -> None:
    """Run a script in the processes of ``accelerate launch``, as the command ``trl`` does."""
    module = prepared(script, arguments)
    training: Any = _from_trl("trl.cli.commands.training", "_subtract_subsequence")
    config: Any = _from_trl("trl.cli.accelerate_config", "resolve_accelerate_config_argument")
    accelerate: Any = importlib.import_module("accelerate.commands.launch")
    parser = module.make_parser(prog=f"rasa-ext trl {script}")
    *parsed, of_file, of_line = parser.parse_args_and_config(
        arguments, return_remaining_strings=True, separate_remaining_strings=True
    )
    for word in (*of_file, *of_line):
        _check_name(word)
    parsed[2].peft_config()  # raises for a wrong value, before any process starts
    words = [*config.resolve_accelerate_config_argument([*of_file, *of_line]), "--module"]
    rest = training._subtract_subsequence(arguments, of_line)
    accelerate.launch_command(
        accelerate.launch_command_parser().parse_args([*words, __name__, script, *rest])
    )


def run(script: str, arguments: list[str]) -> None:
    """Run a script in this process."""
    module = prepared(script, arguments)
    parser = module.make_parser(prog=f"rasa-ext trl {script}")
    parsed = parser.parse_args_and_config(arguments, fail_with_unknown_args=False)
    # By now the arguments have begun the process group. If the trainer were the last to hold it,
    # gloo could wait without end for a thread that waits for Python's lock, as in TRL's own script.
    distributed = importlib.import_module("torch.distributed")
    _held.append(distributed.group.WORLD if distributed.is_initialized() else None)
    module.main(*parsed)


def _from_trl(name: str, *attributes: str) -> ModuleType:
    """Import a module of TRL; exit with a sentence if it is not as expected."""
    try:
        module = importlib.import_module(name)
        for attribute in attributes:
            getattr(module, attribute)
    except (ImportError, AttributeError) as error:
        found = f"TRL {version('trl')}" if importlib.util.find_spec("trl") else "no TRL"
        sys.exit(
            f"rasa-ext trl: expected TRL as of {TESTED}, found {found} ({error}); "
            f"pip install 'trl~={TESTED}'."
        )
    return module


def prepared(script: str, arguments: list[str]) -> ModuleType:
    """Return TRL's script, which takes and trains RaSA instead of LoRA from now on."""
    trl: Any = _from_trl("trl", "ModelConfig", "get_peft_config")
    module = _from_trl(f"trl.scripts.{script}", "make_parser", "main")
    trl.ModelConfig = model_config(trl.ModelConfig, script, _method(arguments))
    trl.get_peft_config = trl.ModelConfig.peft_config
    return module


def _method(arguments: list[str]) -> str:
    """Return the adapter's method, from the command line or the config file."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--method")
    parser.add_argument("--config", type=Path)
    given, _ = parser.parse_known_args(arguments)
    file = given.config and given.config.is_file() and yaml.safe_load(given.config.read_text())
    return given.method or (file or {}).get("method") or "rasa"


def model_config(base: type, script: str, method: str) -> type:
    """Return TRL's ``ModelConfig`` with the options of a method in the place of LoRA's."""
    from rasa_ext.peft import RasaConfig

    def peft_config(self: Any) -> Any:
        given = {name: getattr(self, name) for name in _TYPES}
        given["rasa_options"] = json.loads(given["rasa_options"] or "{}")
        if given["target_modules"] == ["all-linear"]:
            given["target_modules"] = "all-linear"
        task = "SEQ_CLS" if script == "reward" else "CAUSAL_LM"
        return RasaConfig(task_type=task, rasa_method=self.method, **given)

    fields: list[Any] = [
        (field.name, field.type, dataclasses.field(init=False, default=field.default))
        for field in dataclasses.fields(base)
        if field.name.startswith("lora_") or field.name in _SWITCHES
    ]
    about = {field.name: field for field in dataclasses.fields(RasaConfig)}
    for name, kind in _TYPES.items():
        text = about[name].metadata["help"].replace("%", "%%")
        default = None if name == "target_modules" else about[name].default
        fields.append((name, kind, dataclasses.field(default=default, metadata={"help": text})))
    text = about["rasa_method"].metadata["help"]
    fields.append(("method", str, dataclasses.field(default=method, metadata={"help": text})))
    return dataclasses.make_dataclass(
        base.__name__, fields, bases=(base,), namespace={"peft_config": peft_config}
    )


def _check_name(word: str) -> None:
    """Exit with our name for an option of LoRA."""
    name = word.partition("=")[0].removeprefix("--").replace("-", "_")
    if not word.startswith("--") or not name.startswith(
        ("lora_", "use_peft", "use_rslora", "use_dora")
    ):
        return
    ours = _OURS.get(name.removeprefix("lora_"))
    sys.exit(f"rasa-ext trl: {word}: " + (f"expected --{ours}." if ours else "leave it out."))


if __name__ == "__main__":
    run(sys.argv[1], sys.argv[2:])
