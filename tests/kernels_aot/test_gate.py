"""Without a GPU: the kernels compile for every target, spill nothing, fit, and are no worse than the table."""

from __future__ import annotations

import functools
from dataclasses import asdict
from typing import Any

import pytest

triton = pytest.importorskip("triton")
if triton.knobs.runtime.interpret:
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

from bench.aot import report  # noqa: E402 (an interpreter skips before)
from bench.aot.bounds import SHARED_LIMITS, TENSOR_MEMORY_COLUMNS  # noqa: E402 (an interpreter skips before)
from bench.aot.cases import KERNELS, Case, all_cases, shipped_config  # noqa: E402 (an interpreter skips before)
from bench.aot.targets import GPU_TARGETS  # noqa: E402 (an interpreter skips before)
from maskattn.kernels.tables.attention import TABLE  # noqa: E402 (an interpreter skips before)

# One compilation each; bench/aot/cases.py has all.
CASES = [
    *(Case(pass_, target, 64, "bf16") for target in GPU_TARGETS for pass_ in KERNELS),
    *(Case(pass_, "sm90", 80, "bf16", bias=True, gather=True) for pass_ in KERNELS),
    *(Case(pass_, "sm90", 64, "fp32") for pass_ in KERNELS),
    Case("forward", "sm100", 128, "bf16"),
    Case("forward", "gfx942", 128, "fp32"),
    Case("forward", "sm90", 256, "bf16", bias=True, gather=True),
]

TENSOR_INSTRUCTIONS = {
    "sm80": "mma.sync",
    "sm86": "mma.sync",
    "sm90": "wgmma",
    "sm100": "tcgen05.mma",
    "gfx942": "mfma",
}


def name(case: Case) -> str:
    return "-".join(case.key)


@functools.cache
def measured(case: Case) -> dict[str, Any]:
    return report.measure(case).columns()


@functools.cache
def committed() -> dict[tuple[str, ...], dict[str, str]]:
    path = report.table_path()
    if not path.exists():
        pytest.skip(f"no table for triton {triton.__version__}; python -m bench.aot.report writes one")
    return report.read_table(path)


@pytest.mark.parametrize("case", CASES, ids=name)
def test_nothing_is_spilled_and_everything_fits(case):
    row = measured(case)
    assert row["spilled_bytes"] == 0
    assert 0 < row["registers"] <= (512 if case.target == "gfx942" else 255)
    assert row["shared_bytes"] <= SHARED_LIMITS[case.target]
    assert row["tensor_memory"] <= TENSOR_MEMORY_COLUMNS


@pytest.mark.parametrize("case", [case for case in CASES if case.dtype != "fp32"], ids=name)
def test_the_tensor_cores_of_the_target_are_used(case):
    row = measured(case)
    assert row["tensor_instruction"] == TENSOR_INSTRUCTIONS[case.target]
    # In the main loop, not just somewhere.
    assert row["tensor"] > 0


@pytest.mark.parametrize("case", [case for case in CASES if case.dtype == "fp32"], ids=name)
def test_float32_is_multiplied_in_float32(case):
    row = measured(case)
    assert row["tensor_instruction"] == ("mfma" if case.target == "gfx942" else "none")


@pytest.mark.parametrize("case", CASES, ids=name)
def test_no_worse_than_the_committed_table(case):
    assert not report.regressions(measured(case), committed()[case.key])


def test_the_committed_table_covers_every_configuration_as_it_is():
    table = committed()
    assert set(table) == {case.key for case in all_cases()}
    for case in all_cases():
        config = shipped_config(case)
        row = table[case.key]
        assert {key: str(value) for key, value in asdict(config).items()}.items() <= row.items(), name(case)


def test_no_row_of_the_committed_table_spills_or_is_too_large():
    for key, row in committed().items():
        assert int(row["spilled_bytes"]) == 0, key
        assert int(row["shared_bytes"]) <= SHARED_LIMITS[row["target"]], key
        assert int(row["tensor_memory"]) <= TENSOR_MEMORY_COLUMNS, key
        assert float(row["per_score"]) > 0, key


def test_every_row_of_the_committed_table_uses_the_tensor_cores_of_its_target():
    # Tiles of 64 keys, which wgmma needs, do not fit into the registers there.
    without_wgmma = [("key_gradient", "sm90", width) for width in ("192", "256")]
    for key, row in committed().items():
        if row["dtype"] != "fp32":
            expected = "mma.sync" if key[:3] in without_wgmma else TENSOR_INSTRUCTIONS[row["target"]]
            assert (row["tensor_instruction"], float(row["tensor"]) > 0) == (expected, True), key


def test_every_target_of_the_configurations_is_compiled_for():
    assert {target for target, _ in TABLE} == set(GPU_TARGETS)
