"""The training tasks: each trains, saves, loads and exports; mistakes are one sentence."""

import functools
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
)

import rasa_ext
from benchmarks.memory import MODELS
from rasa_ext.commands import training
from rasa_ext.commands.fit import memory
from rasa_ext.commands.options import HELP, TASKS, make_parser, parse
from tests.helpers import peft
from tests.helpers.cli import invoke
from tests.helpers.finetuning import interrupting, losses, parsed, read_log, read_result
from tests.helpers.hub import local_hub
from tests.helpers.processes import run_whole
from tests.helpers.tiny_lm import save_base
from tests.helpers.trainers import rows

COMMAND = "import sys; from rasa_ext.commands import main; sys.argv[0] = 'rasa-ext'; main()"
DRAWING = "--num_generations 2 --max_completion_length 4 --reward_funcs rewards.distinct"
REWARDS = """
def distinct(completions, **_):
    return [float(len(set(str(text)))) for text in completions]
"""
IDS = torch.tensor([[3, 5, 7]])


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A base, a file of data for every task, and reward functions."""
    folder = tmp_path_factory.mktemp("tasks")
    save_base(folder / "base")
    (folder / "rewards.py").write_text(REWARDS)
    for task, (kind, *_) in TASKS.items():
        text = "".join(json.dumps(row) + "\n" for row in rows(kind))
        (folder / f"{task}.jsonl").write_text(text)
    return folder


@pytest.fixture
def there(folder, monkeypatch) -> Path:
    monkeypatch.chdir(folder)
    return folder


def line(task: str, output: object, *more: object) -> list[str]:
    """Return a command line of two steps."""
    words = f"{task} --model base --data {task}.jsonl --output {output} --max-steps 2 --lr 0.05"
    words += " --batch-size 2 --rank 4 --k 1"
    drawing = DRAWING.split() if task in ("grpo", "rloo") else []
    return [*words.split(), *drawing, *map(str, more)]


def trained(output: Path) -> dict[str, torch.Tensor]:
    return load_file(output / "adapter_model.safetensors")


def check_reward(output: Path, folder: Path) -> None:
    """Check that a reward model scores alike as its card loads it, under PEFT, and exported."""
    load = functools.partial(AutoModelForSequenceClassification.from_pretrained, num_labels=1)
    places = {"merged": folder / "merged", "lora": folder / "lora"}
    invoke("merge", output, "--output", places["merged"])
    assert "vllm" not in invoke("export-lora", output, "--output", places["lora"]).lower()
    models = [load(places["merged"])]
    models += [PeftModel.from_pretrained(load("base"), place) for place in (output, places["lora"])]
    code = re.search(r"```python\n(.*?)```", (output / "README.md").read_text(), re.DOTALL)[1]
    there: dict[str, Any] = {}
    exec(code.replace("BASE_FOLDER", "base").replace('"."', repr(str(output))), there)
    models.append(there["model"])
    ids = IDS.repeat(2, 1)
    with torch.no_grad():
        first, *others = (model.eval()(input_ids=ids).logits for model in models)
    assert first.shape == (2, 1)
    for each in others:
        torch.testing.assert_close(each, first)
    for words in (["evaluate", output, "--data", "sft.jsonl"], ["generate", output]):
        assert "targets: expected language models, but " in invoke(*words, code=1)


@pytest.mark.parametrize("task", TASKS)
def test_an_adapter_is_trained_saved_loaded_and_exported(task, there, tmp_path):
    output = tmp_path / task
    text = invoke(*line(task, output, "--test-split", 0.25, "--save-steps", 1))
    config = json.loads((output / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["rasa_k"]) == ("RASA", 4, 1)
    B = [tensor for name, tensor in trained(output).items() if name.endswith("rasa_B")]
    assert B
    assert all(tensor.any() for tensor in B)
    log, result = read_log(output), read_result(output)
    if task == "dpo":
        assert next(row["loss"] for row in log if "loss" in row) == pytest.approx(math.log(2))
    assert (result["step"], result["interrupted"]) == (2, False)
    evaluated = [row["step"] for row in log if "eval_loss" in row]
    assert evaluated == [0, 2]
    assert f"held-out loss {result['eval_loss_before']:.4f}" in text
    assert (output / "loss.png").read_bytes().startswith(b"\x89PNG")
    card = (output / "README.md").read_text()
    assert f"| task | {task}, by TRL's {TASKS[task].kind}Trainer |" in card
    assert f"| data | `{task}.jsonl`, 6 examples |" in card
    assert "| lr | 0.05 |" in card
    assert "license" not in card
    if task == "reward":
        check_reward(output, tmp_path)
        return
    base = AutoModelForCausalLM.from_pretrained("base")
    with torch.no_grad():
        theirs = PeftModel.from_pretrained(base, output)(input_ids=IDS).logits
        model = AutoModelForCausalLM.from_pretrained("base")
        ours = rasa_ext.load_adapter(model, output).eval()(input_ids=IDS).logits
    torch.testing.assert_close(ours, theirs)
    assert rasa_ext.export_lora(model, tmp_path / "lora") == 3 + model.config.num_hidden_layers


def test_numbers_of_a_task_are_printed_and_drawn(there, tmp_path):
    text = invoke(*line("dpo", tmp_path / "dpo", "--eval-data", "dpo.jsonl"))
    margins = [row["rewards/margins"] for row in read_log(tmp_path / "dpo") if "loss" in row]
    assert f"training margin {margins[0]:.4f} -> {margins[-1]:.4f}" in text
    assert "held-out margin 0.0000 -> " in text
    assert re.search(r"step 2/2 loss \d\.\d+ margin -?\d", text)


@pytest.mark.parametrize("task", ["dpo", "grpo"])
def test_an_interrupted_run_goes_on(task, there, tmp_path):
    whole, output = tmp_path / "whole", tmp_path / "out"
    for folder in (whole, output):
        words = line(task, folder, "--dropout", 0.1)
        words[words.index("--max-steps") + 1] = "3"
        if folder == whole:
            invoke(*words)
    with interrupting(2):
        text = invoke(*words, code=130)
    again = f"rasa-ext {task} --config {output}/options.yaml --resume"
    assert f"Stopped after step 2 of 3. Continue with: {again}" in text
    invoke(*again.split()[1:])
    assert losses(output) == losses(whole)
    text = invoke(*again.split()[1:], "--lr", 0.1, code=1)
    assert f"resume: the run of {output}/checkpoint-3 had other options: lr (0.05 before" in text


@pytest.mark.parametrize("task", ["dpo", "reward"])
@pytest.mark.parametrize("start", ["rasa", "lora", "lora as rasa"])
def test_an_adapter_is_trained_further(start, task, there, tmp_path):
    base, folder = AutoModelForCausalLM.from_pretrained("base"), tmp_path / "start"
    if start == "rasa":
        rasa_ext.save_adapter(rasa_ext.patch_model(base, rank=4, k=1), folder)
    else:
        peft.save_lora(base, folder, r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    words = [word for word in line(task, tmp_path / "out") if word not in ("--rank", "4")]
    words = words[: words.index("--k")]
    words[words.index("--lr") + 1] = "1e-9"
    more = ["--k", 2] if start == "lora as rasa" else []
    invoke(*words, "--init-adapter", folder, *more)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["rasa_k"] == {"rasa": 1, "lora": 0, "lora as rasa": 2}[start]
    first = next(row["loss"] for row in read_log(tmp_path / "out") if "loss" in row)
    if task == "dpo":
        assert first == pytest.approx(math.log(2), rel=1e-4)
        return
    assert trained(tmp_path / "out")["base_model.model.score.weight"].any()
    outputs = []
    for kind, place in (
        (AutoModelForCausalLM, folder),
        (AutoModelForSequenceClassification, tmp_path / "out"),
    ):
        model = PeftModel.from_pretrained(kind.from_pretrained("base", num_labels=1), place)
        with torch.no_grad():
            outputs.append(model.get_base_model().model(IDS).last_hidden_state)
    torch.testing.assert_close(*outputs)
    words[0], words[words.index("reward.jsonl")] = "dpo", "dpo.jsonl"
    words[words.index("--output") + 1] = tmp_path / "other"
    text = invoke(*words, "--init-adapter", tmp_path / "out", code=1)
    assert "init_adapter: expected a language model's adapter, but " in text


@pytest.mark.parametrize("task", ["dpo", "reward"])
def test_adapters_over_a_quantized_base_are_not_rounded(task, there, tmp_path):
    save_base(tmp_path / "wide", hidden_size=64, intermediate_size=64)
    words = line(task, tmp_path / "first", "--load-in-4bit", "--model", tmp_path / "wide")
    words = [word for i, word in enumerate(words) if i not in (1, 2)]
    assert "was cast to" not in invoke(*words)
    words = [word for word in words if word not in ("--rank", "4", "--k", "1")]
    words[words.index("--lr") + 1] = "1e-9"
    words[words.index("--output") + 1] = tmp_path / "second"
    invoke(*words, "--init-adapter", tmp_path / "first")
    first, second = trained(tmp_path / "first"), trained(tmp_path / "second")
    assert {tensor.dtype for tensor in first.values()} == {torch.float32}
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        torch.testing.assert_close(second[name], tensor, rtol=0, atol=1e-7, msg=name)


def test_processes_of_accelerate_train_as_one(there, forked_python, tmp_path):
    """TRL's configs are for GPUs; --use_cpu of the script selects CPUs, on which DDP runs."""
    found = []
    for config in ("single_gpu", "multi_gpu", "fsdp2"):
        processes, rows_of_each = ("1", "2") if config == "single_gpu" else ("2", "1")
        options = ["--accelerate_config", config, "--num_processes", processes]
        options += ["--mixed_precision", "no", "--use_cpu", "true"]
        given = line("sft", tmp_path / config, "--train_sampling_strategy", "sequential")
        given[given.index("--batch-size") + 1] = rows_of_each
        run_whole([forked_python, "-c", COMMAND, *given, *options], cwd=there)
        found.append([row[1] for row in losses(tmp_path / config)[:2]])
    assert found[1] == pytest.approx(found[0], rel=1e-5)
    assert found[2] == pytest.approx(found[0], rel=1e-5)


