"""The path of a command's picture, checked before any work, and the error if the picture cannot be written."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from maskattn.errors import OutputError

__all__ = ["picture_path", "picture_written"]

_OTHER_PICTURES = frozenset(
    (".bmp", ".eps", ".gif", ".heic", ".jp2", ".jpeg", ".jpg", ".pdf", ".svg", ".tif", ".tiff", ".webp")
)


def picture_path(out: Path | None, name: str, inputs: list[Path]) -> Path:
    """Return the PNG to write: ``out`` if it ends in .png, otherwise ``name`` in the folder ``out``, which is created.

    Args:
        out: the user's choice; None for the current folder.
        name: default name of the picture.
        inputs: files that it must not replace.

    Raises:
        ValueError: ``out`` is a picture of another kind, or one of the inputs.
        OutputError: the folder cannot be created or written.
    """
    from maskattn.slide.output_folder import prepare_output

    out = Path() if out is None else out
    ending = out.suffix.lower()
    if not out.is_dir():
        if ending in _OTHER_PICTURES:
            raise ValueError(f"--out must be a PNG, or a folder for it, got {out}; name it {out.with_suffix('.png')}")
        if ending != ".png" and out.exists():
            raise ValueError(f"--out must be a PNG, or a folder for it, got the file {out}; choose another name")
    path = out if ending == ".png" and not out.is_dir() else out / name
    if any(path.exists() and other.exists() and path.samefile(other) for other in inputs):
        raise ValueError(f"--out must not replace an input, got {path}; choose another name")
    if path.is_dir():
        raise ValueError(f"--out must not make {path} the picture, got a folder of that name; choose another name")
    prepare_output(path.parent)
    return path


@contextlib.contextmanager
def picture_written(path: Path) -> Iterator[None]:
    """Turn an error while a picture is written into one that names it.

    Raises:
        OutputError: the picture cannot be written, for example because the disk is full.
    """
    try:
        yield
    except OSError as error:
        raise OutputError(
            f"the picture must be written completely, got {path}: {error.strerror or error}; free space or choose "
            "another --out"
        ) from error
