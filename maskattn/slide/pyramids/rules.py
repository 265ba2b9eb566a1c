"""Check the requirements of pyramids before any slide is read."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING

from maskattn.errors import ManifestError

if TYPE_CHECKING:
    from maskattn.slide.request import RunSettings

__all__ = ["check_pyramids"]


def check_pyramids(settings: RunSettings) -> None:
    """Check that zarr is installed if OME-Zarr is requested.

    Raises:
        ManifestError: zarr is missing.
    """
    if settings.zarr and importlib.util.find_spec("zarr") is None:
        raise ManifestError(
            "--zarr needs the package zarr, got none; pip install 'maskattn[zarr]', or leave --zarr out"
        )
