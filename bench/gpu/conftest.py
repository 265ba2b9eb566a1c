"""Options and fixtures of the benches: the device, the grid of sizes, the time limit, and the file for the rows.

pytest bench                                                       on this CPU, a few minutes
pytest bench --bench-device cuda --bench-grid full --bench-csv rows.csv --bench-seconds 540
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from bench.gpu.clock import DeviceClock
from bench.gpu.peers import UnsupportedError
from bench.gpu.points import Case, Problem, problem_of
from bench.gpu.record import Recorder, is_ours, table


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("attention benches")
    group.addoption("--bench-device", choices=("cpu", "cuda"), default="cpu")
    group.addoption("--bench-grid", choices=("smoke", "quick", "full"), default="quick")
    group.addoption(
        "--bench-impls", default="", help="our implementations, separated by commas; by default all of the device"
    )
    group.addoption("--bench-csv", type=Path, default=None, help="file to which rows are appended as they are measured")
    group.addoption(
        "--bench-commit", default="", help="name of the measured sources, for a checkout without git history"
    )
    group.addoption("--bench-seconds", type=float, default=float("inf"), help="start no row after this many seconds")


def pytest_configure(config: pytest.Config) -> None:
    # Peers warn of prototypes, and the project treats warnings as errors only in its own tests.
    config.addinivalue_line("filterwarnings", "ignore")
    device = config.getoption("--bench-device")
    if device == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError(
            "--bench-device cuda needs a GPU that torch can use; torch.cuda.is_available() is False"
        )
    config.recorder = Recorder(config.getoption("--bench-csv"), device, config.getoption("--bench-commit"))
    config.deadline = time.monotonic() + config.getoption("--bench-seconds")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Sort the most important cases first; contenders of a case stay together, to share tensors and conditions."""

    def rank(item: pytest.Item) -> float:
        case = getattr(item, "callspec", None) and item.callspec.params.get("case")
        return case.rank if isinstance(case, Case) else float("inf")

    items.sort(key=rank)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if config.recorder.rows:
        terminalreporter.section("ours and the best peer at each point, one run")
        terminalreporter.write_line(table(config.recorder.rows))


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> str:
    return request.config.getoption("--bench-device")


@pytest.fixture(scope="session")
def clock(device: str) -> Callable[[], float]:
    """Return the timer: wall time on a CPU, where calls return when they are done, and events on a GPU."""
    return DeviceClock() if device == "cuda" else time.perf_counter


@pytest.fixture
def problem(case: Case, device: str) -> Problem:
    return problem_of(case.point, device)


Measure = Callable[..., None]


@pytest.fixture
def measure(request: pytest.FixtureRequest, case: Case, contender: str, device: str, clock) -> Iterator[Measure]:
    """Provide measure(prepare, flop=, bytes_moved=), which times the result of ``prepare()`` and records the row.

    A peer that does not support the case is skipped with the reason; a failure of ours fails the test.
    """
    config = request.config
    if config.recorder.has(case, contender):
        pytest.skip("an earlier call measured it")
    if time.monotonic() > config.deadline:
        config.recorder.add(case, contender, "left out", "time was up")
        pytest.skip("left out: time was up")
    request.node.add_marker(pytest.mark.benchmark(timer=clock))
    benchmark = request.getfixturevalue("benchmark")

    def run(prepare: Callable[[], Callable[[], object]], flop: float = 0.0, bytes_moved: float = 0.0) -> None:
        try:
            call = prepare()
            call()
            seconds = _once(call, clock)
            peak_mib = _peak_mib(call) if device == "cuda" else None
        except Exception as error:
            _give_up(config, case, contender, error)
        benchmark.group = str(case)
        rounds = _rounds(seconds, device)
        benchmark.pedantic(call, rounds=rounds, iterations=1)
        if benchmark.stats is None:
            # --benchmark-disable
            config.recorder.add(case, contender, "ran")
            return
        p20, p50, p80 = np.percentile(benchmark.stats.stats.data, [20, 50, 80])
        figures = {"p20_ms": p20 * 1e3, "p50_ms": p50 * 1e3, "p80_ms": p80 * 1e3, "rounds": rounds}
        figures["tflops"] = flop / p50 / 1e12 if flop else None
        figures["gbytes_per_s"] = bytes_moved / p50 / 1e9 if bytes_moved else None
        if isinstance(clock, DeviceClock):
            figures["host_us"] = clock.host_seconds() * 1e6
        row = config.recorder.add(case, contender, "ok", **figures, peak_mib=peak_mib)
        benchmark.extra_info.update(vars(row))

    yield run
    if isinstance(clock, DeviceClock):
        clock.reset()


def _give_up(config: pytest.Config, case: Case, contender: str, error: Exception) -> None:
    """Skip a peer with the reason, and fail for ours; an error that makes the GPU unusable ends the run."""
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    if isinstance(error, torch.OutOfMemoryError):
        torch.cuda.empty_cache()
        reason = "out of memory"
    fails = is_ours(contender) and not isinstance(error, UnsupportedError)
    config.recorder.add(case, contender, "failed" if fails else "skipped", reason)
    if torch.cuda.is_available() and _context_is_lost():
        pytest.exit(f"{case}, {contender}: {reason}; no more can run on this GPU in this process", returncode=1)
    if fails:
        raise error
    pytest.skip(reason)


def _context_is_lost() -> bool:
    """Return whether the GPU is unusable, since after an illegal access every further call fails."""
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def _once(call: Callable[[], object], clock: Callable[[], float]) -> float:
    start = clock()
    call()
    return clock() - start


def _peak_mib(call: Callable[[], object]) -> float:
    """Return the peak memory of a call, beyond the memory allocated before it."""
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    result = call()
    torch.cuda.synchronize()
    del result
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def _rounds(seconds: float, device: str) -> int:
    """Return as many rounds as fit into 0.3 s on a GPU or one second on a CPU, with a minimum for slow calls."""
    budget, most = (0.3, 100) if device == "cuda" else (1.0, 30)
    return int(min(max(budget / max(seconds, 1e-6), 5 if seconds < 1 else 3), most))
