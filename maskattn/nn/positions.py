"""Where a token is: learnt embeddings read on another grid, sines, rotations and the slopes of ALiBi.

Three conventions exist for learnt embeddings in the wild, and they differ by more than rounding, so the caller names
one:

- ``"timm"``: bicubic with antialiasing to the exact target size (timm's ``resample_abs_pos_embed``, and DINOv2 with
  registers in transformers);
- ``"dino"``: bicubic without antialiasing, by a scale factor nudged by 0.1 token so that the size comes out right
  (DINO, DINOv2's first release and HIPT). The nudge shifts the sampling points, so it is part of the convention;
- ``"transformers"``: bicubic without antialiasing to the exact target size (transformers' ViT, DeiT, BEiT, CLIP,
  SigLIP, I-JEPA and DINOv2 without registers).

One set of weights may therefore give three outputs: a DINOv2 ViT-S/14 of 37×37 positions, read at 224×224, has the
features of DINOv2's own code to 5e-6 under ``"dino"``, is off by 0.03 under ``"transformers"`` and by 0.06 under
``"timm"`` (of values up to 8.2). Each layout loads with the convention of the library that wrote it.

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
    """Bicubic interpolation of a grid of position embeddings, (1, N, C) → (1, H·W, C).

    A grid of its own size is returned as it is, in all conventions.

    Args:
        grid_1NC: the embeddings of the grid tokens, without those of prefix tokens.
        learnt_HW: rows and columns of the learnt grid.
        target_HW: rows and columns wanted.
        convention: "timm", "dino" or "transformers".
    """
    if learnt_HW == target_HW:
        return grid_1NC
    image = grid_1NC.float().unflatten(1, learnt_HW).permute(0, 3, 1, 2)  # [1, C, h, w]
    if convention == "dino":
        factors = [(target + 0.1) / learnt for target, learnt in zip(target_HW, learnt_HW, strict=True)]
        if [math.floor(f * n) for f, n in zip(factors, learnt_HW, strict=True)] != list(target_HW):
            raise ValueError(
                f"the DINO convention cannot reach a {target_HW} grid from {learnt_HW}; pass pos_embed_resample='timm'"
            )
        image = F.interpolate(image, scale_factor=factors, mode="bicubic")
    else:
        image = F.interpolate(image, size=target_HW, mode="bicubic", antialias=convention == "timm")
    return image.permute(0, 2, 3, 1).flatten(1, 2).to(grid_1NC.dtype)


def sine_positions(
    row_T: Int[Tensor, "T"], column_T: Int[Tensor, "T"], grid_HW: tuple[int, int], dim: int
) -> Float[Tensor, "T C"]:
    """Absolute 2-D sine embeddings (T, C): half the channels for the row, half for the column, sines before cosines.

    Angular frequencies are 10000^(−i/(C/4)). MAE's formula; rows come first, as Prov-GigaPath's slide encoder has them.
    """
    frequencies = 10000.0 ** (-torch.arange(dim // 4, dtype=torch.float64, device=row_T.device) / (dim / 4))

    def table(length: int) -> Tensor:
        # In float64: an angle of 1000 cells is off by 6e-5 in float32.
        angles = torch.arange(length, dtype=torch.float64, device=row_T.device)[:, None] * frequencies
        return torch.cat([angles.sin(), angles.cos()], dim=1).to(torch.get_default_dtype())

    return torch.cat([table(grid_HW[0])[row_T], table(grid_HW[1])[column_T]], dim=1)


@dataclass(frozen=True)
class RotaryGrid:
    """Rotary positions that count tokens, as EVA-02 and the Perception Encoder have them.

    Token i of n along a side of the grid is at (i + offset) · reference / n, or at i + offset without a reference.

    Attributes:
        offset: of the first token.
        reference_HW: rows and columns of the grid that the positions were learnt on, to which others are scaled.
        columns_first: the column's angles come before the row's.
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
    """Angles (T, D/2) of rotary positions, D/4 for the row and D/4 for the column: position · theta^(−i/(D/4)).

    Without ``grid`` a position is that of the token's centre, −2π … 2π over each side, as DINOv3 has it.
    """
    frequencies = 1 / theta ** torch.arange(0, 1, 4 / width, dtype=torch.float32, device=row_T.device)

    def table(side: int) -> Tensor:
        length = grid_HW[side]
        if grid is None:
            centres = torch.arange(0.5, length, dtype=torch.float32, device=row_T.device) / length
            return (2 * math.pi * (2 * centres - 1))[:, None] * frequencies
        positions = torch.arange(length, dtype=torch.float32, device=row_T.device) + grid.offset
        if grid.reference_HW is not None:
            positions = positions / length * grid.reference_HW[side]
        # In float64: an angle grows with the grid.
        return positions.double()[:, None] * frequencies

    angles = [table(0)[row_T], table(1)[column_T]]
    return torch.cat(angles[::-1] if grid is not None and grid.columns_first else angles, dim=1)


def rotate(x_THD: Float[Tensor, "T H D"], rotation: tuple[Tensor, Tensor]) -> Float[Tensor, "T H D"]:
    """Rotate channel i with channel i + D/2 by the token's i-th angle.

    Args:
        x_THD: queries or keys.
        rotation: cosines and sines, (T, D/2) each.
    """
    cos, sin = (part[:, None] for part in rotation)  # [T, 1, D/2]
    first, second = x_THD.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x_THD.dtype)


def alibi_slopes(num_heads: int, like: Tensor) -> Float[Tensor, "H"]:
    """ALiBi's slope of each head (Press et al., arXiv 2108.12409): 2^(−8h/H), h = 1 … H, where H is a power of two.

    Other counts take the powers of two below, then every other slope of the next power.

    Args:
        num_heads: H.
        like: a float tensor whose device and dtype they take, so that a bfloat16 model keeps them whole.
    """
    below = 2 ** int(math.log2(num_heads))
    exact = torch.arange(1, below + 1, device=like.device, dtype=like.dtype) * (8 / below)
    between = (2 * torch.arange(num_heads - below, device=like.device, dtype=like.dtype) + 1) * (4 / below)
    return torch.exp2(-torch.cat([exact, between]))
