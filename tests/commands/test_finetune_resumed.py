"""finetune: runs that stop, resume from the newest whole checkpoint, or replace others."""

import io
import itertools
import json
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import yaml
from rich.console import Console

import rasa_ext
from rasa_ext.commands import callbacks, training
from rasa_ext.commands.run_folder import check_output, newest_whole, reserved
from tests.helpers.adapters import content
from tests.helpers.cli import invoke
from tests.helpers.finetuning import (
    Given,
    assert_same_runs,
    checkpoints_in,
    losses,
    parsed,
    read_log,
    read_result,
    run,
    small_options,
)
from tests.helpers.processes import torchrun
from tests.helpers.tiny_lm import make_model, sums, write_jsonl


@pytest.fixture(scope="module")
def uninterrupted(base, files, tmp_path_factory) -> Given:
    """A run of 60 steps with the options that `command_stopped` uses."""
    options = small_options(base, files, tmp_path_factory.mktemp("uninterrupted"), max_steps=60)
    run(options)
    return options


def command_stopped(python: Path, options: Given, number: signal.Signals) -> tuple[int, str]:
    """Run the command, signal it after its second checkpoint; return exit code and output."""
    config = Path(options["output"]).with_suffix(".yaml")
    config.write_text(json.dumps(options))  # JSON is YAML
    command = [python, "-c", "from rasa_ext.commands import main; main()", "sft"]
    piped = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    process = subprocess.Popen([*command, "--config", str(config)], **piped)
    try:
        deadline = time.monotonic() + 240
        while len(checkpoints_in(Path(options["output"]))) < 2:
            assert process.poll() is None, process.stdout.read()
            assert time.monotonic() < deadline
            time.sleep(0.005)
        process.send_signal(number)
        text, _ = process.communicate(timeout=240)
    finally:
        process.kill()
    return process.returncode, text


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_stopped_command_resumes_to_the_bit(number, uninterrupted, tmp_path, forked_python):
    output = tmp_path / "out"
    options = {**uninterrupted, "output": str(output)}
    code, text = command_stopped(forked_python, options, number)
    stopped_at = checkpoints_in(output)[-1][0]
    assert 12 <= stopped_at < 60, "it was not stopped in between"
    resume = f"--config {output / 'options.yaml'} --resume"
    if number == signal.SIGINT:
        assert code == 130, text
        assert losses(output)[-1][0] == stopped_at
        assert f"rasa-ext sft {resume}" in text
    else:
        assert code == -signal.SIGKILL

    invoke("finetune", *resume.split())
    assert_same_runs(output, uninterrupted["output"])


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
    with pytest.raises(FileNotFoundError, match=r"resume: expected a checkpoint in .*found none"):
        run(options, resume=True)
    run(options, max_steps=2)
    told = r"output: .* checkpoints of an earlier run; --resume continues it, --overwrite replaces"
    with pytest.raises(ValueError, match=told):
        run(options)
    with pytest.raises(ValueError, match="overwrite: expected it without resume"):
        run(options, resume=True, overwrite=True)


def test_what_others_wrote_is_replaced_only_where_that_is_asked_for(options):
    output = options["output"]
    make_model().save_pretrained(output)
    before = content(Path(output))
    with pytest.raises(ValueError, match=f"output: .*{output} holds files; pass --overwrite"):
        run(options)
    assert content(Path(output)) == before
    run(options, max_steps=1, overwrite=True)
    assert not {"model.safetensors", "config.json"} & {path.name for path in Path(output).iterdir()}
    rasa_ext.load_adapter(make_model(), output)


def test_a_folder_is_of_one_run_at_a_time(options):
    """The second is refused at its start, also if it would replace or continue the first."""
    output = Path(options["output"])
    record = output / "options.yaml"
    with reserved(output, record, new=True):
        with pytest.raises(ValueError, match=f"output: .*{output} holds files"):
            check_output(parsed(options))
        for new in (True, False):
            refused = pytest.raises(ValueError, match=f"output: another run writes {output}")
            with refused, reserved(output, record, new=new):
                pytest.fail("a second run began")
    run(options, max_steps=2)
    before = content(output)
    refused = pytest.raises(ValueError, match="another run")
    with reserved(output, record, new=False), refused, reserved(output, record, new=False):
        pytest.fail("a second run began")
    assert content(output) == before


