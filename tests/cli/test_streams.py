"""The command line in processes of its own, with outputs that are full, closed, gone or narrow."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from small_slides import write_slide

from maskattn.cli.streams import printable


@pytest.fixture(scope="module")
def slide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_slide(tmp_path_factory.mktemp("slides") / "disc.tiff")


def shell(line: str, cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    """A line of bash, in which $maskattn is the command line; the exit code of a pipe is its first command's."""
    return subprocess.run(
        ["bash", "-c", f"{line}; exit ${{PIPESTATUS[0]}}"],
        check=False,
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**os.environ, "maskattn": f"{sys.executable} -m maskattn", **environment},
    )


FULL = "maskattn: standard output must be writable, got 'No space left on device'; send it elsewhere\n"
COMMANDS = ["info {slide}", "info {slide} --json", "tissue {slide} --out {out}", "--help", "tissue --help"]


@pytest.mark.parametrize("command", COMMANDS)
def test_a_full_output_is_one_line_and_exit_code_2(slide: Path, tmp_path: Path, command: str) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    done = shell(f"$maskattn {command.format(slide=slide, out=tmp_path)} > /dev/full")
    assert (done.returncode, done.stderr) == (2, FULL)


@pytest.mark.parametrize("command", ["info {slide}", "--help"])
def test_a_reader_that_has_gone_ends_a_command_quietly(slide: Path, command: str) -> None:
    # The reader is gone for certain before the command writes, for it waits for no input.
    done = shell(f"(sleep 0.3; $maskattn {command.format(slide=slide)}; echo $? >&2) | true")
    assert done.stderr == "141\n"


def test_a_closed_output_is_said_and_harms_no_file(slide: Path, tmp_path: Path) -> None:
    done = shell(f"$maskattn tissue {slide} --out {tmp_path} >&- <&-")
    assert done.returncode == 2
    assert done.stderr == FULL.replace("No space left on device", "Bad file descriptor")
    assert (tmp_path / "disc_tissue.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("errors", ["2>&-", "2>/dev/full"])
def test_errors_that_cannot_be_shown_leave_output_and_exit_code_alone(slide: Path, errors: str) -> None:
    assert shell(f"$maskattn info gone.tif {errors}").returncode == 1
    done = shell(f"$maskattn info {slide} {errors}")
    assert (done.returncode, done.stderr) == (0, "")
    assert "560 × 420 px" in done.stdout


def test_a_terminal_of_ascii_is_written_in_ascii(slide: Path, tmp_path: Path) -> None:
    copy = tmp_path / "Gefäß 肝.tiff"
    copy.write_bytes(slide.read_bytes())
    done = shell(f"$maskattn info '{copy}'", PYTHONIOENCODING="ascii")
    assert done.returncode == 0, done.stderr
    assert "560 x 420 px" in done.stdout
    assert "1 um per level-0 pixel" in done.stdout
    assert "Gef\\xe4\\xdf \\u809d.tiff" in done.stdout
    facts = json.loads(shell(f"$maskattn info '{copy}' --json", PYTHONIOENCODING="ascii").stdout)
    assert (facts["path"], facts["size"]) == (str(copy), "560 × 420 px")
    failed = shell(f"$maskattn info '{copy}.gone'", PYTHONIOENCODING="ascii")
    assert failed.returncode == 1
    assert "Gef\\xe4\\xdf" in failed.stderr
    assert shell("$maskattn infer --help", PYTHONIOENCODING="ascii").stdout.isascii()


def test_names_that_are_no_text_and_names_with_controls_are_shown_escaped(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "maskattn", "info", tmp_path / os.fsdecode(b"a\xff\x1b[31mb\r.tif")],
        check=False,
        capture_output=True,
    )
    assert done.returncode == 1
    assert b"a\\xff\\x1b[31mb .tif" in done.stderr
    assert b"\x1b" not in done.stderr
    assert printable("two\nlines\x07") == "two\nlines\\x07"


def test_info_and_tissue_need_no_torch_nor_what_draws_maps(slide: Path, tmp_path: Path) -> None:
    for command in ("'info', {!r}", "'tissue', {!r}, '--out', " + repr(str(tmp_path))):
        code = (
            "import sys\n"
            "for name in ('torch', 'h5py', 'matplotlib', 'triton'):\n    sys.modules[name] = None\n"
            f"sys.argv = ['maskattn', {command.format(str(slide))}]\n"
            "from maskattn.cli import main\nmain()"
        )
        done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, ""), done.stderr
        assert done.stdout


def test_the_package_is_the_command_line(slide: Path) -> None:
    done = shell(f"$maskattn info {slide}")
    assert done.returncode == 0
    assert done.stdout.startswith(f"path: {slide}\n")
    assert "Usage: maskattn " in shell("$maskattn --help").stdout


def test_no_warning_of_a_library_is_shown_on_a_machine_that_runs_for_the_first_time(
    slide: Path, tmp_path: Path
) -> None:
    for command in (f"info {slide}", f"tissue {slide} --out {tmp_path}", "doctor"):
        done = shell(f"$maskattn {command}", HOME=str(tmp_path / "home"), PYTHONWARNINGS="default")
        assert (done.returncode, done.stderr) == (0, "")


def test_default_outputs_in_a_folder_that_cannot_be_written_exit_with_2(slide: Path) -> None:
    if not Path("/proc/self").exists():
        pytest.skip("needs a folder that not even root can write to")
    done = shell(f"$maskattn tissue {slide}", cwd=Path("/proc"))
    assert done.returncode == 2
    assert done.stderr.startswith("maskattn: the output folder must be writable")
    assert len(done.stderr.splitlines()) == 1
