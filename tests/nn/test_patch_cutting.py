"""Patches cut from images: the same pixels whatever the patch's side, the pixels' dtype and their layout in memory."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from maskattn.nn.blocks import PatchEmbedding
from maskattn.packing import Packing


def cut_one_by_one(images: Tensor, packing: Packing, p: int, width: int) -> Tensor:
    rows = []
    for index in packing.indices.tolist():
        image, token = divmod(index, packing.num_tokens)
        y, x = token // width * p, token % width * p
        rows.append(images[image, :, y : y + p, x : x + p].flatten())
    return torch.stack(rows)


@pytest.mark.parametrize("p", [4, 7, 8, 14, 16, 32])
@pytest.mark.parametrize("layout", ["whole", "cropped", "by one pixel", "channels last", "transposed", "offset"])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_patches_hold_the_pixels_of_their_squares(p, layout, dtype):
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (3, 3, 3 * p + 2, 4 * p + 16), generator=generator).to(dtype)
    images = {
        "whole": pixels[..., : 3 * p, : 4 * p].contiguous(),
        "cropped": pixels[..., 2:, 16:],
        "by one pixel": pixels[..., 1:, 1 : 4 * p + 1],
        "channels last": pixels.contiguous(memory_format=torch.channels_last),
        "transposed": pixels.transpose(2, 3),
        "offset": pixels.flatten()[5 : 5 + 3 * 3 * 3 * p * 4 * p].view(3, 3, 3 * p, 4 * p),
    }[layout]
    embedding = PatchEmbedding(p, 3, 8)
    height, width = embedding.grid_of(images)
    keep = torch.rand(3, height * width, generator=generator) < 0.5
    keep[0] = True
    packing = Packing.from_keep(keep)
    found = embedding.cut(images, packing)
    assert found.dtype == dtype
    torch.testing.assert_close(found, cut_one_by_one(images, packing, p, width), rtol=0, atol=0)


def test_no_kept_patch_gives_no_rows():
    packing = Packing.from_keep(torch.zeros(2, 4, dtype=torch.bool))
    assert PatchEmbedding(16, 3, 8).cut(torch.zeros(2, 3, 32, 32, dtype=torch.uint8), packing).shape == (0, 768)
