"""What runs on the nodes: an actor that keeps the process of one device, and the check of a node.

The actor's own process stays small, and its messages are bytes that it does not look into. The process of the device is
the one of ``--devices``, so that it ends in the same way: on request it gives its slide back, and if the actor is
killed, it ends at once.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import socket
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from maskattn.cli.ray_engine.placement import Place

__all__ = ["DeviceActor", "look_around"]

_PACE_S, _MOST_AT_ONCE = 0.5, 1000


class DeviceActor:
    """The actor of one device; its process loads the model, runs slides and reports.

    Args:
        work: the pickled :class:`maskattn.cli.device_member.Work`.
        place: the device, and which of its node's processes this is.
        folder: the command's working folder, to which relative paths refer.
    """

    def __init__(self, work: bytes, place: Place, folder: str) -> None:
        from maskattn.cli.device_member import run_member
        from maskattn.cli.devices import shares_of_cores

        with contextlib.suppress(OSError):  # then paths are absolute, which look_around made sure of
            os.chdir(folder)
        self._reports, theirs = multiprocessing.Pipe()
        cores = shares_of_cores(place.of)[place.number] if place.of > 1 else ()
        self._process = multiprocessing.get_context("spawn").Process(
            target=run_member, args=(theirs, place.device, cores), name=place.device
        )
        self._process.start()
        theirs.close()
        with contextlib.suppress(OSError):  # it ended immediately, which its exit code reports
            self._reports.send_bytes(work)

    def process(self) -> tuple[str, int]:
        """Return the host's name and the id of the process that runs the slides."""
        return socket.gethostname(), self._process.pid or 0

    def reports(self) -> tuple[list[bytes], int | None]:
        """Return the reports of the next moment, and the exit code if the process has ended.

        The process waits with further reports until the command asks for them.
        """
        deadline = time.monotonic() + _PACE_S
        found: list[bytes] = []
        while len(found) < _MOST_AT_ONCE and self._reports.poll(max(0.0, deadline - time.monotonic())):
            try:
                found.append(self._reports.recv_bytes())
            except (EOFError, OSError):
                self._process.join()
                return found, self._process.exitcode or 0
        return found, None

    def end(self, within_s: float) -> None:
        """End the process, which gives its slide back."""
        self._process.terminate()
        # A process that waits for its reports to be taken could not unwind.
        deadline = time.monotonic() + within_s
        with contextlib.suppress(EOFError, OSError):
            while self._reports.poll(max(0.0, deadline - time.monotonic())):
                self._reports.recv_bytes()
        self._process.join(max(0.0, deadline - time.monotonic()))
        self._process.kill()
        self._process.join()


def look_around(paths: Sequence[str], mark: str, ask_gpus: bool) -> tuple[str, list[str], float | None]:
    """Look at the node on which this runs.

    Args:
        paths: files and folders that a process will read.
        mark: a file that the command has just written to the output folder.
        ask_gpus: whether to find out the memory of the GPUs.

    Returns:
        The version of this package, the paths that are not there, and the memory of the smallest GPU in GiB, None if it
        is not known.
    """
    from maskattn import __version__

    missing = [path for path in paths if not Path(path).exists()]
    if not Path(mark).exists():
        missing.insert(0, str(Path(mark).parent))
    return __version__, missing, _smallest_gpu_gib() if ask_gpus else None


def _smallest_gpu_gib() -> float | None:
    # torch would see the GPUs only if Ray had assigned them to this task.
    command = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    try:
        told = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
        return min(float(line) for line in told.splitlines()) / 1024
    except (OSError, ValueError, subprocess.SubprocessError):
        return None
