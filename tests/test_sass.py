"""tools/sass.py on machine code written by hand: no compiler is needed."""

import json

import pytest

import sass

# A loop of two loads, whole or by single words, with a case on the way and a division that is called.
LISTING = """
        Function : kernel
        /*0000*/                   MOV R1, c[0x0][0x28] ;
        /*0010*/              @!P0 BRA 0x50 ;
        /*0020*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0030*/                   LDG.E.128.CONSTANT R8, desc[UR4][R2.64+0x10] ;
        /*0040*/                   BRA 0x70 ;
        /*0050*/                   LDG.E R4, desc[UR4][R2.64] ;
        /*0060*/                   LDG.E R8, desc[UR4][R2.64+0x10] ;
        /*0070*/               @P2 BRA 0x90 ;
        /*0080*/                   CALL.REL.NOINC 0xe0 ;
        /*0090*/                   FADD R4, R4, R8 ;
        /*00a0*/                   STG.E.64 desc[UR4][R2.64], R4 ;
        /*00b0*/               @P1 BRA 0x10 ;
        /*00c0*/                   STG.E.U8 desc[UR4][R2.64], R4 ;
        /*00d0*/                   EXIT ;
        /*00e0*/                   MUFU.RCP R0, R0 ;
        /*00f0*/                   RET.REL.NODEC R2 0x0 ;
"""


@pytest.fixture
def code() -> sass.Code:
    return sass.Code(sass.parse(LISTING)["kernel"])


def opcodes(path: list[sass.Instruction]) -> list[str]:
    return [instruction.base for instruction in path]


def test_the_main_loop_takes_whole_vectors_and_every_case_on_the_way(code):
    (loop,) = code.loops
    assert loop.header == 0x10 and 0x00 not in loop.blocks and 0xC0 not in loop.blocks
    longest = ["BRA", "LDG", "LDG", "BRA", "BRA", "CALL", "FADD", "STG", "BRA"]
    assert opcodes(code.path(loop, shortest=False)) == longest
    assert opcodes(code.path(loop, shortest=True)) == [name for name in longest if name != "CALL"]
    assert code.subroutines == {0xE0: 2}


def test_values_follow_from_the_widest_accesses(code):
    (path,) = code.main_loops(1)
    assert sass.values_of(path, 4.0, 1.0) == 8  # two loads of 16 bytes
    assert sass.values_of(path, 0.5, 4.0) == 2  # a store of 8 bytes


def test_narrow_values_beside_wider_parameters() -> None:
    listing = """
        Function : kernel
        /*0000*/               @P0 BRA 0x20 ;
        /*0010*/                   LDG.E R4, desc[UR4][R2.64] ;
        /*0020*/                   LDG.E.U16 R5, desc[UR4][R6.64] ;
        /*0030*/                   LDG.E.U16 R6, desc[UR4][R6.64+0x2] ;
        /*0040*/               @P1 BRA 0x0 ;
        /*0050*/                   EXIT ;
    """
    code = sass.Code(sass.parse(listing)["kernel"])
    (path,) = code.main_loops(1, shortest=True, widths={True: 2})
    assert opcodes(path) == ["BRA", "LDG", "LDG", "BRA"]
    assert sass.values_of(path, 2.0, 0.0, {True: 2}) == 2


def test_of_several_loops_those_that_move_most_are_the_main_ones():
    listing = """
        Function : kernel
        /*0000*/                   LDG.E R4, desc[UR4][R2.64] ;
        /*0010*/               @P1 BRA 0x0 ;
        /*0020*/                   LDS R5, [R4] ;
        /*0030*/                   STG.E.128 desc[UR4][R2.64], R4 ;
        /*0040*/               @P1 BRA 0x20 ;
        /*0050*/                   IMMA.16832.S8.U8 R4, R4.ROW, R5.COL, R4 ;
        /*0060*/               @P1 BRA 0x50 ;
        /*0070*/                   FADD R4, R4, R8 ;
        /*0080*/               @P1 BRA 0x70 ;
        /*0090*/                   EXIT ;
    """
    paths = sass.Code(sass.parse(listing)["kernel"]).main_loops(4)
    assert [opcodes(path) for path in paths] == [["IMMA", "BRA"], ["LDS", "STG", "BRA"], ["LDG", "BRA"]]


def test_the_longest_ways_before_a_loop_and_through_it() -> None:
    listing = """
        Function : kernel
        /*0000*/               @P0 BRA 0x20 ;
        /*0010*/                   MOV R1, R2 ;
        /*0020*/                   LDS R1, [R2] ;
        /*0030*/               @P1 BRA 0x20 ;
        /*0040*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0050*/               @P2 BRA 0xa0 ;
        /*0060*/                   FADD R4, R4, R8 ;
        /*0070*/               @P3 BRA 0xa0 ;
        /*0080*/                   STG.E.U8 desc[UR4][R2.64], RZ ;
        /*0090*/               @P4 BRA 0x80 ;
        /*00a0*/                   STG.E desc[UR4][R2.64], R4 ;
        /*00b0*/               @P5 BRA 0x40 ;
        /*00c0*/                   EXIT ;
    """
    code = sass.Code(sass.parse(listing)["kernel"])
    path = code.finishing()
    assert opcodes(path) == ["LDG", "BRA", "FADD", "BRA", "STG", "BRA"]  # without what fills up
    assert opcodes(code.before(path)) == ["BRA", "MOV", "LDS", "BRA"]


@pytest.mark.parametrize(
    ("threads", "registers", "shared", "blocks"),
    [(256, 32, 0, 8), (256, 64, 0, 4), (256, 65, 0, 3), (512, 128, 0, 1), (128, 16, 0, 16), (32, 16, 0, 32),
     (128, 16, 48 << 10, 4), (128, 16, 227 << 10, 1)],
)  # fmt: skip
def test_blocks_of_a_multiprocessor(threads, registers, shared, blocks):
    assert sass.resident_blocks(threads, registers, shared) == blocks


ROW = {"registers": 40, "stack": 0, "blocks": 4, "divisions": 1, "loads": "16", "stores": "16 4", "instructions": 9.5,
       "finish": 20.0, "prologue": 900}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"registers": 48}, ""),
        ({"stores": "16"}, ""),
        ({"instructions": 9.0}, ""),
        ({"instructions": 9.6}, "instructions 9.5 -> 9.6"),
        ({"stack": 8}, "stack 0 -> 8"),
        ({"blocks": 3}, "blocks 4 -> 3"),
        ({"divisions": 2}, "divisions 1 -> 2"),
        ({"finish": 20.5}, "finish 20.0 -> 20.5"),
        ({"prologue": 901}, "prologue 900 -> 901"),
        ({"loads": "16 2"}, "loads of 16 bytes -> 16 2"),
    ],
)
def test_what_counts_as_worse(change, said):
    sentences = sass.compare({"kernel": ROW}, {"kernel": {**ROW, **change}})
    assert sentences == ([f"kernel: {said}"] if said else [])


def test_a_kernel_that_the_table_does_not_know_is_reported():
    assert sass.compare({"old": ROW}, {"new": ROW}) == [
        "new: not in the table",
        "old: in the table, but not in the code",
    ]


def test_the_documented_table_is_the_committed_one():
    document = sass.DOCUMENT.read_text()
    kernels = json.loads(sass.TABLE.read_text())["kernels"]
    assert sass.documented(document, sass.table(kernels)) == document
