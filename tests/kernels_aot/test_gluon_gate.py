"""Without a GPU: the Hopper kernels compile as they are meant to, spill nothing, and are no worse than the table."""

from __future__ import annotations

import functools
from typing import Any

import pytest

triton = pytest.importorskip("triton")
if triton.knobs.runtime.interpret:
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

from bench.aot.bounds import SHARED_LIMITS  # noqa: E402 (an interpreter skips before)
from bench.aot.gluon_report import (  # noqa: E402 (an interpreter skips before)
    GluonCase,
    all_gluon_cases,
    config_columns,
    gluon_table_path,
    measure_gluon,
    read_gluon_table,
)
from bench.aot.report import regressions  # noqa: E402 (an interpreter skips before)

CASES = [
    GluonCase(64),
    GluonCase(128),
    GluonCase(64, bias=True),
    GluonCase(128, bias=True, alibi=True),
    GluonCase(256),
    GluonCase(64, pass_="backward"),
    GluonCase(128, bias=True, pass_="backward"),
]
# Of a multiprocessor, and the threads of two consumers and of the producer, whose group of warps is rounded up.
REGISTERS, THREADS = 65536, 128


def name(case: GluonCase) -> str:
    return "-".join(case.key)


@functools.cache
def measured(case: GluonCase) -> dict[str, Any]:
    return measure_gluon(case).columns()


@functools.cache
def committed() -> dict[tuple[str, ...], dict[str, str]]:
    path = gluon_table_path()
    if not path.exists():
        pytest.skip(f"no table for triton {triton.__version__}; python -m bench.aot.gluon_report writes one")
    return read_gluon_table(path)


def check(row: dict[str, Any]) -> None:
    """What holds for every case: of a row as measured, or as the table has it."""
    assert int(row["spilled_bytes"]) == 0
    assert int(row["shared_bytes"]) <= SHARED_LIMITS["sm90"]
    assert row["tensor_instruction"] == "wgmma"
    assert float(row["tensor"]) > 0
    assert int(row["tma_copies"]) >= 3
    # Backward adds dQ in the loop for full blocks and in the loop for others, or in one loop, for each consumer.
    is_backward = row["pass_"] == "backward"
    assert int(row["tma_additions"]) in ((2, 4) if is_backward else (0,))
    # ptxas says nothing of products that it has to do one after another.
    assert row["ptxas_remarks"] == ""
    consumer, producer = int(row["consumer_setmaxnreg"]), int(row["producer_setmaxnreg"])
    assert 0 < producer < consumer
    assert (2 * consumer + producer) * THREADS <= REGISTERS
    assert int(row["resident_programs"]) >= 1


@pytest.mark.parametrize("case", CASES, ids=name)
def test_warps_are_specialised_products_overlap_and_nothing_is_spilled(case):
    check(measured(case))


@pytest.mark.parametrize("case", CASES, ids=name)
def test_no_worse_than_the_committed_table(case):
    assert not regressions(measured(case), committed()[case.key])


def test_the_committed_table_covers_every_case_as_it_is():
    table = committed()
    assert set(table) == {case.key for case in all_gluon_cases()}
    for case in all_gluon_cases():
        row = table[case.key]
        config = {key: str(value) for key, value in config_columns(case.config).items()}
        assert config.items() <= row.items(), name(case)
        check(row)
