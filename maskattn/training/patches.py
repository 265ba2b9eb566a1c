"""Labelled patches in folders, one per class, with tissue masks next to the patches.

Dimension key: h·w tokens of a patch.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from maskattn.errors import SlideError
from maskattn.evaluation.predictions import some_of
from maskattn.shapes import Bool, UInt8
from maskattn.slide.names import as_text
from maskattn.training.augmentation import varied
from maskattn.training.bags import Draw
from maskattn.training.cohort import Case, Cohort
from maskattn.training.settings import TrainSettings

__all__ = ["PatchDataset", "PatchItem", "find_patches"]

_IMAGES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp")
_MASK = "_mask"


def find_patches(settings: TrainSettings) -> Cohort:
    """Return the patches of a folder as a cohort, each of them a case.

    Raises:
        ValueError: there is no folder, there are fewer than two classes, or the patient pattern does not match a name.
    """
    folder = settings.patches
    if folder is None or not folder.is_dir():
        raise ValueError(
            f"--stage tile must have --patches, a folder with a folder of images for each class, got {folder}"
        )
    names = tuple(sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")))
    classes = settings.classes or names
    if lacking := [name for name in classes if name not in names]:
        raise ValueError(f"every class must have a folder in {folder}, got none of {some_of(lacking)}")
    of_class = {name: [path for path in sorted((folder / name).iterdir()) if _is_patch(path)] for name in classes}
    empty = [name for name, paths in of_class.items() if not paths]
    if len(classes) < 2 or empty:
        counted = ", ".join(f"{name} ({len(paths)} patches)" for name, paths in of_class.items()) or "none"
        raise ValueError(
            f"patches must be of two classes or more, each with images ({', '.join(_IMAGES)}), got {counted} in "
            f"{folder}"
        )
    cases = [
        Case(f"{name}/{path.stem}", _patient_of(path, name, settings), {path.stem: path}, (float(index),))
        for index, name in enumerate(classes)
        for path in of_class[name]
    ]
    task = settings.task or ("binary" if len(classes) == 2 else "multiclass")
    if task not in ("binary", "multiclass", "ordinal"):
        raise ValueError(f"patches in folders have classes, got --task {task}; take binary, multiclass or ordinal")
    return Cohort(tuple(cases), task, settings.target or "class", classes, {})


def _is_patch(path: Path) -> bool:
    return path.suffix.lower() in _IMAGES and not path.stem.endswith(_MASK) and not path.name.startswith(".")


def _patient_of(path: Path, name: str, settings: TrainSettings) -> str:
    if settings.patient_pattern is None:
        return f"{name}/{path.stem}"
    try:
        found = re.search(settings.patient_pattern, path.stem)
    except re.error as error:
        raise ValueError(
            f"--patient-pattern must be a regular expression, got {settings.patient_pattern!r}: {error}"
        ) from error
    if found is None or not found.groups():
        raise ValueError(
            f"--patient-pattern must have a group and match every name, got {settings.patient_pattern!r} for "
            f"{path.stem!r}; '(.+?)_' matches the text before the first _"
        )
    return str(found[1])


@dataclass(frozen=True, eq=False)
class PatchItem:
    """A patch, or a tile of a slide, as the input of the encoder.

    Attributes:
        index: index of the patch, or of the bag of a slide's or patient's tiles that are averaged in validation.
        pixels_3XY: (3, X, Y) uint8, RGB.
        keep_HW: (h, w) bool, the tokens that take part; None keeps all.
        truth: (class index,).
    """

    index: int
    pixels_3XY: UInt8[Tensor, "3 X Y"]
    keep_HW: Bool[Tensor, "h w"] | None
    truth: tuple[float, ...]


class PatchDataset(Dataset[PatchItem]):
    """Patches, read one at a time; in training they are augmented (:func:`~maskattn.training.augmentation.varied`).

    Args:
        cases: cases of :func:`find_patches`.
        tile_px: side of the encoder's input, in pixels.
        token_px: side of its tokens, in pixels.
        masked: whether tokens without tissue are left out, by the masks next to the patches.
        seed: seed of the augmentation; None: no augmentation.
        drop: share of the kept tokens that is dropped.
    """

    def __init__(
        self,
        cases: Sequence[Case],
        tile_px: int,
        token_px: int,
        masked: bool,
        seed: int | None = None,
        drop: float = 0.0,
    ) -> None:
        self.cases = list(cases)
        self._tile_px, self._token_px, self._masked, self._seed, self._drop = tile_px, token_px, masked, seed, drop

    def __len__(self) -> int:
        return len(self.cases)

    def __getitem__(self, draw: Draw) -> PatchItem:
        """Read a patch.

        Raises:
            SlideError: the image or its mask cannot be read, or a mask is missing or leaves no token.
        """
        case = self.cases[draw.index]
        (path,) = case.slides.values()
        pixels = torch.from_numpy(_read(path, "RGB", self._tile_px)).permute(2, 0, 1)
        keep = self._keep_of(path) if self._masked else None
        if self._seed is None:
            return PatchItem(draw.index, pixels, keep, case.truth)
        rng = np.random.default_rng([self._seed, draw.epoch, draw.index])
        pixels, keep = varied(pixels, keep, self._tile_px // self._token_px, self._drop, rng)
        return PatchItem(draw.index, pixels, keep, case.truth)

    def _keep_of(self, path: Path) -> Bool[Tensor, "h w"]:
        mask = next((other for other in _masks_of(path) if other.is_file()), None)
        if mask is None:
            raise SlideError(
                f"--token-mask tissue needs a mask next to every patch, got no {as_text(_masks_of(path)[0])}; add it, "
                "or use --token-mask none"
            )
        tissue = _read(mask, "L", self._tile_px) > 0
        side = self._tile_px // self._token_px
        keep_HW = tissue.reshape(side, self._token_px, side, self._token_px).any(axis=(1, 3))
        if not keep_HW.any():
            raise SlideError(f"a patch must show tissue, got an empty mask in {as_text(mask)}; leave the patch out")
        return torch.from_numpy(keep_HW)


def _masks_of(path: Path) -> list[Path]:
    return [path.with_name(f"{path.stem}{_MASK}{ending}") for ending in (".png", path.suffix)]


def _read(path: Path, mode: str, side_px: int) -> np.ndarray:
    """Read an image as (Y, X[, 3]) uint8, resized to a square; masks are resized without interpolation."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            converted = image.convert(mode)
    except (OSError, UnidentifiedImageError, SyntaxError) as error:
        raise SlideError(f"a patch must be a readable image, got {as_text(path)}: {error}; leave it out") from error
    if converted.size != (side_px, side_px):
        how = Image.Resampling.BILINEAR if mode == "RGB" else Image.Resampling.NEAREST
        converted = converted.resize((side_px, side_px), how)
    return np.array(converted)