def test_a_run_that_fails_before_its_first_step_leaves_no_folder(options, tmp_path):
    bad = tmp_path / "bad.jsonl"
    bad.write_text("{}")
    words = ["finetune", "--model", options["model"], "--data", bad, "--output", options["output"]]
    assert "bad.jsonl, line 1: expected the key 'prompt'" in invoke(*words, code=1)
    assert not Path(options["output"]).exists()


def test_a_run_that_replaces_another_keeps_none_of_the_checkpoints(options):
    run(options, max_steps=5)
    run(options, max_steps=2, overwrite=True)
    assert [step for step, _ in checkpoints_in(Path(options["output"]))] == [1, 2]
    assert [row[0] for row in losses(options["output"])] == [1, 2]
    record = (Path(options["output"]) / "options.yaml").read_text()
    assert "overwrite" not in record  # or --config would replace it once more


def test_resuming_a_complete_run_changes_nothing(options, tmp_path):
    """Nor does an option on which no step depends, or another folder."""
    run(options, max_steps=3)
    before = content(Path(options["output"]))
    result, text = run(options, max_steps=3, resume=True)
    assert "is complete: 3 steps" in text
    assert result["step"] == 3
    after = content(Path(options["output"]))
    assert all(after[name] == before[name] for name in before if "results" not in name)
    moved = str(Path(options["output"]).rename(tmp_path / "moved"))
    text = run(options, max_steps=3, output=moved, gradient_checkpointing=True, resume=True)[1]
    assert "is complete: 3 steps" in text


def test_a_run_is_resumed_as_it_began_or_not_at_all(options, files, tmp_path, monkeypatch):
    """Resuming with changed options is refused, and the output stays unchanged."""
    run(options, max_steps=3)
    before = content(Path(options["output"]))
    changes = {
        "lr": 1e-4,
        "max_steps": 5,  # the learning rate depends on the number of steps
        "rank": 2,
        "dropout": 0.0,
        "seq_len": 512,
        "template": False,
        "data": str(files / "test.jsonl"),
    }
    for name, value in changes.items():
        old = parsed(options | {"max_steps": 3}).values[name]
        value = [value] if name == "data" else value
        told = f"{name} ({old!r} before, {value!r} now)"
        with pytest.raises(ValueError, match=f"resume: .*{re.escape(told)}"):
            run(options, **{"max_steps": 3, name: value}, resume=True)
    monkeypatch.setattr(training, "processes", lambda: 2)
    with pytest.raises(ValueError, match=r"processes \(1 before, 2 now\)"):
        run(options, max_steps=3, resume=True)
    assert content(Path(options["output"])) == before


FSDP2 = {
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_TRANSFORMER_CLS_TO_WRAP": "LlamaDecoderLayer",
}


@pytest.mark.parametrize(("held_out", "engine"), [(3, {}), (5, {}), (5, FSDP2)])
def test_two_processes_train_as_one_and_write_once(
    held_out, engine, base, tmp_path, forked_python, monkeypatch
):
    """Every step has all four rows. The second process has none or one of the held-out rows."""
    for name, value in engine.items():
        monkeypatch.setenv(name, value)
    rows = [{"prompt": "what is ", "completion": "plus " * n} for n in (1, 2, 5, 9, 3)]
    files = {"data": rows[:4], "eval_data": rows[-held_out:]}
    given = {name: str(write_jsonl(tmp_path / name, each)) for name, each in files.items()}
    given |= {"model": str(base), "rank": 4, "lr": 1e-2, "epochs": 2, "dtype": "float32"}
    one, two = (str(tmp_path / name) for name in ("one", "two"))
    result, _ = run({**given, "batch_size": 4, "output": one})
    text = yaml.safe_dump({**given, "batch_size": 2, "output": two})
    (tmp_path / "options.yaml").write_text(text)
    text = torchrun(forked_python, "finetune.py", tmp_path)
    assert text.count("step 2/2") == 1
    steps = [row["step"] for row in read_log(two) if "train_loss" not in row]
    assert steps == [0, 1, 2, 2]
    assert losses(two) == [pytest.approx(row, rel=1e-4) for row in losses(one)]
    again = read_result(two)
    for name in ("eval_loss_before", "eval_loss"):
        assert again[name] == pytest.approx(result[name], rel=1e-4)
    rasa_ext.load_adapter(make_model(), two)


