"""The processes on a cluster as the command keeps them: started, listened to, and started again when they are lost."""

from __future__ import annotations

import contextlib
import os
import pickle
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic

from maskattn.cli.device_member import Work
from maskattn.cli.member_reports import (
    MOST_STARTS,
    UNWOUND_AFTER_S,
    MemberState,
    Reports,
    how_it_ended,
    settings_of_member,
)
from maskattn.cli.ray_engine.actor import DeviceActor
from maskattn.cli.ray_engine.cluster import living_nodes, on_node, usable_nodes
from maskattn.cli.ray_engine.placement import Place, places_on
from maskattn.cli.reporting import tell
from maskattn.slide.each_slide import OutcomeT
from maskattn.slide.fleet.fleet import FOLDER
from maskattn.slide.fleet.members import forget_process

__all__ = ["Crew", "how_it_was_lost"]

_LOOK_EVERY_S, _WAITS_LONG_AFTER_S, _LATE_AFTER_S = 3.0, 30.0, 5.0
_MOST_FOLDERS = 100


@dataclass
class _Member(MemberState[OutcomeT]):
    """An actor, and the process that it keeps.

    Attributes:
        place: where it is.
        actor: Ray's handle of the actor; None between a loss and the next start.
        process: the host's name and the process id, once Ray has placed the actor.
        began: it has begun with its slides.
        loss: how it ended, if it was lost.
    """

    place: Place = field(kw_only=True)
    actor: Any = None
    process: tuple[str, int] | None = None
    began: bool = False
    loss: str = ""


