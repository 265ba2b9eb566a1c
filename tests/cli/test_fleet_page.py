"""What docs/fleet.md hands to schedulers: every command parses, and the script of submitit runs."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer
import yaml
from test_devices import asked
from typer.main import get_command

from maskattn.cli.app import app
from maskattn.slide.summary import read_summary

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "fleet.md").read_text(encoding="utf-8")


def block(language: str, word: str) -> str:
    """The page's only block of a language that has a word in it."""
    (found,) = [
        text for text in re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE) if word in text
    ]
    return str(found)


def parse(words: list[str]) -> None:
    """Parse a command line as `maskattn` would, without running it."""
    name, command, *rest = words
    assert name == "maskattn"
    group = get_command(app)
    assert isinstance(group, typer.core.TyperGroup)
    group.commands[command].make_context(command, rest)


def test_every_command_of_the_page_parses() -> None:
    lines = re.findall(r"^(?:exec |\s+)(maskattn (?:infer|extract|status) .*)$", PAGE, re.MULTILINE)
    assert len(lines) >= 8
    for line in lines:
        parse(shlex.split(line.replace("${params.", "{").replace("$", ""), comments=True))


def test_batch_script_is_one_of_bash() -> None:
    script = block("bash", "#SBATCH")
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    assert script.startswith("#!/bin/bash\n")


def test_kubernetes_job_runs_a_command_that_parses() -> None:
    job = yaml.safe_load(block("yaml", "kind: Job"))
    pod = job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    parse(container["args"])
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}


def test_script_of_submitit_shares_the_slides_on_this_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("submitit")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    ours = [*asked(tmp_path, 4), str(tmp_path / "out")]
    script = block("py", "submitit")
    for theirs, here in (
        (
            '["maskattn", "infer", "/data/slides", "--out", "/data/out", "--order", "large-first"]',
            f"{['maskattn', *ours]}",
        ),
        ("range(32)", "range(2)"),
    ):
        assert theirs in script
        script = script.replace(theirs, here)
    exec(compile(script, "fleet.md", "exec"), {"__name__": "script"})
    assert capsys.readouterr().out == "[1, 1]\n"
    rows = read_summary(tmp_path / "out" / "summary.csv")
    statuses = {name: row["status"] for name, row in rows.items()}
    good = {f"s{number:03d}" for number in range(4)}
    # A job that begins only after the other has ended finds its slides finished, and tries the failed one again.
    began_late = statuses["s000"] == "skipped"
    assert statuses == {"broken": "failed"} | dict.fromkeys(good, "skipped" if began_late else "ok")
    assert {path.name for path in (tmp_path / "out").iterdir() if path.is_dir()} >= good
    if began_late:
        assert {rows[name]["reason"] for name in good} == {"finished by an earlier run"}
