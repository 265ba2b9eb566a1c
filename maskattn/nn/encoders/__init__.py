"""Tile encoders by name: a table of pathology encoders, and loading of these, of timm's, the hub's and local files.

The table does not import torch; the functions that load encoders are imported on first use.
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
