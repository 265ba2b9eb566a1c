"""Without a GPU: what a whole program issues, by its machine code, decides how short sequences are read."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

triton = pytest.importorskip("triton")
if triton.knobs.runtime.interpret:
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

from bench.aot.cases import Case, shipped_config  # noqa: E402 (an interpreter skips before)
from bench.aot.whole_program import (  # noqa: E402 (an interpreter skips before)
    all_ways,
    best_of,
    count_issued,
    measure_way,
    read_program,
    read_ways,
    table_path,
)
from maskattn.kernels.tables.lookup import look_up  # noqa: E402 (an interpreter skips before)

# Three instructions before the main loop, or five for the warp that makes a descriptor; three a tile; two between the
# loops, or one if there is no tail; four in the tail; two at the end.
ASSEMBLY = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;
        /*0010*/              @P0  EXIT ;
        /*0020*/              @P1  BRA `(.L_x_0) ;
        /*0030*/                   MOV R2, R3 ;
        /*0040*/                   UTMACMDFLUSH ;
.L_x_0:
.L_x_1:
        /*0050*/                   HGMMA.64x64x16.F32.BF16 R24, R4, gdesc[UR8], R24 ;
        /*0060*/             @!P2  BRA `(.L_x_5) ;
.L_x_2:
        /*0070*/              @P3  BRA `(.L_x_1) ;
        /*0080*/              @P4  BRA `(.L_x_4) ;
        /*0090*/                   MOV R2, R3 ;
.L_x_3:
        /*00a0*/                   MOV R2, R3 ;
        /*00b0*/                   HGMMA.64x64x16.F32.BF16 R24, R4, gdesc[UR8], R24 ;
        /*00c0*/                   MOV R2, R3 ;
        /*00d0*/              @P3  BRA `(.L_x_3) ;
.L_x_4:
        /*00e0*/                   STG.E desc[UR4][R2.64], R3 ;
        /*00f0*/                   EXIT ;
.L_x_5:
        /*0100*/             @!P2  BRA `(.L_x_5) ;
        /*0110*/                   BRA `(.L_x_2) ;
.L_x_6:
        /*0120*/                   BRA `(.L_x_6) ;
"""


def test_instructions_are_counted_along_the_way_of_the_warp_that_does_most():
    program = read_program(ASSEMBLY)
    # Waiting, which comes after the program's end, does not count.
    assert len(program.instructions) == 16
    issued = count_issued(program, 4, has_tail=True)
    assert (issued.before, issued.iteration, issued.iterations, issued.tail, issued.after) == (5, 3, 4, 6, 2)
    assert issued.total == 5 + 3 * 4 + 6 + 2


def test_without_a_tail_its_loop_is_passed_over():
    issued = count_issued(read_program(ASSEMBLY), 4, has_tail=False)
    assert (issued.tail, issued.after) == (1, 2)


def test_a_tile_whose_products_come_before_the_loop_is_no_iteration_of_it():
    jump = "        /*009c*/              @P5  BRA `(.L_x_4) ;\n"
    product = "        /*0048*/                   HGMMA.64x64x16.F32.BF16 R24, R4, gdesc[UR8], R24 ;\n"
    first, rest = ASSEMBLY.split(".L_x_0:")
    of_main = count_issued(read_program(first + product + ".L_x_0:" + rest), 4, has_tail=True)
    assert (of_main.before, of_main.iterations) == (6, 3)
    first, rest = ASSEMBLY.split(".L_x_3:")
    program = read_program(first + product + jump + ".L_x_3:" + rest)
    assert [count_issued(program, 4, has_tail).tail for has_tail in (True, False)] == [4, 1]


def test_a_kernel_with_another_form_is_not_counted():
    with pytest.raises(ValueError, match="expected a main loop and a tail's"):
        read_program(ASSEMBLY.replace("@P3  BRA `(.L_x_3)", "@P3  BRA `(.L_x_4)"))


@pytest.mark.parametrize(
    "case", [Case("forward", "sm90", 64, "bf16"), Case("key_gradient", "sm100", 64, "bf16")], ids=str
)
def test_the_committed_table_has_what_is_issued_now(case):
    long, *_ = read_ways(table_path())[case]
    assert measure_way(case, shipped_config(case)) == long


# Forward, 8 bytes are spilt with a bias at the head widths 200 to 248. The key gradient's other ways have not been
# compiled at every head width.
AS_LONG = {Case("forward", "sm100", 256, "bf16"), Case("key_gradient", "sm100", 256, "bf16")}


def test_short_sequences_are_read_in_the_way_that_issues_the_fewest_instructions():
    for case, ways in read_ways(table_path()).items():
        long, short = (
            look_up(case.pass_, case.target, case.head_width, torch.bfloat16, short=short) for short in (False, True)
        )
        assert [(way.descriptors, way.plain_tail) for way in ways] == [
            (config.descriptors, config.plain_tail) for config in all_ways(case)
        ]
        best = ways[0] if case in AS_LONG else best_of(ways)
        assert short == replace(long, descriptors=best.descriptors, plain_tail=best.plain_tail), case
