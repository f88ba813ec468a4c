"""finetune: what is trained, the written files, a resumed run, and options that are refused."""

import copy
import re
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure
from safetensors.torch import load_file
from transformers.models.llama.modeling_llama import LlamaMLP

from rasa_ext.commands import training
from rasa_ext.commands.models import load_tokenizer
from rasa_ext.commands.results import describe, plot_loss
from tests.helpers.adapters import same_adapters
from tests.helpers.cli import invoke
from tests.helpers.file_limit import file_limit
from tests.helpers.finetuning import (
    assert_same_runs,
    checkpoints_in,
    interrupted,
    losses,
    read_log,
    read_result,
    run,
)
from tests.helpers.quantized import quantized
from tests.helpers.tiny_lm import CHATML, make_model


def test_a_run_learns_and_leaves_its_files(options, files):
    result, text = run(
        options, max_steps=20, eval_data=str(files / "test.jsonl"), eval_steps=10, lr=1e-2
    )
    output = Path(options["output"])
    assert (output / "loss.png").read_bytes().startswith(b"\x89PNG")

    rows = read_log(output)
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, 21))
    assert [row["step"] for row in rows if "eval_loss" in row] == [0, 10, 20]
    steps = [row for row in rows if "loss" in row]
    assert steps[0]["learning_rate"] == 1e-2  # the warm-up is shorter than a step
    held_out = [row["eval_loss"] for row in rows if "eval_loss" in row]
    assert held_out[-1] < held_out[0] - 0.5
    assert ">>>0<|im_end|>" in text  # the first sum's answer
    assert "step 10: held-out loss" in text
    assert re.search(r"step 20/20  loss \d.* tokens/s  0:\d\d:\d\d elapsed, 0:00:00 left", text)

    summary = read_result(output)
    assert summary["peak_memory"]["rss_bytes"] > 2**20
    assert (summary["eval_loss_before"], summary["eval_loss"]) == (held_out[0], held_out[-1])
    assert summary["first_loss"] == pytest.approx((steps[0]["loss"] + steps[1]["loss"]) / 2)
    assert summary["last_loss"] == pytest.approx((steps[18]["loss"] + steps[19]["loss"]) / 2)
    assert summary["tokens_per_s"] > 0
    assert (result["step"], result["total_steps"], result["interrupted"]) == (20, 20, False)


def test_a_checkpoint_holds_the_adapter_and_not_the_base(options):
    result, _ = run(options)
    step, checkpoint = checkpoints_in(Path(options["output"]))[-1]
    assert step == 9
    stored = load_file(checkpoint / "adapter_model.safetensors")
    assert all(".rasa_" in name for name in stored)
    assert sum(tensor.numel() for tensor in stored.values()) == result["trainable"]
    weights = {p.name for p in checkpoint.iterdir() if p.suffix in (".safetensors", ".bin")}
    assert weights == {"adapter_model.safetensors"}
    # Adam's two moments of the trained parameters, and nothing of the base's size.
    optimizer = torch.load(checkpoint / "optimizer.pt", weights_only=True)
    moments = sum(t.numel() for s in optimizer["state"].values() for t in s.values() if t.dim())
    assert moments == 2 * result["trainable"]


def test_a_run_stopped_between_epochs_resumes_with_evaluations(options, files, tmp_path):
    evaluated = {"eval_data": str(files / "test.jsonl"), "eval_steps": 2}
    whole = {**options, "output": str(tmp_path / "whole"), **evaluated}
    run(whole)
    stopped, text = interrupted(6, options, **evaluated)  # the end of the first epoch
    assert "Stopping after this step" in text
    assert (stopped["interrupted"], stopped["step"]) == (True, 6)
    assert losses(options["output"]) == losses(whole["output"])[:6]
    assert read_log(options["output"])[-1]["step"] == 6
    resumed, _ = run(options, resume=True, **evaluated)
    assert (resumed["interrupted"], resumed["step"]) == (False, 9)
    assert_same_runs(options["output"], whole["output"])


def test_a_chat_template_from_a_file(options, tmp_path):
    path = tmp_path / "chat.jinja"
    path.write_text(CHATML.replace("im_start", "turn"))
    _, text = run(options, max_steps=1, chat_template_path=path)
    assert "<|turn|>user" in text
    assert load_tokenizer(options["output"]).chat_template == path.read_text()


