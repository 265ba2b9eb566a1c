"""Without a GPU: the Hopper kernel compiles as it is meant to, spills nothing, and is no worse than the table."""

from __future__ import annotations

import functools
from dataclasses import asdict
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton")
if triton.knobs.runtime.interpret:
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

from bench.aot.bounds import SHARED_LIMITS  # noqa: E402 (an interpreter skips before)
from bench.aot.gluon_report import (  # noqa: E402 (an interpreter skips before)
    GluonCase,
    all_gluon_cases,
    gluon_table_path,
    measure_gluon,
    read_gluon_table,
)
from bench.aot.report import regressions  # noqa: E402 (an interpreter skips before)
from maskattn.kernels.gluon.configs import choose  # noqa: E402 (an interpreter skips before)
from maskattn.options import Options  # noqa: E402 (an interpreter skips before)

CASES = [GluonCase(64), GluonCase(128), GluonCase(64, bias=True), GluonCase(128, bias=True, alibi=True), GluonCase(256)]
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
    one = torch.zeros(1)
    for case in all_gluon_cases():
        options = Options(1.0, one if case.bias else None, one if case.alibi else None)
        row = table[case.key]
        config = {key: str(value) for key, value in asdict(choose(case.head_width, options)).items()}
        assert config.items() <= row.items(), name(case)
        check(row)
