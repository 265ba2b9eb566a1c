"""The versions of the packages that a slide was run with, for the records of runs."""

from __future__ import annotations

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
    for name in (*_VERSIONED, *more):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions
