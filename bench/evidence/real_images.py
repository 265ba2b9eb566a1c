"""Real images with ground truth: photographs of two animals, and colon tissue with its grade and its glands.

The folder is supplied by the user and only read: ``photos/*.png`` and ``text/`` for the photographs; ``glas/*.jpg``
with ``grades.csv`` and gland masks (GlaS, MICCAI 2015: research only). Crops are squares of 224 px, with values 0 … 1.

Dimension key: B images, K classes, H·W grid tokens, C channels.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

__all__ = ["Composites", "Crops", "Photographs", "composites", "crops", "normalised", "photographs", "text_head"]

SIDE_PX = 224
# The box of each animal, drawn by hand, in shares of the picture's width and height: left, top, right, bottom.
_ANIMALS = {
    "catdog": {"dog": (0.34, 0.04, 0.75, 0.55), "cat": (0.20, 0.56, 0.90, 0.99)},
    "dogbird": {"bird": (0.03, 0.19, 0.46, 1.0), "dog": (0.47, 0.0, 0.98, 1.0)},
    "dogcat2": {"dog": (0.14, 0.0, 0.45, 1.0), "cat": (0.48, 0.15, 0.82, 1.0)},
    "el1": {"zebra": (0.0, 0.38, 0.34, 0.79), "elephant": (0.50, 0.07, 1.0, 0.90)},
    "el2": {"elephant": (0.04, 0.06, 0.68, 0.42), "zebra": (0.43, 0.43, 0.93, 0.93)},
    "el3": {"elephant": (0.01, 0.26, 0.42, 0.83), "zebra": (0.44, 0.48, 1.0, 0.85)},
    "el4": {"elephant": (0.08, 0.13, 0.90, 0.42), "zebra": (0.0, 0.47, 1.0, 0.95)},
}


@dataclass(frozen=True)
class Photographs:
    """Pictures of two animals.

    Attributes:
        names: names of the files.
        pixels_B3XY: (B, 3, 224, 224) in 0 … 1.
        classes: the two animals in each picture.
        boxes_B24: (B, 2, 4), left, top, right and bottom as shares of the picture.
    """

    names: list[str]
    pixels_B3XY: Tensor
    classes: list[tuple[str, str]]
    boxes_B24: Tensor

    def areas(self, grid_HW: tuple[int, int]) -> Tensor:
        """Return (B, 2, H, W) bool: the tokens whose centre is in each animal's box."""
        height, width = grid_HW
        y = ((torch.arange(height) + 0.5) / height)[:, None]
        x = ((torch.arange(width) + 0.5) / width)[None]
        left, top, right, bottom = (edge[..., None, None] for edge in self.boxes_B24.unbind(-1))
        return (x >= left) & (x < right) & (y >= top) & (y < bottom)


@dataclass(frozen=True)
class Crops:
    """Squares of tissue.

    Attributes:
        names, patients: name and patient of each crop's image.
        pixels_B3XY: (B, 3, 224, 224).
        malignant_B: (B,) bool.
        glands_BXY: (B, 224, 224) bool.
    """

    names: list[str]
    patients: list[str]
    pixels_B3XY: Tensor
    malignant_B: Tensor
    glands_BXY: Tensor

    def glands(self, grid_HW: tuple[int, int]) -> Tensor:
        """Return (B, H, W) bool: the tokens at least half covered by gland."""
        return F.adaptive_avg_pool2d(self.glands_BXY[:, None].float(), grid_HW)[:, 0] >= 0.5


@dataclass(frozen=True)
class Composites:
    """Benign tissue in one half, malignant in the other.

    Attributes:
        pixels_B3XY: (B, 3, 224, 224).
        malignant_left_B: (B,) bool.
        patients: the two patients of each composite, whose images its probe must not have seen.
    """

    pixels_B3XY: Tensor
    malignant_left_B: Tensor
    patients: list[tuple[str, str]]

    def areas(self, grid_HW: tuple[int, int]) -> Tensor:
        """Return (B, 2, H, W) bool: the tokens of the malignant half, and of the benign one."""
        left = torch.arange(grid_HW[1]) < grid_HW[1] / 2
        left_BHW = left.expand(len(self.malignant_left_B), *grid_HW)
        malignant = left_BHW == self.malignant_left_B[:, None, None]
        return torch.stack([malignant, ~malignant], dim=1)


def normalised(pixels_B3XY: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """Normalise pixels in 0 … 1 with an encoder's mean and standard deviation."""
    shape = (3, 1, 1)
    return (pixels_B3XY - torch.tensor(mean).view(shape)) / torch.tensor(std).view(shape)


def photographs(folder: Path) -> Photographs:
    """Read the pictures whose animals are known, each resized to a square."""
    pictures, classes, boxes = [], [], []
    for name, animals in _ANIMALS.items():
        with Image.open(folder / "photos" / f"{name}.png") as image:
            pictures.append(_tensor(image.convert("RGB").resize((SIDE_PX, SIDE_PX), Image.Resampling.BICUBIC)))
        first, second = animals
        classes.append((first, second))
        boxes.append([animals[first], animals[second]])
    return Photographs(list(_ANIMALS), torch.stack(pictures), classes, torch.tensor(boxes))


def text_head(folder: Path, projection_OC: Tensor) -> tuple[Tensor, list[str]]:
    """Return the text classes' directions in the class token's space, (K, C), and their names.

    Directions have unit length before the projection. The projected class token must be divided by its length, so that
    logits are 100 · cosine.
    """
    vectors = torch.from_numpy(np.load(folder / "text" / "coco_stuff_171_clip_vitb16.npy").astype(np.float32))
    names = (folder / "text" / "coco_stuff_171_classes.txt").read_text().split("\n")[: len(vectors)]
    return F.normalize(vectors, dim=1) @ projection_OC, [name.strip() for name in names]


def crops(folder: Path, part: str) -> Crops:
    """Cut two squares from each image, at its left and its right edge.

    Args:
        folder: with ``glas/``.
        part: "train" or "test".
    """
    names, patients, pixels, malignant, glands = [], [], [], [], []
    with (folder / "glas" / "grades.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["name"].startswith(part)]
    for row in rows:
        with Image.open(folder / "glas" / f"{row['name']}.jpg") as image:
            tissue = _tensor(_at_least(image.convert("RGB"), Image.Resampling.BICUBIC))
        with Image.open(folder / "glas" / f"{row['name']}_glands.png") as image:
            gland = _tensor(_at_least(image.convert("L"), Image.Resampling.NEAREST))[0] > 0.5
        height, width = gland.shape
        top = (height - SIDE_PX) // 2
        for left in (0, width - SIDE_PX):
            window = (slice(top, top + SIDE_PX), slice(left, left + SIDE_PX))
            pixels.append(tissue[:, window[0], window[1]])
            glands.append(gland[window])
            names.append(row["name"])
            patients.append(row["patient"])
            malignant.append(row["grade"] == "malignant")
    return Crops(names, patients, torch.stack(pixels), torch.tensor(malignant), torch.stack(glands))


def composites(squares: Crops, count: int, seed: int) -> Composites:
    """Join halves of a benign and of a malignant square of two patients, the malignant one left in every other image.

    Args:
        squares: the squares to choose from.
        count: B.
        seed: seed of the choice.
    """
    rng = np.random.default_rng(seed)
    benign, malignant = ((squares.malignant_B == wanted).nonzero()[:, 0].numpy() for wanted in (False, True))
    pixels, patients, half = [], [], SIDE_PX // 2
    while len(pixels) < count:
        b, m = int(rng.choice(benign)), int(rng.choice(malignant))
        if squares.patients[b] == squares.patients[m]:
            continue
        starts = rng.integers(0, SIDE_PX - half + 1, 2)
        halves = [squares.pixels_B3XY[i, :, :, s : s + half] for i, s in zip((m, b), starts, strict=True)]
        pixels.append(torch.cat(halves if len(pixels) % 2 == 0 else halves[::-1], dim=2))
        patients.append((squares.patients[b], squares.patients[m]))
    return Composites(torch.stack(pixels), torch.arange(count) % 2 == 0, patients)


def _tensor(image: Image.Image) -> Tensor:
    pixels = np.asarray(image, dtype=np.float32) / 255
    return torch.from_numpy(pixels.reshape(*pixels.shape[:2], -1).transpose(2, 0, 1).copy())


def _at_least(image: Image.Image, how: Image.Resampling) -> Image.Image:
    """Enlarge an image with a side below that of a square."""
    factor = max(1.0, SIDE_PX / min(image.size))
    return image if factor == 1 else image.resize((round(image.width * factor), round(image.height * factor)), how)
