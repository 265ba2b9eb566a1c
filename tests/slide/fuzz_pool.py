"""Long-lived processes that take one task after another, and are replaced where a task crashes them or does not end.

Processor time bounds a task, that of processes which the task starts included, because other work on the machine does
not count there; a far longer wall time bounds what waits without working.
"""

from __future__ import annotations

import contextlib
import faulthandler
import multiprocessing
import os
import re
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

TASKS_PER_PROCESS = 1000


@dataclass(frozen=True)
class Limits:
    """The limits of one task: processor and wall seconds, and the address space that it may add to its process's."""

    processor_s: float = 20.0
    wall_s: float = 200.0
    memory_mb: int = 6144


@dataclass(frozen=True)
class Result:
    """What became of a task: what its function returned, or how it brought its process down ("crash", "hang")."""

    task: Any
    returned: Any
    downfall: str
    log: str
    processor_s: float
    wall_s: float


@dataclass
class _Worker:
    process: ForkServerProcess
    connection: Connection
    log: Path
    task: Any = None
    since: float = 0.0
    worked_before_s: float = 0.0
    killed: bool = False
    tasks: int = 0

    @property
    def pid(self) -> int:
        return self.process.pid or 0


def run_tasks(
    function: Callable[[Any], Any],
    tasks: Iterator[Any],
    folder: Path,
    processes: int = 1,
    limits: Limits | None = None,
    preload: tuple[str, ...] = (),
) -> Iterator[Result]:
    """Results in the order in which tasks end; ``preload`` names modules that are loaded once for all processes."""
    limits = limits or Limits()
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, *preload])
    workers: list[_Worker] = []
    names = iter(range(10**9))

    def start() -> _Worker:
        ours, theirs = context.Pipe()
        log = folder / f"log_{next(names)}.txt"
        process = context.Process(target=_serve, args=(theirs, function, log, limits), daemon=True)
        process.start()
        theirs.close()
        ours.recv()  # ready: the time that loading takes counts for no task
        return _Worker(process, ours, log)

    try:
        for task in tasks:
            while len(workers) >= processes and all(worker.task is not None for worker in workers):
                yield from _collect(workers, limits)
            idle = next((worker for worker in workers if worker.task is None), None)
            if idle is None:
                idle = start()
                workers.append(idle)
            idle.task, idle.since, idle.tasks = task, time.monotonic(), idle.tasks + 1
            idle.worked_before_s = processor_seconds(idle.pid)
            idle.connection.send(task)
        while any(worker.task is not None for worker in workers):
            yield from _collect(workers, limits)
    finally:
        for worker in workers:
            _end(worker)


def _collect(workers: list[_Worker], limits: Limits) -> list[Result]:
    """Wait for a result; workers that are down or used up leave the list."""
    busy = [worker for worker in workers if worker.task is not None]
    wait([handle for worker in busy for handle in (worker.connection, worker.process.sentinel)], timeout=0.5)
    results = []
    for worker in busy:
        wall_s = time.monotonic() - worker.since
        processor_s = processor_seconds(worker.pid) - worker.worked_before_s
        try:
            if worker.connection.poll():
                results.append(Result(worker.task, worker.connection.recv(), "", "", processor_s, wall_s))
                worker.task = None
                if worker.tasks >= TASKS_PER_PROCESS:
                    _end(worker)
                    workers.remove(worker)
                continue
        except (EOFError, ConnectionResetError):
            worker.process.join(10)
        if not worker.process.is_alive():
            results.append(_downfall(worker, wall_s))
            workers.remove(worker)
        elif processor_s > limits.processor_s or wall_s > limits.wall_s:
            _stop(worker)
    return results


def _stop(worker: _Worker) -> None:
    """End a worker that works or waits for too long, and all that it started; its log gets the stack."""
    worker.killed = True
    descendants = family(worker.pid)[1:]
    os.kill(worker.pid, signal.SIGPROF)
    worker.process.join(10)
    worker.process.kill()
    worker.process.join(10)
    for pid in descendants:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def family(pid: int) -> list[int]:
    """A process and its descendants."""
    found = [pid]
    for one in found:  # which grows while it is walked
        with contextlib.suppress(OSError):
            for thread in Path(f"/proc/{one}/task").iterdir():
                found += map(int, (thread / "children").read_text().split())
    return found


def processor_seconds(pid: int) -> float:
    """The processor time of a process and its descendants, including those that have ended."""
    ticks = 0
    for one in family(pid):
        with contextlib.suppress(OSError):
            fields = Path(f"/proc/{one}/stat").read_text().rpartition(")")[2].split()
            ticks += sum(map(int, fields[11:15]))  # user and system, its own and its children's
    return ticks / os.sysconf("SC_CLK_TCK")


def _downfall(worker: _Worker, wall_s: float) -> Result:
    log = worker.log.read_text(errors="replace") if worker.log.exists() else ""
    code = worker.process.exitcode or 0
    name = signal.Signals(-code).name if code < 0 else f"exit {code}"
    downfall = "hang" if worker.killed else f"crash: {name}"
    worker.log.unlink(missing_ok=True)
    return Result(worker.task, None, downfall, log.partition("Extension modules")[0][:4000], 0.0, wall_s)


def _end(worker: _Worker) -> None:
    if worker.process.is_alive():
        worker.process.kill()
    worker.process.join(10)
    worker.connection.close()
    worker.log.unlink(missing_ok=True)


def _serve(connection: Connection, function: Callable[[Any], Any], log: Path, limits: Limits) -> None:
    """Take tasks until there are no more; SIGPROF, by which a task is stopped, writes the stack first."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    (held_kb,) = re.findall(r"VmSize:\s+(\d+) kB", Path("/proc/self/status").read_text())
    most = int(held_kb) * 1024 + (limits.memory_mb << 20)
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    with log.open("a") as file:
        os.dup2(file.fileno(), 2)
    faulthandler.enable(sys.__stderr__)
    faulthandler.register(signal.SIGPROF, sys.__stderr__, chain=True)
    connection.send("ready")
    while True:
        try:
            task = connection.recv()
        except EOFError:
            return
        os.ftruncate(2, 0)
        connection.send(function(task))
