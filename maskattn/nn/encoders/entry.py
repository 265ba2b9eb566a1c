"""An entry of the table of encoders: the source of its weights, its architecture, and the input that it expects.

Nothing here imports torch, so that the table can be listed without delay.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

__all__ = ["CLIP", "IMAGENET", "EncoderEntry", "Library", "Pooling", "Triple", "triple_of"]

Library = Literal["timm", "transformers", "clip", "open_clip", "conch"]
Pooling = Literal["token", "avg", "token_avg", "map", "coca", "own"]
Triple = tuple[float, float, float]

IMAGENET: tuple[Triple, Triple] = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
"""The mean and the standard deviation of ImageNet's pixels, per channel, of pixels scaled to [0, 1]."""
CLIP: tuple[Triple, Triple] = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
"""The same for OpenAI's CLIP and what was trained as it was."""


def triple_of(values: Iterable[float]) -> Triple:
    """Convert a configuration's list of three numbers, one for each channel, to a tuple of floats."""
    red, green, blue = values
    return float(red), float(green), float(blue)


@dataclass(frozen=True)
class EncoderEntry:
    """One tile encoder.

    Attributes:
        name: the name that users type.
        title: the authors' name for the encoder.
        library: the package that builds the network: "timm"; "transformers", or "clip" for a CLIP of transformers;
            or the one whose files are read here without it: "open_clip" or "conch".
        hub_id: the encoder's repository on Hugging Face's hub; empty if it has none.
        embed_dim: the width of the features.
        pooling: "token" (class token), "avg" (mean of the patches), "token_avg" (both, concatenated; registers left
            out), "map" or "coca" (attention pooling of the patches, or of the class token too) or "own" (the library's
            module pools).
        pixel_mean, pixel_std: the statistics per channel, of pixels scaled to [0, 1].
        tile_px: the side of the encoder's input image, in px.
        patch_px: the side of the square that is cut from the slide, in px at ``spacing_um``, then resized to
            ``tile_px``.
        crop_px: the side of the centre crop that the network sees, in px; None if it sees the entire image.
        spacing_um: the pixel size of the square that is cut, in µm; None if the authors name none.
        licence: the licence of the weights.
        gated: whether the hub requires an agreement first.
        source: the sources of these facts.
        architecture: timm's name of the network, for weights in a file; empty if only the hub's configuration has it.
        arguments: the arguments of ``timm.create_model`` that differ from the architecture's; layers by name.
        file: the file of weights in the hub's repository, if it has no configuration that says which.
        weights_at: the address of a file of the weights, for encoders that are on no hub.
        remote_code: whether the network is code in the hub's repository.
        why_not: the reason why the network cannot become a packed vision transformer; empty if it can.
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
