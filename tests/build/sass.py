"""Check the machine code of every kernel against PROMISES, on four architectures.

    python -m tests.build.sass [--write] [--built DIR]

Compiles csrc/cuda/*.cu with nvcc, or takes the kernels from the library that check_build.py --keep
DIR has built. Disassembles with nvdisasm. nvdisasm and cuobjdump are from a CUDA toolkit, or from
the packages nvidia-cuda-nvdisasm and nvidia-cuda-cuobjdump. Fails if a kernel spills, uses local
memory or atomics, lacks the wide accesses or tensor core instructions in PROMISES, has fewer loads
in flight, or does not fit on a multiprocessor. Also fails if the table of kernels in
benchmarks/results/machine-code.md is out of date; ``--write`` updates it. No GPU is needed.
"""

import argparse
import os
import re
import shutil
import site
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

from build_support import toolchain
from tests.build.check_build import ARCHS, LIBRARY, LOG, ROOT, Kernel, Report, read_ptxas, run
from tests.build.sass_code import Code, loads_in_flight, read

PAGE = ROOT / "benchmarks" / "results" / "machine-code.md"
NAME = PAGE.relative_to(ROOT)
BEGIN, END = "<!-- kernels: made by tests/build/sass.py -->", "<!-- kernels: end -->"
SHOWN = "sm_90"
FOUR = 4  # loads in flight that hide most of the memory latency


TENSOR = ("HMMA.16816", "LDSM", "LDGSTS")  # products, loads for them, copies to shared memory
# Bytes of shared memory of a multiprocessor, and the most for a block (CUDA C++ Programming Guide,
# technical specifications by compute capability). A block uses 1 KB more than it requests.
SHARED = {
    "sm_80": (164 << 10, 163 << 10),
    "sm_90": (228 << 10, 227 << 10),
    "sm_100": (228 << 10, 227 << 10),
    "sm_120": (100 << 10, 99 << 10),
}


class Promise(NamedTuple):
    """The widest loads and stores in bits, and how many such loads a thread has in flight."""

    kernel: str  # a regular expression for short names
    load: int
    store: int
    in_flight: int | None = FOUR  # None: there are no such loads, or they cannot be identified
    tensor: bool = False  # whether it has all of TENSOR


# The first match counts. Widths follow kStep, kPer16Bytes or kExpandStep elements.
PROMISES = (
    # A warp takes 256 elements, so each lane has two loads. Larger pieces would have more bytes in
    # flight, but would leave multiprocessors idle in a small matrix.
    Promise("pack<double, double>", 128, 128),
    Promise("pack<float, float>", 128, 128, 2),
    Promise("pack<float, (half|bf16)>", 128, 64, 2),
    # Entries of the table of layers are also 64-bit loads.
    Promise("pack<(half|bf16), float>", 64, 128, None),
    # One load covers a lane's 8 elements.
    Promise("pack<(half|bf16), (half|bf16)>", 128, 128, 1),
    # Sums over layers are unrolled; a single layer runs the loop's remainder, two loads a lane.
    Promise("pack_backward<(float|double)>", 128, 128),
    Promise("pack_backward<(half|bf16)>", 128, 64),
    # For one token, an iteration has three loads, two of Ap and one of x. The loop is unrolled, but
    # on sm_80 and sm_100 ptxas uses an iteration's results before the next one's loads.
    Promise(r"shrink<\w+, 1>", 128, 32, 3),
    Promise(r"shrink<\w+, \d>", 128, 32),
    Promise(r"expand<float, \d>", 64, 64),
    Promise(r"expand<(half|bf16), \d>", 32, 32),
    Promise(r"keep<\w+>", 128, 128),
    Promise("dropout", 64, 32, None),
    # Asynchronous copies fetch tiles two or three stages ahead.
    Promise(r"(down|grad)<\w+, \d+(, \w+)?>", 128, 64, None, tensor=True),
    Promise(r"sum<\w+>", 128, 64),
    Promise("write_table", 0, 64, None),
)


