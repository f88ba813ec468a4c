"""Worker scripts in several processes."""

from __future__ import annotations

import socket
import subprocess
from pathlib import Path

WORKERS = Path(__file__).parents[1] / "workers"


def launch(python: Path, launcher: str, worker: str, directory: Path, *options: str) -> None:
    """Two processes of a worker script, which meet on a free port of this machine."""
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