def test_a_mistake_of_a_process_is_a_sentence(there, forked_python, tmp_path):
    given = line("dpo", tmp_path / "out", "--num-processes", 2, "--use_cpu", "true")
    given[given.index("dpo.jsonl")] = "sft.jsonl"
    with pytest.raises(AssertionError) as caught:
        run_whole([forked_python, "-c", COMMAND, *given], cwd=there)
    said = str(caught.value)
    assert "sft.jsonl, line 1: expected the key 'chosen', got 'completion'" in said
    assert "Traceback" not in said


def test_a_file_of_trl_s_own_names_runs(there, tmp_path):
    settings = {
        "model_name_or_path": "base",
        "dataset_name": "sft.jsonl",
        "output_dir": str(tmp_path / "out"),
        "use_peft": True,
        "lora_r": 2,
        "lora_target_modules": ["q_proj", "v_proj"],
        "method": "lora",
        "rslora": True,
        "learning_rate": "1e-2",
        "max_steps": 1,
        "report_to": "none",
        "env": {"RASA_EXT_TEST_OF_ENV": "1"},
        "datasets": None,
    }
    (tmp_path / "trl.yaml").write_text(yaml.safe_dump(settings))
    invoke("finetune", "--config", tmp_path / "trl.yaml", "--no-template")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["rasa_method"], config["r"], config["rasa_rslora"]) == ("lora", 2, True)
    assert config["rasa_template"] is False
    assert {name.split(".")[-2] for name in trained(tmp_path / "out")} == {"q_proj", "v_proj"}
    again = yaml.safe_load((tmp_path / "out" / "options.yaml").read_text())
    assert (again["rank"], again["lr"], again["method"]) == (2, 1e-2, "lora")


