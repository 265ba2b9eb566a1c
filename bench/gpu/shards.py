"""Runs of tests and commands on all cores until time is up; a later call does not repeat those that have ended."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO

from bench.gpu.outcomes import Outcome, OutcomeLog

__all__ = ["collect", "interleaved", "run_commands", "run_tests"]

# A test that begins in time may end this much later; then it is killed.
GRACE_SECONDS = 45.0

PLUGIN = ("-p", "bench.gpu.shard_plugin", "-p", "no:cacheprovider")


def collect(arguments: Sequence[str], cwd: Path, environment: Mapping[str, str] | None = None) -> list[str]:
    """Return the node ids that pytest finds, with additions to the environment.

    Raises:
        RuntimeError: pytest could not collect; the message has its output.
    """
    with tempfile.TemporaryDirectory() as folder:
        ids = Path(folder) / "ids.txt"
        command = [sys.executable, "-m", "pytest", *PLUGIN, "--collect-only", "-q", "--shard-write", str(ids)]
        whole = {**os.environ, **(environment or {})}
        done = subprocess.run([*command, *arguments], capture_output=True, text=True, cwd=cwd, env=whole)
        # Status 5 means that nothing was found.
        if done.returncode not in (0, 5):
            raise RuntimeError(
                f"pytest {' '.join(arguments)} could not collect:\n{(done.stdout + done.stderr)[-3000:]}"
            )
        return ids.read_text(encoding="utf-8").splitlines() if ids.exists() else []


def interleaved(ids: Sequence[str]) -> list[str]:
    """Order the first test of every file, then the second, and so on, so that a file that fails shows early."""
    by_file: dict[str, list[str]] = {}
    for name in ids:
        by_file.setdefault(name.split("::")[0], []).append(name)
    return [name for of_turn in itertools.zip_longest(*by_file.values()) for name in of_turn if name is not None]


def run_tests(
    ids: Sequence[str],
    arguments: Sequence[str],
    log: OutcomeLog,
    shards: int,
    until: float,
    cwd: Path,
    environment: Mapping[str, str] | None = None,
) -> list[str]:
    """Run tests in ``shards`` processes at a time.

    A test whose process dies is recorded as crashed, one that is killed after the time was up as timed out; in either
    case a new process continues with the next test.

    Args:
        ids: of the tests, in order; those that the log has the end of are not run.
        arguments: of pytest: the paths that the ids are found in, and options.
        log: the log to which the outcomes are appended.
        shards: processes.
        until: begin no test after this time.
        cwd: where pytest runs.
        environment: what is added to the environment.

    Returns:
        The ids for which no time was left.
    """
    ended = log.ended()
    left = [name for name in ids if name not in ended]
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(max(1, shards)) as pool:
        of_shards = [left[first::shards] for first in range(min(shards, len(left)))]
        running = [
            pool.submit(_run_shard, of_shard, arguments, log, until, cwd, Path(folder) / str(number), environment)
            for number, of_shard in enumerate(of_shards)
        ]
        for shard in running:
            shard.result()
    ended = log.ended()
    return [name for name in left if name not in ended]


def _run_shard(
    ids: list[str],
    arguments: Sequence[str],
    log: OutcomeLog,
    until: float,
    cwd: Path,
    stem: Path,
    environment: Mapping[str, str] | None,
) -> None:
    listed, said = stem.with_suffix(".ids"), stem.with_suffix(".log")
    while time.time() < until:
        ended = log.ended()
        left = [name for name in ids if name not in ended]
        if not left:
            return
        listed.write_text("".join(f"{name}\n" for name in left), encoding="utf-8")
        command = [sys.executable, "-m", "pytest", *PLUGIN, "-q", "--shard-ids", str(listed), "--shard-of", log.of]
        command += ["--shard-log", str(log.path), "--shard-until", str(until), *arguments]
        with said.open("wb") as output:
            process = _begin(command, output, cwd, environment)
            outcome, reason = _end(process, until)
        latest = log.latest()
        caught = [name for name in left if name in latest and latest[name].outcome == "begun"]
        for name in caught:
            log.add(Outcome(name, outcome, 0.0, reason))
        if not caught and all(name not in latest for name in left) and time.time() < until:
            told = said.read_text(encoding="utf-8", errors="replace")[-1000:]
            for name in left:
                log.add(Outcome(name, "failed", 0.0, f"pytest ended before any test, {reason}: {told}"))


def _begin(
    command: Sequence[str], output: IO[bytes], cwd: Path, environment: Mapping[str, str] | None = None
) -> subprocess.Popen[bytes]:
    """Start a process in its own process group."""
    whole = {**os.environ, **(environment or {})}
    return subprocess.Popen(
        command, stdout=output, stderr=subprocess.STDOUT, cwd=cwd, env=whole, start_new_session=True
    )


def _end(process: subprocess.Popen[bytes], until: float) -> tuple[str, str]:
    """Return how a process ended that had begun a test without finishing it; a process that hangs is killed."""
    try:
        process.wait(max(1.0, until + GRACE_SECONDS - time.time()))
    except subprocess.TimeoutExpired:
        # Its children are killed too, since a remaining process would occupy the GPU.
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return "timed out", f"killed {GRACE_SECONDS:.0f} s after the time was up"
    return "crashed", f"its process ended with status {process.returncode}"


def run_commands(
    commands: Mapping[str, Sequence[str]],
    log: OutcomeLog,
    at_once: int,
    until: float,
    cwd: Path,
    environment: Mapping[str, str] | None = None,
) -> list[str]:
    """Run named commands, some at a time, in order; passed is an exit status of 0.

    Args:
        commands: name → command; those whose end the log has are not run.
        log: the log to which the outcomes are appended, with the end of a failed command's output.
        at_once: how many run at a time.
        until: begin none after this time.
        cwd: where they run.
        environment: what is added to the environment.

    Returns:
        The names of those for which no time was left.
    """
    ended = log.ended()
    left = iter([name for name in commands if name not in ended])
    lock = threading.Lock()

    def work() -> None:
        while time.time() < until:
            with lock:
                name = next(left, None)
            if name is None:
                return
            _run_command(name, commands[name], log, until, cwd, environment)

    with ThreadPoolExecutor(max(1, at_once)) as pool:
        for worker in [pool.submit(work) for _ in range(max(1, at_once))]:
            worker.result()
    ended = log.ended()
    return [name for name in commands if name not in ended]


def _run_command(
    name: str, command: Sequence[str], log: OutcomeLog, until: float, cwd: Path, environment: Mapping[str, str] | None
) -> None:
    began = time.time()
    log.add(Outcome(name, "begun", 0.0))
    with tempfile.TemporaryFile() as output:
        process = _begin(command, output, cwd, environment)
        if _end(process, until)[0] == "timed out":
            # Not recorded as a failure, since a call with more time may finish the command.
            return
        output.seek(0)
        said = output.read().decode(errors="replace")[-1500:]
    outcome = "passed" if process.returncode == 0 else "failed"
    log.add(Outcome(name, outcome, round(time.time() - began, 1), "" if outcome == "passed" else said))
