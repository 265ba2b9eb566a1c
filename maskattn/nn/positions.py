"""The positions of tokens: learnt embeddings resampled to another grid, sines, rotations and the slopes of ALiBi.

Three conventions for resampling learnt embeddings are in use, and they differ by more than rounding, so the caller
chooses one:

- ``"timm"``: bicubic with antialiasing to the exact target size (timm's ``resample_abs_pos_embed``, and DINOv2 with
  registers in transformers);
- ``"dino"``: bicubic without antialiasing, by a scale factor nudged by 0.1 token so that the size comes out right
  (DINO, DINOv2's first release and HIPT). The nudge shifts the sampling points, so it is part of the convention;
- ``"transformers"``: bicubic without antialiasing to the exact target size (transformers' ViT, DeiT, BEiT, CLIP,
  SigLIP, I-JEPA and DINOv2 without registers).

One set of weights may therefore give three outputs: the features of a DINOv2 ViT-S/14 with 37×37 positions, run at
224×224 px, agree with DINOv2's own code to 5e-6 under ``"dino"``, and differ by 0.03 under ``"transformers"`` and by
0.06 under ``"timm"`` (of values up to 8.2). Each layout loads with the convention of the library that wrote it.

Dimension key: P prefix tokens, N tokens of the learnt grid, T packed tokens, C channels, H and W of the target grid
(in ``rotate``: H heads), D head width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from maskattn.shapes import Float, Int

__all__ = [
    "CONVENTIONS",
    "RotaryGrid",
    "alibi_slopes",
    "resample_position_embedding",
    "rotary_angles",
    "rotate",
    "sine_positions",
]

CONVENTIONS = ("timm", "dino", "transformers")


def resample_position_embedding(
    grid_1NC: Float[Tensor, "1 N C"], learnt_HW: tuple[int, int], target_HW: tuple[int, int], convention: str
) -> Float[Tensor, "1 M C"]:
    """Interpolate a grid of position embeddings bicubically, (1, N, C) → (1, H·W, C).

    A grid that already has the target size is returned unchanged, in all conventions.

    Args:
        grid_1NC: the embeddings of the grid tokens, without those of prefix tokens.
        learnt_HW: the rows and columns of the learnt grid.
        target_HW: the rows and columns of the target grid.
        convention: "timm", "dino" or "transformers".

    Raises:
        ValueError: the DINO convention gives another size than the target's.
    """
    if learnt_HW == target_HW:
        return grid_1NC
    image = grid_1NC.float().unflatten(1, learnt_HW).permute(0, 3, 1, 2)  # [1, C, h, w]
    if convention == "dino":
        factors = [(target + 0.1) / learnt for target, learnt in zip(target_HW, learnt_HW, strict=True)]
        if [math.floor(f * n) for f, n in zip(factors, learnt_HW, strict=True)] != list(target_HW):
            raise ValueError(
                f"the DINO convention cannot resample a {learnt_HW} grid to {target_HW}; pass pos_embed_resample='timm'"
            )
        image = F.interpolate(image, scale_factor=factors, mode="bicubic")
    else:
        image = F.interpolate(image, size=target_HW, mode="bicubic", antialias=convention == "timm")
    return image.permute(0, 2, 3, 1).flatten(1, 2).to(grid_1NC.dtype)


def sine_positions(
    row_T: Int[Tensor, "T"], column_T: Int[Tensor, "T"], grid_HW: tuple[int, int], dim: int
) -> Float[Tensor, "T C"]:
    """Compute absolute 2-D sine embeddings (T, C): half the channels for the row, half for the column, sines first.

    Angular frequencies are 10000^(−i/(C/4)), as in MAE; rows come first, as in Prov-GigaPath's slide encoder.
    """
    frequencies = 10000.0 ** (-torch.arange(dim // 4, dtype=torch.float64, device=row_T.device) / (dim / 4))

    def table(length: int) -> Tensor:
        # In float64, because the angle at cell 1000 is off by 6e-5 in float32.
        angles = torch.arange(length, dtype=torch.float64, device=row_T.device)[:, None] * frequencies
        return torch.cat([angles.sin(), angles.cos()], dim=1).to(torch.get_default_dtype())

    return torch.cat([table(grid_HW[0])[row_T], table(grid_HW[1])[column_T]], dim=1)


@dataclass(frozen=True)
class RotaryGrid:
    """Rotary positions in units of tokens, as in EVA-02 and the Perception Encoder.

    Token i of n along an axis of the grid is at (i + offset) · reference / n, or at i + offset without a reference.

    Attributes:
        offset: the position of the first token.
        reference_HW: the rows and columns of the grid that the model was trained on, to which other grids are scaled.
        columns_first: whether the column's angles come before the row's.
    """

    offset: float = 0.0
    reference_HW: tuple[int, int] | None = None
    columns_first: bool = False


def rotary_angles(
    row_T: Int[Tensor, "T"],
    column_T: Int[Tensor, "T"],
    grid_HW: tuple[int, int],
    width: int,
    theta: float,
    grid: RotaryGrid | None = None,
) -> Float[Tensor, "T E"]:
    """Compute the angles (T, D/2) of rotary positions, D/4 for the row and D/4 for the column.

    Angle i is position · theta^(−i/(D/4)). Without ``grid``, the position is the token's centre on a scale of −2π … 2π
    along each axis, as in DINOv3.
    """
    frequencies = 1 / theta ** torch.arange(0, 1, 4 / width, dtype=torch.float32, device=row_T.device)

    def table(axis: int) -> Tensor:
        length = grid_HW[axis]
        if grid is None:
            centres = torch.arange(0.5, length, dtype=torch.float32, device=row_T.device) / length
            return (2 * math.pi * (2 * centres - 1))[:, None] * frequencies
        positions = torch.arange(length, dtype=torch.float32, device=row_T.device) + grid.offset
        if grid.reference_HW is not None:
            positions = positions / length * grid.reference_HW[axis]
            # In float64, because the angles grow with the grid.
        return positions.double()[:, None] * frequencies

    angles = [table(0)[row_T], table(1)[column_T]]
    return torch.cat(angles[::-1] if grid is not None and grid.columns_first else angles, dim=1)


def rotate(x_THD: Float[Tensor, "T H D"], rotation: tuple[Tensor, Tensor]) -> Float[Tensor, "T H D"]:
    """Rotate channel i with channel i + D/2 by the token's i-th angle.

    Args:
        x_THD: queries or keys.
        rotation: the cosines and sines, (T, D/2) each.
    """
    cos, sin = (x[:, None] for x in rotation)  # [T, 1, D/2]
    first, second = x_THD.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x_THD.dtype)


def alibi_slopes(num_heads: int, like: Tensor) -> Float[Tensor, "H"]:
    """Return ALiBi's slope of each head (Press et al., arXiv 2108.12409): 2^(−8h/H), h = 1 … H, for a power of two H.

    Other head counts take the slopes of the next lower power of two, then every other slope of the next higher one.

    Args:
        num_heads: H.
        like: a float tensor whose device and dtype the slopes take; coordinates stay float32 in a bfloat16 model.
    """
    below = 2 ** int(math.log2(num_heads))
    exact = torch.arange(1, below + 1, device=like.device, dtype=like.dtype) * (8 / below)
    between = (2 * torch.arange(num_heads - below, device=like.device, dtype=like.dtype) + 1) * (4 / below)
    return torch.exp2(-torch.cat([exact, between]))
