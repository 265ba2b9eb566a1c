"""Without a GPU: what the machine code of the options may rely on, which the interpreter cannot show."""

from __future__ import annotations

import re

import pytest

triton = pytest.importorskip("triton")
if triton.knobs.runtime.interpret:
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

from bench.aot.cases import Case, compile_case, shipped_config  # noqa: E402 (an interpreter skips before)


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