# The bytes that launchers of csrc/cuda request for a kernel's arguments. (What `expand` requests
# depends on the rank.)
REQUESTS = {
    "pack": "PackTile<{0}>::kBytes",
    "pack_backward": "kBackwardBytes<{0}>",
    "down": "sizeof(DownStage<{0}, {1}>) * kDownRing<{1}>",
    "grad": "sizeof(GradShared<{0}, {1}, {2}>)",
}
CPP = {"half": "__half", "bf16": "__nv_bfloat16"}
"""Types by short name."""


class Row(NamedTuple):
    """One kernel compiled for one architecture."""

    name: str
    code: Code
    ptxas: Kernel
    shared: int


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--write", action="store_true", help=f"put the table into {NAME}")
    parser.add_argument("--built", type=Path, help="read this library instead of compiling")
    given = parser.parse_args()
    report = Report()
    compiled = read_all(given.built) if given.built else compile_all()
    names = sorted({row.name for rows in compiled.values() for row in rows})
    promises, more = promises_of(names), requested(names)
    compiled = {
        arch: [row._replace(shared=row.shared + more.get(row.name, 0)) for row in rows]
        for arch, rows in compiled.items()
    }
    for arch in ARCHS:
        found = [
            f"{row.name}: {fault}"
            for row in compiled[arch]
            for fault in (
                *spilled(row.ptxas),
                *faults(row.code, promises[row.name]),
                *crowded(row, arch),
            )
        ]
        report.check(not found, f"{arch}: {len(compiled[arch])} kernels, {len(found)} faults")
        print("".join(f"      {each}\n" for each in found), end="")
    unused = [each.kernel for each in PROMISES if each not in promises.values()]
    report.check(not unused, f"PROMISES: lines without a kernel: {', '.join(unused) or 'none'}")
    made = table(compiled[SHOWN], promises)
    print(made)
    page = PAGE.read_text()
    if given.write:
        PAGE.write_text(with_table(page, made))
    same = given.write or table_in(page) == made
    report.check(same, f"{NAME} has this table (python -m tests.build.sass --write)")
    return 1 if report.failures else 0


def compile_all() -> dict[str, list[Row]]:
    """Compile the kernels for every architecture, and return them by architecture."""
    nvcc = find_nvcc()
    sources = sorted((ROOT / "csrc").glob("**/*.cu"))
    with tempfile.TemporaryDirectory() as scratch:
        return in_parallel(
            lambda arch: [partial(compile_one, nvcc, each, arch, Path(scratch)) for each in sources]
        )


def compile_one(nvcc: Path, source: Path, arch: str, scratch: Path) -> list[Row]:
    """Compile the kernels of one file, with the options of build_support/extension.py."""
    cubin = scratch / f"{source.stem}.{arch}.cubin"
    options = ["-O3", "-std=c++17", "--ptxas-options=-v", "-cubin", f"-arch={arch}"]
    log = run([str(nvcc), *options, "-I", str(ROOT / "csrc"), "-o", str(cubin), str(source)])
    return disassemble(cubin, {kernel.name: kernel for kernel in read_ptxas(log)})


def read_all(built: Path) -> dict[str, list[Row]]:
    """Read the kernels of a library that check_build.py has kept, by architecture."""
    reports: dict[str, dict[str, Kernel]] = {arch: {} for arch in ARCHS}
    for kernel in read_ptxas((built / LOG).read_text()):
        reports[kernel.arch][kernel.name] = kernel
    library = (built / LIBRARY.name).resolve()
    with tempfile.TemporaryDirectory() as scratch:
        run([str(find_tool("cuobjdump")), "-xelf", "all", str(library)], cwd=scratch)
        return in_parallel(
            lambda arch: [
                partial(disassemble, cubin, reports[arch])
                for cubin in sorted(Path(scratch).glob(f"*.{arch}.cubin"))
            ]
        )


