"""A ViT-S/16 with and without its background, and the price of a map: ``pytest bench/test_vit.py``."""

from __future__ import annotations

import pytest
import torch
from test_attention import measure

from maskattn.explain import CDAM
from maskattn.nn import VisionTransformer


@pytest.fixture(scope="module")
def vit_small() -> VisionTransformer:
    torch.manual_seed(0)
    return VisionTransformer(embed_dim=384, depth=12, num_heads=6, num_classes=10).eval()


@pytest.mark.parametrize("kept", [0.06, 0.3, 1.0])
def test_predict_eight_tiles(benchmark, vit_small, kept):
    x, keep = torch.randn(8, 3, 224, 224), torch.rand(8, 14, 14) < kept
    with torch.inference_mode():
        measure(benchmark, "ViT-S/16, 8 tiles of 224 px, forward", vit_small, (x, keep))


@pytest.mark.parametrize("target", [0, "all"])
def test_explain_eight_tiles(benchmark, vit_small, target):
    x, keep = torch.randn(8, 3, 224, 224), torch.rand(8, 14, 14) < 0.3
    group = "ViT-S/16, 8 tiles of 224 px, f = 0.3, CDAM of one class and of ten"
    measure(benchmark, group, CDAM(vit_small).attribute, (x, target, keep))
