"""What a process asks of the drive does not grow with the number of the other processes."""

from __future__ import annotations

import time
from collections import Counter
from pathlib import Path

import pytest
from fleet_runs import numbered

from maskattn.slide.fleet.claims import Claims
from maskattn.slide.fleet.ended import EndedSlide, EndedSlides
from maskattn.slide.fleet.fleet import Fleet
from maskattn.slide.fleet.members import Member, Watch
from maskattn.slide.fleet.rows import MemberRows
from maskattn.slide.fleet.sharing import Sharing

SLIDES = 200


def fleet_of(out: Path) -> tuple[Member, Fleet]:
    member = Member(out / ".fleet" / "members", 300.0, {})
    return member, Fleet(out / ".fleet", out / "summary.csv", member, Sharing(), "quick")


def others_at_work(out: Path, count: int) -> None:
    """Members that live as long as this process does, and hold a slide each."""
    for job in numbered(count):
        one = Member(out / ".fleet" / "members", 300.0, {})
        one.tell()
        claims = Claims(out / ".fleet" / "claims", one.token, Watch(out / ".fleet" / "members", 300.0))
        assert claims.try_claim(job.slide_id) is not None


class Enough(Exception):  # noqa: N818 -- ends a wait that would last
    pass


def test_process_that_waits_watches_few_slides_and_waits_longer_the_more_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    others_at_work(tmp_path, SLIDES)
    tried: list[str] = []
    waited: list[float] = []
    claim = Claims.try_claim

    def wait(seconds: float) -> None:
        waited.append(seconds)
        if len(waited) == 12:
            raise Enough

    monkeypatch.setattr(time, "sleep", wait)
    monkeypatch.setattr(Claims, "try_claim", lambda self, name: tried.append(name) or claim(self, name))
    member, fleet = fleet_of(tmp_path)
    member.tell()
    with pytest.raises(Enough):
        next(fleet.turns(numbered(SLIDES)))
    assert Counter(tried).keys() == set(tried[:32])  # the same at each look
    assert len(tried) == 32 * len(waited)
    assert max(waited) == 5.0
    for _ in range(400):
        Member(tmp_path / ".fleet" / "members", 300.0, {}).tell()  # and hold nothing
    waited.clear()
    with pytest.raises(Enough):
        next(fleet.turns(numbered(SLIDES)))
    assert max(waited) == pytest.approx(401 / 8)


def test_processes_that_wait_watch_all_slides_together(tmp_path: Path) -> None:
    left = dict(enumerate(numbered(SLIDES)))
    watched = [set(fleet_of(tmp_path)[1]._watched(left)) for _ in range(60)]
    assert {len(one) for one in watched} == {32}
    assert set.union(*watched) == set(left)


def test_search_for_another_process_ends_with_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    others_at_work(tmp_path, SLIDES)
    asked: list[str] = []
    has_ended = Watch.has_ended
    monkeypatch.setattr(Watch, "has_ended", lambda self, token: asked.append(token) or has_ended(self, token))
    _, fleet = fleet_of(tmp_path)
    assert fleet.any_other()
    assert len(asked) == 1


def test_late_process_reads_the_marks_of_failed_slides_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ended = EndedSlides(tmp_path, "quick")
    for job in numbered(SLIDES):
        ended.mark(EndedSlide(job.slide_id, "ok", "", "process 1 on x", "f" * 12))
    ended.mark(EndedSlide("broken", "failed", "why", "process 1 on x", "f" * 12))
    read: list[str] = []
    find = EndedSlides.find
    monkeypatch.setattr(EndedSlides, "find", lambda self, slide: read.append(slide) or find(self, slide))
    ended.forget_failed(lambda _: False)
    assert read == ["broken"]
    assert ended.names() == {job.slide_id for job in numbered(SLIDES)}


def test_process_with_nothing_to_add_leaves_the_table_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    member, _ = fleet_of(tmp_path)
    claims = Claims(tmp_path / ".fleet", member.token, Watch(tmp_path / ".fleet" / "members", 300.0))
    monkeypatch.setattr(Claims, "try_claim", lambda *_: pytest.fail("it must not compete for the table"))
    MemberRows(tmp_path / "summary.csv", tmp_path / ".fleet" / "rows", member.token, claims).finish()
