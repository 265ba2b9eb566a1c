"""A slide through three levels, region by region: against the original layout, masked, stored and explained."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from dense_vit import dense_masked_logits
from original_hipt import LocalHIPT
from runs import lengths_given_to
from small_slides import tissue_image, write_slide
from torch import nn

from maskattn.errors import SlideError
from maskattn.explain import FactorisedAttention, ThreeLevelCDAM
from maskattn.nn import HIPT, VisionTransformer
from maskattn.nn.hipt_checkpoints import hipt_from_state_dict
from maskattn.slide.grid import TokenGrid
from maskattn.slide.layouts import TileHeader, grid_cells
from maskattn.slide.layouts.hierarchical import read_regions, regions_path, writing_regions
from maskattn.slide.reader import SlideReader
from maskattn.slide.regions import encode_regions, encode_stored_regions, explain_regions, lay_regions
from maskattn.slide.stream import stream_tiles
from maskattn.slide.tissue import find_tissue

REGION, PATCH, TOKEN, SIDE = 128, 32, 16, 4


@pytest.fixture
def original() -> LocalHIPT:
    torch.manual_seed(0)
    model = LocalHIPT(classes=3)
    for p in model.parameters():
        nn.init.normal_(p, std=0.2)
    return model.double().eval()


@pytest.fixture
def model(original: LocalHIPT) -> HIPT:
    patches = VisionTransformer(img_size=32, embed_dim=48, depth=2, num_heads=6, pos_embed_resample="dino")
    for p in patches.parameters():
        nn.init.normal_(p, std=0.2)
    found = hipt_from_state_dict(original.state_dict(), patches.double().eval(), patch_px=PATCH)
    assert isinstance(found, HIPT)
    return found


@pytest.fixture
def reader(tmp_path: Path) -> Iterator[SlideReader]:
    with SlideReader(write_slide(tmp_path / "slide.tiff")) as reader:
        yield reader


def laid(reader: SlideReader, token_mask: str) -> TokenGrid:
    shape = {"token_px": TOKEN, "region_px": REGION, "spacing_um": 1.0}
    return lay_regions(reader.info, find_tissue(reader), token_mask=token_mask, **shape)


def test_unmasked_logits_of_a_slide_are_those_of_the_original_layout(
    reader: SlideReader, model: HIPT, original: LocalHIPT
) -> None:
    grid = laid(reader, "none")
    assert 1 < grid.kept_tiles < grid.cells
    assert grid.token_keep_THW.all()
    encoded = encode_regions(reader, grid, model, batch_size=7)
    features = []
    for x, y in grid.coords_lv0.tolist():
        pixels = torch.from_numpy(reader.read_region(x, y, (REGION, REGION), (REGION, REGION)).copy())
        region = (pixels.permute(2, 0, 1).double() / 255 - 0.5) / 0.5
        patches = region.unfold(1, PATCH, PATCH).unfold(2, PATCH, PATCH).permute(1, 2, 0, 3, 4).flatten(0, 1)
        every = torch.ones(SIDE * SIDE, PATCH // TOKEN, PATCH // TOKEN, dtype=torch.bool)
        with torch.no_grad():
            features.append(dense_masked_logits(model.patch_encoder, patches, every))
    with torch.no_grad():
        expected = original(torch.stack(features))[0]
        logits = model(encoded.embeddings_TC, encoded.keep_HW)
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)


def test_masked_glass_changes_nothing_bit_for_bit(reader: SlideReader, model: HIPT, tmp_path: Path) -> None:
    grid = laid(reader, "tissue")
    assert not grid.token_keep_THW.all()
    image = tissue_image()
    glass = np.ones(tuple(side * REGION for side in grid.keep_HW.shape), bool)
    for (x, y), tokens in zip(grid.coords_lv0, grid.token_keep_THW, strict=True):
        glass[y : y + REGION, x : x + REGION] = ~np.kron(tokens, np.ones((TOKEN, TOKEN), bool))
    glass = glass[: image.shape[0], : image.shape[1]]
    other = np.where(glass[:, :, None], np.random.default_rng(0).integers(0, 256, image.shape), image).astype(np.uint8)
    found = []
    for path in (reader.path, write_slide(tmp_path / "other.tiff", other)):
        with SlideReader(path) as of_slide:
            encoded = encode_regions(of_slide, grid, model)
            relevance = ThreeLevelCDAM(model).slide(encoded.embeddings_TC, encoded.keep_HW)
            maps = list(explained(of_slide, grid, model, encoded, relevance))
            found.append((encoded.embeddings_TC, relevance.logits_K, *(m.relevance.tokens_KBhw for m in maps)))
    assert all(torch.equal(one, same) for one, same in zip(*found, strict=True))
    with SlideReader(tmp_path / "other.tiff") as of_slide:
        unmasked = [encode_regions(r, laid(reader, "none"), model).embeddings_TC for r in (reader, of_slide)]
    assert not torch.equal(*unmasked)


def explained(reader, grid, model, encoded, relevance):
    how = ThreeLevelCDAM(model), FactorisedAttention(model)
    return explain_regions(reader, grid, model, encoded, relevance, *how, batch_size=5)


def test_maps_made_region_by_region_are_those_of_all_regions_at_once(reader: SlideReader, model: HIPT) -> None:
    grid = laid(reader, "tissue")
    encoded = encode_regions(reader, grid, model)
    relevance = ThreeLevelCDAM(model).slide(encoded.embeddings_TC, encoded.keep_HW)
    maps = list(explained(reader, grid, model, encoded, relevance))
    assert [region.index for region in maps] == list(range(grid.kept_tiles))
    pixels = torch.cat([batch.tiles_BCHW for batch in stream_tiles(reader, grid, batch_size=2)])
    keep = torch.from_numpy(grid.token_keep_THW)
    whole = ThreeLevelCDAM(model).regions(pixels, keep, relevance.gradient_KTC)
    of_slide = FactorisedAttention(model).slide(encoded.embeddings_TC, encoded.keep_HW)
    attention = FactorisedAttention(model).regions(pixels, keep, of_slide)
    for region in maps:
        np.testing.assert_array_equal(region.keep_hw, grid.token_keep_THW[region.index])
        torch.testing.assert_close(region.relevance.tokens_KBhw[:, 0], whole.tokens_KBhw[:, region.index])
        torch.testing.assert_close(region.relevance.patches_KBnm[:, 0], whole.patches_KBnm[:, region.index])
        torch.testing.assert_close(region.attention.combined_Bhw[0], attention.combined_Bhw[region.index])


def header_of(reader: SlideReader, grid: TokenGrid) -> TileHeader:
    return TileHeader.of_grid("slide", reader.info, grid, encoder="vit256", token_mask="tissue")


def stored(root: Path, reader: SlideReader, grid: TokenGrid, model: HIPT) -> Path:
    with writing_regions(root, header_of(reader, grid), SIDE * SIDE, 48) as take:

        def take_patches(features_NC: np.ndarray, row: int) -> None:
            take(features_NC[None], grid.coords_lv0[row : row + 1], None)

        encode_regions(reader, grid, model, take_patches=take_patches)
        assert not regions_path(root, "slide").exists()
    return regions_path(root, "slide")


def test_stored_patches_are_as_slide2vec_has_them_and_give_the_same_logits(
    reader: SlideReader, model: HIPT, tmp_path: Path
) -> None:
    grid = laid(reader, "tissue")
    path = stored(tmp_path, reader, grid, model)
    held = torch.load(tmp_path / "hierarchical_embeddings" / "slide.pt", map_location="cpu", weights_only=True)
    assert (held.shape, held.dtype) == ((grid.kept_tiles, 16, 48), torch.float32)
    meta = json.loads((tmp_path / "hierarchical_embeddings" / "slide.meta.json").read_text())
    told = {"artifact_type": "hierarchical_embeddings", "num_regions": grid.kept_tiles, "tiles_per_region": 16}
    told |= {"region_tile_multiple": 4, "requested_region_size_px": 128, "requested_tile_size_px": 32}
    told |= {"subtile_order": "row_major", "feature_dim": 48, "requested_spacing_um": 1.0, "encoder_name": "vit256"}
    assert {name: meta[name] for name in told} == told
    with np.load(tmp_path / "tiles" / "slide.coordinates.npz") as npz:
        xy = np.stack((npz["x"], npz["y"]), axis=1)
    assert sorted(map(tuple, xy.tolist())) == sorted(map(tuple, grid.coords_lv0.tolist()))
    np.testing.assert_array_equal(np.lexsort((xy[:, 1], xy[:, 0])), np.arange(len(xy)))

    regions = read_regions(path, slide=reader.info, named=("slide",))
    assert (regions.patch_size_lv0, regions.token_mask, regions.encoder) == (REGION, "tissue", "vit256")
    tissue = grid.token_keep_THW.reshape(-1, SIDE, 2, SIDE, 2).any(axis=(2, 4)).reshape(-1, 16)
    by_coords = {tuple(xy): keep for xy, keep in zip(grid.coords_lv0.tolist(), tissue, strict=True)}
    for xy, keep in zip(regions.coords_T2.tolist(), regions.keep_TN, strict=True):
        np.testing.assert_array_equal(keep, by_coords[tuple(xy)])
    again = encode_stored_regions(regions, model, batch_size=3)
    encoded = encode_regions(reader, grid, model)
    torch.testing.assert_close(again.embeddings_TC, encoded.embeddings_TC, rtol=1e-5, atol=1e-5)
    assert torch.equal(again.keep_HW, encoded.keep_HW)
    rows, columns, keep_HW = grid_cells(regions)
    assert (keep_HW == grid.keep_HW).all()
    assert len(rows) == len(columns) == grid.kept_tiles


def test_features_of_regions_that_do_not_fit_are_refused(reader: SlideReader, model: HIPT, tmp_path: Path) -> None:
    path = stored(tmp_path, reader, laid(reader, "tissue"), model)
    held = torch.load(path, weights_only=True)
    for broken, message in (
        (held[1:], "coordinates of each region"),
        (held[:, :15], "must be \\(regions, n·n patches, channels\\)"),
        (held[:, 0], "those of tiles are in tile_embeddings"),
        (torch.where(held == held[0, 5, 3], torch.nan, held), "must be finite"),
    ):
        torch.save(broken.clone(), path)
        with pytest.raises(SlideError, match=message):
            read_regions(path)
    torch.save(held, path)
    with pytest.raises(SlideError, match="must be of the slide 'another', got one of 'slide'"):
        read_regions(path, named=("another",))
    with pytest.raises(SlideError, match="got no file"):
        read_regions(path.with_name("gone.pt"))
    with (
        pytest.raises(ValueError, match="2 × 2 patches or more in a square, got 15"),
        writing_regions(tmp_path, header_of(reader, laid(reader, "tissue")), 15, 48),
    ):
        pass


def test_a_slide_without_tissue_has_no_regions(tmp_path: Path) -> None:
    white = write_slide(tmp_path / "white.tiff", np.full((420, 560, 3), 244, np.uint8))
    with SlideReader(white) as reader, pytest.raises(SlideError, match="got no region of 128 px with any"):
        laid(reader, "tissue")


def test_one_region_is_held_at_a_time(reader: SlideReader, model: HIPT, monkeypatch: pytest.MonkeyPatch) -> None:
    held = lengths_given_to(HIPT, "cut", monkeypatch)
    grid = laid(reader, "tissue")
    done: list[tuple[int, int]] = []
    encode_regions(reader, grid, model, on_region=lambda *told: done.append(told))
    assert held == [1] * grid.kept_tiles
    assert done == [(row + 1, grid.kept_tiles) for row in range(grid.kept_tiles)]
