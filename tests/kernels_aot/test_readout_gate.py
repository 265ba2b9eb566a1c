"""Without a GPU: the readout's kernels compile, spill nothing, fit, and read memory 16 bytes a thread."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")
if triton.knobs.runtime.interpret:
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "bench"))

from aot.bounds import SHARED_LIMITS  # noqa: E402 (bench/ must be on the path first)
from aot.readout_cases import KERNELS, ReadoutCase, measure_readout  # noqa: E402 (likewise)

COMPILED = [kernel for kernel in KERNELS if kernel != "combine_kernel"]
CASES = [
    *(ReadoutCase(kernel, "sm90", 64, "bf16") for kernel in COMPILED),
    *(ReadoutCase(kernel, "sm90", 128, "bf16", queries=5, options=True) for kernel in COMPILED),
    *(ReadoutCase(kernel, "sm80", 80, "bf16", options=True) for kernel in COMPILED),
    *(ReadoutCase(kernel, "gfx942", 64, "bf16", queries=5, options=True) for kernel in COMPILED),
    ReadoutCase("relevance_kernel", "sm90", 64, "bf16", classes=40),
    ReadoutCase("readout_kernel", "sm100", 64, "fp32", queries=5),
    ReadoutCase("readout_gradient_kernel", "sm100", 256, "fp32", options=True),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_nothing_is_spilled_and_everything_fits(case):
    row = measure_readout(case)
    assert row.code.spilled_bytes == 0
    assert row.code.shared_bytes <= SHARED_LIMITS[case.target]
    if case.target != "gfx942":
        assert row.load_bits == 128


@pytest.mark.parametrize("kernel", ["readout_kernel", "row_gradient_kernel", "readout_gradient_kernel"])
def test_one_query_needs_no_barrier_in_the_loop(kernel):
    """Warps that wait for each other at every tile cannot keep as much of the memory busy."""
    assert measure_readout(ReadoutCase(kernel, "sm90", 64, "bf16")).columns()["barriers"] == 0
