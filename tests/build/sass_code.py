"""Reads what nvdisasm prints of a kernel: instructions, loops, and the loads that are in flight.

Only what tests/build/sass.py asks is understood. Code is followed in the order of its addresses:
both sides of a branch that jumps forward count as run, and a jump that is always taken ends what is
in flight.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

SECTION = re.compile(r"\.text\.(\S+):$")
LABEL = re.compile(r"(\.L\w+):")
INSTRUCTION = re.compile(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@(!?U?P\w+)\s+)?(\S+)\s*(.*?)\s*;")
TARGET = re.compile(r"`\((\.L\w+)\)")
REGISTER = re.compile(r"(?<![\w])R(\d+)(\.64)?")
WIDTH = re.compile(r"\.[US]?(8|16|64|128|256)(?:\.|$)")

LOADS = ("LDG", "LD")  # of global memory, and by a pointer to whatever memory
STORES = ("STG", "ST")
SHARED_STORES = ("STS",)
DOUBLE = ("DADD", "DFMA", "DMUL", "DSETP")
LEAVE = ("BRA", "BRX", "EXIT", "JMP", "RET")


@dataclass(frozen=True)
class Instruction:
    """``@guard op operands``."""

    guard: str | None
    op: str
    operands: str

    @property
    def base(self) -> str:
        """The operation without its modifiers."""
        return self.op.partition(".")[0]

    @property
    def width(self) -> int:
        """Bits of a load or store."""
        found = WIDTH.search(self.op)
        return int(found[1]) if found else 32

    def is_load(self) -> bool:
        return self.base in LOADS

    def is_copy(self) -> bool:
        """Whether it copies from global to shared memory, past all registers."""
        return self.base == "LDGSTS"

    def is_store(self) -> bool:
        return self.base in STORES

    def loaded(self) -> set[int]:
        """The registers that a load writes."""
        first = REGISTER.search(self.operands)
        return set() if first is None else self._span(int(first[1]), self.width)

    def named(self) -> set[int]:
        """All registers that it reads or writes."""
        found = list(REGISTER.finditer(self.operands))
        registers: set[int] = set()
        for index, match in enumerate(found):
            is_value = self.base in (*STORES, *SHARED_STORES) and index == len(found) - 1
            wide = 64 if match[2] or self.base in DOUBLE else 32
            registers |= self._span(int(match[1]), self.width if is_value else wide)
        return registers

    @staticmethod
    def _span(first: int, bits: int) -> set[int]:
        return set(range(first, first + max(bits // 32, 1)))


@dataclass
class Code:
    """One kernel, under its mangled name."""

    name: str
    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)  # the index of what follows

    def loops(self) -> list[range]:
        """The innermost loops: from where a branch jumps back to, to the branch."""
        found = set()
        for index, instruction in enumerate(self.instructions):
            target = TARGET.search(instruction.operands) if instruction.base == "BRA" else None
            # A branch to itself fills the end of every kernel.
            if target and self.labels[target[1]] < index:
                found.add(range(self.labels[target[1]], index + 1))
        return sorted(
            (loop for loop in found if not any(_within(other, loop) for other in found)),
            key=lambda loop: loop.start,
        )

    def stretches(self) -> list[list[Instruction]]:
        """The body of each innermost loop, and all that is in none of them."""
        loops = self.loops()
        inside = {index for loop in loops for index in loop}
        bodies = [[self.instructions[index] for index in loop] for loop in loops]
        rest = [each for index, each in enumerate(self.instructions) if index not in inside]
        return [*bodies, rest]


def _within(inner: range, outer: range) -> bool:
    return inner != outer and outer.start <= inner.start and inner.stop <= outer.stop


def read(listing: str) -> Iterator[Code]:
    """The kernels in the output of ``nvdisasm --print-code``."""
    code = None
    for line in listing.splitlines():
        if section := SECTION.match(line):
            if code is not None:
                yield code
            code = Code(section[1])
        elif code is None:
            continue
        elif label := LABEL.match(line):
            code.labels[label[1]] = len(code.instructions)
        elif found := INSTRUCTION.match(line):
            code.instructions.append(Instruction(found[1], found[2], found[3]))
    if code is not None:
        yield code


def loads_in_flight(instructions: Iterable[Instruction], width: int) -> int:
    """The most loads of so many bits that are issued before one of their results is used.

    Results come in the order of the loads: using one ends the wait for those before it, and those
    after it stay in flight.
    """
    most, flying = 0, []
    for instruction in instructions:
        named = instruction.named()
        used = [index for index, registers in enumerate(flying) if registers & named]
        if used:
            del flying[: used[-1] + 1]
        if instruction.is_load() and instruction.width == width:
            flying.append(instruction.loaded())
            most = max(most, len(flying))
        if instruction.base in LEAVE and instruction.guard is None:
            flying.clear()
    return most
