"""Folders are written completely or not at all; file system errors get a clear message."""

import errno
import os
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models

from rasa_ext.writing import STALE, TOKENIZER, WriteError, new_folder, writing
from tests.helpers.file_limit import file_limit
from tests.helpers.threads import run_in_threads


def tree(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): path.read_text() if path.is_file() else "/"
        for path in sorted(folder.rglob("*"))
    }


ERRORS = [
    (errno.ENOSPC, r"no space left on device \([\d,.]+ MiB are free\).*free some space"),
    (errno.EDQUOT, "quota"),
    (errno.EROFS, "read-only file system; .*choose another folder"),
    (errno.EACCES, "permission denied; .*change the permissions"),
    (errno.EPERM, "operation not permitted; .*change the permissions"),
    (errno.EFBIG, "too large.*ulimit -f"),
    (errno.EIO, "input/output error; .*choose another folder"),
]


@pytest.mark.parametrize(("number", "said"), ERRORS)
def test_one_sentence_for_what_the_system_refuses(number, said, tmp_path):
    with (
        pytest.raises(WriteError, match=f"{tmp_path}.*{said}") as caught,
        writing(tmp_path, "the old one is whole"),
    ):
        raise OSError(number, os.strerror(number), "elsewhere")
    assert "the old one is whole" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert (caught.value.errno, caught.value.filename) == (number, str(tmp_path))


def save_tokenizer(path: Path) -> None:
    Tokenizer(models.WordLevel({"word" * 500: 0})).save(str(path))


WRITERS = {
    "safetensors": lambda path: save_file({"a": torch.zeros(1000)}, path),
    "torch": lambda path: torch.save({"a": torch.zeros(1000)}, path),
    "tokenizers": save_tokenizer,
    "python": lambda path: path.write_bytes(bytes(2000)),
}


@pytest.mark.parametrize("library", WRITERS)
def test_each_library_s_own_error_is_understood(library, tmp_path):
    """The system really fails the writes, at a limit of 1000 bytes."""
    with file_limit(1000), pytest.raises(WriteError) as caught, writing(tmp_path, "all is well"):
        WRITERS[library](tmp_path / "file")
    assert str(tmp_path) in str(caught.value)
    assert "too large" in str(caught.value) or "the disk may be full" in str(caught.value)


@pytest.mark.parametrize("error", [ValueError("rank: no"), RuntimeError("cuda"), OSError("no hub")])
def test_other_errors_pass(error, tmp_path):
    with pytest.raises(type(error)) as caught, writing(tmp_path, ""):
        raise error
    assert caught.value is error


def test_a_new_folder_appears_whole(tmp_path):
    output = tmp_path / "a" / "out"
    usual = os.umask(0o027)
    try:
        with new_folder(output, "") as folder:
            (folder / "sub").mkdir()
            for path in (folder / "one", folder / "sub" / "two"):
                path.touch(mode=0o600)
            assert not output.exists()
    finally:
        os.umask(usual)
    assert tree(tmp_path) == {"a": "/", "a/out": "/", "a/out/one": "", "a/out/sub": "/",
                              "a/out/sub/two": ""}  # fmt: skip
    assert {p.stat().st_mode & 0o777 for p in output.rglob("*") if p.is_file()} == {0o640}
    assert output.stat().st_mode & 0o777 == 0o750


def write(output: Path, files: dict[str, str]) -> None:
    """Write the files through a new folder."""
    before = tree(output)
    with new_folder(output, "the base is whole", (*STALE, *TOKENIZER)) as folder:
        for name, text in files.items():
            (folder / name).write_text(text)
        assert {name: t for name, t in tree(output).items() if ".part" not in name} == before


OLD = {
    "config.json": "old",
    "model-00001-of-00002.safetensors": "old",
    "model.safetensors.index.json": "old",
    "pytorch_model.bin": "old",
    "chat_template.jinja": "old",
    "additional_chat_templates": "/",
    "additional_chat_templates/tool.jinja": "old",
    "model.gguf": "mine",
    "notes": "/",
    "notes/today": "mine",
}


@pytest.fixture
def old(tmp_path) -> Path:
    for name, text in OLD.items():
        if text == "/":
            (tmp_path / name).mkdir()
        else:
            (tmp_path / name).write_text(text)
    return tmp_path


def test_weights_of_an_earlier_model_go_and_the_rest_stays(old):
    write(old, {"config.json": "new", "model.safetensors": "new"})
    assert tree(old) == {
        "config.json": "new",
        "model.gguf": "mine",
        "model.safetensors": "new",
        "notes": "/",
        "notes/today": "mine",
    }


def test_a_file_does_not_replace_a_folder(old):
    with pytest.raises(WriteError, match="is a directory; the base is whole, and the files there"):
        write(old, {"config.json": "new", "notes": "new"})
    assert tree(old) == OLD


def test_threads_that_save_into_one_folder(tmp_path):
    """Threads take turns; none removes another's unfinished folder as if its process had died."""
    (tmp_path / "out").mkdir()
    barrier, wrong = threading.Barrier(4), []

    def save(number: int) -> None:
        try:
            for _ in range(20):
                with new_folder(tmp_path / "out") as folder:
                    for name in ("one", "two"):
                        (folder / name).write_text(str(number))
                    barrier.wait()
        except BaseException as error:
            wrong.append(error)
            barrier.abort()

    run_in_threads(4, save)
    assert not wrong
    found = tree(tmp_path / "out")
    assert found.keys() == {"one", "two"}
    assert len(set(found.values())) == 1
