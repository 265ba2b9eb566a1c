"""Maps averaged over overlapping tilings: equal to runs of moved slides, without seams where the model has none."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import shapely
import tifffile
import torch
from PIL import Image
from small_slides import SHAPE, tissue_image, write_slide
from torch import Tensor, nn

from maskattn.errors import ManifestError
from maskattn.nn.encoders.tile_encoder import EncoderCard, TileEncoder
from maskattn.nn.slide_model import SlideModel
from maskattn.nn.slide_models.card import ModelCard
from maskattn.nn.slide_models.head import SlideHead
from maskattn.nn.slide_models.two_stage import TwoStageModel
from maskattn.nn.vit import VisionTransformer
from maskattn.slide.manifest import SlideJob
from maskattn.slide.overlap import tilings_of
from maskattn.slide.prediction import SlidePrediction
from maskattn.slide.reader import SlideReader
from maskattn.slide.request import RunSettings
from maskattn.slide.run import run_slides

SIDE, TOKEN_PX = 4, 16


def run(job: SlideJob, model: SlideModel | TwoStageModel, settings: RunSettings) -> SlidePrediction:
    (outcome,) = run_slides([job], model, settings)
    assert outcome.status == "ok", outcome.reason
    assert outcome.prediction is not None
    return outcome.prediction


def on_the_slide(folder: Path, name: str, before: tuple[int, int] = (0, 0)) -> np.ndarray:
    """A class's map of tokens, or that of attention, by row and column of tokens of the slide; 0 where none is."""
    with h5py.File(folder / "relevance.h5") as table:
        coords, keep = table["coords"][:], table["tokens/keep"][:]
        if name == "attention":
            values = table["tokens/attention"][:] * table["tiles/attention"][:][:, None, None]
        else:
            values = table["tokens/relevance"][:][list(table["classes"].asstr()).index(name)]
    side = keep.shape[1]
    shown = np.zeros((30 + side, 40 + side), np.float64)
    for (x, y), kept, value in zip(coords // TOKEN_PX, keep, values, strict=True):
        shown[y : y + side, x : x + side] = np.where(kept, value, 0)
    return shown[before[1] :, before[0] :][:27, :35]


def padded(folder: Path, before: tuple[int, int]) -> SlideJob:
    """The slide and its mask, shifted right and down by so many tokens."""
    folder.mkdir()
    by = ((before[1] * TOKEN_PX, 0), (before[0] * TOKEN_PX, 0))
    image = np.pad(tissue_image(), (*by, (0, 0)), constant_values=255)
    rows, columns = np.mgrid[: SHAPE[0], : SHAPE[1]]
    mask = np.pad((rows - 210) ** 2 + (columns - 260) ** 2 < 115**2, by)
    Image.fromarray(mask.astype(np.uint8)).save(folder / "mask.png")
    return SlideJob("disc", write_slide(folder / "disc.tiff", image), mask_path=folder / "mask.png")


def test_tilings_begin_on_tokens_and_cover_each_alike() -> None:
    assert tilings_of(0.0, 8) == [(0, 0)]
    assert tilings_of(0.5, 8) == [(0, 0), (4, 0), (0, 4), (4, 4)]
    assert len(tilings_of(0.75, 8)) == 16
    assert tilings_of(0.667, 3)[:3] == [(0, 0), (1, 0), (2, 0)]
    with pytest.raises(ManifestError, match=r"got --overlap 0\.3; use one of 0, 0\.5, 0\.75, 0\.875"):
        tilings_of(0.3, 8)


@pytest.mark.parametrize("overlap", [0.5, 0.75])
def test_the_map_is_the_mean_of_runs_of_the_moved_slide(model: SlideModel, tmp_path: Path, overlap: float) -> None:
    settings = RunSettings(tmp_path / "out", batch_size=8, tokens=True)
    tilings = tilings_of(overlap, SIDE)
    runs = []
    for index, before in enumerate(tilings):
        job = padded(tmp_path / f"s{index}", before)
        runs.append(run(job, model, replace(settings, out_dir=tmp_path / f"r{index}")))
    found = run(padded(tmp_path / "s", (0, 0)), model, replace(settings, overlap=overlap))
    folder = settings.out_dir / "disc"
    for name in ("benign", "low/high", "attention"):
        each = [on_the_slide(tmp_path / f"r{k}" / "disc", name, before) for k, before in enumerate(tilings)]
        expected, shown = np.mean(each, axis=0), on_the_slide(folder, name)
        np.testing.assert_allclose(shown, expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max())
        assert np.abs(shown - each[0]).max() > 0.02 * np.abs(expected).max()
    assert found.scores == pytest.approx(runs[0].scores)
    assert found.counts == runs[0].counts
    for name in found.scores:
        of_map, of_runs = found.maps[name], [one.maps[name] for one in runs]
        scores = [one.scores[name] for one in runs]
        assert of_map["tilings"] == len(tilings)
        assert (of_map["lowest_score"], of_map["highest_score"]) == pytest.approx((min(scores), max(scores)), abs=1e-4)
        for key in ("score_less_baseline", "on_class_token", "sum_of_tiles"):
            assert of_map[key] == pytest.approx(np.mean([one[key] for one in of_runs]), rel=1e-3, abs=1e-4)
        assert of_map["on_no_tile"] == 0  # every kept token lies in a tile of every tiling
        parts = sum(of_map[key] for key in ("sum_of_tiles", "on_class_token", "on_no_tile", "gap"))
        assert parts == pytest.approx(of_map["score_less_baseline"], abs=1e-5)


class Sum(SlideHead):
    """Logits that are sums over tiles, without any regard to where they lie."""

    kind = "sum"

    def __init__(self, in_dim: int) -> None:
        super().__init__(in_dim, 2)
        self.weights = nn.Linear(in_dim, 2, bias=False)

    def arguments(self) -> dict[str, Any]:
        return {"in_dim": self.in_dim}

    def logits(self, embeddings_TC: Tensor, coords_um_T2: Tensor | None, grid: Any) -> Tensor:
        return self.weights(embeddings_TC).sum(dim=0)

    def attention(self, embeddings_TC: Tensor, coords_um_T2: Tensor | None = None, grid: Any = None) -> Tensor:
        return embeddings_TC.new_full((1, len(embeddings_TC)), 0.01)


def summing_model(seam: float = 0.0) -> TwoStageModel:
    """A token's share of the score depends on its own pixels alone: even attention, no norm after it, a sum at the end.

    A seam adds so much to what the tokens of a tile's first column say.
    """
    torch.manual_seed(0)
    vit = VisionTransformer(img_size=64, embed_dim=24, depth=1, num_heads=2)
    block = vit.blocks[0]
    nn.init.zeros_(vit.pos_embed)
    nn.init.normal_(block.attn.qkv.weight, std=0.2)
    nn.init.zeros_(block.attn.qkv.weight[:48].detach())  # queries and keys
    nn.init.normal_(block.attn.proj.weight, std=0.2)
    nn.init.zeros_(block.mlp.fc2.weight)
    vit.norm = nn.Identity()
    vit.pos_embed.data[0, 1::4] = seam * torch.linspace(-1, 1, 24)
    card = EncoderCard("plain", "token", (0.5,) * 3, (0.25,) * 3, 64, 64, 1.0)
    about = ModelCard(name="sum", kind="sum", classes=("a", "b"), tile_px=64, patch_px=64, spacing_um=1.0)
    return TwoStageModel(Sum(24), replace(about, token_mask="none"), TileEncoder(vit.eval(), card)).eval()


def test_a_model_without_seams_has_the_same_map_with_overlap(tmp_path: Path) -> None:
    slide = write_slide(tmp_path / "disc.tiff")
    job, model = SlideJob("disc", slide), summing_model()
    settings = RunSettings(tmp_path / "plain", batch_size=8, tokens=True, method="cdam", check=False)
    run(job, model, settings)
    found = run(job, model, replace(settings, out_dir=tmp_path / "over", overlap=0.5))
    rows, columns = np.mgrid[:27, :35] * TOKEN_PX + TOKEN_PX / 2
    # Where a tile of every tiling holds enough tissue.
    well_inside = (rows - 210) ** 2 + (columns - 260) ** 2 < 60**2
    assert well_inside.sum() > 30
    for name in ("a", "b"):
        plain, over = (on_the_slide(tmp_path / where / "disc", name) for where in ("plain", "over"))
        np.testing.assert_allclose(over[well_inside], plain[well_inside], rtol=1e-4, atol=1e-5 * np.abs(plain).max())
        assert np.abs(plain[well_inside]).min() > 0
        assert found.maps[name]["tilings"] == 4


def test_a_seam_between_tiles_shrinks(tmp_path: Path) -> None:
    image = np.full((512, 512, 3), (200, 110, 160), np.uint8)
    slide, model = write_slide(tmp_path / "even.tiff", image), summing_model(seam=1.0)
    settings = RunSettings(tmp_path / "out", batch_size=8, tokens=True, masked=False, check=False, method="cdam")
    spreads = []
    for overlap in (0.0, 0.5, 0.75):
        out = tmp_path / f"o{overlap}"
        run(SlideJob("even", slide), model, replace(settings, out_dir=out, overlap=overlap))
        spreads.append(on_the_slide(out / "even", "a")[4:24, 4:24].std())
    # On a slide of one colour the seam, one column in four, is all that there is to see: p, then two columns of p / 2.
    assert spreads[1] == pytest.approx(spreads[0] * np.std([1, 0, 1, 0]) / np.std([2, 0, 0, 0]), rel=1e-3)
    assert spreads[2] < 1e-4 * spreads[0]


def test_every_output_has_the_averaged_map(model: SlideModel, tmp_path: Path, settings: RunSettings) -> None:
    slide = write_slide(tmp_path / "disc.tiff")
    asked = replace(settings, tokens=True, overlap=0.5, geojson="tokens", ome_tiff="values")
    run(SlideJob("disc", slide), model, asked)
    folder = settings.out_dir / "disc"
    shown = on_the_slide(folder, "benign")
    pyramid = tifffile.imread(folder / "heatmap_benign.ome.tiff")[8::16, 8::16]
    np.testing.assert_array_equal(np.nan_to_num(pyramid)[:26, :35], shown[:26].astype(np.float32))
    for one in json.loads((folder / "relevance.geojson").read_text())["features"]:
        centre = shapely.geometry.shape(one["geometry"]).centroid
        expected = shown[int(centre.y // TOKEN_PX), int(centre.x // TOKEN_PX)]
        assert one["properties"]["measurements"]["relevance: benign"] == pytest.approx(expected, rel=1e-4, abs=1e-7)
    assert (folder / "heatmap_benign.png").exists()
    assert not [
        path.name for path in folder.iterdir() if path.suffix not in (".h5", ".png", ".json", ".geojson", ".tiff")
    ]


def test_a_finished_slide_serves_where_its_tiles_overlap_alike(
    model: SlideModel, tmp_path: Path, settings: RunSettings
) -> None:
    job, asked = SlideJob("disc", write_slide(tmp_path / "disc.tiff")), replace(settings, tokens=True, overlap=0.5)
    assert run(job, model, asked).settings["overlap"] == 0.5
    (again,) = run_slides([job], model, asked)
    assert again.status == "skipped"
    (other,) = run_slides([job], model, replace(asked, overlap=0.0))
    assert "got overlap: 0.5" in other.reason
    seen = []

    class Progress:
        def slide_started(self, job: SlideJob) -> None: ...
        def slide_ended(self, outcome: Any) -> None: ...
        def tiles_done(self, done: int, total: int) -> None:
            seen.append((done, total))

    run_slides([job], model, replace(asked, overwrite=True), Progress())
    assert all(done <= total for done, total in seen)
    assert seen[-1][0] >= 0.8 * seen[0][1]


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"overlap": 0.5}, "--overlap averages maps of tokens, got --overlap 0.5 without --tokens"),
        ({"overlap": 0.5, "tokens": True, "features_dir": Path()}, "got --overlap 0.5 with --features ."),
        ({"overlap": 0.4, "tokens": True}, "tiles with 4 tokens along a side must be shifted"),
    ],
)
def test_impossible_overlaps_are_refused(
    model: SlideModel, tmp_path: Path, settings: RunSettings, asked: dict[str, Any], words: str
) -> None:
    slide = write_slide(tmp_path / "disc.tiff")
    with pytest.raises(ManifestError) as refusal:
        run_slides([SlideJob("disc", slide)], model, replace(settings, **asked))
    assert words in str(refusal.value)
    with SlideReader(slide) as reader:
        assert reader.info.width_px == SHAPE[1]
    assert not settings.out_dir.exists()
