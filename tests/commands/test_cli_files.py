"""The commands when files cannot be written, or should not be."""

import errno
import shutil
from pathlib import Path

import pytest
from transformers import AutoTokenizer
from typer.testing import CliRunner

import rasa_ext
from rasa_ext import writing
from rasa_ext.commands import models, paths
from rasa_ext.commands.app import app
from tests.helpers.adapters import content, patched
from tests.helpers.cli import invoke, load, save_official
from tests.helpers.file_limit import file_limit
from tests.helpers.tiny_lm import CHATML, make_tokenizer, save_base


@pytest.fixture(scope="module")
def places(tmp_path_factory) -> dict[str, Path]:
    """Inputs of the commands: a base, an adapter, a LoRA, an official adapter."""
    folder = tmp_path_factory.mktemp("files")
    save_base(folder / "base")
    model = patched(load(folder / "base"), 4, 1)
    rasa_ext.save_adapter(model, folder / "adapter")
    rasa_ext.export_lora(model, folder / "lora")
    save_official(model, folder / "official")
    return {path.name: path for path in folder.iterdir()}


COMMANDS = {
    "merge": ["merge", "adapter"],
    "export-lora": ["export-lora", "adapter"],
    "import-official": ["import-official", "official", "--model", "base"],
    "import-lora": ["import-lora", "lora"],
}


def run(command: str, places: dict[str, Path], output: Path, *more: object, code: int = 0) -> str:
    words = [places.get(word, word) for word in COMMANDS[command]]
    return invoke(*words, "--output", output, *more, code=code)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_full_disk_and_an_output_that_holds_files(command, places, tmp_path):
    output = tmp_path / "a" / "out"
    with file_limit(4000):
        text = run(command, places, output, code=1)
    assert f"Error: {output}: cannot be written: file too large" in text
    assert "nothing was left there" in text
    assert not list(tmp_path.iterdir())
    run(command, places, output)
    (output / "notes.txt").write_text("mine")
    before = content(output)
    text = run(command, places, output, code=1)
    assert f"output: expected a new folder or an empty one, but {output} holds files" in text
    assert "--overwrite" in text
    with file_limit(4000):
        text = run(command, places, output, "--overwrite", code=1)
    assert "the files there are unchanged" in text
    assert content(output) == before
    run(command, places, output, "--overwrite")
    assert content(output).keys() == before.keys()


@pytest.mark.parametrize("command", COMMANDS)
def test_a_model_and_an_adapter_never_share_a_folder(command, places, tmp_path):
    # transformers would put the adapter on top of the merged model.
    output, other = tmp_path / "out", "export-lora" if command == "merge" else "merge"
    run(other, places, output)
    before = content(output)
    text = run(command, places, output, "--overwrite", code=1)
    name = "adapter_config.json" if command == "merge" else "model.safetensors"
    assert f"output: expected no {name} in {output}, since readers would load it with the" in text
    assert content(output) == before


def test_an_output_is_looked_at_before_the_work(places, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setattr(models, "load_model", None)
    for command in COMMANDS:
        text = run(command, places, tmp_path / "file", code=1)
        assert "output: expected a folder, but" in text
        text = run(command, places, tmp_path / "file" / "below", code=1)
        assert "not a directory; nothing was written; move the file" in text
    monkeypatch.setattr(writing, "_may_write", lambda _: False)  # root may write anywhere
    for command in COMMANDS:
        text = run(command, places, tmp_path / "out", code=1)
        assert "permission denied; nothing was written; change the permissions" in text


@pytest.mark.parametrize("command", COMMANDS)
def test_what_is_read_is_never_overwritten(command, places):
    for read in (places["base"], places[COMMANDS[command][1]]):
        before = content(read)
        text = run(command, places, read, "--overwrite", code=1)
        assert "output: expected another directory than the inputs'" in text
        assert content(read) == before


@pytest.mark.parametrize("command", COMMANDS)
def test_the_tokenizer_that_an_adapter_was_trained_with_goes_along(command, places, tmp_path):
    """Each output replaces the templates of the one before."""
    templates = {"several": {"default": "{{ 1 }}", "tool_use": "{{ 2 }}"}, "none": None}
    read, output = COMMANDS[command][1], tmp_path / "out"
    for name in ("several", "several", "none"):
        adapter = shutil.copytree(places[read], tmp_path / name, dirs_exist_ok=True)
        make_tokenizer(templates[name]).save_pretrained(adapter)
        run(command, {**places, read: adapter}, output, "--overwrite")
        assert AutoTokenizer.from_pretrained(output).chat_template == templates[name]
    run(command, places, output, "--overwrite")  # no tokenizer was saved with these
    if command == "merge":
        assert AutoTokenizer.from_pretrained(output).chat_template == CHATML
    else:
        assert not list(output.glob("tokenizer*"))


@pytest.mark.parametrize("command", COMMANDS)
def test_a_tokenizer_that_cannot_be_loaded_is_left_out(command, places, tmp_path):
    read = COMMANDS[command][1]
    adapter = shutil.copytree(places[read], tmp_path / "in")
    (adapter / "tokenizer_config.json").write_text("{")
    with pytest.warns(UserWarning, match=f"the tokenizer saved with {adapter} is left out: "):
        run(command, {**places, read: adapter}, tmp_path / "out")
    assert "rasa_ext" in (tmp_path / "out" / "README.md").read_text()


def test_a_merge_that_is_interrupted_leaves_nothing(places, tmp_path, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(type(AutoTokenizer.from_pretrained(places["base"])), "save_pretrained",
                        interrupted)  # fmt: skip
    assert run("merge", places, tmp_path / "out", code=130).endswith("Interrupted.")
    assert not list(tmp_path.iterdir())


UNEXPECTED = [
    (OSError(errno.ENOSPC, "No space left on device", "out/x"), "out/x: cannot be written"),
    (RuntimeError("basic_ios::clear: iostream error"), "the disk may be full"),
    (PermissionError(errno.EACCES, "Permission denied", "base"), "base: permission denied."),
    (ImportError("You need to install galore"), "Error: You need to install galore"),
]


@pytest.mark.parametrize(("error", "said"), UNEXPECTED)
def test_what_no_command_expected(error, said, monkeypatch):
    """Such errors come, for example, from Trainer writing a checkpoint."""

    def failing(_):
        raise error

    monkeypatch.setattr(paths, "is_adapter", failing)
    text = invoke("inspect", "anything", code=1)
    assert "Error: " in text
    assert said in text


def test_another_error_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr(paths, "is_adapter", lambda _: 1 / 0)
    assert isinstance(CliRunner().invoke(app, ["inspect", "x"]).exception, ZeroDivisionError)
