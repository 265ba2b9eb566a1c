"""Networks of transformers; unpacked ones map normalised images (B, 3, X, Y) to (B, C)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from maskattn.nn.encoders.entry import IMAGENET, triple_of
from maskattn.nn.encoders.tile_encoder import EncoderCard

__all__ = ["build_transformers", "card_of_transformers"]


class _Pooled(nn.Module):
    """A network wrapped so that its forward returns pooled features.

    Args:
        network: the library's network.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        """Compute the features of images, (B, 3, X, Y) → (B, C)."""
        output = self.network(images)
        if isinstance(output, Tensor):
            return output
        pooled: Tensor | None = getattr(output, "pooler_output", None)
        return output.last_hidden_state[:, 0] if pooled is None else pooled


def build_transformers(source: str, trust_code: bool, arguments: dict[str, Any]) -> nn.Module:
    """Build a network of transformers, from the hub or a folder; of a CLIP, the image tower with its projection.

    A network that is code in its repository is wrapped to return pooled features; TITAN's repository gives CONCH v1.5.
    """
    import transformers

    from maskattn.nn.adapters.clip import CLIP_FAMILIES

    config = transformers.AutoConfig.from_pretrained(source, trust_remote_code=trust_code)
    if config.model_type in CLIP_FAMILIES:
        tower: nn.Module = transformers.CLIPVisionModelWithProjection.from_pretrained(source, **arguments)
        return tower.eval()
    network: Any = transformers.AutoModel.from_pretrained(source, trust_remote_code=trust_code, **arguments).eval()
    if hasattr(network, "return_conch"):
        return _Pooled(network.return_conch()[0].eval())
    if type(network).__module__.startswith("transformers_modules"):
        return _Pooled(network)
    built: nn.Module = network
    return built


def card_of_transformers(network: Any, source: str, name: str) -> EncoderCard:
    """Return the card of a network of transformers, with the pixel statistics of its processor, else ImageNet's."""
    config = getattr(network, "config", None)
    processor = _processor_of(source)
    keys = ("image_mean", "image_std")
    mean, std = (triple_of(processor.get(key) or own) for key, own in zip(keys, IMAGENET, strict=True))
    tile_px = _side(processor.get("crop_size")) or _side(processor.get("size"))
    tile_px = tile_px or int(getattr(config, "image_size", 224))
    return EncoderCard(name, "token", mean, std, tile_px, tile_px)


def _processor_of(source: str) -> dict[str, Any]:
    path = Path(source) / "preprocessor_config.json"
    if not Path(source).is_dir():
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError

        try:
            path = Path(hf_hub_download(source, "preprocessor_config.json"))
        except EntryNotFoundError:
            return {}
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _side(size: Any) -> int | None:
    if isinstance(size, dict):
        size = size.get("height", size.get("shortest_edge"))
    return int(size) if size else None
