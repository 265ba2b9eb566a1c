"""One slide: every output, its figures, and what is left out of them."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from PIL import Image
from runs import OUTPUTS, names
from slides import damage_tile, write_pyramid
from small_slides import SHAPE, small_model, tissue_image, write_slide

from maskattn.explain.hierarchical import HierarchicalCDAM
from maskattn.nn.slide_model import SlideModel
from maskattn.slide.grid import make_grid
from maskattn.slide.layouts import read_features
from maskattn.slide.manifest import SlideJob
from maskattn.slide.pipeline import predict_slide
from maskattn.slide.prediction import read_prediction
from maskattn.slide.reader import SlideReader
from maskattn.slide.request import RunSettings
from maskattn.slide.run import run_slides
from maskattn.slide.slide_run import Stages
from maskattn.slide.stream import stream_tiles
from maskattn.slide.tissue import find_tissue

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def finished(model: SlideModel, slide: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The outputs of one slide, tokens included, for tests that only read them."""
    out = tmp_path_factory.mktemp("finished")
    (outcome,) = run_slides([SlideJob("disc", slide)], model, RunSettings(out, batch_size=8, tokens=True))
    assert outcome.status == "ok", outcome.reason
    return out / "disc"


def by_hand(model: SlideModel, slide: Path) -> dict[str, object]:
    """The same slide through the same modules in one batch."""
    with SlideReader(slide) as reader:
        grid = make_grid(reader.info, find_tissue(reader), tile_px=64, token_px=16, spacing_um=1.0)
        (batch,) = stream_tiles(reader, grid, batch_size=1000)
    keep = torch.from_numpy(grid.token_keep_THW)
    with torch.no_grad():
        embeddings = model.encode_tiles(batch.tiles_BCHW, keep)
        logits = model(embeddings, torch.from_numpy(grid.keep_HW))
    explain = HierarchicalCDAM(model)
    tiles = explain.tiles(embeddings, torch.from_numpy(grid.keep_HW))
    tokens = explain.tokens(batch.tiles_BCHW, keep, tiles.gradient_KTC)
    return {"grid": grid, "embeddings": embeddings, "logits": logits, "tiles": tiles, "tokens": tokens}


def test_slide_gives_every_output_and_its_figures(finished: Path, model: SlideModel, slide: Path) -> None:
    assert names(finished) == OUTPUTS
    assert names(finished.parent) == {"disc", "summary.csv"}
    hand = by_hand(model, slide)
    prediction = read_prediction(finished / "prediction.json")
    np.testing.assert_allclose(list(prediction.logits.values()), hand["logits"], rtol=1e-4, atol=1e-5)
    assert sum(prediction.scores.values()) == pytest.approx(1)
    assert prediction.prediction == max(prediction.scores, key=prediction.scores.__getitem__)
    assert prediction.model.demonstration
    assert prediction.model.sha256 == model.identity()[:16]
    grid = hand["grid"]
    counts = prediction.counts
    assert (counts.cells, counts.kept_tiles, counts.kept_tokens) == (grid.cells, grid.kept_tiles, grid.kept_tokens)
    assert counts.skipped_tokens == grid.skipped_tokens > 0
    assert counts.unreadable_tiles == 0
    stages = {"open", "tissue", "grid", "read", "encode", "slide", "check", "tokens", "write"}
    assert set(prediction.timings_s) == stages


def test_tables_hold_the_embeddings_and_the_raw_relevance(finished: Path, model: SlideModel, slide: Path) -> None:
    hand = by_hand(model, slide)
    table = read_features(finished / "features.h5")
    assert (table.layout, table.patch_size_lv0, table.token_mask) == ("trident", 64, "tissue")
    np.testing.assert_array_equal(table.coords_T2, hand["grid"].coords_lv0)
    np.testing.assert_allclose(table.features_TC, hand["embeddings"], rtol=1e-4, atol=1e-5)
    with h5py.File(finished / "relevance.h5") as file:
        assert [name.decode() for name in file["classes"]] == ["benign", "low/high"]
        for name, expected in {
            "tiles/relevance": hand["tiles"].relevance_KT,
            "tiles/attention": hand["tiles"].attention_T,
            "tokens/relevance": hand["tokens"].relevance_KBHW,
            "tokens/attention": hand["tokens"].attention_BHW,
        }.items():
            np.testing.assert_allclose(file[name], expected, rtol=1e-3, atol=1e-5, err_msg=name)
        keep = file["tokens/keep"][:]
        np.testing.assert_array_equal(keep, hand["grid"].token_keep_THW)
        assert not file["tokens/relevance"][:][:, ~keep].any()
        assert not file["tokens/attention"][:][~keep].any()


