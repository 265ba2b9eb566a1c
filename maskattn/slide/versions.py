"""The versions of what a slide was run with, for the records of runs."""

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
    """Package → version, of those that are installed; ``more`` are named beside those that every run uses."""
    versions = {"python": platform.python_version(), "maskattn": maskattn.__version__}
    for name in (*_VERSIONED, *more):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions
