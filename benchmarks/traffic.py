"""Bytes that a training step of one linear moves through a GPU's memory, as the GPU counts them.

    python -m benchmarks.traffic [--json FILE]

Runs itself under Nsight Compute, which reads ``dram__bytes_read.sum`` and ``dram__bytes_write.sum``
of every kernel of a forward and backward at M x in x out = 8192 x 4096 x 4096 in bfloat16, with
dropout 0.05 on the adapter's input and without dropout. Caches are not flushed between kernels, as
in training. For the same linear and r = 16, LoRAFusion (arXiv 2510.00206) reports 2.008 GiB for
plain LoRA and 1.258 GiB for its fused kernels, measured by its authors. ``least`` is the traffic
that every step needs (benchmarks.roofline).
"""

from __future__ import annotations

import argparse
import csv
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

import torch

from benchmarks import roofline
from benchmarks.linears import Case
from benchmarks.records import Results
from benchmarks.shapes import single

M, WIDTH, LAYERS = 8192, 4096, 32
# Variant, dropout, and the rank in the computation.
STEPS = (
    ("frozen", 0.0, 0),
    ("peft r=16", 0.05, 16),
    ("ours", 0.05, 39),
    ("peft r=16", 0.0, 16),
    ("ours", 0.0, 39),
)
METRICS = {"dram__bytes_read.sum": "read_gib", "dram__bytes_write.sum": "written_gib"}
COUNTED = (
    *("ncu", "--csv", "--print-units", "base", "--metrics", ",".join(METRICS)),
    *("--profile-from-start", "off", "--cache-control", "none", "--clock-control", "none"),
)
# The kernel of torch.cuda._sleep marks the start of each step; nothing else launches it.
MARK = "spin_kernel"


def case_of(M: int, width: int, device: str, dropout: float) -> Case:
    """Return a case of one linear with R = 39."""
    return Case(single(width, width, LAYERS), M, 8, 1, torch.bfloat16, device, dropout)


def run_all(M: int, width: int, device: str) -> None:
    """Run a step of each variant, after a mark, for Nsight Compute to count."""
    runtime = torch.cuda.cudart()
    for name, dropout, rank in STEPS:
        case = case_of(M, width, device, dropout)
        made = {**case.variants(), "peft r=16": case.peft(rank)}
        step = case.step(made[case.ours if name == "ours" else name])
        for _ in range(2):
            step()
        torch.cuda.synchronize()
        runtime.cudaProfilerStart()
        torch.cuda._sleep(1)
        step()
        torch.cuda.synchronize()
        runtime.cudaProfilerStop()


def counted(text: str) -> list[dict[str, float]]:
    """Return GiB read and written, and the number of kernels, of each step in Nsight Compute's CSV.

    The marks separate the steps. The CSV begins after other lines, and has a line for each kernel
    and metric, in launch order.
    """
    lines = text.splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), len(lines))
    found: list[dict[str, float]] = []
    kernels: list[set[str]] = []
    marks: set[str] = set()
    for line in csv.DictReader(lines[start:]):
        if MARK in line["Kernel Name"]:
            if line["ID"] not in marks:
                marks.add(line["ID"])
                found.append(defaultdict(float))
                kernels.append(set())
            continue
        if line["Metric Unit"] != "byte":
            raise ValueError(f"expected bytes of {line['Metric Name']}, got {line['Metric Unit']}")
        found[-1][METRICS[line["Metric Name"]]] += (
            float(line["Metric Value"].replace(",", "")) / 2**30
        )
        kernels[-1].add(line["ID"])
    return [{**sums, "kernels": len(ids)} for sums, ids in zip(found, kernels, strict=True)]


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    arguments.add_argument("--device", default="cuda")
    arguments.add_argument("--json", metavar="FILE")
    arguments.add_argument("--quick", action="store_true", help="tiny shapes, to test this")
    arguments.add_argument("--inside", action="store_true", help="only run the steps")
    given = arguments.parse_args()
    tokens, width = (40, 32) if given.quick else (M, WIDTH)
    if given.inside:
        run_all(tokens, width, given.device)
        return
    results = Results(given.json, given.device)
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "ncu.csv"
        again = (sys.executable, "-m", "benchmarks.traffic", "--inside", "--device", given.device)
        small = ("--quick",) if given.quick else ()
        done = subprocess.run((*COUNTED, "--log-file", str(log), *again, *small), check=False)
        text = log.read_text(encoding="utf-8") if log.exists() else ""
    rows = counted(text)
    ours = case_of(1, 16, given.device, 0.0).ours
    for (name, dropout, rank), row in zip(STEPS, rows, strict=False):
        least = roofline.linear_step(tokens, width, width, rank, 2).bytes / 2**30
        results.add(
            what="traffic",
            variant=ours if name == "ours" else name,
            dropout=dropout,
            M=tokens,
            R=rank,
            gib=row["read_gib"] + row["written_gib"],
            **row,
            least=least,
        )
    if done.returncode or len(rows) < len(STEPS):
        print(text[-2000:])
        raise SystemExit(f"ncu ended with {done.returncode}; {len(rows)} of {len(STEPS)} steps")


if __name__ == "__main__":
    main()
