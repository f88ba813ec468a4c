"""finetune: what it writes, and that a run that is stopped goes on as if it had not been."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

import rasa_ext
from rasa_ext.train import callbacks
from rasa_ext.train.callbacks import read_metrics
from rasa_ext.train.finetune import finetune, total_steps
from rasa_ext.train.options import FinetuneOptions
from rasa_ext.train.trainer import checkpoints_in
from tests.helpers.tiny_lm import make_model, save_base, sums, write_jsonl


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return save_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("data")
    write_jsonl(directory / "train.jsonl", sums(22))
    write_jsonl(directory / "test.jsonl", sums(40)[30:])
    return directory


@pytest.fixture
def options(base, files, tmp_path) -> FinetuneOptions:
    # 22 rows in batches of 2, two to a step: the sixth step of an epoch has a single batch.
    return FinetuneOptions(
        model=str(base),
        data=str(files / "train.jsonl"),
        output=str(tmp_path / "out"),
        rank=4,
        dropout=0.1,
        lr=3e-3,
        max_steps=9,
        batch_size=2,
        grad_accum=2,
        dtype="float32",
    )


def run(options: FinetuneOptions, **changes):
    text = io.StringIO()
    result = finetune(dataclasses.replace(options, **changes), Console(file=text, width=200))
    return result, text.getvalue()


def losses(directory: str | Path) -> list[tuple[int, float, float, float]]:
    return [
        (row["step"], row["loss"], row["lr"], row["grad_norm"])
        for row in read_metrics(Path(directory) / "metrics.jsonl")
        if "loss" in row
    ]


def test_a_run_learns_and_leaves_its_files(options, files):
    result, text = run(
        options, max_steps=20, eval_data=str(files / "test.jsonl"), eval_every=10, lr=1e-2
    )
    output = Path(options.output)
    for name in ("tokenizer.json", "loss.png", "summary.json", "finetune.yaml"):
        assert (output / name).stat().st_size > 0
    assert (output / "loss.png").read_bytes().startswith(b"\x89PNG")

    rows = read_metrics(output / "metrics.jsonl")
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, 21))
    assert [row["step"] for row in rows if "eval_loss" in row] == [0, 10, 20]
    assert all(row["tokens_per_s"] > 0 for row in rows if "loss" in row)
    held_out = [row["eval_loss"] for row in rows if "eval_loss" in row]
    assert held_out[-1] < held_out[0] - 0.5
    assert "tokens/s" in text
    assert "held-out loss" in text

    summary = json.loads((output / "summary.json").read_text())
    assert summary["peak_memory"]["rss_bytes"] > 2**20
    assert summary["eval_loss"] == held_out[-1]
    assert (result.step, result.total_steps, result.interrupted) == (20, 20, False)

    model = make_model()
    rasa_ext.load_adapter(model, output)
    trained = [p.abs().max().item() for n, p in model.named_parameters() if n.endswith(".B")]
    assert min(trained) > 0


def test_a_checkpoint_holds_the_adapter_and_not_the_base(options):
    result, _ = run(options)
    step, checkpoint = checkpoints_in(Path(options.output))[-1]
    assert step == 9
    assert result.checkpoint == str(checkpoint)
    assert {path.name for path in checkpoint.iterdir()} >= {
        "adapter_config.json",
        "adapter_model.safetensors",
        "optimizer.pt",
        "scheduler.pt",
        "rng_state.pth",
        "trainer_state.json",
    }
    stored = load_file(checkpoint / "adapter_model.safetensors")
    assert all(".rasa_" in name for name in stored)
    assert sum(tensor.numel() for tensor in stored.values()) == result.trainable
    weights = {p.name for p in checkpoint.iterdir() if p.suffix in (".safetensors", ".bin")}
    assert weights == {"adapter_model.safetensors"}
    # Adam's two moments of what is trained, and nothing of the size of the base.
    optimizer = torch.load(checkpoint / "optimizer.pt", weights_only=True)
    moments = sum(t.numel() for s in optimizer["state"].values() for t in s.values() if t.dim())
    assert moments == 2 * result.trainable


@pytest.mark.parametrize("stop_at", [4, 6])  # within the first epoch, and at its end
def test_a_resumed_run_has_the_losses_of_an_uninterrupted_one(
    options, files, tmp_path, monkeypatch, stop_at
):
    evaluated = {"eval_data": str(files / "test.jsonl"), "eval_every": 2}
    whole = dataclasses.replace(options, output=str(tmp_path / "whole"), **evaluated)
    run(whole)

    original = callbacks.InterruptCallback.on_step_end

    def interrupt(self, args, state, control, **kwargs):
        if state.global_step == stop_at:
            signal.raise_signal(signal.SIGINT)
        return original(self, args, state, control, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(callbacks.InterruptCallback, "on_step_end", interrupt)
        stopped, text = run(options, **evaluated)
    assert "Stopping after this step" in text
    assert (stopped.interrupted, stopped.step) == (True, stop_at)
    assert losses(options.output) == losses(whole.output)[:stop_at]
    assert read_metrics(Path(options.output) / "metrics.jsonl")[-1]["step"] == stop_at

    resumed, _ = run(options, resume=True, **evaluated)
    assert (resumed.interrupted, resumed.step) == (False, 9)
    assert losses(options.output) == losses(whole.output)  # bit for bit
    ours, theirs = (
        load_file(Path(d) / "adapter_model.safetensors") for d in (options.output, whole.output)
    )
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_sigint_to_the_command_leaves_a_checkpoint_that_the_printed_line_resumes(options, tmp_path):
    config = tmp_path / "run.yaml"
    steps = 100
    values = {**options.to_dict(), "max_steps": steps}
    config.write_text(json.dumps(values))  # JSON is YAML
    command = [sys.executable, "-c", "from rasa_ext.cli import main; main()", "finetune"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [*command, "--config", str(config)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    metrics = Path(options.output) / "metrics.jsonl"
    try:
        deadline = time.monotonic() + 240
        while not (metrics.is_file() and len(metrics.read_text().splitlines()) >= 3):
            assert process.poll() is None, process.stdout.read()
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        text, _ = process.communicate(timeout=240)
    finally:
        process.kill()
    assert process.returncode == 130, text
    stopped_at = losses(options.output)[-1][0]
    assert 3 <= stopped_at < steps
    assert checkpoints_in(Path(options.output))[-1][0] == stopped_at
    resume = f"--config {Path(options.output) / 'finetune.yaml'} --resume"
    assert f"rasa-ext finetune {resume}" in text

    again = subprocess.run(
        [*command, *resume.split()], env=environment, capture_output=True, text=True
    )
    assert again.returncode == 0, again.stdout + again.stderr
    assert [row[0] for row in losses(options.output)] == list(range(1, steps + 1))


def test_a_second_ctrl_c_stops_at_once():
    before = signal.getsignal(signal.SIGINT)  # ignored in a shell's background
    handler = callbacks.InterruptCallback(Console(file=io.StringIO()))
    with handler:
        signal.raise_signal(signal.SIGINT)
        assert handler.requested
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_output_and_resume_guard_each_other(options):
    with pytest.raises(ValueError, match=r"resume: expected a checkpoint in .*, found none"):
        run(options, resume=True)
    run(options, max_steps=2)
    with pytest.raises(ValueError, match=r"output: .* holds checkpoints of an earlier run"):
        run(options)


def test_a_checkpoint_cut_off_while_being_written_is_passed_over(options):
    run(options, max_steps=4)
    output = Path(options.output)
    last = checkpoints_in(output)[-1][1]
    (last / "trainer_state.json").unlink()
    result, text = run(options, max_steps=4, resume=True)
    assert "checkpoint-3" in text
    assert result.step == 4


def test_resuming_a_complete_run_changes_nothing(options):
    run(options, max_steps=3)
    before = losses(options.output)
    stored = load_file(Path(options.output) / "adapter_model.safetensors")
    result, text = run(options, max_steps=3, resume=True)
    assert "is complete: 3 of 3 steps" in text
    assert result.step == 3
    assert losses(options.output) == before
    again = load_file(Path(options.output) / "adapter_model.safetensors")
    assert all(torch.equal(stored[name], again[name]) for name in stored)


def test_resuming_with_other_options_says_which(options):
    run(options, max_steps=3)
    _, text = run(options, max_steps=5, lr=1e-4, resume=True)
    assert "lr (0.003 before, 0.0001 now)" in text
    assert "max_steps (3 before, 5 now)" in text
    assert "dropout" not in text
    with pytest.raises(ValueError, match="rank"):
        run(options, max_steps=7, rank=2, resume=True)


def test_gradient_checkpointing_changes_no_loss(options, tmp_path):
    run(options, dropout=0.0)
    run(options, dropout=0.0, gradient_checkpointing=True, output=str(tmp_path / "other"))
    plain, recomputed = losses(options.output), losses(tmp_path / "other")
    assert [row[1] for row in recomputed] == pytest.approx([row[1] for row in plain], rel=1e-5)


def test_target_modules_and_dtype(options):
    _, text = run(options, target_modules="q_proj, v_proj", dtype="bfloat16", max_steps=1)
    stored = load_file(Path(options.output) / "adapter_model.safetensors")
    assert {name.split(".")[-2] for name in stored} == {"q_proj", "v_proj"}
    assert all(tensor.dtype == torch.float32 for tensor in stored.values())
    assert "2 groups" in text


def test_regex_targets(options):
    run(options, target_modules=r"regex:.*layers\.[01]\.mlp\.(up|down)_proj", max_steps=1)
    stored = load_file(Path(options.output) / "adapter_model.safetensors")
    assert {name.split(".")[-2] for name in stored} == {"up_proj", "down_proj"}


def test_total_steps_counts_as_trainer_does(options):
    result, _ = run(options, max_steps=None, epochs=1.5)
    # 11 batches in 6 steps to an epoch
    assert total_steps(dataclasses.replace(options, max_steps=None, epochs=1.5), 22) == 9
    assert result.step == 9


def test_a_loss_that_is_no_number_stops_the_run(options):
    model = make_model()
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")
    with pytest.raises(ValueError, match=r"lr: the loss became nan at step 1; lower --lr"):
        finetune(options, Console(file=io.StringIO()), model=model)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU trains in float16")
def test_float16_without_a_gpu_is_refused(options):
    with pytest.raises(ValueError, match=r"dtype: float16 .* needs a GPU"):
        run(options, dtype="float16")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 0}, "batch_size: expected at least 1, got 0"),
        ({"max_steps": 0}, "max_steps: expected at least 1, got 0"),
        ({"seq_len": 1}, "seq_len: expected at least 2, got 1"),
        ({"lr": 0.0}, "lr: expected a number above 0, got 0.0"),
        ({"dtype": "int8"}, "dtype: expected one of auto, float32"),
        ({"eval_every": 5}, "eval_every: expected eval_data"),
        ({"target_modules": ","}, "target_modules: expected 'all-linear'"),
        ({"k": 9}, r"k: expected 0 <= k <= rank"),
        ({"model": "./nowhere"}, "model: the directory ./nowhere does not exist"),
        ({"model": "nowhere.gguf"}, "model: the file nowhere.gguf does not exist"),
    ],
)
def test_bad_options_name_themselves(options, change, message):
    with pytest.raises(ValueError, match=message):
        run(options, **change)
    assert not Path(options.output).exists()
