"""The versions of the packages that a slide was run with, for the records of runs."""

from __future__ import annotations

import functools
import platform
from importlib import metadata

import maskattn

__all__ = ["installed_versions"]

_VERSIONED = (
    "torch",
    "numpy",
    "openslide-python",
    "openslide-bin",
    "tifffile",
    "imagecodecs",
    "opencv-python-headless",
    "h5py",
)


def installed_versions(*more: str) -> dict[str, str]:
    """Return package → version of the installed packages that every run uses, and of ``more``."""
    versions = {"python": platform.python_version(), "maskattn": maskattn.__version__}
    found = ((name, _version_of(name)) for name in (*_VERSIONED, *more))
    return versions | {name: version for name, version in found if version is not None}


@functools.cache
def _version_of(package: str) -> str | None:
    """Return the version of a package, or None; a run asks for each slide, and a package's metadata take 2 ms."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
