"""Tests of the stand-in for the interpreter: exit codes, stderr, signals and the time limit."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.helpers import forked

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
