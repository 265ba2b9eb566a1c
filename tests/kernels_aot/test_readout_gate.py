"""Without a GPU: the readout's kernels compile, spill nothing, fit, and read memory 16 bytes a thread."""

from __future__ import annotations

import csv
import functools

import pytest

triton = pytest.importorskip("triton")
if triton.knobs.runtime.interpret:
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

from bench.aot.bounds import SHARED_LIMITS  # noqa: E402 (an interpreter skips before)
from bench.aot.readout_cases import (  # noqa: E402 (an interpreter skips before)
    KERNELS,
    ReadoutCase,
    measure_readout,
    readout_cases,
    readout_table_path,
)


@functools.cache
def committed() -> dict[tuple[str, ...], dict[str, str]]:
    path = readout_table_path()
    if not path.exists():
        pytest.skip(f"no table for triton {triton.__version__}; python -m aot.readout_cases in bench/ writes one")
    with path.open(newline="") as file:
        return {key_of(row): row for row in csv.DictReader(file)}


def key_of(row: dict[str, object]) -> tuple[str, ...]:
    return tuple(
        str(row[name]) for name in ("kernel", "target", "head_width", "dtype", "queries", "classes", "options")
    )


CASES = [
    *(ReadoutCase(kernel, "sm90", 64, "bf16") for kernel in KERNELS),
    *(ReadoutCase(kernel, "sm90", 128, "bf16", queries=5, options=True) for kernel in KERNELS),
    *(ReadoutCase(kernel, "sm80", 80, "bf16", options=True) for kernel in KERNELS),
    *(ReadoutCase(kernel, "gfx942", 64, "bf16", queries=5, options=True) for kernel in KERNELS),
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


@pytest.mark.parametrize("case", [case for case in CASES if case in list(readout_cases())], ids=str)
def test_no_worse_than_the_committed_table(case):
    row = measure_readout(case).columns()
    before = committed()[key_of(row)]
    for column in ("spilled_bytes", "shared_bytes", "instructions_per_key", "bytes_per_key", "barriers"):
        assert float(row[column]) <= float(before[column]), f"{column}; was {before[column]}"


def test_no_row_of_the_committed_table_spills_or_is_too_large():
    assert len(committed()) == len(list(readout_cases()))
    for key, row in committed().items():
        assert int(row["spilled_bytes"]) == 0, key
        assert int(row["shared_bytes"]) <= SHARED_LIMITS[row["target"]], key


@pytest.mark.parametrize("kernel", ["readout_kernel", "row_gradient_kernel", "readout_gradient_kernel"])
def test_one_query_needs_no_barrier_in_the_loop(kernel):
    """Warps that wait for each other at every tile cannot keep as much of the memory busy."""
    assert measure_readout(ReadoutCase(kernel, "sm90", 64, "bf16")).columns()["barriers"] == 0
