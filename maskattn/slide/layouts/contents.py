"""List a file's contents, by which layouts recognise their files, and turn reading errors into :class:`SlideError`."""

from __future__ import annotations

import contextlib
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from maskattn.errors import SlideError
from maskattn.slide.names import as_text

__all__ = ["FileContents", "look_into", "opened_h5", "reading"]

_H5_SUFFIXES = (".h5", ".hdf5")
_SUFFIXES = (*_H5_SUFFIXES, ".pt", ".npz")


@dataclass(frozen=True)
class FileContents:
    """The structure of a file.

    Attributes:
        path: the file.
        kind: "h5", "pt" or "npz".
        names: names of its datasets and groups, or of its arrays; empty for a ``.pt`` file, which is not opened.
        groups: the subset of ``names`` that are groups.
        coords_columns: the number of columns of ``coords``; 0 if it has none.
        coords_attributes: names of the attributes of ``coords``.
    """

    path: Path
    kind: str
    names: frozenset[str] = frozenset()
    groups: frozenset[str] = frozenset()
    coords_columns: int = 0
    coords_attributes: frozenset[str] = frozenset()


def look_into(path: Path) -> FileContents:
    """List the contents of a file.

    Raises:
        SlideError: the file is missing, is of another kind, or cannot be read.
    """
    if not path.is_file():
        raise SlideError(
            f"a file of features or coordinates must exist, got no file {as_text(path)}; check the folder, or "
            "extract the slide first"
        )
    suffix = path.suffix.lower()
    if suffix == ".pt":
        return FileContents(path, "pt")
    if suffix == ".npz":
        with reading(path), zipfile.ZipFile(path) as archive:
            return FileContents(path, "npz", frozenset(name.removesuffix(".npy") for name in archive.namelist()))
    if suffix not in _H5_SUFFIXES:
        raise SlideError(
            f"a file of features or coordinates must end in {', '.join(_SUFFIXES)}, got {as_text(path)}; name one that "
            "TRIDENT, CLAM, STAMP, slide2vec or AtlasPatch wrote"
        )
    with opened_h5(path) as file:
        import h5py

        coords = file.get("coords")
        coords = coords if isinstance(coords, h5py.Dataset) else None
        return FileContents(
            path,
            "h5",
            frozenset(file),
            frozenset(name for name in file if isinstance(file[name], h5py.Group)),
            0 if coords is None or coords.ndim < 2 else coords.shape[-1],
            frozenset(() if coords is None else coords.attrs),
        )


@contextlib.contextmanager
def opened_h5(path: Path) -> Iterator[Any]:
    """Open an HDF5 file for reading.

    Raises:
        SlideError: the file cannot be read, whether on opening or later within the context.
    """
    import h5py

    with reading(path), h5py.File(path, "r") as file:
        yield file


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Raise a library's error about a file as a :class:`SlideError`.

    Raises:
        SlideError: the file cannot be read.
    """
    try:
        yield
    except SlideError:
        raise
    except (OSError, RuntimeError, LookupError, TypeError, ValueError, EOFError, zipfile.BadZipFile) as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise SlideError(
            f"a file of features or coordinates must be complete and readable, got {as_text(path)}: {reason}; copy it "
            "again, or extract the slide again"
        ) from error
