"""The arithmetic of the pipe bounds, on instructions written out here and on compiled kernels."""

from __future__ import annotations

import pytest

triton = pytest.importorskip("triton")
if triton.knobs.runtime.interpret:
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

from bench.aot import report  # noqa: E402 (an interpreter skips before)
from bench.aot.bounds import CHIPS, bound_of, pipe_cycles, resident_programs  # noqa: E402 (an interpreter skips before)
from bench.aot.cases import Case  # noqa: E402 (an interpreter skips before)
from bench.aot.machine_code import MachineCode  # noqa: E402 (an interpreter skips before)
from maskattn.kernels.tables.config import Config  # noqa: E402 (an interpreter skips before)

# A loop over tiles of 128 × 128 scores at width 64 by 8 warps, as counted for the fastest public Triton kernel.
KNOWN_LOOP = (
    *["HGMMA.64x128x16.F32.BF16 R24, gdesc[UR4], R24"] * 4,
    *["HGMMA.64x64x16.F32.BF16 R24, R88, gdesc[UR4], R24"] * 8,
    *["MUFU.EX2 R1, R2"] * 66,
    *["FMNMX R1, R2, R3, !PT"] * 68,
    *["FADD R1, R2, R3"] * 68,
    *["FFMA R1, R2, R3, R4"] * 66,
    *["FMUL R1, R2, R3"] * 34,
    *["F2FP.BF16.F32.PACK_AB R1, R2, R3"] * 32,
    *["IADD3 R1, R2, R3, R4"] * 27,
    *["BAR.SYNC.DEFER_BLOCKING 0x0"] * 71,
)


def code_of(loop=(), registers=128, shared_bytes=0, tensor_memory=0):
    return MachineCode(registers, 0, shared_bytes, tensor_memory, "wgmma", 32, tuple(loop))


def test_a_loop_counted_by_hand_gives_the_published_cycles_and_ceilings():
    assert len(KNOWN_LOOP) == 444
    bound = bound_of(code_of(KNOWN_LOOP), Config(128, 128, 8, 3), "forward", "sm90", 64, 64)
    cycles = bound.cycles
    assert (cycles.issue, cycles.mufu, cycles.tensor) == (888, 1056, 1024)
    # FADD, FFMA and FMUL on 128 lanes; the maximum, the conversion and the integers on 64.
    assert cycles.fp32 == 8 * 32 * (68 + 66 + 34) / 128
    assert cycles.integer == 8 * 32 * (68 + 32 + 27) / 64
    # Per wgmma of four warps: both operands, or the right one, in bfloat16 at 128 bytes a clock.
    assert cycles.load_store == 0
    assert cycles.operands == 2 * (4 * (64 + 128) * 16 * 2 + 8 * 64 * 16 * 2) / 128
    assert bound.slowest == "mufu"
    assert bound.overlapped_tflops == pytest.approx(950, rel=0.02)
    assert bound.series_tflops == pytest.approx(490, rel=0.02)


@pytest.mark.parametrize(("target", "published"), [("sm80", 312), ("sm86", 149.7), ("sm90", 989.4), ("sm100", 2250)])
def test_the_dense_rate_is_the_data_sheets(target, published):
    assert CHIPS[target].dense_tflops == pytest.approx(published, rel=0.005)


@pytest.mark.parametrize(
    ("instruction", "pipe", "cycles"),
    [
        ("HMMA.16816.F32.BF16 R1, R2, R3, R1", "tensor", 2 * 16 * 8 * 16 / 2048),
        ("LDSM.16.M88.4 R116, [R152]", "load_store", 4),
        ("LDS.64 R1, [R2]", "load_store", 2),
        ("LDGSTS.E.BYPASS.128 [R162+0x4000], [R16.64], P0", "load_store", 4),
        ("LDGDEPBAR", "load_store", 0),
        ("SHFL.BFLY PT, R1, R2, 0x1, 0x1f", "load_store", 1),
        ("SHF.R.U32.HI R1, RZ, 0x1, R2", "integer", 0.5),
        ("IMAD.WIDE.U32 R1, R2, R3, R4", "fp32", 1),
        ("UIADD3 UR4, UR5, UR6, URZ", "integer", 0),
        ("FADD2 R2, R4, R6", "fp32", 1),
    ],
)
def test_an_instruction_keeps_its_pipe_busy(instruction, pipe, cycles):
    assert getattr(pipe_cycles([instruction], 1, CHIPS["sm80"]), pipe) == cycles


