"""``rasa-ext trl``: TRL's six scripts train RaSA by TRL's options."""

import json
import math
import re
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import rasa_ext
from rasa_ext.commands.app import app
from tests.helpers.processes import run_whole
from tests.helpers.tiny_lm import save_base
from tests.helpers.trainers import rows

KINDS = {"sft": "SFT", "dpo": "DPO", "kto": "KTO", "reward": "Reward", "grpo": "GRPO"}
KINDS["rloo"] = "RLOO"
COMMON = (
    "--max_steps 2 --learning_rate 0.05 --report_to none --r 4 --rasa_k 1 --use_cpu true "
    "--per_device_train_batch_size 2 --logging_steps 1 --save_steps 2 --bf16 false "
    "--gradient_checkpointing false --model_name_or_path base --dataset_name data"
)
DRAWING = "--num_generations 2 --max_completion_length 4 --reward_funcs rewards.distinct"
COMMAND = "import sys; from rasa_ext.commands import main; sys.argv[0] = 'rasa-ext'; main()"
REWARDS = """
def distinct(completions, **_):
    return [float(len(set(text))) for text in completions]
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("trl")
    save_base(folder / "base")
    (folder / "rewards.py").write_text(REWARDS)
    return folder


def arguments(script: str, folder: Path, output: str, *more: str) -> list[str]:
    """Write a script's data, and return its arguments."""
    (folder / "data").mkdir(exist_ok=True)
    text = "".join(json.dumps(row) + "\n" for row in rows(KINDS[script]))
    (folder / "data" / "train.jsonl").write_text(text)
    words = [*COMMON.split(), "--output_dir", output, *more]
    return [*words, *DRAWING.split()] if script in ("grpo", "rloo") else words


def logged(output: Path) -> list[dict[str, float]]:
    state = json.loads((output / "checkpoint-2" / "trainer_state.json").read_text())
    return state["log_history"]


@pytest.mark.parametrize("script", KINDS)
def test_an_adapter_is_trained_saved_loaded_and_exported(script, folder, forked_python):
    given = arguments(script, folder, script)
    run_whole([forked_python, "-m", "rasa_ext.commands.trl", script, *given], cwd=folder)
    output = folder / script
    config = json.loads((output / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["rasa_k"]) == ("RASA", 4, 1)
    tensors = load_file(output / "adapter_model.safetensors")
    moved = [key for key, tensor in tensors.items() if key.endswith("rasa_B") and tensor.any()]
    assert len(moved) == sum(key.endswith("rasa_B") for key in tensors) > 0
    if script == "dpo":
        assert logged(output)[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    if script == "reward":
        return
    base = AutoModelForCausalLM.from_pretrained(folder / "base")
    ids = torch.tensor([[3, 5, 7]])
    with torch.no_grad():
        theirs = PeftModel.from_pretrained(base, output)(input_ids=ids).logits
        model = AutoModelForCausalLM.from_pretrained(folder / "base")
        ours = rasa_ext.load_adapter(model, output).eval()(input_ids=ids).logits
    torch.testing.assert_close(ours, theirs)
    assert (
        rasa_ext.export_lora(model, folder / f"{script}-lora") == 3 + model.config.num_hidden_layers
    )


def test_processes_of_accelerate_train_as_one(folder, forked_python):
    """TRL's configs are for GPUs; --use_cpu of the script selects CPUs, on which DDP runs."""
    losses = []
    for config in ("single_gpu", "multi_gpu", "fsdp2"):
        processes, rows_of_each = ("1", "2") if config == "single_gpu" else ("2", "1")
        options = ["--accelerate_config", config, "--num_processes", processes]
        options += ["--mixed_precision", "no", "--per_device_train_batch_size", rows_of_each]
        given = arguments("sft", folder, config, "--train_sampling_strategy", "sequential")
        run_whole([forked_python, "-c", COMMAND, "trl", "sft", *given, *options], cwd=folder)
        losses.append([row["loss"] for row in logged(folder / config)[:2]])
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert losses[2] == pytest.approx(losses[0], rel=1e-5)


def test_options_of_a_method_and_of_a_file(folder, forked_python):
    (folder / "run.yaml").write_text("method: lora\nr: 2\nrasa_options: '{\"rslora\": true}'\n")
    given = arguments("sft", folder, "file", "--config", "run.yaml")
    given = given[: given.index("--r")] + given[given.index("--rasa_k") + 2 :]
    run_whole([forked_python, "-m", "rasa_ext.commands.trl", "sft", *given], cwd=folder)
    config = json.loads((folder / "file" / "adapter_config.json").read_text())
    assert (config["rasa_method"], config["r"], config["rasa_rslora"]) == ("lora", 2, True)


REFUSED = [
    ("--lora_r 8", "--lora_r: expected --r"),
    ("--lora_alpha 8", "--lora_alpha: expected --rasa_alpha"),
    ("--use_peft", "--use_peft: leave it out"),
    ("--rasa_k 9", "rasa_k"),
]


@pytest.mark.parametrize(("words", "said"), REFUSED)
def test_what_is_refused_before_a_process_starts(words, said, folder, forked_python):
    given = arguments("sft", folder, "refused", *words.split())
    with pytest.raises(AssertionError, match=re.escape(said)):
        run_whole([forked_python, "-c", COMMAND, "trl", "sft", *given], cwd=folder)
    assert not (folder / "refused").exists()


def test_help_names_the_scripts():
    text = CliRunner().invoke(app, ["trl", "--help"]).output
    assert all(f"\n  {script} " in text.replace("│", " ") for script in KINDS)
