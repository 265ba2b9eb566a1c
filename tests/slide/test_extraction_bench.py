"""The benches of extraction time the same work, and their tables say what was measured."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from small_slides import write_slide

pytest.importorskip("timm")

from bench.cpu import extract
from bench.evidence import token_mask
from maskattn.nn import TileEncoder, VisionTransformer
from maskattn.nn.encoders import EncoderCard

pytestmark = pytest.mark.usefixtures("one_thread")


def test_loop_and_extraction_give_the_same_features_for_the_stated_number_of_tokens(tmp_path: Path):
    extract._draw(tmp_path, 3)
    calls = extract._calls("vit_tiny_patch16_224", tmp_path)
    assert set(calls) == {f"{name}, {dtype}" for name in extract.CONTENDERS for dtype in extract.DTYPES}
    extract._check_same(tmp_path, calls)
    record = calls["tissue, float32"]()
    assert (record.tiles, record.kept_tokens, record.tokens) == (3, 3 * extract.KEPT, 3 * 196)


def test_the_bench_requires_only_what_the_contenders_need(tmp_path: Path):
    extract._draw(tmp_path, 1)
    assert set(extract._calls("vit_tiny_patch16_224", tmp_path, ["timm"])) == {"timm, float32", "timm, bfloat16"}


def test_cosines_are_listed_by_the_share_of_kept_tokens(tmp_path: Path):
    slide = write_slide(tmp_path / "disc.tiff")
    card = EncoderCard("small", "token", (0.5, 0.5, 0.5), (0.25, 0.25, 0.25), 224, 224)
    vit = VisionTransformer(img_size=224, embed_dim=24, depth=2, num_heads=2)
    compared = token_mask._compare(str(slide), TileEncoder(vit.eval(), card), 8)
    share, cosine, own, nearest, _random = compared
    assert len(share) == len(cosine) == len(own) <= 8
    assert ((share > 0) & (share < 1)).all()
    assert (cosine <= 1 + 1e-5).all()
    assert (nearest < 1).all()
    whole = (torch.tensor([0.95, 1.0, 0.3]), torch.tensor([1.0, 0.5, 0.2]), torch.tensor([True, False, True]))
    table = token_mask._table([(*whole, torch.tensor([0.7, 0.8, 0.9]), torch.tensor([0.1, 0.2, 0.3]))])
    assert table[2:4] == [
        "| 25% to 50% | 1 | 0.200 | 0.200 | 100% |",
        "| 90% to 100%, not all | 2 | 0.500 | 0.550 | 50% |",
    ]
    assert table[-1].strip().startswith("Two different tiles, both whole: cosine 0.200 at random, 0.800 to the nearest")
