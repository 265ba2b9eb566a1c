"""A command's process ends at once, but with its code, after all that was registered for its end."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

# Python's own end would destroy this object, which then prints; the command's end leaves it alone.
TAKEN_APART = "import builtins\nclass Last:\n    def __del__(self): print('taken apart')\nbuiltins.last = Last()\n"
START = "import sys\nsys.argv = ['maskattn', *sys.argv[1:]]\nfrom maskattn.cli import entry_point, main\n"


def end_of(code: str, *arguments: str) -> tuple[int, list[str], str]:
    """The exit code of a fresh interpreter, the last lines that it prints, and what it says of errors."""
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=120)
    return done.returncode, done.stdout.splitlines()[-3:], done.stderr


@pytest.mark.parametrize(
    ("arguments", "code"),
    [(("--help",), 0), (("info", "/no/such/slide.svs"), 1), (("info", "--no-such-option"), 2)],
    ids=["ok", "failed", "usage"],
)
def test_a_command_ends_with_its_code_and_is_not_taken_apart(arguments: tuple[str, ...], code: int) -> None:
    assert end_of(START + "main()", *arguments)[0] == code
    usual = end_of(TAKEN_APART + START + "main()", *arguments)
    short = end_of(TAKEN_APART + START + "entry_point()", *arguments)
    assert (usual[0], usual[1][-1]) == (code, "taken apart")
    assert short[0] == code
    assert "taken apart" not in short[1]
    assert short[2] == usual[2]


def test_what_is_registered_for_the_end_is_called_and_streams_are_flushed() -> None:
    later = (
        "import atexit, threading, time, ctypes\n"
        "real = sys.stdout\n"
        "def command():\n"
        "    atexit.register(real.write, 'registered\\n')\n"
        "    threading.Thread(target=lambda: (time.sleep(0.2), real.write('thread\\n'))).start()\n"
        "    ctypes.CDLL(None).puts(b'library')\n"
        "    raise SystemExit(3)\n"
        "from maskattn.cli.ending import short_end\n"
        "with short_end():\n"
        "    command()\n"
    )
    code, lines, _ = end_of(TAKEN_APART + START + later)
    assert (code, sorted(lines)) == (3, ["library", "registered", "thread"])


def test_a_process_that_something_waits_for_ends_as_usual() -> None:
    for before in (
        "import atexit\natexit.register(print, 'before')\n",
        "import sys\nsys.setprofile(lambda *_: None)\n",
        "import sys\nsys.settrace(lambda *_: None)\n",
    ):
        code, lines, _ = end_of(before + TAKEN_APART + START + "entry_point()", "--help")
        assert code == 0
        assert "taken apart" in lines
    assert (
        "before" in end_of("import atexit\natexit.register(print, 'before')\n" + START + "entry_point()", "--help")[1]
    )


def test_an_error_and_an_interrupt_end_as_usual() -> None:
    from_within = "from maskattn.cli.ending import short_end\nwith short_end():\n    raise "
    code, lines, error = end_of(TAKEN_APART + from_within + "KeyError('lost')")
    assert (code, lines) == (1, ["taken apart"])
    assert "KeyError: 'lost'" in error
    code, lines, error = end_of(TAKEN_APART + from_within + "SystemExit('in words')")
    assert (code, lines, error) == (1, ["taken apart"], "in words\n")
    code, lines, _ = end_of(TAKEN_APART + from_within + "KeyboardInterrupt")
    assert (code, lines) == (-2, ["taken apart"])


def test_the_installed_command_and_the_module_end_that_way(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(TAKEN_APART)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])}
    installed = Path(sys.executable).parent / "maskattn"
    usual = subprocess.run([sys.executable, "-c", "pass"], capture_output=True, text=True, env=environment, timeout=120)
    assert "taken apart" in usual.stdout
    for command in ([sys.executable, "-m", "maskattn"], *([[str(installed)]] if installed.exists() else [])):
        done = subprocess.run([*command, "--help"], capture_output=True, text=True, env=environment, timeout=120)
        assert done.returncode == 0
        assert "Usage: maskattn" in done.stdout
        assert "taken apart" not in done.stdout
