"""Several runs that fill one folder of outputs at the same time."""

from __future__ import annotations

import csv
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from small_slides import small_model

from maskattn.slide.fleet.claims import Claims
from maskattn.slide.fleet.members import Member, Watch
from maskattn.slide.fleet.rows import MemberRows
from maskattn.slide.manifest import SlideJob
from maskattn.slide.pipeline import RunSettings
from maskattn.slide.run import run_slides
from maskattn.slide.summary import read_summary


def test_no_run_loses_the_rows_of_another(tmp_path: Path) -> None:
    model, settings = small_model(), RunSettings(out_dir=tmp_path / "out")
    names = [[f"run{run}_{slide}" for slide in range(25)] for run in range(4)]

    def run(own: list[str]) -> None:
        jobs = [SlideJob(slide_id=name, path=Path(f"{name}.svs"), problem="there is no such file") for name in own]
        assert all(outcome.status == "failed" for outcome in run_slides(jobs, model, settings))

    with ThreadPoolExecutor(len(names)) as pool:
        list(pool.map(run, names))
    rows = read_summary(settings.out_dir / "summary.csv")
    assert sorted(rows) == sorted(name for own in names for name in own)
    assert {row["reason"] for row in rows.values()} == {"there is no such file"}


def test_table_is_complete_whenever_another_program_reads_it(tmp_path: Path) -> None:
    model, settings = small_model(), RunSettings(out_dir=tmp_path)
    jobs = [SlideJob(f"s{slide}", Path("gone.svs"), problem='it said "no", twice') for slide in range(400)]
    seen: list[int] = []

    def look(running: Future[object]) -> None:
        while not running.done():
            if (tmp_path / "summary.csv").exists():
                with (tmp_path / "summary.csv").open(newline="") as file:
                    header, *table = csv.reader(file)
                assert all(len(fields) == len(header) for fields in table)
                assert all(fields[2] == 'it said "no", twice' for fields in table)
                seen.append(len(table))

    with ThreadPoolExecutor(1) as pool:
        for _ in range(2):
            look(pool.submit(run_slides, jobs, model, settings))
    assert len(set(seen)) > 3
    assert len(read_summary(tmp_path / "summary.csv")) == len(jobs)


def test_table_that_one_run_rewrites_keeps_the_rows_of_the_others(tmp_path: Path) -> None:
    path, fleet = tmp_path / "summary.csv", tmp_path / ".fleet"

    def run(number: int) -> None:
        with Member(fleet / "members", 300.0, {}) as member:
            claims = Claims(fleet, member.token, Watch(fleet / "members", 300.0))
            rows = MemberRows(path, fleet / "rows", member.token, claims)
            for slide in range(60):
                scores = {f"score_{number}_{slide // 20}": "1"}
                rows.add({"slide_id": f"{number}_{slide}", "status": "ok", "reason": "", "seconds": "0", **scores})
                if slide % 25 == 24:
                    rows.finish()
            rows.finish()

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(run, range(4)))
    rows = read_summary(path)
    assert {
        name: [key for key, value in row.items() if key[:6] == "score_" and value] for name, row in rows.items()
    } == {f"{number}_{slide}": [f"score_{number}_{slide // 20}"] for number in range(4) for slide in range(60)}
    assert not list((fleet / "rows").iterdir())
