"""Run worker scripts in several processes."""

from __future__ import annotations

import socket
import subprocess
from pathlib import Path

WORKERS = Path(__file__).parents[1] / "workers"


def launch(python: Path, launcher: str, worker: str, directory: Path, *options: str) -> None:
    """Run a script of tests/workers under ``launcher``, with a free port for the processes.

    ``options`` must end with the launcher's port option; the port is appended.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    done = subprocess.run(
        [python, "-m", launcher, *options, str(port), WORKERS / worker, directory],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