def in_parallel(tasks: Callable[[str], list[Callable[[], list[Row]]]]) -> dict[str, list[Row]]:
    """Run the tasks of every architecture, and return the rows in order."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        jobs = {arch: [pool.submit(task) for task in tasks(arch)] for arch in ARCHS}
        rows = {arch: [row for job in each for row in job.result()] for arch, each in jobs.items()}
    return {arch: sorted(each, key=lambda row: order(row.name)) for arch, each in rows.items()}


def disassemble(cubin: Path, ptxas: Mapping[str, Kernel]) -> list[Row]:
    codes = list(read(run([str(find_tool("nvdisasm")), "--print-code", str(cubin)])))
    names = map(short, demangled([code.name for code in codes]))
    return [
        Row(name, code, ptxas[code.name], ptxas[code.name].shared)
        for name, code in zip(names, codes, strict=True)
    ]


def find_nvcc() -> Path:
    try:
        return toolchain.cuda_home(Path(sysconfig.get_path("purelib"))) / "bin" / "nvcc"
    except toolchain.Missing as missing:
        raise SystemExit(f"nvcc: {missing}.") from None


@cache
def find_tool(name: str) -> Path:
    """Find nvdisasm or cuobjdump beside nvcc, on PATH, or in a package of this Python."""
    candidates = [find_nvcc().parent / name, *map(Path, filter(None, [shutil.which(name)]))]
    for folder in (sysconfig.get_path("purelib"), *site.getsitepackages()):
        candidates += sorted(Path(folder).glob(f"nvidia/*/bin/{name}"))
    for candidate in candidates:
        if os.access(candidate, os.X_OK):
            return candidate
    raise SystemExit(
        f"{name} is neither beside nvcc nor on PATH; pip install nvidia-cuda-{name} brings it."
    )


def demangled(names: list[str]) -> list[str]:
    done = subprocess.run(
        ["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True
    )
    return done.stdout.splitlines()


def short(name: str) -> str:
    """Shorten ``rasa_ext::pack_kernel<float, __nv_bfloat16>(...)`` to ``pack<float, bf16>``."""
    name = re.sub(r"\(.*", "", name).removeprefix("void ").removeprefix("rasa_ext::")
    name = name.replace("_kernel", "")
    for new, old in CPP.items():
        name = name.replace(old, new)
    return name


def order(name: str) -> tuple:
    """Return a sort key: kernel, then wide types before narrow ones, then numbers."""
    kernel, _, types = name.partition("<")
    rank = {"double": 0, "float": 1, "half": 2, "bf16": 3}
    parts = re.findall(r"\w+", types)
    return kernel, [rank.get(part, int(part) if part.isdigit() else 9) for part in parts]


def promises_of(names: Iterable[str]) -> dict[str, Promise]:
    """Return the promise of each kernel; raise SystemExit if one has none."""
    found = {
        name: next((each for each in PROMISES if re.fullmatch(each.kernel, name)), None)
        for name in sorted(names)
    }
    strangers = [name for name, promise in found.items() if promise is None]
    if strangers:
        raise SystemExit(
            f"PROMISES: expected a line for each of {strangers}; add what their sources promise."
        )
    return {name: promise for name, promise in found.items() if promise}


def spilled(kernel: Kernel) -> Iterator[str]:
    if kernel.stack or kernel.spills:
        yield f"{kernel.stack} bytes of stack, {kernel.spills} of spills"


def crowded(row: Row, arch: str) -> Iterator[str]:
    if row.shared > SHARED[arch][1]:
        yield f"{row.shared} bytes of shared memory, a block has {SHARED[arch][1]}"
    if row.shared and blocks(row, arch) < 1:
        yield f"no block fits, with {row.ptxas.registers} registers"


def blocks(row: Row, arch: str) -> int:
    """Return how many blocks of 256 threads fit on a multiprocessor, by registers and memory."""
    registers = -(-row.ptxas.registers // 8) * 8
    return min(65536 // (256 * registers), SHARED[arch][0] // (row.shared + 1024), 2048 // 256)


def requested(names: Iterable[str]) -> dict[str, int]:
    """Return the bytes of dynamic shared memory that launchers request, by REQUESTS."""
    sizes = {}
    for name in names:
        kernel, _, types = name.rstrip(">").partition("<")
        if kernel in REQUESTS:
            sizes[name] = REQUESTS[kernel].format(*(CPP.get(t, t) for t in types.split(", ")))
    lines = [f'std::printf("%d\\n", static_cast<int>({size}));' for size in sizes.values()]
    headers = ("cstdio", *(f"cuda/{each}.cuh" for each in ("pack", "pack_backward", "skinny")))
    text = "".join(f"#include <{each}>\n" for each in headers)
    text += f"int main() {{ using namespace rasa_ext; {' '.join(lines)} }}\n"
    with tempfile.TemporaryDirectory() as scratch:
        source, program = Path(scratch, "sizes.cu"), Path(scratch, "sizes")
        source.write_text(text)
        options = ["-std=c++17", "-I", str(ROOT / "csrc"), "-o", str(program), str(source)]
        run([str(find_nvcc()), *options])
        return dict(zip(sizes, map(int, run([str(program)]).split()), strict=True))


def faults(code: Code, promise: Promise) -> list[str]:
    """List a kernel's violations: forbidden instructions, and broken promises."""
    found = []
    ops = list(dict.fromkeys(each.op for each in code.instructions))
    local = [op for op in ops if op.startswith(("LDL", "STL"))]
    atomic = [op for op in ops if op.startswith(("ATOM", "RED")) and not op.startswith("REDUX")]
    for what, used in (("local memory", local), ("atomics", atomic)):
        if used:
            found.append(f"{what}: {', '.join(used)}")
    missing = [each for each in TENSOR if not any(op.startswith(each) for op in ops)]
    if promise.tensor and missing:
        found.append(f"no {', '.join(missing)}")
    load, store = widest(code)
    for what, got, promised in (("load", load, promise.load), ("store", store, promise.store)):
        if got < promised:
            found.append(f"no {what} of {promised} bits, the widest has {got}")
    if promise.in_flight is not None:
        for where, count in in_flight(code, promise.load).items():
            if count < promise.in_flight:
                found.append(
                    f"{where}: {count} load{'s' * (count != 1)} in flight, "
                    f"expected {promise.in_flight}"
                )
    return found


