"""Without a GPU: what the machine code of the options may rely on, which the interpreter cannot show."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

triton = pytest.importorskip("triton")
if triton.knobs.runtime.interpret:
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

from bench.aot.cases import Case, compile_case, shipped_config  # noqa: E402 (an interpreter skips before)
from bench.aot.machine_code import registers_and_spills  # noqa: E402 (an interpreter skips before)


def ptx_of(case: Case) -> str:
    return compile_case(case, shipped_config(case)).asm["ptx"]


def test_a_token_without_a_place_is_at_distance_zero():
    # PTX: the maximum of NaN and 0 is 0, but that of max.NaN is NaN.
    ptx = ptx_of(Case("forward", "sm80", 64, "bf16", alibi=True))
    assert re.search(r"max\.(ftz\.)?f32", ptx)
    assert "sqrt.approx" in ptx
    assert "max.NaN" not in ptx


@pytest.mark.parametrize("pass_", ["forward", "query_gradient", "key_gradient"])
def test_descriptors_are_copied_by_the_copy_engine(pass_):
    ptx = ptx_of(Case(pass_, "sm90", 64, "bf16"))
    assert "cp.async.bulk.tensor.2d" in ptx
    # Gathered rows are not.
    assert "cp.async.bulk" not in ptx_of(Case(pass_, "sm90", 64, "bf16", gather=True))


@pytest.mark.parametrize("pass_", ["forward", "query_gradient", "key_gradient"])
def test_the_positions_of_chunks_cost_dropout_a_second_draw_and_no_spills(pass_):
    case = Case(pass_, "sm90", 64, "bf16", dropout=True)
    of_chunks = replace(case, chunks=True)
    # Ten rounds of two products of 32-bit words, for as many counters again; a few products are not of the draw.
    products = [len(re.findall(r"mul\.(wide|hi|lo)\.[us](32|64)", ptx_of(each))) for each in (case, of_chunks)]
    assert 1.5 < products[1] / products[0] < 2.1
    assert registers_and_spills(compile_case(of_chunks, shipped_config(of_chunks)))[1] == 0


def test_a_plain_tail_asks_for_no_tile_before_its_own():
    case = Case("query_gradient", "sm90", 64, "bf16")
    config = shipped_config(case)
    assert config.plain_tail
    plain, pipelined = (
        compile_case(case, each).asm["ptx"].count("cp.async.bulk.tensor.2d")
        for each in (config, replace(config, plain_tail=False))
    )
    # Keys and values of the tail, once; in a pipeline, for each stage before its loop and once in it.
    assert pipelined - plain == 2 * (config.num_stages - 1)


TF32_PRODUCTS = {"sm80": r"mma\.sync\.aligned\.m16n8k8\S*\.tf32\.tf32", "sm90": r"wgmma\.mma_async\S*\.tf32\.tf32"}


@pytest.mark.parametrize(("target", "head_width"), [("sm80", 32), ("sm90", 64)])
@pytest.mark.parametrize("pass_", ["forward", "query_gradient", "key_gradient"])
def test_float32_goes_to_the_tensor_cores_in_three_products_where_that_is_allowed(pass_, target, head_width):
    case = Case(pass_, target, head_width, "tf32x3")
    assert shipped_config(case).precision == "tf32x3"
    compiled = compile_case(case, shipped_config(case))
    assert re.search(TF32_PRODUCTS[target], compiled.asm["ptx"])
    assert registers_and_spills(compiled)[1] == 0


def test_float32_stays_off_the_tensor_cores_where_it_is_not():
    assert "tf32" not in ptx_of(Case("forward", "sm90", 64, "fp32"))


@pytest.mark.parametrize(
    "case",
    [
        Case("forward", "sm90", 128, "tf32x3"),
        Case("forward", "sm90", 64, "tf32x3", alibi=True),
        Case("forward", "gfx942", 64, "tf32x3"),
    ],
    ids=str,
)
def test_what_has_no_tiles_for_three_products_multiplies_float32_as_it_is(case):
    assert shipped_config(case) == shipped_config(replace(case, dtype="fp32"))
