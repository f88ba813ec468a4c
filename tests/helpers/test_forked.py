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

SLEEP = "import os, time; print(os.getpid(), flush=True); time.sleep(600)"


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
    deadline = time.monotonic() + 30
    while process.exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_client_that_ends_before_the_answer_leaves_the_server(forked_python):
    request = {"words": ["-c", SLEEP], "folder": os.getcwd(), "environment": dict(os.environ)}
    for _ in range(3):
        with forked._connect(str(forked_python)) as client, open(os.devnull, "w") as null:
            text = json.dumps(request).encode() + b"\n"
            socket.send_fds(client, [text], [null.fileno()] * 3)
    done = subprocess.run([forked_python, "-c", "raise SystemExit(7)"])
    assert done.returncode == 7
