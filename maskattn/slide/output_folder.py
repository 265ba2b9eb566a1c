"""The output folder, in which a slide's folder appears complete, under its final name, or not at all.

Outputs are written to ``OUT/.<slide_id>.<token>.partial``, which is renamed at the end; each process has a token of its
own. With ``--overwrite`` the finished folder is moved to ``OUT/.<slide_id>.<token>.old`` while the new one is renamed.
A killed process may leave either; the process that takes the slide over, or the next run, removes them.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from fnmatch import fnmatchcase
from pathlib import Path

from maskattn.errors import OutputError, SlideError
from maskattn.slide.file_checks import is_there
from maskattn.slide.fleet.claims import Claim
from maskattn.slide.names import as_text
from maskattn.slide.prediction import SlidePrediction, read_prediction
from maskattn.slide.sinks import SINKS

__all__ = [
    "are_one_name",
    "clear_leftovers",
    "find_finished",
    "may_be_finished",
    "prepare_output",
    "slide_folder",
    "sweep",
]

# Files that this or an earlier version writes.
_OURS = ("prediction.json", *(name for sink in SINKS for name in sink.files), "heatmap_*", "relevance.geojson")
# Files that macOS' Finder, Windows' Explorer, and NFS (on removal of an open file) leave in any folder.
_LITTER = (".DS_Store", "._*", "Thumbs.db", "desktop.ini", ".nfs*")
_WORKING_NAME = re.compile(r"\.(?P<slide_id>.+)\.(?P<token>[0-9a-f]{12})\.(partial|old)", re.DOTALL)
_PROBE_BYTES = 64 * 1024


def prepare_output(out_dir: Path) -> None:
    """Create the output folder and write a small file to it as a test, before any slide is read.

    Raises:
        OutputError: the folder cannot be created or written to, or its disk is full.
    """
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out_dir, prefix=".probe") as probe:
            probe.write(bytes(_PROBE_BYTES))
            probe.flush()
    except OSError as error:
        raise OutputError(
            f"the output folder must be writable and have free space, got {as_text(out_dir)}: "
            f"{error.strerror or error}; choose another --out or free space"
        ) from error


def may_be_finished(out_dir: Path, overwrite: bool) -> bool:
    """Return whether all slides may be finished, so that nothing need be made ready for them: a run wrote a summary."""
    return not overwrite and (out_dir / "summary.csv").exists()


def clear_leftovers(out_dir: Path, slide_id: str, tokens: Iterable[str] = ()) -> None:
    """Remove a slide's leftovers of killed processes; a finished folder that was moved aside is moved back.

    Args:
        out_dir: the output folder.
        slide_id: the slide, which no process is running.
        tokens: the tokens of the processes; leftovers of earlier versions, without a token, are removed too.
    """
    final = out_dir / slide_id
    for token in ("", *tokens):
        partial, old = _working_names(out_dir, slide_id, token)
        _remove(partial)
        if os.path.lexists(old):
            if final.exists():
                _remove(old)
            else:
                old.rename(final)


def sweep(out_dir: Path) -> None:
    """Remove the leftovers of killed processes for all slides; no process may be running any of them."""
    for name in os.listdir(out_dir):
        if found := _WORKING_NAME.fullmatch(name):
            with contextlib.suppress(OSError):  # if the slide is run, its outcome reports the error
                clear_leftovers(out_dir, found["slide_id"], [found["token"]])


def find_finished(out_dir: Path, slide_id: str) -> SlidePrediction | None:
    """Return the prediction of an earlier run; None if there is none, or it is incomplete.

    Raises:
        SlideError: the slide's path is not a folder, is unreadable, or contains files that this package did not write.
    """
    final = out_dir / slide_id
    if not os.path.lexists(final):
        return None
    if not final.is_dir():
        raise SlideError(
            f"a slide's output must be a folder, got {_kind(final)} {as_text(final)}; move it away or choose another "
            "--out"
        )
    try:
        foreign = sorted(name for name in os.listdir(final) if not _is_ours(name))
        if not foreign:
            return read_prediction(final / "prediction.json")
    except (FileNotFoundError, ValueError):
        return None
    except OSError as error:
        raise SlideError(
            f"a slide's output folder must be readable, got {as_text(final)}: {error.strerror or error}; "
            "move it away or choose another --out"
        ) from error
    raise SlideError(
        f"a slide's output folder must contain only maskattn's files, got {as_text(foreign[0])!r} in {as_text(final)}; "
        "move it away or choose another --out"
    )


def are_one_name(out_dir: Path, one: str, other: str) -> bool:
    """Return whether two ids are the same file name in the output folder, for example if its names ignore case."""
    try:
        with tempfile.TemporaryDirectory(dir=out_dir, prefix=".probe") as folder:
            (Path(folder) / one).mkdir()
            return is_there(Path(folder) / other)
    except OSError:
        return False  # the folder is not writable: running the slides reports it


@contextlib.contextmanager
def slide_folder(out_dir: Path, slide_id: str, claim: Claim | None = None) -> Iterator[Path]:
    """Create a folder for a slide's outputs; it gets its final name when the context ends, or is removed on any error.

    Args:
        out_dir: the output folder.
        slide_id: the slide's id.
        claim: this process's claim on the slide, if several processes share the folder.

    Raises:
        ClaimLostError: another process took the slide over in the meantime.
    """
    final = out_dir / slide_id
    partial, old = _working_names(out_dir, slide_id, secrets.token_hex(6) if claim is None else claim.token)
    clear_leftovers(out_dir, slide_id, () if claim is None else claim.ended)
    partial.mkdir(parents=True)
    try:
        yield partial
        if claim is not None:
            claim.check()
        if final.exists():
            final.rename(old)
        partial.rename(final)
    except BaseException:
        with contextlib.suppress(OSError):
            _remove(partial)
        if old.exists() and not final.exists():
            old.rename(final)
        raise
    with contextlib.suppress(OSError):
        _remove(old)


def _working_names(out_dir: Path, slide_id: str, token: str) -> tuple[Path, Path]:
    stem = f".{slide_id}.{token}" if token else f".{slide_id}"
    return out_dir / f"{stem}.partial", out_dir / f"{stem}.old"


def _is_ours(name: str) -> bool:
    return any(fnmatchcase(name, litter) for litter in _LITTER) or any(
        fnmatchcase(name.lstrip("."), ours + "*") for ours in _OURS
    )


def _kind(path: Path) -> str:
    return "the broken link" if path.is_symlink() and not path.exists() else "the file"


def _remove(path: Path) -> None:
    """Remove a file, or a folder with its contents; a link is removed, and its target kept."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
