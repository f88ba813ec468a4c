"""Tests of the stand-in for the interpreter: exit codes, stderr, signals and the time limit."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest

from tests.helpers import forked
from tests.helpers.processes import run_whole

SLEEP = "import os, time; print(os.getpid(), flush=True); time.sleep(600)"


def wait_for_end(process: Path) -> None:
    deadline = time.monotonic() + 30
    while process.exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize(
    ("code", "status", "said"),
    [
        ("import sys; sys.exit(7)", 7, ""),
        ("import sys; sys.exit('why')", 1, "why"),
        ("raise ValueError('why')", 1, "ValueError: why"),
        ("import os; os.abort()", -signal.SIGABRT, ""),
    ],
)
def test_it_ends_as_its_process_does(forked_python, code, status, said):
    done = subprocess.run([forked_python, "-c", code], capture_output=True, text=True)
    assert done.returncode == status
    assert said in done.stderr


def test_one_that_hangs_says_where_and_fails(forked_python):
    code = "import time\ndef wait():\n    time.sleep(60)\nwait()"
    variables = {**os.environ, forked.MOST: "0.2"}
    done = subprocess.run(
        [forked_python, "-c", code], env=variables, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert "in wait" in done.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_signals_end_both(forked_python, number):
    client = subprocess.Popen(
        [forked_python, "-c", SLEEP], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    process = Path(f"/proc/{int(client.stdout.readline())}")
    client.send_signal(number)
    client.communicate()
    assert client.returncode == -number
    wait_for_end(process)


def test_workers_end_with_a_launcher_that_is_killed(forked_python):
    """torchrun starts workers in sessions of their own, so no signal to a group reaches them."""
    start = "import subprocess, sys; subprocess.Popen([sys.executable, '-c', sys.argv[1]], {})"
    code = f"{start.format('start_new_session=True')}; import time; time.sleep(600)"
    launcher = subprocess.Popen([forked_python, "-c", code, SLEEP], stdout=subprocess.PIPE)
    worker = Path(f"/proc/{int(launcher.stdout.readline())}")
    launcher.kill()
    wait_for_end(worker)
    launcher.communicate()


def test_nothing_outlives_a_command_that_takes_too_long(forked_python, monkeypatch, tmp_path):
    code = f"import os; open('pid', 'w').write(str(os.getpid())); {SLEEP}"
    wait = subprocess.Popen.wait

    def impatient(process, timeout=None):
        assert timeout in (600, None)
        deadline = time.monotonic() + 60
        while timeout and not (tmp_path / "pid").exists():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        return wait(process, None if timeout is None else 0.01)

    monkeypatch.setattr(subprocess.Popen, "wait", impatient)
    with pytest.raises(subprocess.TimeoutExpired):
        run_whole(["sh", "-c", f'{forked_python} -c "$0" & wait', code], cwd=tmp_path)
    wait_for_end(Path("/proc", (tmp_path / "pid").read_text()))


def test_a_client_that_ends_before_the_answer_leaves_the_server(forked_python):
    request = {"words": ["-c", SLEEP], "folder": os.getcwd(), "environment": dict(os.environ)}
    for _ in range(3):
        with forked._connect(str(forked_python)) as client, open(os.devnull, "w") as null:
            text = json.dumps(request).encode() + b"\n"
            socket.send_fds(client, [text], [null.fileno()] * 3)
    done = subprocess.run([forked_python, "-c", "raise SystemExit(7)"])
    assert done.returncode == 7
