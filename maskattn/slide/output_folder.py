"""The folder of outputs: a slide's own folder appears whole, under its final name, or not at all.

Work goes on in ``OUT/.<slide_id>.partial``, which is renamed at the end. With ``--overwrite`` the finished folder steps
aside as ``OUT/.<slide_id>.old`` for the moment of the renaming. A killed run may leave either; the next one clears up.
"""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path

from maskattn.errors import OutputError, SlideError
from maskattn.slide.prediction import SlidePrediction, read_prediction

__all__ = ["clear_leftovers", "find_finished", "prepare_output", "slide_folder"]

_OURS = ("prediction.json", "features.h5", "relevance.h5", "attention.png", "heatmap_*", "relevance.geojson")
_PROBE_BYTES = 64 * 1024


def prepare_output(out_dir: Path) -> None:
    """Create the output folder and try it with a small file, before any slide is read.

    Raises:
        OutputError: the folder cannot be made or written, or its disk is full.
    """
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out_dir, prefix=".probe") as probe:
            probe.write(bytes(_PROBE_BYTES))
            probe.flush()
    except OSError as error:
        raise OutputError(
            f"the output folder must be writable with room to spare, got {out_dir}: {error.strerror or error}; "
            "choose another --out or free space"
        ) from error


def clear_leftovers(out_dir: Path, slide_id: str) -> None:
    """Remove what a killed run left of a slide; a finished folder that had stepped aside comes back."""
    final, partial, old = _names(out_dir, slide_id)
    if partial.exists():
        shutil.rmtree(partial)
    if old.exists():
        if final.exists():
            shutil.rmtree(old)
        else:
            old.rename(final)


def find_finished(out_dir: Path, slide_id: str) -> SlidePrediction | None:
    """The prediction of an earlier run, or None where there is none that is complete.

    Raises:
        SlideError: something that this package did not write stands in the slide's place.
    """
    final = out_dir / slide_id
    if not final.exists():
        return None
    if not final.is_dir():
        raise SlideError(
            f"a slide's output must be a folder, got the file {final}; move it away or choose another --out"
        )
    strange = sorted(
        entry.name
        for entry in final.iterdir()
        if not any(fnmatchcase(entry.name.lstrip("."), name + "*") for name in _OURS)
    )
    if strange:
        raise SlideError(
            f"a slide's output folder must hold maskattn's files only, got {strange[0]!r} in {final}; "
            "move it away or choose another --out"
        )
    try:
        return read_prediction(final / "prediction.json")
    except (FileNotFoundError, ValueError):
        return None


@contextlib.contextmanager
def slide_folder(out_dir: Path, slide_id: str) -> Iterator[Path]:
    """A folder to write a slide's outputs to; it takes its final name at the end, or is removed on any error."""
    final, partial, old = _names(out_dir, slide_id)
    clear_leftovers(out_dir, slide_id)
    partial.mkdir()
    try:
        yield partial
        if final.exists():
            final.rename(old)
        partial.rename(final)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        if old.exists() and not final.exists():
            old.rename(final)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _names(out_dir: Path, slide_id: str) -> tuple[Path, Path, Path]:
    return out_dir / slide_id, out_dir / f".{slide_id}.partial", out_dir / f".{slide_id}.old"
