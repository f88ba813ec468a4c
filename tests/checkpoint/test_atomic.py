"""The files of an adapter change together, whatever happens while they are written."""

from __future__ import annotations

import errno
import os

import pytest

import rasa_ext
from rasa_ext.checkpoint.writing import WriteError
from tests.helpers.adapters import RANK, content, patched
from tests.helpers.file_limit import file_limit
from tests.helpers.models import SEQUENTIAL

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture
def saved(tmp_path):
    """A directory with an old adapter, and a model with a larger new one."""
    rasa_ext.save_adapter(patched(SEQUENTIAL.build(), 2, 1, seed=1), tmp_path)
    return tmp_path, patched(SEQUENTIAL.build(), RANK, 2, seed=2)


WRITERS = {"adapter": rasa_ext.save_adapter, "lora": rasa_ext.export_lora}


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("share", [0.0, 0.1, 0.999])
def test_a_full_disk_leaves_the_old_files(share, writer, saved, tmp_path_factory):
    """No file may grow beyond a share of the new weights', so that a write fails part way."""
    directory, model = saved
    before, elsewhere = content(directory), tmp_path_factory.mktemp("new")
    WRITERS[writer](model, elsewhere)
    limit = int(share * (elsewhere / WEIGHTS).stat().st_size)
    with file_limit(limit), pytest.raises(WriteError) as caught:
        WRITERS[writer](model, directory)
    assert content(directory) == before
    assert caught.value.errno == errno.EFBIG
    for part in (str(directory), "too large", "the adapter that is there is whole", "ulimit -f"):
        assert part in str(caught.value)


@pytest.mark.parametrize("writer", WRITERS)
def test_all_files_may_be_read_by_whom_the_umask_lets(writer, saved):
    directory, model = saved
    usual = os.umask(0o022)
    try:
        WRITERS[writer](model, directory)
    finally:
        os.umask(usual)
    assert {path.stat().st_mode & 0o777 for path in directory.iterdir()} == {0o644}


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left"), KeyboardInterrupt()])
@pytest.mark.parametrize("call", [1, 2, 3])
@pytest.mark.parametrize("writer", WRITERS)
def test_a_failing_move_leaves_the_old_files(call, error, writer, saved, monkeypatch):
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
    assert len(calls) == call
    assert content(directory) == before


def no_space(*args):
    raise OSError(errno.ENOSPC, "No space left")


def test_a_failing_first_save_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "replace", no_space)
    new = tmp_path / "a" / "b"
    with pytest.raises(OSError, match=r"no space is left on its disk.*nothing was left.*free some"):
        rasa_ext.save_adapter(patched(SEQUENTIAL.build()), new)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("writer", WRITERS)
def test_a_file_where_the_folder_goes(writer, tmp_path):
    (tmp_path / "file").write_text("mine")
    for place in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(WriteError, match=r"a file stands where a folder goes.*move that file"):
            WRITERS[writer](patched(SEQUENTIAL.build()), place)
    assert content(tmp_path) == {"file": b"mine"}
