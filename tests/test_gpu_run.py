"""The one command for a machine with a GPU: tests on all cores, an end in time, and a later call that goes on."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bench.gpu import run
from bench.gpu.outcomes import Outcome, OutcomeLog, fingerprint
from bench.gpu.points import Case, Point
from bench.gpu.record import Recorder, read_rows
from bench.gpu.shards import collect, interleaved, run_commands, run_tests

ROOT = Path(__file__).resolve().parents[1]
SOON = 120.0


@pytest.fixture
def suite(tmp_path, monkeypatch) -> Path:
    """A folder of tests that pass, fail, are skipped, wait and take their process with them."""
    folder = tmp_path / "suite"
    folder.mkdir()
    (folder / "pytest.ini").write_text("[pytest]\n")
    (folder / "test_one.py").write_text(
        "import os, pathlib, pytest, time\n"
        "def note(name): pathlib.Path('ran.txt').open('a').write(name + '\\n')\n"
        "def test_first(): note('first')\n"
        "def test_fails(): assert 1 == 2, 'one is not two'\n"
        "def test_dies(): note('dies'); os._exit(7)\n"
        "def test_after(): note('after')\n"
    )
    (folder / "test_two.py").write_text(
        "import pytest, time\n"
        "@pytest.mark.skip(reason='has no such device')\n"
        "def test_skipped(): pass\n"
        "@pytest.mark.parametrize('name', ['a; b', 'c'])\n"
        "def test_named(name): pass\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    for name in [name for name in os.environ if name.startswith("PYTEST_XDIST")]:
        monkeypatch.delenv(name)
    return folder


def outcomes(log: OutcomeLog) -> dict[str, str]:
    return {name.split("::")[1]: outcome.outcome for name, outcome in log.ended().items()}


def test_every_test_has_an_outcome_whatever_becomes_of_its_process(suite, tmp_path):
    log = OutcomeLog(tmp_path / "outcomes.jsonl", "these sources")
    ids = interleaved(collect(["."], suite))
    assert [name.split("::")[0] for name in ids[:4]] == ["test_one.py", "test_two.py"] * 2
    assert run_tests(ids, ["."], log, 2, time.time() + SOON, suite) == []
    assert outcomes(log) == {
        "test_first": "passed",
        "test_fails": "failed",
        "test_dies": "crashed",
        "test_after": "passed",
        "test_skipped": "skipped",
        "test_named[a; b]": "passed",
        "test_named[c]": "passed",
    }
    ended = log.ended()
    assert "one is not two" in ended["test_one.py::test_fails"].reason
    assert "status 7" in ended["test_one.py::test_dies"].reason
    assert "has no such device" in ended["test_two.py::test_skipped"].reason


def test_a_later_call_runs_what_has_not_ended_and_no_more(suite, tmp_path):
    log = OutcomeLog(tmp_path / "outcomes.jsonl", "these sources")
    ids = collect(["."], suite)
    assert run_tests(ids, ["."], log, 2, time.time() - 1, suite) == ids
    assert log.ended() == {}
    first = [name for name in ids if name.endswith("test_first")]
    run_tests(first, ["."], log, 1, time.time() + SOON, suite)
    run_tests(first, ["."], log, 1, time.time() + SOON, suite)
    assert (suite / "ran.txt").read_text() == "first\n"
    of_others = OutcomeLog(log.path, "other sources")
    run_tests(first, ["."], of_others, 1, time.time() + SOON, suite)
    assert (suite / "ran.txt").read_text() == "first\n" * 2


def test_no_test_begins_after_the_time_and_those_left_are_named(suite, tmp_path):
    (suite / "test_one.py").write_text(
        "import time\nimport pytest\n"
        "@pytest.mark.parametrize('number', range(60))\ndef test_slow(number): time.sleep(0.5)\n"
    )
    log = OutcomeLog(tmp_path / "outcomes.jsonl", "these sources")
    ids = collect(["test_one.py"], suite)
    began = time.time()
    left = run_tests(ids, ["test_one.py"], log, 1, began + 8, suite)
    assert time.time() - began < 25
    assert 0 < len(left) < len(ids)
    assert left == ids[-len(left) :]


def test_tests_that_cannot_be_collected_fail_with_what_pytest_says(suite, tmp_path):
    ids = collect(["."], suite)
    (suite / "test_two.py").write_text("import no_such_module\n")
    with pytest.raises(RuntimeError, match="no_such_module"):
        collect(["."], suite)
    log = OutcomeLog(tmp_path / "outcomes.jsonl", "these sources")
    of_two = [name for name in ids if name.startswith("test_two")]
    assert run_tests(of_two, ["test_two.py"], log, 1, time.time() + SOON, suite) == []
    assert {outcome.outcome for outcome in log.ended().values()} == {"failed"}
    assert "no_such_module" in log.ended()[of_two[0]].reason


def test_commands_end_in_time_and_are_begun_again_by_a_later_call(tmp_path):
    log = OutcomeLog(tmp_path / "outcomes.jsonl", "these sources")
    python = [sys.executable, "-c"]
    commands = {
        "good": [*python, "pass"],
        "bad": [*python, "print('what went wrong'); raise SystemExit(9)"],
        "told": [*python, "import os; assert os.environ['SPOKEN'] == 'yes'"],
    }
    assert run_commands(commands, log, 2, time.time() - 1, tmp_path) == list(commands)
    assert run_commands(commands, log, 2, time.time() + SOON, tmp_path, {"SPOKEN": "yes"}) == []
    ended = log.ended()
    assert {name: outcome.outcome for name, outcome in ended.items()} == {
        "good": "passed",
        "bad": "failed",
        "told": "passed",
    }
    assert "what went wrong" in ended["bad"].reason


def test_a_line_that_was_cut_short_is_passed_over(tmp_path):
    log = OutcomeLog(tmp_path / "outcomes.jsonl", "these sources")
    log.add(Outcome("one", "begun", 0.0))
    log.add(Outcome("one", "passed", 1.5))
    log.add(Outcome("two", "begun", 0.0))
    with log.path.open("a") as file:
        file.write('{"of": "these sour')
    assert log.latest()["two"].outcome == "begun"
    assert log.ended() == {"one": Outcome("one", "passed", 1.5)}


def test_sources_that_changed_have_another_fingerprint(tmp_path):
    (tmp_path / "maskattn").mkdir()
    (tmp_path / "maskattn" / "a.py").write_text("x = 1\n")
    before = fingerprint(tmp_path)
    assert fingerprint(tmp_path) == before
    (tmp_path / "maskattn" / "a.py").write_text("x = 2\n")
    assert fingerprint(tmp_path) != before


def test_a_fingerprint_may_be_that_of_some_files_and_folders(tmp_path):
    for name in ("one/a.py", "one/b.c", "two/a.py", "two/b.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x = 1\n")
    of = "one", "two/a.py"
    before = fingerprint(tmp_path, of)
    (tmp_path / "two" / "b.py").write_text("x = 2\n")
    assert fingerprint(tmp_path, of) == before
    for name in ("one/b.c", "two/a.py"):
        (tmp_path / name).write_text("x = 3\n")
        assert fingerprint(tmp_path, of) != before
        before = fingerprint(tmp_path, of)


def test_rows_that_were_measured_are_not_measured_again(tmp_path):
    case = Case("attention", "forward", Point(1, 64, 0.5, 2, 32, "fp32"), 0)
    first = Recorder(tmp_path / "rows.csv", "cpu", "these sources")
    first.add(case, "maskattn packed, torch", "ok", p50_ms=2.0, host_us=50.0)
    first.add(case, "xformers", "left out", "time was up")
    second = Recorder(tmp_path / "rows.csv", "cpu", "these sources")
    assert second.has(case, "maskattn packed, torch")
    assert not second.has(case, "xformers")
    assert not Recorder(tmp_path / "rows.csv", "cpu", "other sources").has(case, "maskattn packed, torch")
    assert [(row.contender, row.host_us) for row in read_rows(tmp_path / "rows.csv")] == [
        ("maskattn packed, torch", 50.0)
    ]


def test_steps_are_taken_in_order_and_one_without_time_says_so(tmp_path, monkeypatch):
    taken = []

    def step(name, report):
        def take(call):
            taken.append(name)
            if isinstance(report, Exception):
                raise report
            return report

        return take

    results = {"tests": run.Report(["fine"]), "sanitize": RuntimeError("no such tool"), "bench": run.Report(left=2)}
    monkeypatch.setattr(run, "STEPS", {name: step(name, report) for name, report in results.items()})
    monkeypatch.setattr(run, "_build", lambda: None)
    assert run.main(["--device", "cpu", "--out", str(tmp_path), "bench", "tests"]) == 3
    assert taken == ["tests", "bench"]
    assert run.main(["--device", "cpu", "--out", str(tmp_path)]) == 1
    assert "no such tool" in (tmp_path / "table.txt").read_text()
    assert run.main(["--device", "cpu", "--out", str(tmp_path), "--seconds", "0", "tests"]) == 3
    assert "no time was left" in (tmp_path / "table.txt").read_text()
    with pytest.raises(SystemExit, match="2"):
        run.main(["all", "--out", str(tmp_path)])


@pytest.mark.parametrize("step", ["sanitize", "models"])
def test_the_plumbing_runs_without_a_gpu(step, tmp_path):
    """A step that is cut short goes on in the next call."""
    command = ["bash", str(ROOT / "bench" / "gpu.sh"), step, "--device", "cpu", "--out", str(tmp_path)]
    alone = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    alone["PYTHON"] = sys.executable
    for seconds, status in (("0", 3), ("300", 0)):
        done = subprocess.run([*command, "--seconds", seconds], capture_output=True, text=True, env=alone, timeout=400)
        assert done.returncode == status, done.stdout + done.stderr
    text = (tmp_path / "table.txt").read_text()
    assert "FAILED" not in text
    assert ("ran without it" if step == "sanitize" else "rows ok") in text
