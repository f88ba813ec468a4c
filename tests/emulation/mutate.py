"""Break the kernels in one place at a time, and count how many breaks the check notices.

    python tests/emulation/mutate.py [--jobs N] [--only SUBSTRING]

mutants.py lists the breaks (mutants). The kernels are compiled for the host with AddressSanitizer
and linked to the stand-alone check. The check runs for each mutant with the short list of cases. It
runs with all cases only if the short list notices nothing and no reason is known why the mutant is
not a fault. The program prints the score of each kind, and the surviving mutants with the reason.
It fails if a barrier or a wait survives, if fewer than 92 % of the mutants die, or if a survivor
has no reason.
"""

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from concurrent.futures import Executor, ThreadPoolExecutor
from pathlib import Path
from threading import Lock

from mutants import CSRC, FILES, KERNELS, Mutant, mutants_of
from mutants_that_live import reason_of

HERE = Path(__file__).resolve().parent
CXX = os.environ.get("CXX", "g++")
FLAGS = ["-std=c++17", "-w", "-O1", "-fsanitize=address"]
# Otherwise the compiler assumes that loops stay within their arrays, which is false in mutants.
FLAGS += ["-fno-aggressive-loop-optimizations"]
# Switch off checks that take half of the time and notice none of these breaks.
ASAN = "detect_leaks=0:detect_stack_use_after_return=0:symbolize=0"
PATIENCE = 4  # time limit as a multiple of the unbroken kernel's time, to stop endless loops
SMALL, ALL = ("--small",), ()  # arguments for the short list of cases, and for all


def few_types(csrc: Path) -> None:
    """Remove float16 from the sources: it has the same paths as bfloat16 and costs compile time."""
    switches = csrc / "cuda" / "switches.cuh"
    text = re.sub(
        r" *case DType::kFloat16:\s*return body\(Type<float16>\{\}\);\n", "", switches.read_text()
    )
    switches.write_text(text)


