"""A plugin of pytest: run the listed tests in the order of the list until time is up, and log the outcome of each.

pytest -p bench.gpu.shard_plugin --shard-ids ids.txt --shard-log outcomes.jsonl --shard-until 1790000000 tests/kernels
pytest -p bench.gpu.shard_plugin --collect-only --shard-write ids.txt tests/kernels

The log gets a line when a test begins and one when it has ended, each written at once, so that a test that takes the
process with it is known, and so that several processes may share a log.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench.gpu.outcomes import Outcome, OutcomeLog

# Characters kept of pytest's report of a failure; a line of the log must be written at once.
LONGEST_REASON = 1500


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("sharding")
    group.addoption("--shard-ids", type=Path, default=None, help="the tests to run, a node id a line")
    group.addoption("--shard-log", type=Path, default=None, help="where what became of each test is appended")
    group.addoption("--shard-of", default="", help="what the outcomes are of: the fingerprint of the sources")
    group.addoption("--shard-until", type=float, default=float("inf"), help="start no test after this time")
    group.addoption("--shard-write", type=Path, default=None, help="where to write the ids of the collected tests")


def pytest_configure(config: pytest.Config) -> None:
    log = config.getoption("--shard-log")
    if log is not None:
        config.pluginmanager.register(_Logger(OutcomeLog(log, config.getoption("--shard-of"))))


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    listed = config.getoption("--shard-ids")
    if listed is not None:
        by_id = {item.nodeid: item for item in items}
        ids = listed.read_text(encoding="utf-8").splitlines()
        items[:] = [by_id[name] for name in ids if name in by_id]
    written = config.getoption("--shard-write")
    if written is not None:
        written.write_text("".join(f"{item.nodeid}\n" for item in items), encoding="utf-8")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    if time.time() > item.config.getoption("--shard-until"):
        item.session.shouldstop = "time is up"
        return True
    return (yield)


class _Logger:
    """Appends to the log what pytest reports."""

    def __init__(self, log: OutcomeLog) -> None:
        self._log = log
        self._seconds: dict[str, float] = {}
        self._found: dict[str, tuple[str, str]] = {}

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self._seconds[nodeid] = 0.0
        self._found[nodeid] = ("passed", "")
        self._log.add(Outcome(nodeid, "begun", 0.0, f"process {os.getpid()}"))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._seconds[report.nodeid] += report.duration
        if report.outcome != "passed" and self._found[report.nodeid][0] != "failed":
            told = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr or "")
            self._found[report.nodeid] = (report.outcome, told[-LONGEST_REASON:])

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        outcome, reason = self._found[nodeid]
        self._log.add(Outcome(nodeid, outcome, round(self._seconds[nodeid], 3), reason))