def widest(code: Code) -> tuple[int, int]:
    """Return the widest load and store of global memory in bits; 0 if there is none."""
    loads = [each.width for each in code.instructions if each.is_load() or each.is_copy()]
    stores = [each.width for each in code.instructions if each.is_store()]
    return max(loads, default=0), max(stores, default=0)


def in_flight(code: Code, width: int) -> dict[str, int]:
    """Count loads of ``width`` bits in flight by kind of loop, or in all code if no loop has any.

    The kind is whether a loop stores. Loops of one kind are parts of one loop that nvcc unrolled,
    and the best of them counts.
    """
    *loops, rest = code.stretches()
    found: dict[str, int] = {}
    for body in loops:
        count = loads_in_flight(body, width)
        kind = "loop that stores" if any(each.is_store() for each in body) else "loop"
        if count:
            found[kind] = max(found.get(kind, 0), count)
    return found or {"straight": loads_in_flight(rest, width)}


def table(rows: list[Row], promises: Mapping[str, Promise]) -> str:
    """Return the table in Markdown, with the compiler's version, which affects the numbers."""
    version = run([str(find_nvcc()), "--version"])
    release = re.search(r"V(\d+\.\d+\.\d+)", version)
    lines = [
        f"nvcc {release[1] if release else '?'}, {SHOWN}:",
        "",
        "| kernel | registers | shared | blocks | load | store | loads in flight |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        promise = promises[row.name]
        flying = "-"
        if promise.in_flight is not None:
            counts = in_flight(row.code, promise.load).items()
            flying = ", ".join(f"{count} ({where})" for where, count in sorted(counts))
        load, store = (f"{bits} bits" if bits else "-" for bits in widest(row.code))
        fit = blocks(row, SHOWN) if row.shared else "-"
        cells = (f"`{row.name}`", row.ptxas.registers, row.shared, fit, load, store, flying)
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def table_in(page: str) -> str:
    _, begin, rest = page.partition(BEGIN + "\n")
    found, end, _ = rest.partition("\n" + END)
    if not begin or not end or BEGIN in rest:
        raise SystemExit(f"{NAME}: expected one table between {BEGIN} and {END}.")
    return found


def with_table(page: str, made: str) -> str:
    return page.replace(f"{BEGIN}\n{table_in(page)}\n{END}", f"{BEGIN}\n{made}\n{END}")


if __name__ == "__main__":
    sys.exit(main())
