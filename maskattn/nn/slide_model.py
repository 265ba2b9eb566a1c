"""The slide model, tile encoder → slide encoder → head, with its configuration and its files.

The tile encoder is a vision transformer over the pixels of a tile and reads only its tissue tokens. The slide encoder
is a vision transformer over the tiles' embeddings at their grid positions and reads only tiles with tissue; its head
gives the slide's logits. (A hierarchy as in HIPT; masking at every level as in Grisi et al., arXiv 2404.18152.)

Dimension key: B tiles, h·w tokens of a tile, T kept tiles, H·W grid cells of a slide, C channels, K classes.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from maskattn.nn.blocks import PackedTokens
from maskattn.nn.encoders.pixels import tokens_of_tiles
from maskattn.nn.fitting import joined, misfits
from maskattn.nn.vit import VisionTransformer
from maskattn.packing import Packing
from maskattn.shapes import Bool, Float, UInt8

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["SlideModel", "SlideModelConfig"]

_SUFFIX = ".safetensors"


@dataclass(frozen=True)
class SlideModelConfig:
    """The configuration of a slide model.

    Attributes:
        name: the model's name in outputs.
        classes: the names of the K logits.
        tile_px: the side of a tile in the tile encoder's input, in px.
        spacing_um: the pixel size of these tiles, in µm.
        tile_encoder: the arguments of the tile encoder's :class:`VisionTransformer` (num_classes must stay 0).
        slide_encoder: the arguments of the slide encoder's :class:`VisionTransformer`; patch_size (1), in_chans (the
            tile encoder's width) and num_classes (K) are filled in.
        masked: whether background is masked; False gives the same model without masks, which attends to the glass too.
        min_token_fraction: a token is kept if more than this share of its area is tissue.
        pixel_mean, pixel_std: the statistics per channel, of pixels scaled to [0, 1].
        demonstration: whether the classes mean nothing outside the package's own synthetic slides.
        note: a sentence that outputs carry.
    """

    name: str
    classes: tuple[str, ...]
    tile_px: int
    spacing_um: float
    tile_encoder: dict[str, Any]
    slide_encoder: dict[str, Any]
    masked: bool = True
    min_token_fraction: float = 0.0
    pixel_mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    pixel_std: tuple[float, float, float] = (0.25, 0.25, 0.25)
    demonstration: bool = False
    note: str = ""

    @property
    def token_px(self) -> int:
        """The side of the tile encoder's token, in px of the tile."""
        return int(self.tile_encoder.get("patch_size", 16))

    @classmethod
    def from_json(cls, text: str) -> SlideModelConfig:
        """Read a configuration that :meth:`to_json` wrote.

        Raises:
            ValueError: the text is not JSON, or a key is missing or unknown.
        """
        try:
            values = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"a slide model's configuration must be JSON: {error}") from error
        return cls.from_dict(values)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> SlideModelConfig:
        """Build the configuration from its fields as read from JSON.

        Raises:
            ValueError: a key is missing or unknown.
        """
        values = dict(values)
        known = {field.name for field in fields(cls)}
        required = {"name", "classes", "tile_px", "spacing_um", "tile_encoder", "slide_encoder"}
        unknown, missing = sorted(set(values) - known), sorted(required - set(values))
        if unknown or missing:
            raise ValueError(
                f"a slide model's configuration must have {sorted(required)} and may have {sorted(known - required)}, "
                f"got unknown keys {unknown} and no {missing}; correct the JSON file"
            )
        for name in ("classes", "pixel_mean", "pixel_std"):
            if name in values:
                values[name] = tuple(values[name])
        return cls(**values)

    def as_dict(self) -> dict[str, Any]:
        """Return the fields as JSON's types."""
        return {name: list(x) if isinstance(x, tuple) else x for name, x in asdict(self).items()}

    def to_json(self) -> str:
        """Return the configuration as indented JSON."""
        return json.dumps(asdict(self), indent=2) + "\n"


