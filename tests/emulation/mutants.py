"""Find the mutants of the kernels, and write sources that contain many of them at once.

The mutants delete every barrier and every wait for a copy, shift every bound in both directions (by
one, by a loop's step, or by the number that all sizes are multiples of), swap indices, confuse
lanes and omit masks. They cover all kernels and launchers except heuristics.cuh, in which both
sides of a bound are right. Compiling each mutant by itself would take most of the time. So a source
contains all mutants, and the program chooses one at the start (mutants.h).
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

CSRC = Path(__file__).resolve().parents[2] / "csrc"
KERNELS = ("dropout", "pack", "pack_backward", "decode", "skinny", "table")

# The kernels that a mutant in a file can break. A header may belong to several kernels.
FILES = {
    "pack.cuh": ("pack",),
    "pack.cu": ("pack",),
    "pack_backward.cuh": ("pack_backward",),
    "pack_backward.cu": ("pack_backward",),
    "layers.cuh": ("pack", "pack_backward"),
    "tile.cuh": ("pack", "pack_backward"),
    "decode.cuh": ("decode",),
    "decode.cu": ("decode",),
    "skinny.cuh": ("skinny",),
    "skinny.cu": ("skinny",),
    "dropout.cuh": ("dropout",),
    "dropout.cu": ("dropout",),
    "philox.cuh": ("dropout",),
    "table.cuh": ("table",),
    "table.cu": ("table",),
    "collective.cuh": ("dropout", "pack", "pack_backward", "decode"),
    "launch.cuh": ("dropout", "pack", "pack_backward", "decode"),
}


@dataclass(frozen=True)
class Site:
    """Characters [begin, end) of a text, and replacements that break the code.

    ``choice`` is an expression that selects the original or a replacement at run time. In it, @0
    and @1 are placeholders for the mutants' numbers.
    """

    kind: str
    begin: int
    end: int
    broken: tuple[str, ...]
    choice: str


@dataclass(frozen=True)
class Mutant:
    """One change that breaks a kernel: the line before and after, and the program's layer."""

    kind: str
    file: str
    line: int
    before: str
    after: str
    number: int
    layer: int

    def __str__(self) -> str:
        return f"{self.kind}: {self.file}:{self.line}: {self.before}  ->  {self.after}"


# Two ways to shift the bound of each comparison, as in mutants.h. Angle brackets of templates are
# not matched, since they have no spaces around them.
COMPARISONS = {
    "<": ("<=", "+ {} <"),
    "<=": ("<", "<= {} +"),
    ">": (">=", "> {} +"),
    ">=": (">", "+ {} >="),
}
# In these files all sizes are multiples of 8, so a bound shifted by less has no effect.
STEPS = {"skinny.cuh": "8", "skinny.cu": "8"}
LOOP = re.compile(r"for \(.*; (\w+) [<>]=? [^;]*; (?:\+\+\1|\1 \+= (?P<step>.*))\) ")
NAME = r"[A-Za-z_][\w.]*(?:\[\d\])?"
ROW_COL = re.compile(rf"(?P<row>{NAME}) \* (?P<width>{NAME}) \+ (?P<col>{NAME})")
CASTED = re.compile(
    r"(?:static_cast<int64_t>\(|int64_t\{)(?P<row>[^(){}]+)[)}] \* "
    rf"(?P<width>{NAME}) \+ (?P<col>{NAME})"
)
BLOCK = re.compile(r"blockIdx\.([xyz])")
LANE = re.compile(r"\blane ([/%]) (\d+)")


