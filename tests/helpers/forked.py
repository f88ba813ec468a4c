"""A stand-in for the Python interpreter whose processes begin with the libraries imported.

The program that ``interpreter`` gives is started instead of ``sys.executable``: a small client asks
a server, which has imported torch, transformers and peft once, to fork. The fork has the client's
arguments, environment, folder and standard files, and is otherwise a process of its own; signals to
the client reach it, and it ends when its client does. The server has a single thread, so that a
fork is sound, and serves all workers of a run until the last lets go of it.

What a process imports can only be tested with ``sys.executable``.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PRELOADED = (
    "matplotlib.pyplot",
    "peft",
    "rasa_ext.commands.training",
    "rasa_ext.peft",
    "tests.helpers.adapters",
    "torch.distributed.fsdp",
    "torch.distributed.run",
    "transformers.trainer",
    "trl.trainer.sft_trainer",
)
# The second keeps pyarrow from starting a thread.
ONE_THREAD = {"OMP_NUM_THREADS": "1", "JE_ARROW_MALLOC_CONF": "background_thread:false"}


@contextmanager
def interpreter(folder: Path) -> Iterator[Path]:
    """The program, whose server is started unless another worker with this folder has."""
    import fcntl
    import subprocess

    program, server = folder / "python", None
    with open(folder / "python.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            kept = _keep(program)
        except OSError:  # none is there
            program.write_text(f'#!/bin/sh\nexec {sys.executable} -IS {__file__} {program} "$@"\n')
            program.chmod(0o755)
            with open(folder / "python.log", "w") as log:
                command = [sys.executable, "-m", "tests.helpers.forked", "--serve", str(program)]
                environment = {**os.environ, **ONE_THREAD}
                server = subprocess.Popen(
                    command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=log
                )
            assert server.stdout.readline(), (folder / "python.log").read_text()
            kept = _keep(program)
    with kept:
        yield program
    if server is not None:
        server.communicate()


def _keep(program: Path) -> socket.socket:
    """While this connection is open the server stays."""
    connection = _connect(str(program))
    connection.sendall(b"stay")
    if not connection.recv(1):
        raise ConnectionError("the server was about to end")
    return connection


def _connect(name: str) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(f"\0{name}")  # one of Linux's names without a file
    return connection


def _client(name: str, arguments: list[str]) -> int:
    """Has the server run Python with these arguments, and ends as that does."""
    server = _connect(name)
    request = {"words": arguments, "folder": os.getcwd(), "environment": dict(os.environ)}
    socket.send_fds(server, [json.dumps(request).encode() + b"\n"], [0, 1, 2])
    answers = server.makefile("r")
    pid = int(answers.readline())
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: os.kill(pid, number))
    code = int(answers.readline())
    if code < 0:
        if code != -signal.SIGKILL:
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    return code


def _serve(name: str) -> dict:
    """Forks as clients ask, and exits when none is left; returns in a fork what it is to run."""
    import select

    # A shell starts what it leaves in the background with SIGINT ignored, and forks inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(f"\0{name}")
    listener.listen()
    print("ready", flush=True)
    forks: dict[socket.socket, int] = {}  # each client's, as a file that is ready when it ends
    keepers: set[socket.socket] = set()
    begun = False
    while forks or keepers or not begun:
        ready, *_ = select.select([listener, *forks, *forks.values(), *keepers], [], [])
        keepers -= set(ready)
        for connection, fork in list(forks.items()):
            if connection in ready:  # the client has ended
                signal.pidfd_send_signal(fork, signal.SIGKILL)
            if connection in ready or fork in ready:
                end = os.waitid(os.P_PIDFD, fork, os.WEXITED)
                code = end.si_status if end.si_code == os.CLD_EXITED else -end.si_status
                if connection not in ready:
                    connection.sendall(f"{code}\n".encode())
                del forks[connection]
                connection.close()
                os.close(fork)
        if listener not in ready:
            continue
        begun, connection = True, listener.accept()[0]
        text, files, *_ = socket.recv_fds(connection, 1 << 20, 3)
        if not files:
            keepers.add(connection)
            connection.sendall(b"stay")
            continue
        while not text.endswith(b"\n"):
            text += connection.recv(1 << 20)
        pid = os.fork()
        if pid == 0:
            for each in (listener, connection, *forks, *keepers):
                each.close()
            for number, file in enumerate(files):
                os.dup2(file, number)
            return json.loads(text)
        for file in files:
            os.close(file)
        forks[connection] = os.pidfd_open(pid)
        connection.sendall(f"{pid}\n".encode())
    os._exit(0)


def _run(words: list[str], folder: str, environment: dict[str, str]) -> None:
    """As the interpreter would with these words, as far as the tests use them."""
    import runpy

    from huggingface_hub import constants

    os.environ.clear()
    os.environ.update(environment)
    constants.HF_HUB_CACHE = environment.get("HF_HUB_CACHE", constants.HF_HUB_CACHE)
    sys.path[1:1] = filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))
    os.chdir(folder)
    if words[0] == "-u" or environment.get("PYTHONUNBUFFERED"):
        sys.stdout.reconfigure(write_through=True)
    kind, *rest = words[words[0] == "-u" :]
    sys.path[0] = str(Path(kind).resolve().parent)
    sys.argv = [kind, *rest]
    if kind == "-m":
        sys.path[0] = folder
        sys.argv = rest
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    elif kind == "-c":
        sys.path[0] = ""
        sys.argv = ["-c", *rest[1:]]
        exec(compile(rest[0], "<string>", "exec"), {"__name__": "__main__"})
    else:
        runpy.run_path(kind, run_name="__main__")


def main() -> None:
    if sys.argv[1] != "--serve":
        sys.exit(_client(sys.argv[1], sys.argv[2:]))
    import atexit
    import gc
    import importlib
    import threading

    import torch

    for module in PRELOADED:
        importlib.import_module(module)
    torch.set_num_threads(1)
    threads = len(os.listdir("/proc/self/task"))
    assert threads == 1, f"a fork would lose {threads - 1} threads"
    gc.freeze()  # a fork's collections would copy the pages of all that is imported
    sys.executable = sys.argv[2]
    try:
        _run(**_serve(sys.executable))
        code = 0
    except SystemExit as end:
        if not isinstance(end.code, int | None):
            raise
        code = end.code or 0
    # The interpreter's own end, but for its last visit to every module, which copies their pages.
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    main()
