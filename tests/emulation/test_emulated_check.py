"""Run the stand-alone check, plain in several orders of execution, and under sanitizers."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers import compiled

# Test names in CTest, and the program that each runs.
PROGRAMS = {
    "check": "rasa_check",
    "address_and_undefined": "rasa_check_address",
    "threads": "rasa_check_thread",
    "race_in_shared_memory": "rasa_race",
    "race_across_blocks": "rasa_race",
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_check(name):
    folder = compiled.build(PROGRAMS[name])
    ctest = shutil.which("ctest", path=Path(sys.executable).parent) or "ctest"
    command = [ctest, "--test-dir", folder, "-R", f"^{name}$"]
    command += ["--output-on-failure", "--no-tests=error"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
