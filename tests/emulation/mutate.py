"""Breaks the kernels in one place at a time and counts how many of the breaks the check notices.

    python tests/emulation/mutate.py [--jobs N] [--only SUBSTRING]

Every barrier is deleted, every bound shifted by one in both directions, indices are swapped; in all
kernels and launchers, but not in heuristics.cuh, where either side of a bound is right. Each mutant
is compiled for the host with AddressSanitizer, linked to the stand-alone check and run.
Prints the score of each kind and the mutants that survive, each with the reason why it is no fault
where one is known. Fails if a barrier survives, if fewer than 90 % die, or if a survivor has no
reason.
"""

from __future__ import annotations

import argparse
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from mutants_that_live import reason_of

HERE = Path(__file__).resolve().parent
CSRC = HERE.parents[1] / "csrc"
CXX = os.environ.get("CXX", "g++")
FLAGS = ["-std=c++17", "-w", "-fsanitize=address", f"-I{HERE}"]
KERNELS = ("dropout", "pack", "pack_backward", "decode", "table")
PATIENCE = 4  # times what the unbroken kernel takes; a loop that never ends is noticed, too

# What of a file a mutant can break; what several include breaks them all.
FILES = {
    "pack.cuh": ("pack",),
    "pack.cu": ("pack",),
    "pack_backward.cuh": ("pack_backward",),
    "pack_backward.cu": ("pack_backward",),
    "decode.cuh": ("decode",),
    "decode.cu": ("decode",),
    "dropout.cuh": ("dropout",),
    "dropout.cu": ("dropout",),
    "philox.cuh": ("dropout",),
    "table.cuh": ("table",),
    "table.cu": ("table",),
    "collective.cuh": ("dropout", "pack", "pack_backward", "decode"),
    "launch.cuh": ("dropout", "pack", "pack_backward", "decode"),
}


@dataclass(frozen=True)
class Mutant:
    """One break: characters [begin, end) of a file become ``text``."""

    kind: str
    file: str
    line: int
    begin: int
    end: int
    text: str
    before: str
    after: str

    def __str__(self) -> str:
        return f"{self.kind}: {self.file}:{self.line}: {self.before}  ->  {self.after}"


# A comparison and the two ways to shift its bound. Templates have no blanks around their brackets.
COMPARISONS = {
    "<": ("<=", "+ 1 <"),
    "<=": ("<", "<= 1 +"),
    ">": (">=", "> 1 +"),
    ">=": (">", "+ 1 >="),
}
NAME = r"[A-Za-z_][\w.]*(?:\[\d\])?"
ROW_COL = re.compile(rf"(?P<row>{NAME}) \* (?P<width>{NAME}) \+ (?P<col>{NAME})")
CASTED = re.compile(
    r"(?:static_cast<int64_t>\(|int64_t\{)(?P<row>[^(){}]+)[)}] \* "
    rf"(?P<width>{NAME}) \+ (?P<col>{NAME})"
)
BLOCK = re.compile(r"blockIdx\.([xyz])")


def edits(text: str) -> Iterator[tuple[str, int, int, str]]:
    """Kind, begin, end and new text of every break of a file's text."""
    for found in re.finditer(r"__syncthreads\(\);", text):
        yield "barrier", *found.span(), ";"
    for found in re.finditer(r"(?<= )(<=|>=|<|>)(?= )", text):
        for shifted in COMPARISONS[found[1]]:
            yield "bound", *found.span(), shifted
    for found in re.finditer(r"\b(?:std::)?(?:min|max)\(", text):
        end = closing(text, found.end() - 1)
        whole = text[found.start() : end]
        for shift in ("+ 1", "- 1"):
            yield "bound", found.start(), end, f"({whole} {shift})"
    for pattern in (ROW_COL, CASTED):
        for found in pattern.finditer(text):
            row, col = found["row"], found["col"]
            if row != col:
                before, between = found.start(), text[found.end("row") : found.start("col")]
                head = text[before : found.start("row")]
                yield "index", *found.span(), head + col + between + row
    for found in BLOCK.finditer(text):
        yield "index", *found.span(), "blockIdx." + ("y" if found[1] == "x" else "x")


def closing(text: str, opening: int) -> int:
    """The place after the bracket that closes the one at ``opening``."""
    depth = 0
    for place in range(opening, len(text)):
        depth += {"(": 1, ")": -1}.get(text[place], 0)
        if depth == 0:
            return place + 1
    raise ValueError("unbalanced brackets")


def mutants_of(file: str) -> Iterator[Mutant]:
    text = (CSRC / "cuda" / file).read_text()
    starts = [0, *(found.end() for found in re.finditer("\n", text))]
    for kind, begin, end, new in edits(text):
        number = sum(start <= begin for start in starts)
        start = starts[number - 1]
        stop = text.index("\n", end)
        before = text[start:stop]
        head = before.strip()
        in_comment = "//" in text[start:begin]
        if in_comment or head.startswith(("#", "static_assert", "constexpr")):
            continue
        after = text[start:begin] + new + text[end:stop]
        one_line = [" ".join(part.split()) for part in (before, after)]
        yield Mutant(kind, file, number, begin, end, new, *one_line)


