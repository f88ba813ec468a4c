"""Tests of the parser and the checks of machine code, on short hand-written examples."""

from types import SimpleNamespace

import pytest

from tests.build import sass
from tests.build.sass_code import Instruction, loads_in_flight, read

HEAD = "\t.section\t.text.kernel\n.text.kernel:\n"


def code(text: str):
    """Parse a kernel of these lines; lines that end in a colon are labels."""
    lines = [
        line if line.endswith(":") else f"        /*{16 * index:04x}*/    {line} ;"
        for index, line in enumerate(filter(None, map(str.strip, text.splitlines())))
    ]
    (found,) = read(HEAD + "\n".join(lines))
    return found


def flight(text: str, width: int = 128) -> int:
    return loads_in_flight(code(text).instructions, width)


def test_an_instruction_has_a_guard_a_width_and_registers():
    (load, store) = code(
        """
        @!P0 LDG.E.128.CONSTANT R8, desc[UR4][R2.64+0x10]
        STG.E.64 desc[UR4][R2.64], R12
        """
    ).instructions
    assert (load.guard, load.base, load.width, load.loaded()) == ("!P0", "LDG", 128, {8, 9, 10, 11})
    assert load.named() == {2, 3, 8}
    assert (store.guard, store.width, store.named()) == (None, 64, {2, 3, 12, 13})
    assert Instruction(None, "LDG.E.U16", "R1, desc[UR4][R2.64]").width == 16
    assert Instruction(None, "LDG.E", "R1, desc[UR4][R2.64]").width == 32
    assert Instruction(None, "DADD", "R4, R4, R6").named() == {4, 5, 6, 7}
    # Uniform and special registers do not count.
    assert Instruction(None, "S2UR", "UR4, SR_CTAID.X").named() == set()


def test_loads_are_in_flight_until_a_result_is_used():
    four, more = (
        "\n".join(f"LDG.E.128 R{at + 4 * i}, desc[UR4][R2.64]" for i in range(4)) for at in (8, 24)
    )
    assert flight(four) == 4
    assert flight(f"{four}\nFADD R0, R8, R1\n{more}") == 7  # only the first load has arrived
    assert flight(f"{four}\nFADD R0, R23, R1\n{more}") == 4  # R23 is the last load's last register
    assert flight(four, width=64) == 0


def test_one_at_a_time():
    each = "LDG.E.128 R8, desc[UR4][R2.64]\nSTG.E.128 desc[UR4][R4.64], R8\n"
    assert flight(each * 4) == 1


def test_an_address_that_was_loaded_is_a_use():
    assert flight("LDG.E.64 R2, desc[UR4][R8.64]\nLDG.E.64 R4, desc[UR4][R2.64]", 64) == 1
    # R3 is the upper half of the address.
    assert flight("LDG.E R3, desc[UR4][R8.64]\nLDG.E R4, desc[UR4][R2.64]", 32) == 1


def test_a_register_loaded_twice_waits_for_the_first():
    assert flight("LDG.E.128 R8, desc[UR4][R2.64]\n" * 2) == 1


def test_a_jump_that_is_always_taken_ends_the_flight():
    load = "LDG.E.128 R{}, desc[UR4][R2.64]\n"
    assert flight(load.format(8) + "@P0 EXIT\n" + load.format(12)) == 2
    assert flight(load.format(8) + "EXIT\n" + load.format(12)) == 1


NESTED = """
    MOV R1, R2
    .L_x_1:
    LDG.E R3, desc[UR4][R4.64]
    .L_x_0:
    LDG.E.128 R8, desc[UR4][R4.64]
    FADD R5, R8, R5
    @P0 BRA `(.L_x_0)
    @P1 BRA `(.L_x_1)
    @P2 BRA `(.L_x_2)
    STG.E desc[UR4][R4.64], R5
    .L_x_2:
    EXIT
    .L_x_3:
    BRA `(.L_x_3)
    """


def test_loops_are_the_innermost():
    found = code(NESTED)
    assert found.loops() == [range(2, 5)]
    body, rest = found.stretches()
    assert [each.base for each in body] == ["LDG", "FADD", "BRA"]
    assert [each.base for each in rest] == ["MOV", "LDG", "BRA", "BRA", "STG", "EXIT", "BRA"]


def test_kernels_end_where_the_next_begins():
    listing = HEAD + "        /*0000*/    EXIT ;\n" + HEAD.replace("kernel", "other")
    assert [(each.name, len(each.instructions)) for each in read(listing)] == [
        ("kernel", 1),
        ("other", 0),
    ]


GOOD = """
    .L_x_0:
    LDG.E.128 R8, desc[UR4][R2.64]
    LDG.E.128 R12, desc[UR4][R2.64]
    STG.E.128 desc[UR4][R4.64], R8
    STG.E.128 desc[UR4][R4.64], R12
    @P0 BRA `(.L_x_0)
    EXIT
    """
PROMISE = sass.Promise("copy", load=128, store=128, in_flight=2)


def test_a_kernel_that_keeps_its_promise_has_no_faults():
    assert sass.faults(code(GOOD), PROMISE) == []