@pytest.mark.parametrize("other", [{"loss_type": "dft"}, {"label_smoothing_factor": 0.5}])
def test_another_loss_is_the_one_that_is_trained(other, options, tmp_path):
    run(options, max_steps=1)
    run(options, max_steps=1, **other, output=str(tmp_path / "other"))
    (_, plain, *_), (_, loss, *_) = losses(options["output"])[0], losses(tmp_path / "other")[0]
    assert abs(loss - plain) > 0.1


def test_gradient_checkpointing_changes_no_loss(options, tmp_path, monkeypatch):
    forward, calls = LlamaMLP.forward, []
    monkeypatch.setattr(
        LlamaMLP, "forward", lambda *args: calls.extend([0] * args[0].training) or forward(*args)
    )
    run(options, dropout=0.0)
    once = len(calls)
    run(options, dropout=0.0, gradient_checkpointing=True, output=str(tmp_path / "other"))
    assert len(calls) == 3 * once
    plain, recomputed = losses(options["output"]), losses(tmp_path / "other")
    assert [row[1] for row in recomputed] == pytest.approx([row[1] for row in plain], rel=1e-5)


def test_other_arguments_of_trl(options):
    """Trainer's own schedules use ``warmup``, too."""
    more = {
        "max_grad_norm": 0.5,
        "adam_beta1": 0.8,
        "lr_scheduler_type": "constant_with_warmup",
        "weight_decay": 0.25,
        "save_steps": 3,
    }
    run(options, warmup=0.5, max_steps=4, **more)
    rates = [rate for _, _, rate, _ in losses(options["output"])]
    assert rates == pytest.approx([0, 1.5e-3, 3e-3, 3e-3])
    assert "| adam_beta1 | 0.8 |" in (Path(options["output"]) / "README.md").read_text()
    (_, third), _ = checkpoints_in(Path(options["output"]))
    assert third.name == "checkpoint-3"
    (group,) = torch.load(third / "optimizer.pt", weights_only=True)["param_groups"]
    assert (group["weight_decay"], group["betas"][0]) == (0.25, 0.8)


@pytest.mark.parametrize(
    ("optim", "eps"), [("adafactor", (1e-30, 1e-3)), ("adamw_torch_fused", 1e-2)]
)
def test_other_optimizers(optim, eps, options):
    """Adafactor has two eps, of which no argument is one."""
    run(options, max_steps=2, optim=optim, adam_epsilon=0.01)
    state = torch.load(checkpoints_in(Path(options["output"]))[-1][1] / "optimizer.pt")
    assert state["param_groups"][0]["eps"] == eps
    (_, first, *_), (_, second, *_) = losses(options["output"])
    assert first != second


def test_packing_splits_plain_text_and_leaves_nothing_out(options, tmp_path):
    (tmp_path / "d.txt").write_text(f"{'what is the answer? ' * 50}\nit is 4\n")
    plain = {"data": str(tmp_path / "d.txt"), "max_steps": 1}
    count = re.compile(r"2 examples(?: in \d+ rows)?, ([\d,]+) tokens to learn")
    whole = run(options, **plain)[1]
    split = run(options, **plain, packing=True, seq_len=32, overwrite=True)[1]
    assert count.search(split)[1] == count.search(whole)[1]


def test_target_modules_and_dtype(options):
    _, text = run(options, target_modules="q_proj, lm_head", dtype="bfloat16", max_steps=1)
    stored = load_file(Path(options["output"]) / "adapter_model.safetensors")
    assert {name.split(".")[-2] for name in stored} == {"q_proj", "lm_head"}
    assert all(tensor.dtype == torch.float32 for tensor in stored.values())
    assert stored["base_model.model.lm_head.rasa_B"].abs().max() > 1e-3
    assert "(2 groups, effective rank 5)" in text


def test_steps_and_rates_of_epochs(options):
    """Warm-up begins above zero, and the rate ends above zero."""
    result, _ = run(options, max_steps=None, epochs=1.5, warmup=1 / 3)
    # an epoch has 11 batches in 6 steps
    assert result["step"] == result["total_steps"] == 9
    assert [step for step, _ in checkpoints_in(Path(options["output"]))] == [
        8,
        9,
    ]  # saved per tenth
    rates = [row[2] for row in losses(options["output"])]
    expected = [1 / 4, 2 / 4, 3 / 4, *(left / 6 for left in range(6, 0, -1))]
    assert rates == pytest.approx([3e-3 * share for share in expected])


