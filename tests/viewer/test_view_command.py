"""``maskattn view``: it says where the page is, serves it until it is told to end, and says what is wrong."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
from typer.testing import CliRunner

from maskattn.cli.app import app


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 0), (signal.SIGTERM, 143)])
def test_the_page_is_served_until_the_command_is_told_to_end(out: Path, number: int, code: int) -> None:
    command = [sys.executable, "-m", "maskattn", "view", str(out), "--port", "0", "--no-browser"]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        # A suite that a shell runs in the background is started with Ctrl-C ignored, and so would be its children.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:
        try:
            assert process.stdout is not None
            url = re.search(r"http://127\.0\.0\.1:\d+/", process.stdout.readline())
            assert url is not None
            with urllib.request.urlopen(url[0], timeout=30) as answer:
                assert b"<title>maskattn</title>" in answer.read()
            process.send_signal(number)
            _, errors = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == code, errors
    assert "Traceback" not in errors


def test_a_port_that_is_taken_is_said_to_be(out: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        done = CliRunner().invoke(app, ["view", str(out), "--port", str(port), "--no-browser"])
    assert done.exit_code == 2
    assert f"the viewer needs a free port, got {port}" in done.stderr


def test_a_path_that_shows_nothing_is_said_to(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["view", str(tmp_path / "absent"), "--port", "0", "--no-browser"])
    assert done.exit_code == 2
    assert "absent" in done.stderr
