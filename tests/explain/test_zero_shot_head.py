"""Concepts as a slide head: scores pooled by hand, the shares of tiles and tokens in them, and a complete run."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from maskattn.explain.slide_heads import SlideHeadCDAM
from maskattn.explain.text_concepts import TextConcepts
from maskattn.explain.zero_shot import zero_shot_head
from maskattn.nn.encoders.tile_encoder import EncoderCard, TileEncoder
from maskattn.nn.slide_models.card import ModelCard
from maskattn.nn.slide_models.folder import load_model_folder, save_model
from maskattn.nn.vit import VisionTransformer

NAMES = ("gland", "fat", "stroma")


def concepts(C: int = 8) -> TextConcepts:
    vectors = torch.randn(3, C, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return TextConcepts(NAMES, vectors, 10.0)


def tower() -> TileEncoder:
    """A small image tower with a projection, as a tile encoder."""
    torch.manual_seed(1)
    vit = VisionTransformer(img_size=32, patch_size=8, embed_dim=16, depth=2, num_heads=2, num_classes=8).double()
    for weight in vit.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    return TileEncoder(vit, EncoderCard("tower", "token", (0.5,) * 3, (0.25,) * 3, 32, 32)).double().eval()


@pytest.mark.parametrize("best", [None, 1, 4, 100])
def test_logits_are_the_means_of_the_best_tiles_and_tiles_add_up_to_them(best):
    words, z = concepts(), torch.randn(9, 8, dtype=torch.float64)
    head = zero_shot_head(words, best)
    cosines = F.cosine_similarity(z[None], words.vectors_KC[:, None], dim=2)
    expected = 10 * cosines.sort(dim=1, descending=True).values[:, : best or 9].mean(dim=1)
    torch.testing.assert_close(head(z), expected)
    found = SlideHeadCDAM(head).tiles(z)
    torch.testing.assert_close(found.relevance_KT.sum(dim=1), expected)
    torch.testing.assert_close(torch.einsum("tc,ktc->kt", z, found.gradient_KTC), found.relevance_KT)
    assert ((found.relevance_KT != 0).sum(dim=1) == min(best or 9, 9)).all()
    torch.testing.assert_close(found.sums.difference_K, expected)
    assert found.sums.gap_K.abs().max() < 1e-12
    assert found.attention_T.sum() == pytest.approx(1)
    assert SlideHeadCDAM(head).tiles(z, gradient=False).gradient_KTC is None


def test_the_score_keeps_its_gradient_in_the_tiles():
    z = torch.randn(5, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(zero_shot_head(concepts(), 2), (z,))


def test_tokens_and_what_is_on_none_add_up_to_their_tiles_share_of_the_score():
    encoder, generator = tower(), torch.Generator().manual_seed(2)
    pixels = torch.randint(0, 256, (4, 3, 32, 32), generator=generator, dtype=torch.uint8)
    explain = SlideHeadCDAM(zero_shot_head(concepts(), 2), encoder, "integrated-norm", m=40)
    with torch.no_grad():
        of_slide = explain.tiles(encoder.encode_tiles(pixels, None))
    maps = explain.tokens(pixels, None, of_slide.gradient_KTC)
    accounted = maps.relevance_KBHW.sum(dim=(2, 3)) + maps.unmapped_KB
    torch.testing.assert_close(accounted, of_slide.relevance_KT, rtol=1e-3, atol=1e-3)
    assert (maps.relevance_KBHW[of_slide.relevance_KT == 0] == 0).all()


def test_a_folder_keeps_the_concepts(tmp_path):
    head = zero_shot_head(concepts(), 3)
    save_model(tmp_path / "model", head, ModelCard(name="words", kind="zero_shot", classes=NAMES))
    twin, card = load_model_folder(tmp_path / "model")
    assert card.classes == NAMES
    z = torch.randn(6, 8, dtype=torch.float64)
    assert torch.equal(twin(z), head(z))


def test_a_pool_of_no_tile_is_refused():
    with pytest.raises(ValueError, match="best=0"):
        zero_shot_head(concepts(), 0)