def few_types(csrc: Path) -> None:
    """Leaves float32, bfloat16 and float64: float16 takes the same paths and costs compile time."""
    switches = csrc / "cuda" / "switches.cuh"
    text = re.sub(
        r" *case DType::kFloat16:\s*return body\(Type<float16>\{\}\);\n", "", switches.read_text()
    )
    switches.write_text(text)


class Workshop:
    """A folder with the parts that no mutant changes, compiled once."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.csrc = folder / "csrc"
        shutil.copytree(CSRC, self.csrc)
        few_types(self.csrc)
        parts = [HERE / "schedule.cpp", HERE / "fibers.cpp"]
        parts += [*(HERE / "check").glob("check_*.cpp"), HERE / "check" / "main.cpp"]
        parts += [HERE / "check" / "arrays.cpp", HERE / "check" / "memory_host.cpp"]
        self.parts = [self.compile(part, self.csrc, folder, "-O1") for part in parts]
        self.kernels = {
            name: self.compile(self.csrc / "cuda" / f"{name}.cu", self.csrc, folder)
            for name in KERNELS
        }
        self.seconds = dict.fromkeys(KERNELS, 600)  # of processor time
        for name in KERNELS:
            start = children_seconds()
            noticed = self.is_noticed(None, (name,))
            if noticed:
                raise SystemExit(f"the check of {name} fails without any break: {noticed}")
            self.seconds[name] = 1 + int(PATIENCE * (children_seconds() - start))

    def compile(self, source: Path, csrc: Path, into: Path, optimize: str = "-O0") -> Path:
        target = into / f"{source.stem}.o"
        options = [optimize, "-DRASA_FEW_TYPES", f"-I{csrc}", "-x", "c++", "-c", source]
        options += ["-o", target]
        subprocess.run([CXX, *FLAGS, *options], check=True, capture_output=True)
        return target

    def is_noticed(self, mutant: Mutant | None, names: tuple[str, ...] = ()) -> str:
        """How the mutant is noticed, or nothing if it is not; None breaks nothing."""
        names = names or FILES[mutant.file]
        with tempfile.TemporaryDirectory(dir=self.folder) as folder:
            csrc = Path(folder) / "csrc"
            shutil.copytree(self.csrc, csrc)
            if mutant is not None:
                path = csrc / "cuda" / mutant.file
                text = path.read_text()
                path.write_text(text[: mutant.begin] + mutant.text + text[mutant.end :])
            # A kernel at a time: most mutants die at the first.
            for name in names:
                try:
                    changed = self.compile(csrc / "cuda" / f"{name}.cu", csrc, Path(folder))
                except subprocess.CalledProcessError:
                    return "does not compile"
                others = [self.kernels[other] for other in KERNELS if other != name]
                program = Path(folder) / "check"
                link = [CXX, *FLAGS, changed, *others, *self.parts, "-o", program]
                subprocess.run(link, check=True, capture_output=True)
                noticed = self.run(program, name)
                if noticed:
                    return noticed
        return ""

    def run(self, program: Path, name: str) -> str:
        environment = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0"}
        # Processor time, since other programs may be running.
        limit = ["sh", "-c", 'ulimit -t "$0"; exec "$@"', str(self.seconds[name])]
        done = subprocess.run([*limit, program, name], capture_output=True, env=environment)
        if done.returncode == 0:
            return ""
        if done.returncode in (-signal.SIGXCPU, -signal.SIGKILL):
            return "runs for ever"
        return "address" if b"AddressSanitizer" in done.stderr else "wrong"


def children_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def report(results: list[tuple[Mutant, str]], seconds: float) -> bool:
    """Prints the score; whether it is good enough."""
    valid = [(m, how) for m, how in results if how != "does not compile"]
    survivors = [m for m, how in valid if not how]
    good = True
    for kind in ("barrier", "bound", "index"):
        of_kind = [how for m, how in valid if m.kind == kind]
        killed = sum(map(bool, of_kind))
        print(f"{kind}: {killed} of {len(of_kind)} noticed")
        good &= kind != "barrier" or killed == len(of_kind)
    share = 1 - len(survivors) / max(len(valid), 1)
    print(f"all: {len(valid) - len(survivors)} of {len(valid)} noticed, {share:.1%}")
    print(f"how: {dict(Counter(how for _, how in results if how))}, in {seconds:.0f} s")
    for mutant in survivors:
        reason = reason_of(mutant.file, mutant.before, mutant.after)
        good &= reason is not None
        print(f"lives: {mutant}\n       {reason or 'NO REASON KNOWN'}")
    return good and share >= 0.9


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="mutants at a time")
    parser.add_argument("--only", default="", help="mutants whose description holds this")
    parser.add_argument("--list", action="store_true", help="print the mutants and stop")
    options = parser.parse_args()
    mutants = [m for file in FILES for m in mutants_of(file) if options.only in str(m)]
    if options.list:
        print(*mutants, sep="\n")
        return 0
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        workshop = Workshop(Path(folder))
        with ThreadPoolExecutor(options.jobs) as pool:
            results = list(zip(mutants, pool.map(workshop.is_noticed, mutants), strict=True))
    return 0 if report(results, time.monotonic() - start) else 1


if __name__ == "__main__":
    sys.exit(main())
