"""Processes share an output folder: each slide is run by exactly one, whatever happens to the others."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from fleet_runs import run_quickly

from maskattn.errors import ManifestError, SlideError
from maskattn.slide.fleet.claims import Claim, ClaimLostError, Claims, owner_of
from maskattn.slide.fleet.ended import EndedSlide, EndedSlides
from maskattn.slide.fleet.members import Member, Watch, read_member
from maskattn.slide.fleet.process import Process
from maskattn.slide.fleet.sharing import Sharing, chosen_jobs
from maskattn.slide.manifest import SlideJob
from maskattn.slide.summary import read_summary


@contextmanager
def member(root: Path, timeout_s: float = 300.0) -> Iterator[tuple[Member, Claims]]:
    with Member(root / "members", timeout_s, {}) as one:
        yield one, Claims(root / "claims", one.token, Watch(root / "members", timeout_s))


def ended_process() -> Process:
    """A process of this machine that has ended."""
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    return replace(Process.current(), pid=child.pid)


def silent_member(root: Path, process: Process) -> Claims:
    """The claims of a member that shows no sign of life."""
    one = Member(root / "members", 300.0, {})
    one.process = process
    one.tell()
    return Claims(root / "claims", one.token, Watch(root / "members", 300.0))


def claimed(claims: Claims, name: str) -> Claim:
    claim = claims.try_claim(name)
    assert claim is not None
    return claim


def test_slide_is_claimed_by_one_and_free_again_when_released(tmp_path: Path) -> None:
    with member(tmp_path) as (_, ours), member(tmp_path) as (_, theirs):
        claim = claimed(ours, "a.1")
        assert theirs.try_claim("a.1") is None
        assert theirs.claimed() == {"a.1"}
        assert claimed(theirs, "a").number == 1
        claim.check()
        claim.release()
        assert claimed(theirs, "a.1").ended == ()


def test_many_threads_claim_each_slide_once(tmp_path: Path) -> None:
    names = [f"s{number}" for number in range(200)]

    def claim_all(_: int) -> list[str]:
        with member(tmp_path) as (_, claims):
            found = [name for name in random.sample(names, len(names)) if claims.try_claim(name) is not None]
            time.sleep(0.5)  # a member that has left holds nothing
            return found

    with ThreadPoolExecutor(8) as pool:
        found = [name for one in pool.map(claim_all, range(8)) for name in one]
    assert sorted(found) == sorted(names)


def test_slide_of_a_process_that_ended_is_taken_over_at_once_and_by_one(tmp_path: Path) -> None:
    dead = silent_member(tmp_path, ended_process())
    lost = claimed(dead, "a")
    with member(tmp_path) as (_, first), member(tmp_path) as (_, second):
        claim = claimed(first, "a")
        assert (claim.number, claim.ended) == (2, (lost.token,))
        assert second.try_claim("a") is None
        with pytest.raises(ClaimLostError, match=r"took over.*--claim-timeout"):
            lost.check()
        claim.release()
        assert not list((tmp_path / "claims").iterdir())


@pytest.mark.parametrize("elsewhere", ["boot", "namespace"])
def test_process_of_another_machine_is_waited_for_until_the_timeout(tmp_path: Path, elsewhere: str) -> None:
    claimed(silent_member(tmp_path, replace(ended_process(), **{elsewhere: "another"})), "a")
    with member(tmp_path, timeout_s=0.3) as (_, ours):
        assert ours.try_claim("a") is None
        time.sleep(0.1)
        assert ours.try_claim("a") is None
        time.sleep(0.3)
        assert claimed(ours, "a").number == 2


def test_clock_that_is_set_back_or_forward_makes_no_process_count_as_ended(tmp_path: Path) -> None:
    with member(tmp_path, timeout_s=0.5) as (owner, theirs), member(tmp_path, timeout_s=0.5) as (_, ours):
        claimed(theirs, "a")
        for hours in (-48, 48, 0):
            os.utime(tmp_path / "members" / f"{owner.token}.json", (time.time() + 3600 * hours,) * 2)
            assert ours.try_claim("a") is None
        time.sleep(1.0)  # it keeps showing signs of life
        assert ours.try_claim("a") is None


def test_owner_that_died_before_it_wrote_its_name_is_taken_over_after_the_timeout(tmp_path: Path) -> None:
    (tmp_path / "claims").mkdir()
    (tmp_path / "claims" / "a.1").touch()
    with member(tmp_path, timeout_s=0.2) as (_, ours):
        assert ours.try_claim("a") is None
        time.sleep(0.3)
        assert claimed(ours, "a").ended == ()


def test_release_leaves_what_another_has_claimed_since(tmp_path: Path) -> None:
    claim = claimed(silent_member(tmp_path, ended_process()), "a")
    with member(tmp_path) as (_, ours):
        mine = claimed(ours, "a")
        claim.release()  # it was only suspended
        mine.check()
        with member(tmp_path) as (_, third):
            assert third.try_claim("a") is None


def test_failure_mark_of_another_request_does_not_count(tmp_path: Path) -> None:
    EndedSlides(tmp_path, "tokens").mark(EndedSlide("a.b", "failed", 'it said "no"', "process 1 on x", "f" * 12))
    assert EndedSlides(tmp_path, "no tokens").names() == set()
    ended = EndedSlides(tmp_path, "tokens")
    assert ended.names() == {"a.b"}
    assert ended.find("a.b") == EndedSlide("a.b", "failed", 'it said "no"', "process 1 on x", "f" * 12)
    ended.forget_failed(lambda token: token == "f" * 12)
    assert ended.names() == {"a.b"}
    ended.forget_failed(lambda token: False)
    assert ended.names() == set()


def jobs(count: int) -> list[SlideJob]:
    return [SlideJob(f"s{number:03d}", Path("none.svs")) for number in range(count)]


def test_shards_are_all_slides_once() -> None:
    shares = [chosen_jobs(jobs(10), Sharing(shard=f"{share}/3")) for share in (1, 2, 3)]
    assert sorted(job.slide_id for share in shares for job in share) == [job.slide_id for job in jobs(10)]
    assert [len(share) for share in shares] == [4, 3, 3]


@pytest.mark.parametrize("shard", ["0/3", "4/3", "1", "1/0", "a/b", "-1/3", "1/3/5"])
def test_invalid_share_is_refused(shard: str) -> None:
    with pytest.raises(ManifestError, match=r"--shard takes I/N.*got .*1/4, 2/4"):
        chosen_jobs(jobs(3), Sharing(shard=shard))


def test_largest_slides_come_first(tmp_path: Path) -> None:
    sizes = {"small.svs": 10, "large.svs": 1000, "mirax.mrxs": 5}
    for name, size in sizes.items():
        (tmp_path / name).write_bytes(bytes(size))
    (tmp_path / "mirax").mkdir()
    (tmp_path / "mirax" / "Data0000.dat").write_bytes(bytes(500))
    found = chosen_jobs([SlideJob(name, tmp_path / name) for name in sizes], Sharing(order="large-first"))
    assert [job.slide_id for job in found] == ["large.svs", "mirax.mrxs", "small.svs"]


def test_limit_leaves_the_rest_and_nothing_else(tmp_path: Path) -> None:
    outcomes = run_quickly(tmp_path, jobs(5), Sharing(limit=2))
    assert [outcome.slide_id for outcome in outcomes] == ["s000", "s001"]
    again = run_quickly(tmp_path, jobs(5), Sharing(limit=2))
    assert [outcome.status for outcome in again] == ["skipped", "skipped", "ok", "ok"]
    assert {path.name for path in tmp_path.iterdir()} == {"s000", "s001", "s002", "s003", "summary.csv"}


def test_slide_that_failed_in_one_process_is_not_tried_by_the_next_unless_asked(tmp_path: Path) -> None:
    broken = [SlideJob("broken", Path("none.svs")), *jobs(2)]
    tried: list[str] = []

    def run(job: SlideJob) -> None:
        tried.append(job.slide_id)
        if job.slide_id == "broken":
            raise SlideError("it is broken")
        if len(tried) == 2:  # while this process is at work
            (elsewhere, *_) = run_quickly(tmp_path, broken, Sharing(limit=1))
            assert (elsewhere.status, elsewhere.reason.partition(" (")[0]) == ("failed", "it is broken")
            again = run_quickly(tmp_path, broken[:1], Sharing(retry_failed=True), run)
            assert again[0].reason == "it is broken"

    run_quickly(tmp_path, broken, Sharing(), run)
    assert tried.count("broken") == 2
    run_quickly(tmp_path, broken, Sharing(), run)
    assert tried.count("broken") == 3  # a new run tries again


def test_slide_that_kills_its_processes_fails_in_the_end_and_the_others_are_done(tmp_path: Path) -> None:
    for number in range(1, 6):
        claims = silent_member(tmp_path / ".fleet", ended_process())
        assert claimed(claims, "s001").number == number
    failed = [outcome for outcome in run_quickly(tmp_path, jobs(3), Sharing()) if outcome.status != "ok"]
    assert [outcome.slide_id for outcome in failed] == ["s001"]
    assert "got 5 that were killed while running it" in failed[0].reason
    assert not (tmp_path / ".fleet").exists()


def test_work_of_an_owner_that_was_only_suspended_is_discarded(tmp_path: Path) -> None:
    seen: list[str] = []

    def run(job: SlideJob) -> None:
        if not seen and job.slide_id == "s000":
            seen.append(job.slide_id)
            (claim,) = (tmp_path / ".fleet" / "claims").iterdir()
            # Another process took this one for ended, ran the slide and published it.
            claim.with_name("s000.2").write_text(json.dumps({"token": "0" * 12, "at": ""}))

    first, second = run_quickly(tmp_path, jobs(2), Sharing(claim_timeout_s=1), run)
    assert (first.status, second.status) == ("ok", "ok")  # after the timeout, since the other one was no one
    assert len(read_summary(tmp_path / "summary.csv")) == 2
    assert {path.name for path in tmp_path.iterdir()} == {"s000", "s001", "summary.csv"}


def test_rows_and_leftovers_of_killed_processes_are_collected(tmp_path: Path) -> None:
    dead = silent_member(tmp_path / ".fleet", ended_process())
    token = claimed(dead, "gone").token
    (tmp_path / f".gone.{token}.partial").mkdir()
    (tmp_path / ".fleet" / "rows").mkdir()
    (tmp_path / ".fleet" / "rows" / f"{token}.csv").write_text("slide_id,status,reason,seconds\nearlier,ok,,1\n")
    run_quickly(tmp_path, jobs(1), Sharing())
    assert set(read_summary(tmp_path / "summary.csv")) == {"earlier", "s000"}
    assert {path.name for path in tmp_path.iterdir()} == {"s000", "summary.csv"}


def at_work(out: Path) -> set[int]:
    """The processes that hold a slide."""
    pids = set()
    for path in (out / ".fleet" / "claims").glob("*"):
        about = read_member(out / ".fleet" / "members", owner_of(path))
        if about is not None:
            pids.add(about["process"]["pid"])
    return pids


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_processes_that_are_killed_at_their_slides_lose_none_and_run_none_twice(tmp_path: Path, how: int) -> None:
    out, hold, script = tmp_path / "out", tmp_path / "hold", Path(__file__).with_name("fleet_runs.py")
    chance, count = random.Random(0), 60
    hold.touch()

    def start() -> subprocess.Popen[bytes]:
        command = [sys.executable, str(script), str(out), str(count), str(hold)]
        return subprocess.Popen(command, stderr=subprocess.DEVNULL)

    running = [start() for _ in range(3)]
    for _ in range(6):
        number = chance.randrange(len(running))
        while running[number].pid not in at_work(out):
            time.sleep(0.01)
        running[number].send_signal(how)
        running[number].wait()
        running[number] = start()
    hold.unlink()
    for one in running:
        assert one.wait(timeout=60) == 0
    run_quickly(out, jobs(count), Sharing())  # whoever was last may have been killed
    rows = read_summary(out / "summary.csv")
    assert sorted(rows) == [job.slide_id for job in jobs(count)]
    assert {row["status"] for row in rows.values()} <= {"ok", "skipped"}
    assert {path.name for path in out.iterdir()} == {*rows, "summary.csv"}
    published = [(out / name / "prediction.json").read_text() for name in rows]
    assert published == [f"{name} whole" for name in rows]
