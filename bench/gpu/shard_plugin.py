"""A pytest plugin that runs listed tests in the order of the list until time is up, and logs the outcome of each.

pytest -p bench.gpu.shard_plugin --shard-ids ids.txt --shard-log outcomes.jsonl --shard-until 1790000000 tests/kernels
pytest -p bench.gpu.shard_plugin --collect-only --shard-write ids.txt tests/kernels

The log gets a line when a test begins and one when it has ended, each in a single write, so that a test that kills the
process is known, and several processes can share a log.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench.gpu.outcomes import Outcome, OutcomeLog

# Characters kept of pytest's report of a failure, so that a line of the log fits a single write.
LONGEST_REASON = 1500


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("sharding")
    group.addoption("--shard-ids", type=Path, default=None, help="file with the tests to run, one node id per line")
    group.addoption("--shard-log", type=Path, default=None, help="file to which outcomes are appended")
    group.addoption("--shard-of", default="", help="fingerprint of the tested sources")
    group.addoption("--shard-until", type=float, default=float("inf"), help="start no test after this time")
    group.addoption("--shard-write", type=Path, default=None, help="file for the ids of the collected tests")


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
    """Appends pytest's reports to the log."""

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
            reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr or "")
            self._found[report.nodeid] = (report.outcome, reason[-LONGEST_REASON:])

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        outcome, reason = self._found[nodeid]
        self._log.add(Outcome(nodeid, outcome, round(self._seconds[nodeid], 3), reason))