def test_a_mixture_of_data_sets(there, tmp_path):
    name = "json"
    sets = [{"path": name, "data_files": f"{each}.jsonl"} for each in ("sft", "sft")]
    (tmp_path / "mix.yaml").write_text(yaml.safe_dump({"datasets": sets}))
    words = [word for word in line("sft", tmp_path / "out") if word not in ("--data", "sft.jsonl")]
    text = invoke(*words, "--config", tmp_path / "mix.yaml")
    assert "16 examples" in text


def test_a_mixture_takes_what_trl_s_does(there, tmp_path):
    """Columns are chosen, and shares of data sets."""
    (tmp_path / "more.jsonl").write_text('{"prompt": "a", "completion": "b", "id": 1}\n' * 8)
    columns = {"columns": ["prompt", "completion"]}
    more = {"path": "json", "data_files": str(tmp_path / "more.jsonl"), **columns}
    sets = [more | {"fraction": 0.25}, more | {"data_files": "sft.jsonl", "fraction": 0.75}]
    (tmp_path / "mix.yaml").write_text(yaml.safe_dump({"datasets": sets}))
    words = [word for word in line("sft", tmp_path / "out") if word not in ("--data", "sft.jsonl")]
    text = invoke(*words, "--config", tmp_path / "mix.yaml", "--dry-run")
    assert "json, json: 11 examples." in text  # 3 and 8 of 8
    (tmp_path / "mix.yaml").write_text(
        yaml.safe_dump({"datasets": [{"path": "json", "colums": 1}]})
    )
    assert "colums" in invoke(*words, "--config", tmp_path / "mix.yaml", code=1)
    for name in ("dataset_config", "dataset_train_split", "dataset_test_split"):
        given = (f"--{name}", "other", "--config", tmp_path / "mix.yaml")
        assert f"{name}: " in invoke(*words, *given, code=1)


