"""The files of an adapter change together, even if writing fails or is interrupted."""

import errno
import fcntl
import itertools
import os
import shutil
import signal
import traceback
from collections.abc import Callable

import pytest
import torch

import rasa_ext
from rasa_ext import writing
from rasa_ext.checkpoint import files
from rasa_ext.methods import LoraConfig
from rasa_ext.writing import WriteError
from tests.helpers.adapters import RANK, content, patched, same_adapters
from tests.helpers.models import SEQUENTIAL

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@pytest.fixture
def saved(tmp_path):
    """A directory with an old adapter, and a model with a larger new adapter."""
    rasa_ext.save_adapter(patched(SEQUENTIAL.build(), 2, 1, seed=1), tmp_path)
    return tmp_path, patched(SEQUENTIAL.build(), RANK, 2, seed=2)


WRITERS = {"adapter": rasa_ext.save_adapter, "lora": rasa_ext.export_lora}


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left"), KeyboardInterrupt()])
@pytest.mark.parametrize("call", range(1, 7))
@pytest.mark.parametrize("writer", WRITERS)
def test_a_failing_move_leaves_the_old_files(call, error, writer, saved, monkeypatch):
    """Saving moves six files: three old ones out and three new ones in."""
    directory, model = saved
    before, replace, calls = content(directory), os.replace, []

    def failing(source, target):
        calls.append(target)
        if len(calls) == call:
            raise error
        return replace(source, target)

    monkeypatch.setattr(os, "replace", failing)
    with pytest.raises(type(error)):
        WRITERS[writer](model, directory)
    monkeypatch.undo()
    assert len(calls) >= call
    assert content(directory) == before


