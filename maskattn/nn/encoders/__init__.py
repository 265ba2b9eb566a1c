"""Encoders of tiles by name: the table of pathology's, and how they, timm's, the hub's and one's own are loaded.

The table imports no torch; what loads is imported where it is asked for.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from maskattn.nn.encoders.loading import load_encoder, load_entry
    from maskattn.nn.encoders.tile_encoder import EncoderCard, TileEncoder

__all__ = ["EncoderCard", "TileEncoder", "load_encoder", "load_entry"]

_HOME = {
    "EncoderCard": "tile_encoder",
    "TileEncoder": "tile_encoder",
    "load_encoder": "loading",
    "load_entry": "loading",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
