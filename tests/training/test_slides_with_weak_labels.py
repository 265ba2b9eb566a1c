"""An encoder is fine-tuned on tiles of slides: what is drawn, what is left out, and what a slide is said to be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("timm")
pytest.importorskip("pytorch_lightning")
pytest.importorskip("openslide")

import timm
from safetensors.torch import load_file, save_file
from small_cohorts import read_table, write_table
from small_slides import tissue_image, write_slide
from typer.testing import CliRunner, Result

from maskattn.cli.app import app
from maskattn.errors import SlideError
from maskattn.evaluation.splits import Split
from maskattn.nn.encoders import load_encoder
from maskattn.nn.slide_models.folder import load_two_stages
from maskattn.slide.reader import SlideReader
from maskattn.training.bags import Draw
from maskattn.training.cohort import Cohort
from maskattn.training.settings import TrainSettings
from maskattn.training.slide_tile_data import SlideTileDataset, bags_of
from maskattn.training.slide_tiles import LaidSlides
from maskattn.training.train_tiles import train_tiles
from maskattn.training.weak_labels import labelled_slides, with_tiles

NAME = "timm:vit_tiny_patch16_224"


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five slides of four patients and two classes, a file that is none, their labels, and weights."""
    root = tmp_path_factory.mktemp("weak")
    (root / "slides").mkdir()
    rows = []
    for index, (patient, grade) in enumerate(
        [("p0", "low"), ("p1", "high"), ("p2", "low"), ("p3", "high"), ("p0", "low")]
    ):
        image = tissue_image(seed=index).astype(int) - (40 if grade == "high" else 0)
        write_slide(root / "slides" / f"s{index}.tiff", np.clip(image, 0, 255).astype(np.uint8))
        rows.append({"slide_id": f"s{index}", "patient_id": patient, "grade": grade})
    (root / "slides" / "broken.tiff").write_bytes(b"no slide")
    rows.append({"slide_id": "broken", "patient_id": "p9", "grade": "high"})
    write_table(root / "labels.csv", rows)
    save_file(timm.create_model("vit_tiny_patch16_224", num_classes=0).state_dict(), root / "tiny.safetensors")
    return root


def settings_of(lab: Path, **changed: Any) -> TrainSettings:
    files = {"slides": lab / "slides", "labels": lab / "labels.csv", "weights": lab / "tiny.safetensors"}
    given = {"stage": "tile", "encoder": NAME, "target": "grade", "spacing_um": 1.0, "patch_px": 64, "device": "cpu"}
    small = {"token_mask": "tissue", "tiles_per_slide": 2, "validation_tiles": 2, "batch_size": 3, "epochs": 2}
    return TrainSettings(**{**files, **given, **small, **changed})


@pytest.fixture(scope="module")
def laid(lab: Path) -> tuple[Cohort, LaidSlides]:
    settings = settings_of(lab)
    return with_tiles(*labelled_slides(settings), settings)


def maskattn(lab: Path, *arguments: object) -> Result:
    files = ("--slides", lab / "slides", "--labels", lab / "labels.csv", "--weights", lab / "tiny.safetensors")
    tile = ("--stage", "tile", "--encoder", NAME, "--target", "grade", "--device", "cpu")
    return CliRunner().invoke(app, ["train", *(str(one) for one in (*tile, *files, *arguments))])


def test_a_slide_that_cannot_be_read_is_left_out_and_the_others_are_learnt_from(lab: Path, tmp_path: Path) -> None:
    (tmp_path / "split.csv").write_text("train,val,test\np0,p2,\np1,p3,\n")
    out = tmp_path / "run"
    geometry = ("--spacing-um", 1, "--patch-size", 64, "--token-mask", "tissue", "--freeze", 10)
    few = ("--tiles-per-slide", 2, "--validation-tiles", 2, "--epochs", 1, "--split", tmp_path / "split.csv")
    result = maskattn(lab, *geometry, *few, "--out", out)
    assert result.exit_code == 0, result.output
    assert "1 slides cannot be used and are left out (broken)" in result.stderr
    (row,) = read_table(out / "left_out.csv")
    assert row["slide_id"] == "broken"
    assert "broken.tiff" in row["reason"]
    assert {one["PATIENT"] for one in read_table(out / "patient-preds.csv")} == {"p2", "p3"}
    model = load_two_stages(out, load_encoder(NAME, weights=out / "encoder.safetensors"))
    assert model.card.classes == ("high", "low")
    assert (model.card.patch_px, model.card.spacing_um, model.card.task) == (64, 1.0, "binary")
    assert model.card.trained_on.startswith("5 slides, each tile with the label of its slide")
    before, after = load_file(lab / "tiny.safetensors"), load_file(out / "encoder.safetensors")
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved
    assert all(name.startswith(("blocks.10.", "blocks.11.", "norm.")) for name in moved)


