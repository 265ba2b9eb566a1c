"""An entry of the table of encoders: where the weights are, how the network is built, and how it is fed.

Nothing here imports torch, so that the table can be listed at once.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

__all__ = ["IMAGENET", "EncoderEntry", "Library", "Pooling", "Triple", "triple_of"]

Library = Literal["timm", "transformers", "clip", "open_clip", "conch"]
Pooling = Literal["token", "avg", "token_avg", "map", "own"]
Triple = tuple[float, float, float]

IMAGENET: tuple[Triple, Triple] = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
"""Mean and standard deviation of its pixels, per channel."""


def triple_of(values: Iterable[float]) -> Triple:
    """A number for each of the three channels, as configurations list them."""
    red, green, blue = values
    return float(red), float(green), float(blue)


@dataclass(frozen=True)
class EncoderEntry:
    """One encoder of tiles.

    Attributes:
        name: the name that users give.
        title: the authors' name for it.
        library: what builds its network: "timm"; "transformers", or "clip" for a CLIP of transformers; "open_clip" or
            "conch", packages of these names.
        hub_id: its repository on Hugging Face's hub; empty where it has none.
        embed_dim: width of its features.
        pooling: "token" (class token), "avg" (mean of the patches), "token_avg" (both, side by side; registers left
            out), "map" (attention pooling) or "own" (what the library's module does).
        pixel_mean, pixel_std: per channel, of pixels scaled to [0, 1].
        tile_px: side of the images that the encoder takes.
        patch_px: side of the square that is cut from the slide, at ``spacing_um``, and resized to ``tile_px``.
        crop_px: side of such an image's centre that the network sees, where it does not see all of it.
        spacing_um: µm per pixel of the square that is cut; None where its authors name none.
        licence: of the weights.
        gated: whether the hub wants an agreement first.
        source: where these facts were read.
        architecture: timm's name of the network, for weights that come as a file; empty where only the hub says it.
        arguments: of ``timm.create_model``, where they differ from the architecture's; layers by name.
        file: name of the weights in the hub's repository, where they are not a model that timm knows how to load.
        weights_at: where a file of the weights can be had, for encoders that no hub has.
        remote_code: whether its network is code that the hub's repository brings.
        why_not: why its network does not become a packed vision transformer; empty where it does.
    """

    name: str
    title: str
    library: Library
    hub_id: str
    embed_dim: int
    pooling: Pooling
    pixel_mean: Triple
    pixel_std: Triple
    tile_px: int
    patch_px: int
    spacing_um: float | None
    licence: str
    source: str
    gated: bool = False
    crop_px: int | None = None
    architecture: str = ""
    arguments: Mapping[str, Any] = field(default_factory=dict)
    file: str = ""
    weights_at: str = ""
    remote_code: bool = False
    why_not: str = ""