class SlideModel(nn.Module):
    """A model of a slide: tile encoder → slide encoder → head.

    Args:
        config: see :class:`SlideModelConfig`.
        impl: the implementation of attention in both encoders; None takes the best.

    Raises:
        ValueError: the configuration contradicts itself.
    """

    pixel_mean: Tensor
    pixel_std: Tensor

    def __init__(self, config: SlideModelConfig, impl: str | None = None) -> None:
        super().__init__()
        if config.tile_encoder.get("num_classes", 0):
            raise ValueError("the tile encoder must give features, got num_classes in its arguments; leave it out")
        if config.tile_px % config.token_px:
            raise ValueError(
                f"tile_px must be a multiple of the tile encoder's patch_size, got tile_px={config.tile_px}, "
                f"patch_size={config.token_px}"
            )
        self.config = config
        self.tile_encoder = VisionTransformer(**{"img_size": config.tile_px, **config.tile_encoder, "impl": impl})
        derived = {
            "patch_size": 1,
            "in_chans": self.tile_encoder.embed_dim,
            "num_classes": len(config.classes),
        }
        self.slide_encoder = VisionTransformer(**{**config.slide_encoder, **derived, "impl": impl})
        self.register_buffer("pixel_mean", torch.tensor(config.pixel_mean), persistent=False)
        self.register_buffer("pixel_std", torch.tensor(config.pixel_std), persistent=False)

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return self.pixel_mean.device

    def tile_tokens(
        self, tiles_BIXY: UInt8[Tensor, "B 3 X Y"], keep_BHW: Bool[Tensor, "B h w"] | None = None
    ) -> PackedTokens:
        """Embed the tokens of tiles as packed tokens for the tile encoder's blocks; only kept pixels are converted.

        Args:
            tiles_BIXY: (B, 3, tile_px, tile_px) uint8, RGB.
            keep_BHW: (B, h, w) bool over each tile's tokens; None keeps all.
        """
        return tokens_of_tiles(self.tile_encoder, tiles_BIXY, keep_BHW, self.pixel_mean, self.pixel_std)

    def encode_tiles(
        self, tiles_BIXY: UInt8[Tensor, "B 3 X Y"], keep_BHW: Bool[Tensor, "B h w"] | None = None
    ) -> Float[Tensor, "B C"]:
        """Embed tiles. Arguments as in :meth:`tile_tokens`."""
        return self.tile_encoder(self.tile_tokens(tiles_BIXY, keep_BHW))

    def slide_tokens(
        self,
        embeddings_TC: Float[Tensor, "T C"],
        keep_HW: Bool[Tensor, "H W"],
        group: ProcessGroup | None = None,
    ) -> PackedTokens:
        """Embed the kept tiles as packed tokens for the slide encoder's blocks.

        Args:
            embeddings_TC: (T, C), a row for each kept cell, row-major.
            keep_HW: (H, W) bool over the slide's grid cells.
            group: the process group over which the slide's tiles are divided; ``keep_HW``, still of the whole grid,
                is then True for this process's tiles alone. None if this process has all tiles.

        Raises:
            ValueError: the numbers of embeddings and of kept cells differ.
            GroupError: the processes of the group disagree, or one of them has ended.
        """
        packing = Packing.from_keep(keep_HW.to(embeddings_TC.device).flatten()[None])
        if packing.total != embeddings_TC.shape[0]:
            raise ValueError(
                f"there must be one embedding for each kept cell, got {embeddings_TC.shape[0]} embeddings and "
                f"{packing.total} kept cells"
            )
        return self.slide_encoder.embed_patches(embeddings_TC, packing, (keep_HW.shape[0], keep_HW.shape[1]), group)

    def forward(
        self,
        embeddings_TC: Float[Tensor, "T C"],
        keep_HW: Bool[Tensor, "H W"],
        group: ProcessGroup | None = None,
    ) -> Float[Tensor, "K"]:
        """Compute the slide's logits (K,). Arguments as in :meth:`slide_tokens`."""
        return self.slide_encoder(self.slide_tokens(embeddings_TC, keep_HW, group))[0]

    def save(self, path: str | Path, dtype: torch.dtype | None = None) -> None:
        """Write ``NAME.safetensors`` and ``NAME.json`` in the same folder; neither is left half-written.

        Args:
            path: the path of the weights, which must end in .safetensors.
            dtype: the dtype of the stored weights; None keeps the model's.
        """
        from safetensors.torch import save

        path = _weights_path(path)
        state = {name: x.to(dtype or x.dtype).contiguous() for name, x in self.state_dict().items()}
        _replace(path, save(state))
        _replace(path.with_suffix(".json"), self.config.to_json().encode())

    @classmethod
    def load(cls, path: str | Path, impl: str | None = None, device: torch.device | str = "cpu") -> SlideModel:
        """Load a model that :meth:`save` wrote, or a folder that :func:`maskattn.nn.save_model` wrote, in eval mode.

        Raises:
            FileNotFoundError: the weights or their configuration do not exist.
            ValueError: the weights do not fit the configuration (the message names the keys), or the folder holds
                another kind of model.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        path = Path(path)
        folder = path if path.is_dir() else path.parent
        if path.is_dir() or ((folder / "config.json").is_file() and not path.with_suffix(".json").is_file()):
            from maskattn.nn.slide_models.folder import load_model_folder

            found, _ = load_model_folder(folder, impl)
            if not isinstance(found, cls):
                raise ValueError(
                    f"a SlideModel's folder must hold a model with its own encoder, got a head of kind {found.kind!r} "
                    f"in {folder}; load it with load_two_stages"
                )
            return found.to(device).eval()
        path = _weights_path(path)
        for file in (path, path.with_suffix(".json")):
            if not file.is_file():
                raise FileNotFoundError(
                    f"a slide model is NAME.safetensors and NAME.json in one folder; there is no {file}"
                )
        model = cls(SlideModelConfig.from_json(path.with_suffix(".json").read_text()), impl)
        try:
            state = load_file(path)
        except SafetensorError as error:
            raise ValueError(f"{path} is not a safetensors file: {error}") from error
        _check_state(path, state, model.state_dict())
        model.load_state_dict(state)
        return model.to(device).eval()

    def identity(self) -> str:
        """Return the SHA-256 of configuration and weights; models with the same identity give the same predictions."""
        digest = hashlib.sha256(self.config.to_json().encode())
        for name, x in sorted(self.state_dict().items()):
            digest.update(name.encode())
            digest.update(x.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()


def _weights_path(path: str | Path) -> Path:
    path = Path(path)
    if path.suffix != _SUFFIX:
        raise ValueError(f"a slide model's weights end in {_SUFFIX}, got {path}")
    return path


def _check_state(path: Path, state: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    if wrong := misfits(state, expected):
        raise ValueError(
            f"{path} does not fit its configuration: {joined(wrong)}; the .safetensors and the .json must come from "
            "the same model"
        )


def _replace(path: Path, content: bytes) -> None:
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_bytes(content)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