def forked(work: Callable[[], object]) -> int:
    """Run ``work`` in a forked process and return the process id."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    return pid


def killed_at(call: int, work: Callable[[], object]) -> bool:
    """Kill a process at its ``call``-th change of a folder; return False if it ended earlier."""

    calls = itertools.count(1)

    def counted(function):
        def counting(*args, **kwargs):
            if next(calls) == call:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return counting

    def patched_work():
        for module, name in ((os, "replace"), (os, "rename"), (os, "mkdir"), (shutil, "rmtree")):
            setattr(module, name, counted(getattr(module, name)))
        work()

    return os.WIFSIGNALED(os.waitpid(forked(patched_work), 0)[1])


def lora(alpha: float, seed: int):
    """Return a LoRA that stores its scale only in the config."""
    return patched(SEQUENTIAL.build(), config=LoraConfig(rank=2, alpha=alpha), seed=seed)


def outputs(model):
    with torch.no_grad():
        return SEQUENTIAL.loss(model, SEQUENTIAL.inputs(0))[0]


def test_killed_at_any_moment_a_folder_is_one_whole_version(tmp_path):
    """It loads, and a folder in it is of that version, once there is a config.

    The next save succeeds and removes the leftovers of the killed save.
    """
    models = {"old": lora(8.0, seed=1), "new": lora(32.0, seed=2)}
    versions = {name: outputs(model) for name, model in models.items()}
    assert not torch.allclose(*versions.values())
    within = "additional_chat_templates"

    def save(folder, version):
        with writing.new_folder(folder) as new:
            rasa_ext.save_adapter(models[version], new)
            (new / within).mkdir()
            (new / within / version).touch()

    seen = []
    for call in itertools.count(1):
        folder = tmp_path / str(call)
        save(folder, "old")
        if not killed_at(call, lambda: save(folder, "new")):  # noqa: B023
            break
        found = outputs(rasa_ext.load_adapter(SEQUENTIAL.build(), folder))
        now = [name for name, version in versions.items() if torch.equal(version, found)]
        assert now, f"neither version, killed at call {call}"
        if (folder / CONFIG).exists():
            assert [path.name for path in (folder / within).iterdir()] == now
        seen += now
        killed_at(call + 1, lambda: save(folder, "old"))  # noqa: B023
        save(folder, "new")
        files = sorted(path.name for path in folder.rglob("*") if path.is_file())
        assert files == ["README.md", CONFIG, WEIGHTS, "new"]
        found = outputs(rasa_ext.load_adapter(SEQUENTIAL.build(), folder))
        assert torch.equal(found, versions["new"])
    assert seen == sorted(seen, reverse=True)  # once new, always new
    assert set(seen) == {"old", "new"}


def test_two_processes_that_save_into_one_folder_leave_a_whole_adapter(tmp_path):
    models = [lora(8.0, seed=1), lora(32.0, seed=2)]
    for trial in range(30):
        folder, (ready, go) = tmp_path / str(trial % 3), os.pipe()

        def save(model, folder=folder, ready=ready, go=go):
            os.close(go)
            os.read(ready, 1)  # returns in both processes once the parent closes the pipe
            rasa_ext.save_adapter(model, folder)

        children = [forked(lambda model=model: save(model)) for model in models]
        os.close(ready)
        os.close(go)
        assert [os.waitpid(child, 0)[1] for child in children] == [0, 0]
        found = outputs(rasa_ext.load_adapter(SEQUENTIAL.build(), folder))
        assert any(torch.equal(outputs(model), found) for model in models)
        assert sorted(content(folder)) == ["README.md", CONFIG, WEIGHTS]


def test_a_save_while_an_adapter_is_read_gives_one_version(tmp_path, monkeypatch):
    """Another save may come between reading the config and reading the tensors."""
    old, new = lora(8.0, seed=1), lora(32.0, seed=2)
    rasa_ext.save_adapter(old, tmp_path)
    read, saves = files.read_either, [new]

    def meanwhile(folder):
        if saves:
            rasa_ext.save_adapter(saves.pop(), tmp_path)
        return read(folder)

    monkeypatch.setattr(files, "read_either", meanwhile)
    found = rasa_ext.load_adapter(SEQUENTIAL.build(), tmp_path)
    assert torch.equal(outputs(found), outputs(new))


def refuse(*args, **kwargs):
    raise OSError(errno.EPERM, "Operation not permitted")


@pytest.mark.parametrize("missing", [(os, "link"), (fcntl, "flock")], ids=["links", "locks"])
def test_a_file_system_may_lack_links_and_locks(missing, saved, monkeypatch):
    directory, model = saved
    monkeypatch.setattr(*missing, refuse)
    rasa_ext.save_adapter(model, directory)
    assert sorted(content(directory)) == ["README.md", CONFIG, WEIGHTS]
    assert same_adapters(model, rasa_ext.load_adapter(SEQUENTIAL.build(), directory))


def test_a_save_does_not_wait_for_ever_for_who_holds_the_lock(saved, monkeypatch):
    """``flock DIRECTORY rasa-ext ...`` holds the lock for the whole command."""
    directory, model = saved
    monkeypatch.setattr(writing, "_PATIENCE", 0.05)
    descriptor = os.open(directory, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    rasa_ext.save_adapter(model, directory)
    os.close(descriptor)
    assert sorted(content(directory)) == ["README.md", CONFIG, WEIGHTS]
    assert same_adapters(model, rasa_ext.load_adapter(SEQUENTIAL.build(), directory))


def test_a_save_follows_no_link_that_lies_in_its_folder(saved, tmp_path_factory):
    directory, model = saved
    outside = tmp_path_factory.mktemp("outside")
    for name in ("adapter_model.safetensors", "kept"):
        (outside / name).write_text("mine")
    for name in (CONFIG, WEIGHTS, "README.md"):
        for kind in ("new", "old"):
            (directory / f".{name}.{kind}").symlink_to(outside / "kept")
    (directory / CONFIG).unlink()
    (directory / ".saving.1.part").symlink_to(outside)
    (directory / ".saving.2.part" / "new").mkdir(parents=True)
    (directory / ".saving.2.part" / "new" / CONFIG).touch()
    (directory / ".saving.2.part" / "old").symlink_to(outside)
    rasa_ext.save_adapter(model, directory)
    assert content(outside) == {"adapter_model.safetensors": b"mine", "kept": b"mine"}
    assert not any((directory / name).is_symlink() for name in (CONFIG, WEIGHTS))


def test_a_hidden_folder_that_came_with_an_adapter_replaces_nothing_of_the_user_s(saved):
    """A folder that looks like a save that was killed."""
    directory, model = saved
    for name in ("new/x", "old/mine/evil", "old/notes"):
        (directory / ".saving.0.part" / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / ".saving.0.part" / name).write_text("evil")
    (directory / "mine").mkdir()
    for name in ("mine/precious", "notes"):
        (directory / name).write_text("mine")
    rasa_ext.save_adapter(model, directory)
    kept = {path.name: path.read_text() for path in directory.rglob("*") if path.is_file()
            if path.name not in (CONFIG, WEIGHTS, "README.md")}  # fmt: skip
    assert kept == {"precious": "mine", "notes": "mine"}


@pytest.mark.parametrize("writer", WRITERS)
def test_a_file_where_the_folder_goes(writer, tmp_path):
    (tmp_path / "file").write_text("mine")
    for place in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(WriteError, match=r"(exists|not a directory);.*move the file"):
            WRITERS[writer](patched(SEQUENTIAL.build()), place)
    assert content(tmp_path) == {"file": b"mine"}
