"""PEFT's own MetaMathQA benchmark, with RaSA as one of its methods.

    python -m experiments.metamathqa.run PEFT_CHECKOUT [experiments/rasa/NAME ...]

Runs ``method_comparison/MetaMathQA/run.py`` of a checkout of PEFT on the entries beside this file
(all of them unless named). Data, training, measuring and the place of the results are its own; the
only thing added is that ``rasa_ext.peft`` is registered first. It needs a GPU and the hub.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
_CODE = """
import runpy, sys
import rasa_ext.peft  # registers RASA: PeftConfig.from_pretrained then knows adapter_config.json
script = sys.argv.pop(1)
sys.argv[0] = script
sys.path[0] = script.rpartition("/")[0]  # as if the script had been started itself
runpy.run_path(script, run_name="__main__")
"""


def entries() -> list[str]:
    """The entries here, as PEFT's runner wants them named."""
    found = sorted(HERE.glob("experiments/*/*/adapter_config.json"))
    return [path.parent.relative_to(HERE).as_posix() for path in found]


def run(checkout: Path, entry: str) -> None:
    """Run one entry. A process of its own, since PEFT's runner measures memory from its start.

    Raises ValueError where ``checkout`` has no such benchmark or ``entry`` is none of ours, and
    CalledProcessError where the benchmark fails.
    """
    script = checkout.resolve() / "method_comparison" / "MetaMathQA" / "run.py"
    if not script.is_file():
        raise ValueError(
            f"PEFT_CHECKOUT: expected a clone of huggingface/peft with {script}, got none; "
            "git clone https://github.com/huggingface/peft, and pip install -e it."
        )
    if entry not in entries():
        raise ValueError(f"entry: expected one of {', '.join(entries())}, got {entry!r}.")
    # The runner takes paths of exactly three parts, relative to where it is started.
    here = [sys.executable, "-c", _CODE, script.as_posix(), "-v", entry]
    path = os.pathsep.join(filter(None, [str(HERE.parents[1]), os.environ.get("PYTHONPATH")]))
    subprocess.run(here, cwd=HERE, check=True, env={**os.environ, "PYTHONPATH": path})


def main() -> None:
    """Run the command above."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkout", type=Path, metavar="PEFT_CHECKOUT")
    parser.add_argument("entries", nargs="*", help="experiments/rasa/NAME; all unless given")
    given = parser.parse_args()
    for entry in given.entries or entries():
        run(given.checkout, entry.rstrip("/"))


if __name__ == "__main__":
    main()