class Crew(Generic[OutcomeT]):
    """All members on a cluster.

    Args:
        work: the work that each member loads and runs.
        cpu_processes, gpu_memory_gib: as for :func:`maskattn.cli.ray_engine.placement.places_on`.

    Attributes:
        members: those that were started.
        problems: a line for each node that was left out.
    """

    def __init__(self, work: Work[OutcomeT], cpu_processes: int | None, gpu_memory_gib: float | None) -> None:
        self._work = work
        self._cpu_processes, self._gpu_memory_gib = cpu_processes, gpu_memory_gib
        self._known: set[str] = set()
        self._stored: dict[Any, Any] = {}
        self._running: dict[Any, _Member[OutcomeT]] = {}
        self._lost: list[_Member[OutcomeT]] = []
        self.members: list[_Member[OutcomeT]] = []
        self.problems: list[str] = []

    def new_places(self) -> list[Place]:
        """Return the places on the nodes that have joined since the last call."""
        nodes = living_nodes()
        new = [node for node in nodes if node.node_id not in self._known]
        self._known |= {node.node_id for node in new}
        if self._cpu_processes is None and any(node.gpus for node in nodes):
            new = [node for node in new if node.gpus]
        if not new:
            return []
        ask_gpus = self._gpu_memory_gib is not None
        usable = usable_nodes(new, self._work.out_dir, self._paths(), ask_gpus, self.problems.append)
        return places_on(usable, self._cpu_processes, self._gpu_memory_gib)

    def run(self, places: Sequence[Place], reports: Reports[OutcomeT]) -> None:
        """Start a member at each place, and process their reports until all have ended."""
        import ray

        limit = self._work.settings.limit
        self._add(places if limit is None else places[:limit])
        begun = looked_at = time.monotonic()
        done_at: float | None = None
        while self._running or self._lost:
            for problem in self.problems:
                reports.tell(problem)
            if self._running:
                ready, _ = ray.wait(list(self._running), timeout=1.0)
                for promise in ready:
                    self._take(promise, self._running.pop(promise), reports)
            else:
                time.sleep(_LOOK_EVERY_S / 2)
            now = time.monotonic()
            if any(member.done for member in self.members):
                # A member is done only when all slides have ended, or its share of the limit has.
                self._lost.clear()
                done_at = done_at or now
                if limit is None and now - done_at > _LATE_AFTER_S:
                    self._end([member for member in self._running.values() if not member.began])
            elif now - looked_at > _LOOK_EVERY_S:
                looked_at = now
                self._start_again(reports)
                self._add(self.new_places() if limit is None else [])
            if now - begun > _WAITS_LONG_AFTER_S and any(one.process is None for one in self._running.values()):
                reports.tell("some devices of the cluster are not free; their processes start when Ray gives them away")

    @contextlib.contextmanager
    def ended_together(self) -> Iterator[None]:
        """End the members together with this process, whatever ends it; each of them releases its slide."""
        try:
            yield
        finally:
            self._end([member for member in self.members if member.actor is not None])

    def _add(self, places: Sequence[Place]) -> None:
        settings, count = self._work.settings, len(places)
        for place in places:
            number = len(self.members)
            work = self._work.under(settings_of_member(settings, number, count))
            member: _Member[OutcomeT] = _Member(number, str(place), work, place=place)
            self.members.append(member)
            self._start(member)

    def _start(self, member: _Member[OutcomeT]) -> None:
        """Start an actor, which Ray places when the node can take it."""
        import ray

        place = member.place
        create = ray.remote(DeviceActor).options(
            num_cpus=place.num_cpus, num_gpus=place.num_gpus, max_restarts=0, scheduling_strategy=on_node(place.node)
        )
        member.process, member.began = None, False
        member.actor = create.remote(self._stored_work(member.work_of_next_start()), place, os.getcwd())
        self._running[member.actor.process.remote()] = member

    def _stored_work(self, work: Work[OutcomeT]) -> Any:
        """Return the pickled work as an object of the store, which members with the same settings share."""
        import ray

        if work.settings not in self._stored:
            self._stored[work.settings] = ray.put(pickle.dumps(work))
        return self._stored[work.settings]

    def _take(self, promise: Any, member: _Member[OutcomeT], reports: Reports[OutcomeT]) -> None:
        """Process what an actor has told, and ask it for more."""
        import ray

        try:
            told = ray.get(promise)
        except ray.exceptions.RayError as error:
            if member.process is not None:  # its slide is free now, not after --claim-timeout
                forget_process(self._work.out_dir / FOLDER / "members", *member.process)
            self._lose(member, how_it_was_lost(error), reports)
            return
        if member.process is None:
            member.process = told
        else:
            packed, code = told
            for one in packed:
                kind, *what = pickle.loads(one)
                member.began |= kind == "started"
                reports.take(member, kind, *what)
            if code is not None:
                self._lose(member, how_it_ended(code), reports)
                return
        self._running[member.actor.reports.remote()] = member

    def _lose(self, member: _Member[OutcomeT], how: str, reports: Reports[OutcomeT]) -> None:
        """A process has ended: at the end of its slides, by an error, or because it was killed."""
        import ray

        ray.kill(member.actor)  # also gives its device free
        member.actor = None
        if member.done or member.error is not None:
            return
        if any(other.done for other in self.members):
            return
        member.loss = how
        if member.starts < MOST_STARTS:
            self._lost.append(member)
        else:
            tell(f"the process of {member.device} {how}")

    def _start_again(self, reports: Reports[OutcomeT]) -> None:
        """Start lost members again, except on nodes that have ended with them."""
        if not self._lost:
            return
        alive = {node.node_id for node in living_nodes()}
        lost, self._lost = self._lost, []
        for member in lost:
            if member.place.node.node_id in alive:
                tell(f"the process of {member.device} {member.loss}; it is being restarted")
                self._start(member)
            else:
                reports.tell(f"node {member.place.node.name} has ended; the other nodes take its slides over")

    def _end(self, members: Sequence[_Member[OutcomeT]]) -> None:
        """End processes, each of which releases its slide."""
        import ray

        placed = [member for member in members if member.process is not None]
        ends = [member.actor.end.remote(UNWOUND_AFTER_S) for member in placed]
        if ends:
            ray.wait(ends, num_returns=len(ends), timeout=UNWOUND_AFTER_S + 1)
        for member in members:
            ray.kill(member.actor)
        self._running = {promise: one for promise, one in self._running.items() if one not in members}

    def _paths(self) -> list[str]:
        """Return what this machine has of the slides' folders and the command's files, which each node must see."""
        folders = list(dict.fromkeys(job.path.parent for job in self._work.jobs))[:_MOST_FOLDERS]
        asked = vars(self._work.settings).items()
        files = [value for name, value in asked if isinstance(value, Path) and name != "cache_dir"]  # of each machine
        return [os.path.abspath(path) for path in (*folders, *files) if path.exists()]


def how_it_was_lost(error: Exception) -> str:
    """Return in words why Ray lost an actor."""
    text = " ".join(str(error).split())
    if "memory" in text.lower() and ("OOM" in text or "memory pressure" in text or "running low" in text):
        return "was killed for lack of memory on its node"
    return f"was lost ({type(error).__name__})"