def test_tensor_cores_and_the_slowest_other_pipe_take_turns_when_nothing_overlaps():
    cycles = pipe_cycles(KNOWN_LOOP, 8, CHIPS["sm90"])
    assert (cycles.overlapped, cycles.series) == (1056, 1024 + 1056)


def test_what_a_product_reads_itself_waits_for_no_turn_but_shares_the_memory():
    both_operands = ["HGMMA.64x64x16.F32.BF16 R24, gdesc[UR4], R24"] * 4
    cycles = pipe_cycles([*both_operands, *["LDS.128 R4, [R2]"] * 3], 4, CHIPS["sm90"])
    assert (cycles.tensor, cycles.operands, cycles.load_store) == (4 * 32, 4 * 32, 3 * 4 * 4)
    assert cycles.overlapped == cycles.operands + cycles.load_store
    assert cycles.series == cycles.tensor + cycles.load_store


@pytest.mark.parametrize(
    ("registers", "num_warps", "shared_kib", "resident"),
    [
        (186, 4, 64, 2),
        (240, 4, 64, 2),
        (176, 8, 64, 1),
        (128, 8, 64, 2),
        (64, 4, 100, 2),
        (64, 4, 114, 1),
        (32, 4, 0, 16),
    ],
)
def test_registers_and_shared_memory_decide_how_many_programs_fit(registers, num_warps, shared_kib, resident):
    code = code_of(registers=registers, shared_bytes=shared_kib * 1024)
    assert resident_programs(code, num_warps, CHIPS["sm90"]) == resident


def test_tensor_memory_decides_too():
    assert resident_programs(code_of(registers=64, tensor_memory=256), 4, CHIPS["sm100"]) == 2


@pytest.mark.parametrize("target", ["sm80", "sm90", "sm100"])
@pytest.mark.parametrize(("pass_", "products"), [("forward", 2), ("key_gradient", 4)])
def test_compiled_kernels_do_the_products_of_one_tile_per_turn_of_their_loop(target, pass_, products):
    row = report.measure(Case(pass_, target, 64, "bf16"))
    flop = 2 * products * row.config.block_m * row.config.block_n * 64
    assert row.bound.cycles.tensor * CHIPS[target].tensor_flop == flop
    assert row.bound.overlapped_tflops <= CHIPS[target].dense_tflops * (1 + 1e-9)
    assert row.bound.series_tflops < row.bound.overlapped_tflops


@pytest.mark.parametrize(
    ("column", "value", "worse"),
    [
        ("per_score", "8.00", True),
        ("per_score", "9.50", False),
        ("registers", "120", True),
        ("registers", "122", False),
        ("series_tflops", "500.0", True),
        ("resident_programs", "1", False),
        ("spilled_bytes", "-1", True),
        ("tensor_instruction", "mma.sync", True),
    ],
)
def test_what_is_worse_than_the_table_is_named(column, value, worse):
    now = {"spilled_bytes": 0, "shared_bytes": 0, "tensor_memory": 0, "per_score": 9.0, "registers": 130}
    now |= {"slowest": "mufu", "overlapped_tflops": 900.0, "series_tflops": 480.0, "resident_programs": 2}
    now["tensor_instruction"] = "wgmma"
    before = {name: str(known) for name, known in now.items()} | {column: value}
    assert [each.split()[0] for each in report.regressions(now, before)] == [column] * worse