def test_tiles_lie_over_the_tissue_and_tokens_on_glass_take_no_part(laid: tuple[Cohort, LaidSlides]) -> None:
    tiles = laid[1].tiles["s0"]
    assert len(tiles) > 8
    with SlideReader(tiles.path) as reader:
        for row in (0, len(tiles) // 2):
            pixels, keep = tiles.read(reader, row), tiles.keep(row)
            assert pixels.shape == (3, 224, 224)
            assert keep.shape == (14, 14)
            dark = (pixels.float().mean(0) < 225).reshape(14, 16, 14, 16).float().mean((1, 3)) > 0.5
            assert float((keep == dark).float().mean()) > 0.85
    shares = torch.stack([tiles.keep(row).float().mean() for row in range(len(tiles))])
    assert 0 < float(shares.min()) < 1 == float(shares.max())


def test_what_is_drawn_depends_on_seed_epoch_and_slide_alone(laid: tuple[Cohort, LaidSlides]) -> None:
    cohort, tiles = laid[0], laid[1].tiles
    data = SlideTileDataset(cohort.cases, tiles, "early", 3, seed=1, drop=0.2)
    alone = SlideTileDataset(cohort.cases[1:2], tiles, "early", 3, seed=1, drop=0.2)
    assert (len(data), len(alone)) == (15, 3)
    (slide,) = cohort.cases[1].slides
    drawn = [tuple(data.rows(slide, epoch)) for epoch in range(6)]
    assert len(set(drawn)) > 1
    assert drawn == [tuple(alone.rows(slide, epoch)) for epoch in range(6)]
    first = 3 * len(cohort.cases[0].slides)
    one, other = data[Draw(first + 1, 4)], alone[Draw(1, 4)]
    assert torch.equal(one.pixels_3XY, other.pixels_3XY)
    assert torch.equal(one.keep_HW, other.keep_HW)
    assert one.truth == other.truth == cohort.cases[1].truth
    assert drawn != [tuple(SlideTileDataset(cohort.cases, tiles, "early", 3, 2).rows(slide, e)) for e in range(6)]


def test_validation_reads_all_tiles_or_some_evenly_spread(laid: tuple[Cohort, LaidSlides]) -> None:
    cohort, tiles = laid[0], laid[1].tiles
    assert len(SlideTileDataset(cohort.cases, tiles, "early", None)) == sum(map(len, tiles.values()))
    some = SlideTileDataset(cohort.cases, tiles, "early", 3)
    assert list(some.rows("s0", 0)) == [0, (len(tiles["s0"]) - 1) // 2, len(tiles["s0"]) - 1]
    assert [some[Draw(index, 0)].index for index in range(len(some))] == [*[0] * 6, *[1] * 3, *[2] * 3, *[3] * 3]


def test_slides_of_a_patient_are_joined_as_asked(laid: tuple[Cohort, LaidSlides]) -> None:
    cases = laid[0].cases
    assert bags_of(cases, "early")[0] == (0, ("s0", "s4"))
    assert bags_of(cases, "late")[:3] == [(0, ("s0",)), (0, ("s4",)), (1, ("s1",))]


def test_a_slide_is_said_to_be_what_the_linear_layer_says_of_its_tiles_mean(
    lab: Path, laid: tuple[Cohort, LaidSlides], tmp_path: Path
) -> None:
    settings, split = settings_of(lab, epochs=1, freeze=12), Split(("p1", "p2"), ("p0", "p3"))
    cohort, found = with_tiles(*labelled_slides(settings), settings)
    run = train_tiles(settings, cohort, split, tmp_path / "run", laid=found)
    encoder = load_encoder(NAME, weights=tmp_path / "run" / "encoder.safetensors")
    model = load_two_stages(tmp_path / "run", encoder)
    data = SlideTileDataset(cohort.of(split.validation), found.tiles, "early", 2)
    items = [data[Draw(index, 0)] for index in range(len(data))]
    with torch.no_grad():
        features = encoder.encode_tiles(
            torch.stack([one.pixels_3XY for one in items]), torch.stack([one.keep_HW for one in items])
        )
        bag = torch.tensor([one.index for one in items])
        logits = torch.stack([model.head(features[bag == index], None, None) for index in (0, 1)])
    assert run.validation.scores_PK == pytest.approx((logits.double() / run.temperature).softmax(1).numpy(), abs=1e-5)


def test_a_training_that_was_interrupted_ends_bit_by_bit_as_an_undisturbed_one(lab: Path, tmp_path: Path) -> None:
    class Interrupted:
        def looked_through(self, slide_id: str, done: int, slides: int) -> None:
            pass

        def batch_done(self, epoch: int, done: int, batches: int) -> None:
            if epoch == 1 and done == 1:
                raise KeyboardInterrupt

        def epoch_done(self, row: dict[str, float], best: bool) -> None:
            pass

    settings = settings_of(lab, freeze=11, drop_tokens=0.2)

    def run(out: Path, progress: Any = None) -> None:
        cohort, found = with_tiles(*labelled_slides(settings), settings)
        train_tiles(settings, cohort, Split(("p0", "p1"), ("p2", "p3")), out, laid=found, progress=progress)

    run(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "halved", Interrupted())
    assert not (tmp_path / "halved" / "model.safetensors").exists()
    run(tmp_path / "halved")
    for name in ("encoder.safetensors", "model.safetensors", "patient-preds.csv"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "halved" / name).read_bytes(), name


def test_a_tile_that_cannot_be_decoded_is_replaced_by_the_next(
    laid: tuple[Cohort, LaidSlides], monkeypatch: pytest.MonkeyPatch
) -> None:
    tiles, read = laid[1].tiles["s1"], SlideReader.read_region
    bad = {tuple(tiles.coords_lv0[0].tolist())}

    def torn(self: SlideReader, x: int, y: int, *more: Any, **named: Any) -> np.ndarray:
        if (x, y) in bad:
            raise SlideError("a region must be readable, got a torn one")
        return read(self, x, y, *more, **named)

    whole = SlideTileDataset(laid[0].cases[1:2], laid[1].tiles, "early", None)
    second = whole[Draw(1, 0)]
    monkeypatch.setattr(SlideReader, "read_region", torn)
    assert torch.equal(whole[Draw(0, 0)].pixels_3XY, second.pixels_3XY)
    bad |= {tuple(corner) for corner in tiles.coords_lv0.tolist()}
    with pytest.raises(SlideError, match=r"got .*s1\.tiff: a region must be readable, got a torn one; leave"):
        whole[Draw(0, 0)]


def test_too_few_readable_slides_of_a_class_are_told(lab: Path, tmp_path: Path) -> None:
    lines = (lab / "labels.csv").read_text().splitlines()
    (tmp_path / "few.csv").write_text("\n".join(line for line in lines if not line.startswith("s3")))
    settings = settings_of(lab, labels=tmp_path / "few.csv", skip_missing=True)
    with pytest.raises(
        ValueError, match=r"2 patients or more .* got 1 of high, with 1 slides left out \(broken\); broken"
    ):
        with_tiles(*labelled_slides(settings), settings)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("--features", "."), "--stage tile reads --slides and their --labels, got features in addition"),
        (("--patches", "."), "got patches in addition; leave them out"),
        (("--task", "regression"), "an encoder learns classes from slides, got --task regression"),
        (("--target", "stage"), "must have the column 'stage'"),
        ((), "was trained is unknown"),
        (("--stage", "slide"), "a slide model reads --features"),
        (("--slides", "nowhere"), "nowhere"),
    ],
)
def test_what_does_not_fit_is_refused_in_a_sentence(lab: Path, tmp_path: Path, more: Any, words: str) -> None:
    result = maskattn(lab, *more, "--out", tmp_path / "run")
    assert result.exit_code == 2
    assert words in result.stderr
    assert not (tmp_path / "run" / "state").exists()


def test_slides_need_labels_and_patches_take_nothing_of_slides(lab: Path, tmp_path: Path) -> None:
    base = ["train", "--stage", "tile", "--encoder", NAME, "--out", str(tmp_path / "run")]
    result = CliRunner().invoke(app, [*base, "--slides", str(lab / "slides")])
    assert "got no --labels and --target" in result.stderr
    result = CliRunner().invoke(app, [*base, "--patches", str(lab), "--tiles-per-slide", "4", "--patch-size", "64"])
    assert "--stage tile reads --patches, got tiles_per_slide, patch_px in addition" in result.stderr
    result = maskattn(
        lab, "--labels", write_table(tmp_path / "l.csv", [{"slide_id": "s0", "grade": 1}]), "--out", tmp_path
    )
    assert "have a slide file and no row of labels" in result.stderr
