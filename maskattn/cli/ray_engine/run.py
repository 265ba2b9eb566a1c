"""``--engine ray`` from its start to its outcomes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from maskattn.cli.device_member import Work
from maskattn.cli.member_reports import Reports, outcomes_of
from maskattn.cli.progress import ProgressBars
from maskattn.cli.ray_engine.cluster import connected
from maskattn.cli.ray_engine.crew import Crew
from maskattn.cli.ray_engine.placement import processes_of_cpu
from maskattn.slide.each_slide import OutcomeT

__all__ = ["RayOptions", "run_on_ray"]

_MOST_BARS = 16
_REMEDY = "give a smaller --batch-size, or fewer processes with --devices or --gpu-memory-gib"


@dataclass(frozen=True)
class RayOptions:
    """Where and how a command runs on Ray.

    Attributes:
        address: as for :func:`maskattn.cli.ray_engine.cluster.connected`.
        devices: as for :func:`maskattn.cli.ray_engine.placement.processes_of_cpu`.
        gpu_memory_gib: as for :func:`maskattn.cli.ray_engine.placement.places_on`.
    """

    address: str | None = None
    devices: str | None = None
    gpu_memory_gib: float | None = None


def run_on_ray(options: RayOptions, work: Work[OutcomeT], lines_of: Callable[[OutcomeT], list[str]]) -> list[OutcomeT]:
    """Run slides in a process on each device of a cluster.

    Args:
        options: the cluster and its devices.
        work: the work that each process loads and runs.
        lines_of: returns the lines that report a slide's outcome.

    Returns:
        The outcome of each slide that was reached.

    Raises:
        ModuleNotFoundError: Ray is not installed.
        ValueError: the cluster cannot be reached, or none of its nodes can run the slides.
        Exception: no process could do its work; this is the error of the first that failed.
        SlideError: all processes were killed repeatedly.
    """
    cpu_processes = processes_of_cpu(options.devices)
    with connected(options.address):
        crew = Crew(work, cpu_processes, options.gpu_memory_gib)
        places = crew.new_places()
        if not places:
            raise ValueError(_no_places(crew.problems, options.gpu_memory_gib))
        with ProgressBars(len(work.jobs), lines_of, min(len(places), _MOST_BARS)) as bars:
            reports = Reports(bars)
            with crew.ended_together():
                crew.run(places, reports)
            return outcomes_of(crew.members, reports, [job.slide_id for job in work.jobs], _REMEDY)


def _no_places(problems: Sequence[str], gpu_memory_gib: float | None) -> str:
    if problems:
        return f"no node of the cluster can run the slides: {'; '.join(problems)}"
    if gpu_memory_gib is not None:
        return (
            f"--gpu-memory-gib must not exceed the memory of the cluster's GPUs, got {gpu_memory_gib:g} and no GPU "
            "that nvidia-smi reports to have as much; give less"
        )
    return (
        "a cluster must have nodes with GPUs or cores, got none; start Ray on them with `ray start --address=HOST:PORT`"
    )
