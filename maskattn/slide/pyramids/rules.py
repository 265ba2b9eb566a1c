"""What a run that asks for pyramids needs, checked before any slide is read."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING

from maskattn.errors import ManifestError

if TYPE_CHECKING:
    from maskattn.slide.request import RunSettings

__all__ = ["check_pyramids"]


def check_pyramids(settings: RunSettings) -> None:
    """Refuse OME-Zarr where zarr is not installed.

    Raises:
        ManifestError: a package is missing that the outputs need.
    """
    if settings.zarr and importlib.util.find_spec("zarr") is None:
        raise ManifestError(
            "--zarr needs the package zarr, got none; pip install 'maskattn[zarr]', or leave --zarr out"
        )