@pytest.mark.parametrize("task", ["sft", "dpo"])
def test_a_run_is_pushed_whole_at_the_end(task, there, tmp_path, monkeypatch):
    with local_hub(monkeypatch, tmp_path / "cache") as hub:
        invoke(*line(task, tmp_path / "sums", "--push-to-hub", "--hub-strategy", "end"))
        pushed, times = hub.files("me/sums"), len(hub.messages)
    for name in ("README.md", "loss.png", "all_results.json", "adapter_model.safetensors"):
        assert pushed[name] == (tmp_path / "sums" / name).read_bytes()
    assert f"by TRL's {TASKS[task].kind}Trainer".encode() in pushed["README.md"]
    assert times == 1


@pytest.mark.parametrize("task", TASKS)
def test_the_first_step_trains(task, there, tmp_path):
    words = line(task, tmp_path / "out")
    words[words.index("--max-steps") + 1] = "1"
    invoke(*words)
    assert [row[2] for row in losses(tmp_path / "out")] == [0.05]


def test_evaluations_may_follow_epochs(there, tmp_path):
    words = line("sft", tmp_path / "out", "--eval-data", "sft.jsonl", "--eval-strategy", "epoch")
    words[words.index("--max-steps") : words.index("--max-steps") + 2] = ["--epochs", "2"]
    invoke(*words)
    evaluated = [row["step"] for row in read_log(tmp_path / "out") if "eval_loss" in row]
    assert evaluated == [0, 4, 8]


def test_the_line_overrides_the_file(there, tmp_path):
    settings = {"data": ["dpo.jsonl"], "eval_data": ["dpo.jsonl"], "lr": 0.5, "adapter_dtype": None}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings))
    words = ["--model", "base", "--output", str(tmp_path / "out"), "--adapter_dtype", "bfloat16"]
    words += [
        "--config",
        str(tmp_path / "run.yaml"),
        "--data",
        "sft.jsonl",
        "--learning-rate",
        "0.1",
    ]
    options = parse("sft", words)
    assert (options.data.data, options.data.eval_data) == (["sft.jsonl"], ["dpo.jsonl"])
    assert options.training.learning_rate == 0.1
    assert options.config().adapter_dtype == torch.bfloat16
    (tmp_path / "run.yaml").write_text("lr: 0.1\nlearning_rate: 0.2\n")
    with pytest.raises(ValueError, match=r"learning_rate: expected this option once"):
        parse("sft", words[:-2])


