"""One command for a CPU: every benchmark, as one JSON, one markdown table and one picture.

    python -m benchmarks.cpu_report --out benchmarks/results [--minutes 34]

Writes DIR/cpu-NAME.json, .md and .png; NAME is the date unless --name is given. Nothing else should
run on the machine. With more minutes, every benchmark runs all its rounds. What docs/benchmarks.md
shows comes first: single linears, a whole model with many tokens and with few, SFTTrainer, the
host's time. Then come the linears of a decoder layer: steps, growth with L and k, decoding, packing
and merging of all layers, each operator, where the time of a step goes, and the official formula
under torch.compile. ``benchmarks.staged`` says how stages share the time.

The exit status is 0 only if no stage failed. ``--quick`` runs with tiny shapes.
"""

from __future__ import annotations

import argparse
import datetime
import shutil
import sys
import tempfile
from functools import partial
from pathlib import Path

from benchmarks import staged
from benchmarks.staged import Stage

BOTH = ("--dtype", "float32", "bfloat16")


def stages(quick: bool, out: Path) -> list[Stage]:
    """Return the stages in order; budgets are seconds of a run of 2000."""
    bench = partial(staged.bench, out, device="cpu", quick=quick)
    plain = partial(staged.bench, out, device=None, quick=False)  # modules with other arguments
    few = ("--shapes", "24,32,48", "--rounds", "2") if quick else ("--rounds", "60")
    found = [plain("layer", "layer", 140, *few)]
    if not quick:  # their models have only one size
        short = ("--dtype", "float32", "--length", "8", "--rounds", "100")
        found += [
            plain("model", "model", 330, "--dtype", "float32", "--rounds", "14"),
            plain("bfloat16", "model", 330, "--dtype", "bfloat16", "--rounds", "14"),
            plain("few tokens", "model", 270, *short),
            plain("sft", "sft", 480),
        ]
    return [
        *found,
        plain("host", "host", 60, *(("--rounds", "2") if quick else ())),
        bench("step", "block", 130, "step", *BOTH),
        bench("growth", "block", 50, "growth", "--dtype", "float32"),
        bench("decode", "block", 40, "decode", *BOTH),
        bench("all layers", "ops", 40, "model"),
        bench("one linear", "ops", 30, "one"),
        staged.profile(out, 30, device="cpu", quick=quick),
        bench("compiled", "block", 70, "compiled", "--dtype", "float32"),
    ]


def collect(work: Path, out: Path, name: str) -> None:
    """Copy the report's files under their names, and link the picture from the text."""
    out.mkdir(parents=True, exist_ok=True)
    text = (work / "report.md").read_text(encoding="utf-8")
    if (work / "step.png").exists():
        shutil.copy(work / "step.png", out / f"{name}.png")
        text += f"\n## Where a step goes\n\n![parts of a step, stacked]({name}.png)\n"
    (out / f"{name}.md").write_text(text, encoding="utf-8")
    shutil.copy(work / "report.json", out / f"{name}.json")
    print(f"copied to {out / name}.json and .md")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--name", default=datetime.date.today().isoformat())
    parser.add_argument("--minutes", type=float, default=34, help="time limit for all stages")
    parser.add_argument("--quick", action="store_true", help="tiny shapes, to test the report")
    parser.add_argument("--only", nargs="+", metavar="STAGE", help="run only these stages")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        planned = staged.chosen(stages(given.quick, work), given.only)
        code = staged.produce(planned, given.minutes, work, "cpu", given.quick)
        collect(work, given.out, f"cpu-{given.name}")
    return code


if __name__ == "__main__":
    sys.exit(main())
