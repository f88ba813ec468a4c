"""Parse nvdisasm's output of kernels: instructions, loops, and loads in flight.

The parser understands only what tests/build/sass.py needs. It reads code in address order: both
sides of a forward branch count as executed, and an unconditional jump ends all loads in flight.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

SECTION = re.compile(r"\.text\.(\S+):$")
LABEL = re.compile(r"(\.L\w+):")
INSTRUCTION = re.compile(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@(!?U?P\w+)\s+)?(\S+)\s*(.*?)\s*;")
TARGET = re.compile(r"`\((\.L\w+)\)")
REGISTER = re.compile(r"(?<![\w])R(\d+)(\.64)?")
WIDTH = re.compile(r"\.[US]?(8|16|64|128|256)(?:\.|$)")

LOADS = ("LDG", "LD")  # from global memory, and by a generic pointer
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
        """The operation without modifiers."""
        return self.op.partition(".")[0]

    @property
    def width(self) -> int:
        """Width of a load or store in bits."""
        found = WIDTH.search(self.op)
        return int(found[1]) if found else 32

    def is_load(self) -> bool:
        return self.base in LOADS

    def is_copy(self) -> bool:
        """Return whether it copies from global to shared memory without registers."""
        return self.base == "LDGSTS"

    def is_store(self) -> bool:
        return self.base in STORES

    def loaded(self) -> set[int]:
        """Return the registers that a load writes."""
        first = REGISTER.search(self.operands)
        return set() if first is None else self._span(int(first[1]), self.width)

    def named(self) -> set[int]:
        """Return all registers that it reads or writes."""
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
    """The code of one kernel, with the mangled name."""

    name: str
    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)  # index of the next instruction

    def loops(self) -> list[range]:
        """Return the innermost loops, each from the target of a backward branch to the branch."""
        found = set()
        for index, instruction in enumerate(self.instructions):
            target = TARGET.search(instruction.operands) if instruction.base == "BRA" else None
            # Every kernel ends with a branch to itself, which is no loop.
            if target and self.labels[target[1]] < index:
                found.add(range(self.labels[target[1]], index + 1))
        return sorted(
            (loop for loop in found if not any(_within(other, loop) for other in found)),
            key=lambda loop: loop.start,
        )

    def stretches(self) -> list[list[Instruction]]:
        """Return the body of each innermost loop, and last all instructions outside of them."""
        loops = self.loops()
        inside = {index for loop in loops for index in loop}
        bodies = [[self.instructions[index] for index in loop] for loop in loops]
        rest = [each for index, each in enumerate(self.instructions) if index not in inside]
        return [*bodies, rest]


def _within(inner: range, outer: range) -> bool:
    return inner != outer and outer.start <= inner.start and inner.stop <= outer.stop


def read(listing: str) -> Iterator[Code]:
    """Yield the kernels in the output of ``nvdisasm --print-code``."""
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
    """Return the most loads of ``width`` bits that are in flight at once.

    Results arrive in the order of the loads. The use of a result ends the flight of this load and
    all earlier ones; later ones stay in flight.
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