MISTAKES = {
    "{sft} --k eight": "--k: expected an integer, got 'eight'",
    "{sft} --rank 0": "rank: expected",
    "{sft} --k 99": "k: expected 0 <= k <= rank",
    "{sft} --learning_rat 1": "unknown option --learning_rat; did you mean --learning_rate?",
    "{sft} --lr 0,001": "--lr: expected a number, got '0,001'",
    "{sft} --method dora": "got 'dora'; upgrade rasa_ext, or install the package",
    "{sft} --rslora true": "rslora: expected none with the method 'rasa'",
    "{sft} --target-modules q_prj": "target_modules: ",
    "{sft} --target-modules '[q_proj]'": "target_modules: expected names such as q_proj,v_proj",
    "{sft} --packing maybe": "--packing: expected true or false, got 'maybe'",
    "{sft} --config nope.yaml": "nope.yaml: no such file or directory",
    "{sft} --num_processes 0": "num_processes: expected at least 1, got 0",
    "{sft} --accelerate_config nope": "nope",
    "{sft} --resume_from_checkpoint x": "resume_from_checkpoint: expected none, since the command",
    "{sft} --use_peft false": "use_peft: expected true",
    "{sft} -m x": "unknown option -m",
    "{sft} stray": "unexpected 'stray'",
    "sft --model base --output {out}": "--data: expected rows with prompt and completion",
    "sft --data sft.jsonl --output {out}": "--model: expected a model, got none",
    "sft --model ./no --data sft.jsonl --output {out}": "model: the directory ./no does not exist",
    "sft --model base --data no.jsonl --output {out}": "no.jsonl does not exist",
    "sft --model base --data dpo.jsonl --output {out}": "which are for `rasa-ext dpo`",
    "sft --model base --data grpo.jsonl --output {out}": "expected the key 'completion'",
    "dpo --model base --data sft.jsonl --output {out}": "which is for `rasa-ext sft`",
    "kto --model base --data dpo.jsonl --output {out}": "which are for `rasa-ext dpo`",
    "grpo --model base --data grpo.jsonl --output {out}": "reward_funcs: expected a reward funct",
    "grpo --model base --data grpo.jsonl --output {out} --reward-funcs no.such": "no.such: ",
    "grpo --model base --data grpo.jsonl --output {out} --reward-funcs x": "reward_funcs: expected",
    "trl sft": "No such command 'trl': use sft, dpo, kto, reward, grpo or rloo",
    "ppo": "No such command 'ppo'",
}


@pytest.mark.parametrize("words", MISTAKES)
def test_a_mistake_is_answered_by_a_sentence(words, there, tmp_path):
    output = tmp_path / "out"
    given = words.format(sft=f"sft --model base --data sft.jsonl --output {output}", out=output)
    given = [word.strip("'") for word in given.split()]
    text = invoke(*given, code=2 if given[0] in ("trl", "ppo") else 1)
    assert MISTAKES[words] in text
    assert text.count("Error") == 1 or given[0] in ("trl", "ppo")
    assert not output.exists()


BAD_ROWS = {
    "dpo": {
        '{"prompt": "a", "chosen": "b"}': "expected the key 'rejected', got 'prompt', 'chosen'",
        '{"prompt": "a", "chosen": "b", "rejected": "b"}': "'chosen' equals 'rejected'",
        '{"prompt": "a", "chosen": "", "rejected": "b"}': "'chosen': expected text, got an empty",
        '{"prompt": "a", "chosen": ["b"], "rejected": "c"}': "'chosen', turn 1: expected an object",
        '{"prompt": [{"role": "assistant", "content": "a"}], "chosen": "b", "rejected": "c"}': (
            "'prompt': expected turns that end with another than the assistant's"
        ),
        '{"messages": []}': "got 'messages', which is for `rasa-ext sft`",
    },
    "kto": {
        '{"prompt": "a", "completion": "b"}': "expected the key 'label', got 'prompt', 'completion",
        '{"prompt": "a", "completion": "b", "label": "good"}': "'label': expected true or false",
    },
    "grpo": {
        '{"question": "a"}': "expected the key 'prompt', got 'question'",
        '{"prompt": " "}': "'prompt': expected text, got blanks",
    },
}


