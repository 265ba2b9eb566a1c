"""Weights packed while the digest of an encoder is computed."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from maskattn.nn import inference_linear
from maskattn.nn.encoders import TileEncoder
from maskattn.nn.encoders.tile_encoder import EncoderCard
from maskattn.nn.inference_linear import packed_weights
from maskattn.nn.vit import VisionTransformer
from maskattn.slide.packed_meanwhile import packed_meanwhile

CARD = EncoderCard("mine", "token", (0.5,) * 3, (0.5,) * 3, 64, 64)


@pytest.fixture
def encoder() -> TileEncoder:
    torch.manual_seed(0)
    return TileEncoder(VisionTransformer(img_size=64, embed_dim=64, depth=2, num_heads=2, num_classes=0), CARD).eval()


def kept(model: nn.Module) -> set[tuple[int, object]]:
    return {(id(module), key) for module in model.modules() for key in inference_linear._packed.get(module, {})}


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_that_a_batch_multiplies_by_is_packed_before_it(
    encoder: TileEncoder, masked: bool, dtype: torch.dtype
) -> None:
    tiles = torch.randint(0, 256, (3, 3, 64, 64), dtype=torch.uint8)
    keep = torch.rand(3, 4, 4) < 0.6 if masked else None
    with packed_weights(encoder), torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        assert packed_meanwhile(lambda: "the digest", encoder, masked=masked) == "the digest"
        before = kept(encoder)
        with torch.inference_mode():
            features = encoder.encode_tiles(tiles, keep)
        if before or masked:
            assert kept(encoder) == before
    with torch.inference_mode(), torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        expected = encoder.encode_tiles(tiles, keep)
    torch.testing.assert_close(features, expected, rtol=0.02, atol=0.02)


def test_an_error_of_the_digest_is_raised_and_one_of_the_encoder_is_left_to_its_batches(
    encoder: TileEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails() -> str:
        raise ValueError("no digest")

    def breaks(*_: object) -> None:
        raise RuntimeError("no features")

    with packed_weights(encoder), pytest.raises(ValueError, match="no digest"):
        packed_meanwhile(fails, encoder, masked=True)
    monkeypatch.setattr(TileEncoder, "encode_tiles", breaks)
    assert packed_meanwhile(lambda: 1, encoder, masked=True) == 1
    assert packed_meanwhile(lambda: 2, None, masked=True) == 2
