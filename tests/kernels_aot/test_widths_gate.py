"""Without a GPU: head widths between the usual ones spill nothing, and are read as much at a time as those."""

from __future__ import annotations

import collections
import re
from dataclasses import astuple, replace

import pytest

triton = pytest.importorskip("triton")
if triton.knobs.runtime.interpret:
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

from bench.aot.width_cases import (  # noqa: E402 (an interpreter skips before)
    WidthCase,
    class_of,
    width_cases,
)
from bench.aot.widths import (  # noqa: E402 (an interpreter skips before)
    compile_width,
    current_code,
    faults,
    measure_width,
    read_widths,
    table_path,
)

TABLE = read_widths(table_path())

# A few of each kind, which spilt or were read element by element before.
CASES = [
    WidthCase("forward_kernel", "sm90", 72, "bf16", "plain"),
    WidthCase("query_gradient_kernel", "sm90", 72, "bf16", "bias"),
    WidthCase("key_gradient_kernel", "sm90", 104, "bf16", "plain"),
    WidthCase("key_gradient_kernel", "sm80", 72, "bf16", "every"),
    WidthCase("query_gradient_kernel", "sm90", 200, "bf16", "plain"),
    WidthCase("query_gradient_kernel", "sm90", 56, "bf16", "every"),
    WidthCase("query_gradient_kernel", "sm90", 136, "fp32", "bias"),
    WidthCase("key_gradient_kernel", "sm90", 112, "bf16", "bias"),
    WidthCase("forward_kernel", "sm80", 72, "fp32", "plain"),
    WidthCase("forward_kernel", "sm90", 88, "fp32", "bias"),
    WidthCase("readout_kernel", "sm90", 88, "bf16", "plain"),
    WidthCase("forward_kernel", "gfx90a", 72, "bf16", "bias"),
    WidthCase("key_gradient_kernel", "gfx950", 104, "bf16", "plain"),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_head_width_between_the_usual_ones_spills_nothing(case):
    assert faults(measure_width(case)) == []


def test_the_committed_table_has_every_case_and_no_row_spills_or_is_too_large():
    if not TABLE:
        pytest.skip(f"no table for triton {triton.__version__}; python -m bench.aot.report --all-widths writes one")
    assert {case: wrong for case, row in TABLE.items() if (wrong := faults(row))} == {}
    assert set(TABLE) == set(width_cases())


@pytest.mark.parametrize("case", [case for case in CASES if case in TABLE], ids=str)
def test_the_committed_table_is_of_the_kernels_as_they_are(case):
    assert TABLE[case].code == current_code(case), "python -m bench.aot.report --all-widths writes it anew"


def test_what_is_concluded_is_what_a_head_width_of_the_same_class_takes():
    resources = collections.defaultdict(set)
    for case, row in TABLE.items():
        compiled = TABLE[replace(case, head_width=row.compiled)]
        assert compiled.compiled == row.compiled
        assert row == replace(compiled, case=case)
        if row.compiled == case.head_width:
            resources[row.launch].add(astuple(row)[5:])
    # Where several of a class were compiled, they took the same.
    assert {launch for launch, found in resources.items() if len(found) > 1} == set()
    sample = sorted(TABLE.values(), key=lambda row: row.launch)[::80]
    assert {row.case for row in sample if class_of(row.case) != row.launch} == set()


@pytest.mark.parametrize("width", [72, 80])
def test_a_thread_reads_sixteen_bytes_at_once_whatever_the_head_width(width):
    # Where heads begin at multiples of 8 elements and not of 16, the launcher does not see it by itself.
    ptx = compile_width(WidthCase("forward_kernel", "sm80", width, "bf16", "plain")).asm["ptx"]
    assert "cp.async.cg.shared.global" in ptx
    assert not re.search(r"ld\.global\.b16|st\.global\.b16", ptx)
    loads = re.findall(
        r"ld\.global\S*\.v4\.b32", compile_width(WidthCase("readout_kernel", "sm90", width, "bf16", "plain")).asm["ptx"]
    )
    assert len(loads) >= 2
