"""How many processes the machine's memory is enough for: what is free, by the kernel and by the limits of cgroups."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path

__all__ = ["PROCESS_GIB", "devices_that_fit", "free_gib"]

PROCESS_GIB = 0.75
"""What a process takes at least: 0.4 GiB with the demonstration's model and a small slide, and 0.2 GiB for a worker."""

_GIB = 2**30


def free_gib(root: Path = Path("/")) -> float | None:
    """Return the memory that processes of this user may still take, in GiB; None if the system does not tell.

    Args:
        root: where the system's files are.
    """
    found: list[float] = []
    with contextlib.suppress(OSError, ValueError, IndexError):
        lines = (root / "proc/meminfo").read_text().splitlines()
        (kib,) = [line.split()[1] for line in lines if line.startswith("MemAvailable:")]
        found.append(int(kib) * 1024)
    with contextlib.suppress(OSError):
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            number, controllers, path = line.split(":", 2)
            if number == "0" and not controllers:
                found += _left_in(root / "sys/fs/cgroup", path, "memory.max", "memory.current", "inactive_file")
            elif "memory" in controllers.split(","):
                names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
                found += _left_in(root / "sys/fs/cgroup/memory", path, *names)
    return max(0.0, min(found)) / _GIB if found else None


def _left_in(mount: Path, path: str, limit: str, usage: str, cached: str) -> list[float]:
    """Return what is left in a cgroup and in each that contains it; nothing for one without a limit."""
    left = []
    # In a container the path may be that on its host, and only the mount itself is there.
    for folder in [mount / part.lstrip("/") for part in (path, *map(str, Path(path).parents))]:
        with contextlib.suppress(OSError, ValueError):
            most, used = int((folder / limit).read_text()), int((folder / usage).read_text())
            counts = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            left.append(float(most - used + int(counts.get(cached, 0))))
    return left


def devices_that_fit(devices: Sequence[str], process_gib: float, free: float | None) -> list[str]:
    """Return the devices whose processes fit into the free memory, at least one; each device before any has a second.

    Args:
        devices: one for each process.
        process_gib: what a process needs.
        free: the free memory in GiB; None leaves all devices.
    """
    most = len(devices) if free is None else max(1, int(free / process_gib))
    by_turn = sorted(range(len(devices)), key=lambda index: devices[:index].count(devices[index]))
    return [devices[index] for index in sorted(by_turn[:most])]