def sites(text: str, sizes: str = "1") -> Iterator[Site]:
    """Yield every place in a text that can be broken; all sizes are multiples of ``sizes``."""
    for found in re.finditer(r"__syncthreads\(\);", text):
        yield Site("barrier", *found.span(), (";",), f"if (!mutants::on(@0)) {found[0]}")
    for found in re.finditer(r"wait_copies<[^;]*;", text):
        yield Site("wait", *found.span(), (";",), f"if (!mutants::on(@0)) {found[0]}")
    for found in re.finditer(r"keep_two\((?=\w+\[)", text):
        end = closing(text, found.end() - 1)
        plain = text[found.end() : text.index(",", found.end())]
        choice = f"(mutants::on(@0) ? {plain} : {text[found.start() : end]})"
        yield Site("mask", found.start(), end, (plain,), choice)
    for found in LANE.finditer(text):
        other = f"lane {'%' if found[1] == '/' else '/'} {found[2]}"
        choice = f"(mutants::on(@0) ? {other} : {found[0]})"
        yield Site("lane", *found.span(), (other,), choice)
    for found in re.finditer(r"(?<= )(<=|>=|<|>)(?= )", text):
        start = text.rfind("\n", 0, found.start()) + 1
        loop = LOOP.search(text, start, text.index("\n", found.end()))
        step = (loop["step"] or "1") if loop else sizes
        choice = f"{found[1]} mutants::At{{@0, {step}}} >"
        broken = tuple(each.format(step) for each in COMPARISONS[found[1]])
        yield Site("bound", *found.span(), broken, choice)
    for found in re.finditer(r"\b(?:std::)?(?:min|max)\(", text):
        end = closing(text, found.end() - 1)
        whole = text[found.start() : end]
        choice = f"({whole} + {sizes} * (mutants::on(@0) - mutants::on(@1)))"
        broken = f"({whole} + {sizes})", f"({whole} - {sizes})"
        yield Site("bound", found.start(), end, broken, choice)
    for pattern in (ROW_COL, CASTED):
        for found in pattern.finditer(text):
            row, col = found["row"], found["col"]
            if row != col:
                head = text[found.start() : found.start("row")]
                between = text[found.end("row") : found.start("col")]
                either = (f"(mutants::on(@0) ? {a} : {b})" for a, b in ((col, row), (row, col)))
                choice = head + between.join(either)
                yield Site("index", *found.span(), (head + col + between + row,), choice)
    for found in BLOCK.finditer(text):
        other = "blockIdx." + ("y" if found[1] == "x" else "x")
        choice = f"(mutants::on(@0) ? {other} : {found[0]})"
        yield Site("index", *found.span(), (other,), choice)


def closing(text: str, opening: int) -> int:
    """Return the position after the bracket that closes the one at ``opening``."""
    depth = 0
    for place in range(opening, len(text)):
        depth += {"(": 1, ")": -1}.get(text[place], 0)
        if depth == 0:
            return place + 1
    raise ValueError("unbalanced brackets")


def layers_of(found: list[Site]) -> list[list[Site]]:
    """Split the sites into as few lists as possible, so that sites of a list do not overlap."""
    layers: list[list[Site]] = []
    for site in sorted(found, key=lambda site: (site.begin, site.end)):
        free = next((layer for layer in layers if layer[-1].end <= site.begin), None)
        if free is None:
            layers.append(free := [])
        free.append(site)
    return layers


def line_of(text: str, site: Site) -> tuple[int, int, int] | None:
    """Return number, begin and end of a site's line or lines, or None if it is not executed."""
    start = text.rfind("\n", 0, site.begin) + 1
    in_comment = "//" in text[start : site.begin]
    fixed = ("#", "static_assert", "constexpr", "if constexpr", "__global__")
    if in_comment or text[start:].lstrip().startswith(fixed):
        return None
    return text.count("\n", 0, start) + 1, start, text.index("\n", site.end)


def mutants_of(csrc: Path = CSRC) -> tuple[list[Mutant], list[dict[str, str]]]:
    """Return all mutants, numbered, and for each layer the files with that layer's mutants."""
    mutants: list[Mutant] = []
    layers: list[dict[str, str]] = []
    for file in FILES:
        text = (csrc / "cuda" / file).read_text()
        found = [site for site in sites(text, STEPS.get(file, "1")) if line_of(text, site)]
        for layer, apart in enumerate(layers_of(found)):
            if layer == len(layers):
                layers.append({})
            pieces, last = [], 0
            for site in apart:
                number, start, stop = line_of(text, site)
                choice = site.choice
                for i, broken in enumerate(site.broken):
                    choice = choice.replace(f"@{i}", str(len(mutants)))
                    after = text[start : site.begin] + broken + text[site.end : stop]
                    lines = [" ".join(part.split()) for part in (text[start:stop], after)]
                    mutants.append(Mutant(site.kind, file, number, *lines, len(mutants), layer))
                pieces += [text[last : site.begin], choice]
                last = site.end
            layers[layer][file] = "".join([*pieces, text[last:]])
    return mutants, layers
