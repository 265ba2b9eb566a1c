"""Encoders of tiles by name: the table of pathology's, and how they, timm's, the hub's and one's own are loaded.

The table imports no torch; what loads is imported where it is asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from maskattn.first_use import imported_on_first_use

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

__getattr__, __dir__ = imported_on_first_use(__name__, _HOME)
