"""A stand-in for the Python interpreter that starts processes with large libraries imported.

Tests start the program that ``interpreter`` yields instead of ``sys.executable``. The program is a
small client. It asks a server, which has imported torch, transformers and peft once, to fork. The
fork has the client's arguments, environment, folder and standard files, receives the client's
signals, and ends when the client ends. A fork that hangs prints its stack and fails. The server has
a single thread, so that forks are safe. It serves all test workers of a run, and exits after the
last one disconnects.

Tests of what a process imports must use ``sys.executable``.
"""

import json
import os
import signal
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
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
MOST = "SECONDS_OF_A_FORK"  # the variable of the time limit, by default five minutes
# JE_ARROW_MALLOC_CONF stops pyarrow from starting a thread.
ONE_THREAD = {"OMP_NUM_THREADS": "1", "JE_ARROW_MALLOC_CONF": "background_thread:false"}


@contextmanager
def interpreter(folder: Path) -> Iterator[Path]:
    """Yield the program, and start its server unless another worker has done so for ``folder``."""
    import fcntl
    import subprocess

    program, server = folder / "python", None
    with open(folder / "python.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            kept = _keep(program)
        except OSError:  # no server runs
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
    """Open a connection that keeps the server running until it is closed."""
    connection = _connect(str(program))
    connection.sendall(b"stay")
    if not connection.recv(1):
        raise ConnectionError("the server was about to end")
    return connection


def _connect(name: str) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(f"\0{name}")  # an abstract Linux socket, without a file
    return connection


def _client(name: str, arguments: list[str]) -> int:
    """Run Python with ``arguments`` in a fork, and return the exit code or end by its signal."""
    import ctypes

    # End with the process that started this one, such as a launcher that is killed.
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
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
    """Fork for each client until no client or worker is left, then exit.

    Returns only in a fork, with the client's request.
    """
    import select

    # A shell starts background processes with SIGINT ignored, and forks inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(f"\0{name}")
    listener.listen()
    print("ready", flush=True)
    forks: dict[socket.socket, int] = {}  # by client: the fork's pidfd, readable at its end
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
                    with suppress(ConnectionError):
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
        with suppress(ConnectionError):  # the client was killed: the next round ends the fork
            connection.sendall(f"{pid}\n".encode())
    os._exit(0)


def _run(words: list[str], folder: str, environment: dict[str, str]) -> None:
    """Run a script, ``-m`` module or ``-c`` code like the Python interpreter."""
    import faulthandler
    import runpy

    from huggingface_hub import constants

    os.environ.clear()
    os.environ.update(environment)
    faulthandler.dump_traceback_later(float(environment.get(MOST, 300)), exit=True)
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
    gc.freeze()  # or else collections in a fork would copy the memory of all modules
    sys.executable = sys.argv[2]
    try:
        _run(**_serve(sys.executable))
        code = 0
    except SystemExit as end:
        if not isinstance(end.code, int | None):
            raise
        code = end.code or 0
    # Exit like the interpreter, but skip the clean-up of modules, which copies their memory.
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    main()
