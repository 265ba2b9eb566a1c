"""The weights of an encoder packed for its products while those of all its layers go through a digest.

The digest names the network in a run's request, so that nothing can be encoded before it is known. It takes one core a
fifth of a second for ViT-B/16, and packing, into memory that the system has to clear first, about as long.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from typing import TypeVar

import torch

from maskattn.nn.encoders.tile_encoder import TileEncoder
from maskattn.nn.inference_linear import multiplies_natively

__all__ = ["packed_meanwhile"]

_Result = TypeVar("_Result")


def packed_meanwhile(digest: Callable[[], _Result], encoder: TileEncoder | None, *, masked: bool) -> _Result:
    """Return ``digest()``, and on a CPU pack an encoder's weights meanwhile: within ``packed_weights``, and its dtype.

    Args:
        digest: what is called, in a thread of its own.
        encoder: the encoder; None if nothing is encoded.
        masked: whether some tokens of its tiles will not take part.
    """
    if encoder is None or encoder.vit is None or encoder.device.type != "cpu":
        return digest()
    found: list[_Result] = []

    def find() -> None:
        with contextlib.suppress(Exception):  # who calls meets it below
            found.append(digest())

    thread = threading.Thread(target=find, name="maskattn digest", daemon=True)
    thread.start()
    with contextlib.suppress(Exception):  # the first batch meets it too
        _encode_one_token(encoder, masked)
    thread.join()
    return found[0] if found else digest()


def _encode_one_token(encoder: TileEncoder, masked: bool) -> None:
    """Encode the middle token of a black tile, for which layers are packed as for all others."""
    assert encoder.vit is not None, "only a packed transformer has tokens"
    side = encoder.tile_px // encoder.token_px
    tile_1IXY = torch.zeros(1, 3, encoder.tile_px, encoder.tile_px, dtype=torch.uint8)
    keep_1HW = torch.zeros(1, side, side, dtype=torch.bool)
    keep_1HW[:, side // 2, side // 2] = True
    with torch.inference_mode():
        # Whole tiles may take other products than masked ones, for which these weights would not be.
        if masked or multiplies_natively(torch.zeros(1, encoder.vit.embed_dim)) is not None:
            encoder.encode_tiles(tile_1IXY, keep_1HW)