def test_a_loss_that_is_no_number_stops_the_run(options):
    model = make_model()
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")
    with pytest.raises(ValueError, match=r"lr: the loss became nan at step 1; lower --lr"):
        run(options, model)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU trains in float16")
def test_float16_without_a_gpu_is_refused(options):
    with pytest.raises(ValueError, match=r"dtype: float16 needs a GPU"):
        run(options, dtype="float16")


BAD_OPTIONS = [
    ({"test_split": 1.0}, "test_split: expected a share in (0, 1)"),
    ({"activation_offloading": "true"}, "activation_offloading: expected a GPU"),
    ({"batch_size": 0}, "batch_size: expected at least 1, got 0"),
    ({"max_steps": 0}, "max_steps: "),
    ({"seq_len": 1}, "seq_len: expected at least 2, got 1"),
    ({"lr": 0.0}, "lr: expected a number above 0, got 0.0"),
    ({"k": 9}, "k: expected 0 <= k <= rank"),
    ({"target_modules": "regex:("}, "target_modules: expected a regular expression"),
    ({"target_modules": "q_projection"}, "target_modules: "),
    ({"target_modules": ","}, "target_modules: "),
    ({"dtype": "int8"}, "dtype: expected one of auto, float32"),
    ({"eval_steps": 5}, "eval_steps: expected eval_data"),
    ({"eval_steps": 0}, "eval_steps: "),
    ({"save_steps": -1}, "save_steps: "),
    ({"model": "nowhere.gguf"}, "model: the file nowhere.gguf"),
    ({"seed": -1}, "seed: "),
    ({"weight_decay": float("nan")}, "weight_decay: "),
    ({"eval_data": "."}, "eval_data: expected files"),
    ({"lr_scheduler_type": "sine"}, "lr_scheduler_type: expected one of 'linear', 'cosine'"),
    ({"load_in_4bit": True, "load_in_8bit": True}, "load_in_8bit: "),
    ({"rank_pattern": __file__}, f"rank_pattern: {__file__} is no JSON or YAML"),
    ({"modules_to_save": "pigeon"}, "modules_to_save: "),
    ({"method": "elora"}, "method: expected "),
    ({"experts": "all"}, "experts: expected None or 'slot' or 'layer' or 'shared'"),
    ({"experts": "slot"}, "experts: expected a model with stacked experts"),
    ({"method": "lora", "k": 0}, "k: expected none with the method 'lora'"),
    ({"method": "lora", "start": "paper"}, "start: expected none with the method 'lora'"),
    ({"pigeon": 1}, "unknown option --pigeon."),
    ({"max_grad_nrm": 1}, "unknown option --max_grad_nrm; did you mean --max_grad_norm?"),
    ({"max_grad_norm": "one"}, "max_grad_norm: expected a number, got 'one'"),
    ({"report_to": "pigeon"}, "report_to: "),
    ({"chat_template_path": "x"}, "chat_template_path: expected a .jinja file, got 'x'"),
    ({"deepspeed": "no.json"}, "deepspeed"),
    ({"eval_packing": True}, "eval_packing: expected none, since the command sets it"),
    ({"model_init_kwargs": '{"a": 1}'}, "model_init_kwargs: expected none, since the command"),
]


@pytest.mark.parametrize(("change", "message"), BAD_OPTIONS)
def test_bad_options_name_themselves_before_a_model_is_loaded(
    options, change, message, monkeypatch
):
    monkeypatch.setattr(training, "load_model", lambda *_, **__: pytest.fail("was loaded"))
    with pytest.raises(ValueError, match=re.escape(message)):
        run(options, **change)
    assert not Path(options["output"]).exists()


