"""Which processes a cluster is to have: one for each device of its nodes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["Node", "Place", "places_on", "processes_of_cpu"]


@dataclass(frozen=True)
class Node:
    """A node of the cluster.

    Attributes:
        node_id: Ray's id of it.
        name: its name in messages.
        cpus: the cores that Ray may give away.
        gpus: the GPUs that Ray may give away.
        gpu_memory_gib: the memory of its smallest GPU; None if it was not asked for or is not known.
    """

    node_id: str
    name: str
    cpus: float
    gpus: int
    gpu_memory_gib: float | None = None


@dataclass(frozen=True)
class Place:
    """The place of one process.

    Attributes:
        node: the node.
        number: of the process among those of its node, from 0.
        of: the number of processes of the node.
        device: "cuda" (the GPU that Ray assigns) or "cpu".
        num_cpus, num_gpus: what Ray reserves for it.
    """

    node: Node
    number: int
    of: int
    device: str
    num_cpus: float
    num_gpus: float

    def __str__(self) -> str:
        kind = {"cuda": "GPU", "cpu": "CPU"}[self.device]
        return f"{kind} of {self.node.name}" + (f" (process {self.number + 1} of {self.of})" if self.of > 1 else "")


def processes_of_cpu(devices: str | None) -> int | None:
    """Return the number of processes on each node's CPU, or None if the GPUs are to be used.

    Args:
        devices: the value of --devices: None or "all" for all GPUs, "cpu" or "cpu:N" for the CPU of each node.

    Raises:
        ValueError: it is none of these.
    """
    kind, _, number = (devices or "all").strip().partition(":")
    if kind == "all" and not number:
        return None
    if kind == "cpu" and (number or "1").isdecimal() and int(number or "1"):
        return int(number or "1")
    raise ValueError(
        f"--devices with --engine ray takes all, cpu, or cpu:N for N processes on the CPU of each node, got "
        f"{devices!r}; Ray itself assigns the GPUs"
    )


def places_on(nodes: Sequence[Node], cpu_processes: int | None, gpu_memory_gib: float | None) -> list[Place]:
    """Return the places of all processes, those of a node one after another.

    Args:
        nodes: the nodes of the cluster.
        cpu_processes: the number of processes on the CPU of each node; None is one process for each GPU, or one for
            each CPU if the cluster has no GPU.
        gpu_memory_gib: the memory that a process needs. A GPU is shared by as many processes as fit, and a node whose
            smallest GPU has less is left out; None is one process for each GPU.
    """
    on_gpus = cpu_processes is None and any(node.gpus for node in nodes)
    found = []
    for node in nodes:
        if on_gpus:
            on_each = _that_fit(node, gpu_memory_gib)
            found += _of_node(node, node.gpus * on_each, "cuda", 1 / max(1, on_each))
        elif node.cpus:
            found += _of_node(node, cpu_processes or 1, "cpu", 0.0)
    return found


def _that_fit(node: Node, gpu_memory_gib: float | None) -> int:
    """Return the number of processes that share each GPU of a node."""
    if gpu_memory_gib is None:
        return 1
    return int((node.gpu_memory_gib or 0.0) / gpu_memory_gib)


def _of_node(node: Node, count: int, device: str, num_gpus: float) -> list[Place]:
    # Rounded down as Ray counts, to 1/10,000, so that the last one still fits.
    share = node.cpus / max(1, count)
    num_cpus = float(int(share)) if share >= 1 else int(share * 1e4) / 1e4
    return [Place(node, number, count, device, num_cpus, int(num_gpus * 1e4) / 1e4) for number in range(count)]