BROKEN = [
    ("LDG.E.128", "LDG.E.64", "no load of 128 bits"),
    ("STG.E.128", "STG.E", "no store of 128 bits"),
    ("LDG.E.128 R12", "LDG.E.128 R8", "1 load in flight, expected 2"),
    ("EXIT", "LDL R1, [R2]\nEXIT", "local memory: LDL"),
    ("EXIT", "STL.64 [R2], R4\nEXIT", "local memory: STL.64"),
    ("EXIT", "RED.E.ADD.F32 desc[UR4][R2.64], R4\nEXIT", "atomics: RED.E.ADD.F32"),
    ("EXIT", "ATOMG.E.ADD PT, R4, desc[UR4][R2.64], R4\nEXIT", "atomics: ATOMG.E.ADD"),
    ("EXIT", "ATOMS.ADD R4, [R2], R4\nEXIT", "atomics: ATOMS.ADD"),
]


@pytest.mark.parametrize(("old", "new", "fault"), BROKEN)
def test_a_broken_promise_is_named(old, new, fault):
    assert old in GOOD
    assert any(fault in each for each in sass.faults(code(GOOD.replace(old, new)), PROMISE))


TILES = """
    LDGSTS.E.BYPASS.LTC128B.128 [R3+0x10], desc[UR4][R6.64], !PT
    LDSM.16.M88.4 R8, [R3]
    HMMA.16816.F32.BF16 R4, R8, R12, R4
    STG.E.64 desc[UR4][R2.64], R4
    EXIT
    """


@pytest.mark.parametrize("word", ["LDGSTS", "LDSM", "HMMA.16816"])
def test_the_tensor_cores_words_are_asked_for(word):
    promise = sass.Promise("tiles", load=128, store=64, in_flight=None, tensor=True)
    assert sass.faults(code(TILES), promise) == []
    broken = code(TILES.replace(word, "MOV"))
    assert any(word in each for each in sass.faults(broken, promise))


BLOCKS = [
    (79104, 120, "sm_80", 2),
    (79104, 120, "sm_120", 1),
    (95504, 120, "sm_90", 2),
    (99840, 166, "sm_90", 1),
    (89856, 168, "sm_90", 1),
    (8320, 40, "sm_90", 6),
    (16544, 32, "sm_120", 5),
]


@pytest.mark.parametrize(("shared", "registers", "arch", "count"), BLOCKS)
def test_blocks_by_registers_and_shared_memory(shared, registers, arch, count):
    row = sass.Row("kernel", None, SimpleNamespace(registers=registers), shared)
    assert sass.blocks(row, arch) == count
    assert list(sass.crowded(row, arch)) == []
    large = row._replace(shared=300_000)
    assert "a block has" in next(sass.crowded(large, arch))


def test_a_reduction_within_a_warp_is_no_atomic():
    assert sass.faults(code(GOOD.replace("EXIT", "REDUX.SUM UR4, R4\nEXIT")), PROMISE) == []


def test_loops_that_differ_in_their_stores_count_apart():
    """Only the best of similar loops counts, but a loop without stores counts separately."""
    alone = "LDG.E.128 R8, desc[UR4][R2.64]\nFADD R0, R8, R0\n"
    text = GOOD.replace("EXIT", f".L_x_1:\n{alone}@P0 BRA `(.L_x_1)\nEXIT")
    assert sass.in_flight(code(text), 128) == {"loop that stores": 2, "loop": 1}
    copies = GOOD.replace("EXIT", GOOD.replace("L_x_0", "L_x_1").replace("R12, desc", "R8, desc"))
    assert sass.in_flight(code(copies), 128) == {"loop that stores": 2}


def test_a_kernel_without_loops_is_measured_as_a_whole():
    straight = GOOD.replace("@P0 BRA `(.L_x_0)", "")
    assert sass.in_flight(code(straight), 128) == {"straight": 2}


NAMES = [
    ("void rasa_ext::pack_kernel<float, __nv_bfloat16>(rasa_ext::PackParams)", "pack<float, bf16>"),
    ("void rasa_ext::shrink_kernel<__half, 8>(rasa_ext::DecodeParams)", "shrink<half, 8>"),
    ("rasa_ext::dropout_mask_kernel(unsigned long const*, long)", "dropout_mask"),
]


@pytest.mark.parametrize(("demangled", "short"), NAMES)
def test_names_are_short(demangled, short):
    assert sass.short(demangled) == short


def test_kernels_without_a_promise_are_named():
    assert sass.promises_of(["pack<float, bf16>"])["pack<float, bf16>"].load == 128
    with pytest.raises(SystemExit, match=r"a line for each of \['none', 'unpack<float>'\]"):
        sass.promises_of(["unpack<float>", "pack<float, bf16>", "none"])


def test_the_table_stands_between_its_marks():
    page = f"before\n{sass.BEGIN}\nold\n{sass.END}\nafter\n"
    assert sass.table_in(page) == "old"
    assert sass.with_table(page, "new") == page.replace("old", "new")
    with pytest.raises(SystemExit, match="expected one table between"):
        sass.table_in("no marks")