class Workshop:
    """A folder with the programs that contain all mutants."""

    def __init__(self, folder: Path, layers: list[dict[str, str]], pool: Executor):
        self.folder = folder
        self.pool = pool
        parts = [HERE / "schedule.cpp", HERE / "fibers.cpp"]
        parts += [*(HERE / "check").glob("check_*.cpp"), HERE / "check" / "main.cpp"]
        parts += [HERE / "check" / "arrays.cpp", HERE / "check" / "memory_host.cpp"]
        jobs = [pool.submit(self.compile, part, CSRC, folder) for part in parts]
        made = [self.kernels(layer, i) for i, layer in enumerate(layers)]
        objects = [job.result() for job in jobs]
        # A later layer changes few files; the other kernels are those of the first layer.
        whole = [[job.result() for job in (made[0] | each).values()] for each in made]
        self.programs = [
            self.link([*objects, *each], folder / f"check{i}") for i, each in enumerate(whole)
        ]
        self.limits: dict[tuple, int] = {}
        self.locks: dict[tuple, Lock] = defaultdict(Lock)

    def kernels(self, layer: dict[str, str], number: int) -> dict:
        """Start compiling the kernels that a layer's files change; return the jobs by kernel."""
        folder = self.folder / f"layer{number}"
        csrc = folder / "csrc"
        shutil.copytree(CSRC, csrc)
        few_types(csrc)
        for file, text in layer.items():
            (csrc / "cuda" / file).write_text(text)
        names = {name for file in layer for name in FILES[file]}
        sources = {name: csrc / "cuda" / f"{name}.cu" for name in KERNELS if name in names}
        include = ("-include", HERE / "mutants.h")
        return {
            name: self.pool.submit(self.compile, source, csrc, folder, *include)
            for name, source in sources.items()
        }

    def compile(self, source: Path, csrc: Path, into: Path, *more: object) -> Path:
        target = into / f"{source.stem}.o"
        options = ["-DRASA_FEW_TYPES", f"-I{HERE}", f"-I{csrc}", *more, "-x", "c++", "-c", source]
        subprocess.run([CXX, *FLAGS, *options, "-o", target], check=True)
        return target

    def link(self, objects: list[Path], program: Path) -> Path:
        subprocess.run([CXX, *FLAGS, *objects, "-o", program], check=True)
        return program

    def limit(self, program: int, name: str, *cases: str) -> int:
        """Return a check's limit of processor time, in seconds.

        The first call runs the check without a mutant, which must pass.
        """
        check = (program, name, *cases)
        with self.locks[check]:
            if check not in self.limits:
                noticed, took = self.run(self.programs[program], [name, *cases], 600)
                if noticed:
                    raise SystemExit(f"the check of {name} fails without any break: {noticed}")
                self.limits[check] = 1 + int(PATIENCE * took)
        return self.limits[check]

    def is_noticed(self, mutant: Mutant) -> str:
        """Return how the check notices the mutant, or "" if it does not."""
        known = reason_of(mutant.file, mutant.before, mutant.after)
        for cases in (SMALL,) if known else (SMALL, ALL):
            for name in FILES[mutant.file]:  # one kernel at a time: most mutants die at the first
                limit = self.limit(mutant.layer, name, *cases)
                program = self.programs[mutant.layer]
                noticed, _ = self.run(program, [name, *cases], limit, mutant.number)
                if noticed:
                    return noticed
        return ""

    def run(
        self, program: Path, words: list[str], seconds: int, mutant: int | None = None
    ) -> tuple[str, float]:
        """Run a check, and return how it failed ("" if it passed) and the processor time."""
        environment = {**os.environ, "ASAN_OPTIONS": ASAN}
        if mutant is not None:
            environment["RASA_MUTANT"] = str(mutant)
        # Limit processor time, not elapsed time, since other programs may be running.
        limit = ["sh", "-c", 'ulimit -t "$0"; exec "$@"', str(seconds)]
        with subprocess.Popen(
            [*limit, program, *words],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            env=environment,
        ) as process:
            said = process.stderr.read()
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = code = os.waitstatus_to_exitcode(status)
        if code == 0:
            how = ""
        elif code in (-signal.SIGXCPU, -signal.SIGKILL):
            how = "runs for ever"
        else:
            how = "address" if b"AddressSanitizer" in said else "wrong"
        return how, usage.ru_utime + usage.ru_stime


def report(results: list[tuple[Mutant, str]], seconds: float) -> bool:
    """Print the score, and return whether it is good enough."""
    survivors = [mutant for mutant, how in results if not how]
    good = True
    for kind in ("barrier", "wait", "bound", "index", "lane", "mask"):
        of_kind = [how for mutant, how in results if mutant.kind == kind]
        killed = sum(map(bool, of_kind))
        print(f"{kind}: {killed} of {len(of_kind)} noticed")
        good &= kind not in ("barrier", "wait") or killed == len(of_kind)
    share = 1 - len(survivors) / max(len(results), 1)
    print(f"all: {len(results) - len(survivors)} of {len(results)} noticed, {share:.1%}")
    print(f"how: {dict(Counter(how for _, how in results if how))}, in {seconds:.0f} s")
    for mutant in survivors:
        reason = reason_of(mutant.file, mutant.before, mutant.after)
        good &= reason is not None
        print(f"lives: {mutant}\n       {reason or 'NO REASON KNOWN'}")
    return good and share >= 0.92


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="mutants at a time")
    parser.add_argument("--only", default="", help="mutants whose description holds this")
    parser.add_argument("--list", action="store_true", help="print the mutants and stop")
    options = parser.parse_args()
    mutants, layers = mutants_of()
    mutants = [mutant for mutant in mutants if options.only in str(mutant)]
    if options.list:
        print(*mutants, sep="\n")
        return 0
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(options.jobs) as pool:
        workshop = Workshop(Path(folder), layers, pool)
        results = list(zip(mutants, pool.map(workshop.is_noticed, mutants), strict=True))
    return 0 if report(results, time.monotonic() - start) else 1


if __name__ == "__main__":
    sys.exit(main())