def test_an_interrupt_of_one_process_stops_both_after_the_same_step(
    base, files, tmp_path, forked_python, monkeypatch
):
    options = small_options(
        base, files, tmp_path / "out", max_steps=8, dtype="float32", save_steps=6
    )
    (tmp_path / "options.yaml").write_text(json.dumps(options))
    monkeypatch.setenv("INTERRUPT_AFTER", "3")
    with pytest.raises(AssertionError, match="exitcode  : 130") as stopped:
        torchrun(forked_python, "finetune.py", tmp_path)
    assert "Stopped after step 3 of 8. Continue in 2 processes with:" in str(stopped.value)
    assert [step for step, _ in checkpoints_in(tmp_path / "out")] == [3]
    assert read_result(tmp_path / "out")["interrupted"]


def test_a_run_is_resumed_with_the_data_that_it_began_with(options, tmp_path):
    data = write_jsonl(tmp_path / "data.jsonl", sums(8))
    run(options, max_steps=1, data=str(data))
    write_jsonl(data, sums(9)[1:])
    with pytest.raises(ValueError, match=r"other options: rows of the data, as sha256 \('"):
        run(options, max_steps=1, data=str(data), resume=True)


@pytest.fixture(scope="module")
def finished(base, files, tmp_path_factory) -> Path:
    """The output of a run, with the checkpoints of steps 9 and 10."""
    output = tmp_path_factory.mktemp("finished") / "out"
    run(small_options(base, files, output, max_steps=10))
    (output / "checkpoint-best").mkdir()
    return output


@pytest.fixture
def stopped(finished, tmp_path) -> Path:
    return shutil.copytree(finished, tmp_path / "stopped")


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def rot(path: Path) -> None:
    """Change the middle half of a file; the ends, which identify the format, stay."""
    data = path.read_bytes()
    quarter = len(data) // 4
    other = bytes(byte ^ 0xFF for byte in data[quarter:-quarter])
    path.write_bytes(data[:quarter] + other + data[-quarter:])


def found(stopped: Path) -> tuple[Path, str]:
    """Return the chosen checkpoint and the printed text."""
    text = io.StringIO()
    return newest_whole(stopped, Console(file=text, width=1000)), text.getvalue()


LARGE = ("adapter_model.safetensors", "optimizer.pt", "scheduler.pt")
SMALL = ("rng_state.pth", "trainer_state.json", "adapter_config.json", "run.json")
DAMAGES = [*itertools.product(LARGE, (cut, rot, Path.unlink)), *((name, cut) for name in SMALL)]


@pytest.mark.parametrize(("name", "damage"), DAMAGES)
def test_a_damaged_newest_is_named_and_the_one_before_taken(name, damage, stopped):
    damage(stopped / "checkpoint-10" / name)
    last, before = stopped / "checkpoint-10", stopped / "checkpoint-9"
    assert found(stopped) == (before, f"{last} is damaged.\nResuming from {before}.\n")


def test_random_states_may_be_missing(stopped):
    """Trainer does not need them."""
    (stopped / "checkpoint-10" / "rng_state.pth").unlink()
    assert found(stopped)[0] == stopped / "checkpoint-10"


def test_none_is_whole(stopped):
    for step in (9, 10):
        cut(stopped / f"checkpoint-{step}" / "optimizer.pt")
    with pytest.raises(ValueError, match="but all 2 are damaged; start without --resume"):
        found(stopped)