@pytest.mark.parametrize(
    ("task", "row"), [(task, row) for task, bad in BAD_ROWS.items() for row in bad]
)
def test_a_wrong_row_is_answered_with_its_line(task, row, there, tmp_path):
    good = (there / f"{task}.jsonl").read_text().splitlines()[0]
    (tmp_path / "bad.jsonl").write_text(f"{good}\n{row}\n{good}\n")
    words = line(task, tmp_path / "out")
    words[words.index(f"{task}.jsonl")] = str(tmp_path / "bad.jsonl")
    text = invoke(*words, code=1)
    assert f"{tmp_path}/bad.jsonl, line 2" in text
    assert BAD_ROWS[task][row] in text


def test_ratings_of_a_table_are_read(there, tmp_path):
    (tmp_path / "a.csv").write_text("q,a,label\nx,1,true\ny,2,0\n")
    words = line("kto", tmp_path / "out", "--prompt-field", "q", "--completion-field", "a")
    words[words.index("kto.jsonl")] = str(tmp_path / "a.csv")
    assert "label: true" in invoke(*words)


@pytest.mark.parametrize("task", TASKS)
def test_options_in_the_short_help_exist(task):
    known = make_parser(task)._option_string_actions
    text = invoke(task, "--help")
    for name in (name for group in HELP.values() for name in group):
        assert f" {name} " in text
        assert name in known or name in ("--config", "--num-processes")
    assert "--learning_rate" in invoke(task, "--help-all")
    assert known["--learning_rate"].default == TASKS[task].lr


def test_every_option_of_a_record_is_read_again(there, tmp_path):
    given = {"model": "base", "data": "sft.jsonl", "output": str(tmp_path), "rank": 2, "lr": 0.1}
    options = parsed(given)
    (tmp_path / "again.yaml").write_text(yaml.safe_dump(options.given))
    assert parse("sft", ["--config", str(tmp_path / "again.yaml")]).values == options.values


@pytest.mark.parametrize("task", TASKS)
def test_a_dry_run_loads_no_weights(task, there, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "load_model", lambda *_, **__: pytest.fail("was loaded"))
    text = invoke(*line(task, tmp_path / "out", "--test-split", 0.25, "--dry-run"))
    assert f"{task}.jsonl: 6 examples. --test-split 0.25: 2 examples." in text
    assert "model.layers.*.mlp.up_proj 2 48 x 32 5" in text
    assert re.search(r"memory: about \d+\.\d GB \(base .*: it fits\.", text)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("bits", ["16", "8", "4"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_sum_of_memory_is_the_documentation_s(bits, checkpointing, there, tmp_path):
    expected, name = MODELS["Llama-3.2-1B"], {"8": "load_in_8bit", "4": "load_in_4bit"}
    shape = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16}
    shape |= {"num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256}
    with torch.device("meta"):
        config = LlamaConfig(**shape, tie_word_embeddings=True, dtype=torch.bfloat16)
        model = rasa_ext.patch_model(LlamaForCausalLM(config), rank=8, k=1)
    given = {"model": "base", "data": "sft.jsonl", "output": str(tmp_path), "dtype": "bfloat16"}
    given |= {"batch_size": 2, "max_length": 1024, "gradient_checkpointing": checkpointing}
    given |= {name[bits]: True} if bits in name else {}
    found = memory(model, parsed(given))
    parts = {
        "base": expected.base(bits),
        "adapter": expected.adapter(8, 1),
        "packs": expected.packs(8, 1),
        "activations": expected.activations(2048, 8, 1, checkpointing),
        "logits": expected.logits(2048),
    }
    assert found == pytest.approx(parts, rel=0.02)


def test_the_card_has_a_question_and_how_to_serve_the_folder(there, tmp_path):
    invoke(*line("sft", tmp_path / "out", "--eval-data", "sft.jsonl"))
    card = (tmp_path / "out" / "README.md").read_text()
    first = json.loads((there / "sft.jsonl").read_text().splitlines()[0])
    assert f"## A question\n\n> {first['prompt']}\n\n" in card
    assert "vllm serve BASE_FOLDER --dtype float32 --enable-lora --max-lora-rank 8" in card


def test_a_rate_for_whole_models_is_warned_of(there, tmp_path):
    with pytest.warns(UserWarning, match=r"lr: 2e-05 is a rate for whole models; an adapter for s"):
        parsed({"model": "base", "data": "sft.jsonl", "output": str(tmp_path), "lr": 2e-5})