def test_the_best_step_is_kept_and_named(options, files, tmp_path):
    """Without --eval-steps, every checkpoint is evaluated.

    The best step is asked to have the largest loss, so it is not the last.
    """
    given = {"eval_data": str(files / "test.jsonl"), "max_steps": 6, "save_steps": 2, "lr": 0.3}
    best = {"load_best_model_at_end": "true", "greater_is_better": "true"}
    given |= best
    result, _ = run(options, **given)
    output, name = Path(options["output"]), "adapter_model.safetensors"
    rows = [row for row in read_log(output) if "eval_loss" in row]
    assert [row["step"] for row in rows] == [0, 2, 4, 6]
    best_row = max(rows[1:], key=lambda row: row["eval_loss"])
    assert (result["kept_step"], result["eval_loss"]) == (best_row["step"], best_row["eval_loss"])
    assert result["kept_step"] < 6
    (line,) = [each for each in describe(result) if each.startswith("held-out")]
    assert line.endswith(f"(of step {best_row['step']}, which is kept)")
    expected = (output / f"checkpoint-{best_row['step']}" / name).read_bytes()
    assert (output / name).read_bytes() == expected
    moved = output.rename(tmp_path / "moved")
    again, text = run(options, **given, output=str(moved), resume=True)
    assert "is complete: 6 steps" in text
    assert again["eval_loss"] == best_row["eval_loss"]
    assert (moved / name).read_bytes() == expected
    with pytest.raises(ValueError, match="load_best_model_at_end: expected eval_data"):
        run(options, **best)


def test_held_out_rows_that_are_trained_on_are_counted(options):
    text = run(options, eval_data=options["data"], max_steps=1)[1]
    assert "22 held-out examples are also trained on" in text


BAD_PATHS = [
    (
        "data",
        "no.csv",
        "data: expected files or a hub data set, but no.csv does not",
    ),
    ("model", "./no", "model: the directory ./no does not exist"),
    ("init-adapter", "no", "init_adapter: expected an adapter's directory, but no does not"),
    ("rank-pattern", "no.json", "rank_pattern: the file no.json does not exist"),
    ("output", "file", "output: expected a folder, but file is a file"),
]


@pytest.mark.parametrize(("option", "path", "message"), BAD_PATHS)
def test_paths_are_checked_before_a_model_is_loaded(
    option, path, message, options, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    given = {"model": options["model"], "data": options["data"], option: path}
    words = [word for name, value in given.items() for word in (f"--{name}", value)]
    text = invoke("sft", *words, code=1)
    assert f"Error: {message}" in text
    assert "Loading /" not in text


def test_a_4_bit_base_trains_a_float32_adapter_without_a_warning(options, recwarn):
    """TRL rounds trainable parameters over such a base to bfloat16; finetune restores them."""
    model = quantized(make_model(hidden_size=64, intermediate_size=128), "nf4")
    model.is_loaded_in_4bit = True
    run(options, model, lr=1e-9, dropout=0.0, max_steps=1)
    assert not [w for w in recwarn if "cast to" in str(w.message)]
    stored = load_file(Path(options["output"]) / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.float32}
    assert any((A.bfloat16().float() != A).any() for n, A in stored.items() if n.endswith("_A"))


def test_a_given_model_is_left_as_it_was(options):
    model = make_model()
    before = copy.deepcopy(model)
    run(options, model, max_steps=1)
    assert same_adapters(model, before)
    run(options, model, max_steps=1, resume=True)  # the run is complete
    assert same_adapters(model, before)
    assert model(torch.tensor([[1, 2]])).logits.shape == (1, 2, 320)


@pytest.mark.parametrize("size", [400, 50_000, 70_000])
def test_a_full_disk_is_the_output_s(size, options):
    words = ["--model", options["model"], "--data", options["data"], "--output", options["output"]]
    with file_limit(size):
        text = invoke("finetune", *words, "--max-steps", 2, code=1)
    assert re.search(rf"Error: {options['output']}\S*: cannot be written: ", text)


def test_the_picture_s_axis_fits_the_losses(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(Figure, "savefig", lambda self, path: seen.append(self.axes[0].get_ylim()))
    rows = [{"step": i, "loss": 2 + i / 100} for i in range(20)]
    plot_loss([*rows, {"step": 20, "eval_loss": 2.3}], tmp_path / "loss.png", "title")
    low, high = seen[0]
    assert 1.9 < low <= 2
    assert 2.3 <= high < 2.4


def test_advice_is_given_once(options, recwarn):
    """PEFT's layers give equal advice, with names that are not options of the command."""
    run(options, target_modules="layers.0.self_attn.q_proj", max_steps=1)
    (said,) = [str(w.message) for w in recwarn if "close to a LoRA" in str(w.message)]
    assert said.startswith("groups: ")