@pytest.mark.parametrize("name", ["heatmap_benign.png", "heatmap_low_high.png", "attention.png"])
def test_glass_is_untouched_in_every_heat_map(finished: Path, model: SlideModel, slide: Path, name: str) -> None:
    with Image.open(finished / name) as image:
        body = np.asarray(image)[-SHAPE[0] :, : SHAPE[1]]
    grid = by_hand(model, slide)["grid"]
    kept = np.zeros((-(-SHAPE[0] // 64) * 64, -(-SHAPE[1] // 64) * 64), dtype=bool)
    for (x, y), tokens in zip(grid.coords_lv0, grid.token_keep_THW, strict=True):
        kept[y : y + 64, x : x + 64] = np.kron(tokens, np.ones((16, 16), dtype=bool))
    kept = kept[: SHAPE[0], : SHAPE[1]]
    changed = (body != tissue_image()).any(axis=2)
    assert not changed[~kept].any()
    assert changed[kept].mean() > 0.9


def test_stage_within_a_stage_is_not_counted_twice() -> None:
    stages = Stages(torch.device("cpu"))
    start = time.perf_counter()
    with stages("outer"):
        time.sleep(0.02)
        with stages("inner"):
            time.sleep(0.05)
        time.sleep(0.02)
    assert stages.seconds["inner"] >= 0.05
    assert stages.seconds["outer"] >= 0.04
    assert sum(stages.seconds.values()) <= time.perf_counter() - start


def test_gpu_is_at_work_on_a_batch_while_the_next_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []

    class Event:
        def record(self, stream: str) -> None:
            self.batch = stream

        def synchronize(self) -> None:
            told.append(f"wait for {self.batch}")

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _: told.append("wait for all"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: f"what batch {batch} asked for")
    stages = Stages(torch.device("cuda"))
    for batch in range(3):
        with stages("encode", runs_ahead=True):
            told.append(f"batch {batch}")
    assert told[:3] == ["batch 0", "batch 1", "wait for what batch 0 asked for"]
    assert told[3:] == ["batch 2", "wait for what batch 1 asked for"]
    with stages("slide"):
        pass
    assert told[5:] == ["wait for all"]


def test_without_tokens_the_map_is_of_tiles(model: SlideModel, slide: Path, settings: RunSettings) -> None:
    prediction = predict_slide(SlideJob("disc", slide), model, replace(settings, out_dir=settings.out_dir.parent))
    folder = settings.out_dir.parent / "disc"
    assert names(folder) == OUTPUTS
    with h5py.File(folder / "relevance.h5") as file:
        assert "tokens" not in file
    assert "tokens" not in prediction.timings_s


def test_batch_size_does_not_change_the_result(model: SlideModel, slide: Path, tmp_path: Path) -> None:
    one, many = (
        run_slides([SlideJob("s", slide)], model, RunSettings(tmp_path / str(size), batch_size=size))[0].prediction
        for size in (1, 100)
    )
    assert one is not None
    assert many is not None
    assert one.logits == pytest.approx(many.logits, rel=1e-4)


def test_no_mask_attends_to_every_token_of_the_slide(model: SlideModel, slide: Path, settings: RunSettings) -> None:
    (outcome,) = run_slides([SlideJob("disc", slide)], model, replace(settings, masked=False))
    assert outcome.prediction is not None
    counts = outcome.prediction.counts
    assert (counts.kept_tiles, counts.skipped_tokens) == (counts.cells, 0)


def test_damaged_tiles_are_left_out_and_counted(model: SlideModel, settings: RunSettings, tmp_path: Path) -> None:
    path = write_slide(tmp_path / "damaged.tiff")
    mask = np.zeros((42, 56), dtype=np.uint8)
    mask[6:36, 12:40] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    damage_tile(path, 9 * 3 + 4)
    job = SlideJob("damaged", path, mask_path=tmp_path / "mask.png")
    (outcome,) = run_slides([job], model, replace(settings, tokens=True))
    assert outcome.status == "ok", outcome.reason
    assert outcome.prediction is not None
    counts = outcome.prediction.counts
    assert counts.unreadable_tiles == 1
    with h5py.File(settings.out_dir / "damaged" / "relevance.h5") as file:
        coords = file["coords"][:].tolist()
        assert file["tokens/relevance"].shape[1] == len(coords) == counts.kept_tiles - 1
    assert [256, 192] not in coords
    assert [192, 192] in coords


def test_slide_of_unreadable_tiles_fails_with_its_reason(
    model: SlideModel, settings: RunSettings, tmp_path: Path
) -> None:
    path = write_pyramid(tmp_path / "damaged.tiff", tissue_image(), 1.0, downsamples=(8,), tile=64)
    for tile in range(-(-SHAPE[0] // 64) * -(-SHAPE[1] // 64)):
        damage_tile(path, tile)
    (outcome,) = run_slides([SlideJob("disc", path)], model, settings)
    assert outcome.status == "failed"
    assert "a slide must have tiles that can be read" in outcome.reason
    assert "unreadable" in outcome.reason
    assert names(settings.out_dir) == {"summary.csv"}


def test_scores_that_are_not_finite_fail_the_slide(slide: Path, settings: RunSettings) -> None:
    model = small_model()
    with torch.no_grad():
        model.slide_encoder.head.bias[0] = float("nan")
    (outcome,) = run_slides([SlideJob("a", slide)], model, settings)
    assert outcome.status == "failed"
    assert "finite" in outcome.reason


def test_prediction_is_plain_json(finished: Path) -> None:
    fields = json.loads((finished / "prediction.json").read_text())
    assert fields["model"]["classes"] == ["benign", "low/high"]
    assert fields["versions"]["torch"] == torch.__version__


@pytest.mark.parametrize("how", ["found", "mask", "no mask"])
def test_a_dark_slide_fails_unless_it_is_forced(
    model: SlideModel, settings: RunSettings, tmp_path: Path, how: str
) -> None:
    dark = write_pyramid(tmp_path / "dark.tif", 255 - tissue_image(), 1.0, downsamples=())
    mask = None
    if how == "mask":
        mask = tmp_path / "mask.png"
        Image.fromarray(np.full(SHAPE, 255, np.uint8)).save(mask)
    settings = replace(settings, masked=how != "no mask")
    (outcome,) = run_slides([SlideJob("dark", dark, mask_path=mask)], model, settings)
    assert outcome.status == "failed"
    assert "got a dark background" in outcome.reason
    assert "--force" in outcome.reason
    (outcome,) = run_slides([SlideJob("dark", dark, mask_path=mask)], model, replace(settings, force=True))
    assert outcome.status == "ok", outcome.reason
    assert outcome.prediction.settings["force"] is True
