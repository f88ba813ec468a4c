"""The time limit of the stand-in for the interpreter. Exit codes show where it is used."""

import os
import subprocess

from tests.helpers import forked


def test_one_that_hangs_says_where_and_fails(forked_python):
    code = "import time\ndef wait():\n    time.sleep(60)\nwait()"
    variables = {**os.environ, forked.MOST: "0.2"}
    done = subprocess.run(
        [forked_python, "-c", code], env=variables, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert "in wait" in done.stderr
