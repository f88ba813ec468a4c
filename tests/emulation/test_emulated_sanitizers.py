"""The stand-alone check under AddressSanitizer, UndefinedBehaviorSanitizer and ThreadSanitizer."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

NAMES = ["address_and_undefined", "threads", "race_in_shared_memory", "race_across_blocks"]


@pytest.mark.parametrize("name", NAMES)
def test_check(emulation_build, name):
    ctest = shutil.which("ctest", path=Path(sys.executable).parent) or "ctest"
    command = [ctest, "--test-dir", emulation_build, "-R", f"^{name}$"]
    command += ["--output-on-failure", "--no-tests=error"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
