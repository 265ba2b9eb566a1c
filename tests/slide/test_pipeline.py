from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from PIL import Image
from slides import damage_tile, write_pyramid
from small_slides import SHAPE, small_model, tissue_image, write_slide

from maskattn.errors import OutputError, SlideError
from maskattn.explain.hierarchical import HierarchicalCDAM
from maskattn.nn.slide_model import SlideModel
from maskattn.slide import outputs
from maskattn.slide.grid import make_grid
from maskattn.slide.manifest import SlideJob, collect_jobs
from maskattn.slide.pipeline import RunSettings, predict_slide
from maskattn.slide.prediction import SlideOutcome, read_prediction
from maskattn.slide.reader import SlideReader
from maskattn.slide.run import run_slides
from maskattn.slide.slide_run import Stages
from maskattn.slide.stream import stream_tiles
from maskattn.slide.summary import read_summary
from maskattn.slide.tables import read_features
from maskattn.slide.tissue import find_tissue

OUTPUTS = {
    *("attention.png", "features.h5", "heatmap_benign.png", "heatmap_low_high.png", "prediction.json", "relevance.h5")
}


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Small work is quickest on one thread, all the more on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def model() -> SlideModel:
    return small_model()


@pytest.fixture(scope="module")
def slide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_slide(tmp_path_factory.mktemp("slides") / "disc.tiff")


@pytest.fixture
def settings(tmp_path: Path) -> RunSettings:
    return RunSettings(tmp_path / "out", batch_size=8)


def names(folder: Path) -> set[str]:
    return {entry.name for entry in folder.iterdir()}


def statuses(outcomes: list[SlideOutcome]) -> dict[str, str]:
    return {outcome.slide_id: outcome.status for outcome in outcomes}


class Stop:
    """Progress that does something at a slide's first batch of tiles."""

    def __init__(self, slide_id: str, action: object) -> None:
        self.slide_id, self.action, self.current = slide_id, action, ""
        self.summaries: list[dict[str, str]] = []
        self.out: Path | None = None

    def slide_started(self, job: SlideJob) -> None:
        self.current = job.slide_id

    def tiles_done(self, done: int, total: int) -> None:
        assert 0 < done <= total
        if self.current == self.slide_id:
            self.action()

    def slide_ended(self, outcome: SlideOutcome) -> None:
        if self.out is not None:
            rows = read_summary(self.out / "summary.csv")
            self.summaries.append({slide_id: row["status"] for slide_id, row in rows.items()})


@pytest.fixture(scope="module")
def finished(model: SlideModel, slide: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The outputs of one slide, tokens included; for tests that only look."""
    out = tmp_path_factory.mktemp("finished")
    (outcome,) = run_slides([SlideJob("disc", slide)], model, RunSettings(out, batch_size=8, tokens=True))
    assert outcome.status == "ok", outcome.reason
    return out / "disc"


def by_hand(model: SlideModel, slide: Path) -> dict[str, object]:
    """The same slide through the same rooms in one batch."""
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


def test_slide_gives_every_output_and_the_numbers_of_its_parts(finished: Path, model: SlideModel, slide: Path) -> None:
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
    stages = {"open", "tissue", "grid", "read", "encode", "slide", "tokens", "write"}
    assert set(prediction.timings_s) == stages


def test_tables_hold_the_embeddings_and_the_raw_relevance(finished: Path, model: SlideModel, slide: Path) -> None:
    hand = by_hand(model, slide)
    table = read_features(finished / "features.h5")
    assert (table.layout, table.tile_size) == ("trident", 64)
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
    model: SlideModel, slide: Path, settings: RunSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = SlideReader.read_region

    def broken(self: SlideReader, x: int, y: int, size: tuple[int, int], out: tuple[int, int]) -> np.ndarray:
        if size == (64, 64):
            raise SlideError("damaged")
        return whole(self, x, y, size, out)

    monkeypatch.setattr(SlideReader, "read_region", broken)
    (outcome,) = run_slides([SlideJob("disc", slide)], model, settings)
    assert outcome.status == "failed"
    assert "unreadable" in outcome.reason
    assert names(settings.out_dir) == {"summary.csv"}


def bad_jobs(folder: Path, slide: Path) -> list[SlideJob]:
    (folder / "text.svs").write_text("not a slide\n")
    write_slide(folder / "unspaced.tiff", spacing_um=None)
    write_slide(folder / "white.tiff", np.full((*SHAPE, 3), 245, dtype=np.uint8))
    Image.fromarray(np.full((30, 300), 255, dtype=np.uint8)).save(folder / "wrong.png")
    return [
        SlideJob("good", slide),
        SlideJob("text", folder / "text.svs"),
        SlideJob("unspaced", folder / "unspaced.tiff"),
        SlideJob("white", folder / "white.tiff"),
        SlideJob("mask", slide, mask_path=folder / "wrong.png"),
        *collect_jobs([folder / "missing.svs"]),
        SlideJob("implausible", slide, spacing_um=300.0),
        SlideJob("last", slide, spacing_um=1.0),
    ]


def test_each_broken_slide_fails_with_its_remedy_and_the_others_go_on(
    model: SlideModel, slide: Path, settings: RunSettings, tmp_path: Path
) -> None:
    outcomes = {o.slide_id: o for o in run_slides(bad_jobs(tmp_path, slide), model, settings)}
    assert [o.slide_id for o in outcomes.values() if o.status == "ok"] == ["good", "last"]
    for slide_id, words in {
        "text": "a text file that begins with",
        "unspaced": "--spacing-um",
        "white": "--mask",
        "mask": "300 × 30 px",
        "missing": "does not exist",
        "implausible": "300 from the manifest",
    }.items():
        assert outcomes[slide_id].status == "failed"
        assert words in outcomes[slide_id].reason
    rows = read_summary(settings.out_dir / "summary.csv")
    assert {slide_id: row["reason"] for slide_id, row in rows.items()} == {
        slide_id: outcome.reason for slide_id, outcome in outcomes.items()
    }
    assert names(settings.out_dir) == {"summary.csv", "good", "last"}


def test_override_of_the_spacing_outranks_manifest_and_file(
    model: SlideModel, slide: Path, settings: RunSettings
) -> None:
    job = SlideJob("disc", slide, spacing_um=0.9)
    (outcome,) = run_slides([job], model, replace(settings, spacing_um=0.8))
    assert outcome.prediction is not None
    assert (outcome.prediction.slide.spacing_um, outcome.prediction.slide.spacing_source) == (0.8, "override")


def test_summary_is_current_after_every_slide(model: SlideModel, slide: Path, settings: RunSettings) -> None:
    progress = Stop("", None)
    progress.out = settings.out_dir
    run_slides(
        [SlideJob("a", slide), SlideJob("b", slide, problem="no"), SlideJob("c", slide)], model, settings, progress
    )
    assert progress.summaries == [
        {"a": "ok"},
        {"a": "ok", "b": "failed"},
        {"a": "ok", "b": "failed", "c": "ok"},
    ]


def test_finished_slides_are_skipped_with_their_scores_and_others_stay_in_the_summary(
    model: SlideModel, slide: Path, settings: RunSettings
) -> None:
    run_slides([SlideJob("a", slide), SlideJob("b", slide)], model, settings)
    before = (settings.out_dir / "b" / "prediction.json").stat().st_mtime_ns
    outcomes = run_slides([SlideJob("b", slide), SlideJob("c", slide)], model, settings)
    assert statuses(outcomes) == {"b": "skipped", "c": "ok"}
    assert outcomes[0].prediction == read_prediction(settings.out_dir / "b" / "prediction.json")
    assert (settings.out_dir / "b" / "prediction.json").stat().st_mtime_ns == before
    rows = read_summary(settings.out_dir / "summary.csv")
    assert {slide_id: row["status"] for slide_id, row in rows.items()} == {"a": "ok", "b": "skipped", "c": "ok"}
    assert rows["b"]["score_benign"] == rows["c"]["score_benign"]


def test_overwrite_runs_again(model: SlideModel, slide: Path, settings: RunSettings) -> None:
    run_slides([SlideJob("a", slide)], model, settings)
    (settings.out_dir / "a" / "features.h5").write_text("old")
    (outcome,) = run_slides([SlideJob("a", slide)], model, replace(settings, overwrite=True))
    assert outcome.status == "ok"
    assert read_features(settings.out_dir / "a" / "features.h5").layout == "trident"
    assert names(settings.out_dir) == {"a", "summary.csv"}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"tokens": True}, "tokens: False"),
        ({"masked": False}, "masked: True"),
        ({"spacing_um": 0.5}, "spacing_um: 1.0"),
        ("model", "model: small"),
    ],
)
def test_outputs_of_another_request_are_not_passed_off_as_this_one(
    model: SlideModel, slide: Path, settings: RunSettings, change: object, words: str
) -> None:
    run_slides([SlideJob("a", slide)], model, settings)
    if isinstance(change, dict):
        settings = replace(settings, **change)
    else:
        model = small_model("other", seed=1)
    (outcome,) = run_slides([SlideJob("a", slide)], model, settings)
    assert outcome.status == "failed"
    assert words in outcome.reason
    assert "--overwrite" in outcome.reason
    assert names(settings.out_dir / "a") == OUTPUTS


def test_folder_that_is_not_ours_is_never_touched(model: SlideModel, slide: Path, settings: RunSettings) -> None:
    (settings.out_dir / "a").mkdir(parents=True)
    (settings.out_dir / "a" / "thesis.txt").write_text("years of work")
    (settings.out_dir / "b").write_text("a file")
    outcomes = run_slides([SlideJob("a", slide), SlideJob("b", slide)], model, replace(settings, overwrite=True))
    assert statuses(outcomes) == {"a": "failed", "b": "failed"}
    assert (settings.out_dir / "a" / "thesis.txt").read_text() == "years of work"
    assert (settings.out_dir / "b").read_text() == "a file"


def test_leftovers_of_a_killed_run_are_cleared_and_done_again(
    model: SlideModel, slide: Path, settings: RunSettings
) -> None:
    run_slides([SlideJob("kept", slide), SlideJob("half", slide)], model, settings)
    out = settings.out_dir
    (out / ".new.partial").mkdir()
    (out / ".new.partial" / "features.h5").write_text("half")
    (out / "kept").rename(out / ".kept.old")
    (out / "half" / "prediction.json").write_text('{"slide_id": "ha')
    outcomes = run_slides([SlideJob(name, slide) for name in ("kept", "half", "new")], model, settings)
    assert statuses(outcomes) == {"kept": "skipped", "half": "ok", "new": "ok"}
    assert names(out) == {"kept", "half", "new", "summary.csv"}


def test_interrupt_leaves_nothing_half(model: SlideModel, slide: Path, settings: RunSettings) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_slides([SlideJob("a", slide), SlideJob("b", slide)], model, settings, Stop("b", interrupt))
    assert names(settings.out_dir) == {"a", "summary.csv"}
    assert list(read_summary(settings.out_dir / "summary.csv")) == ["a"]


def test_killed_run_goes_on_where_it_was(model: SlideModel, slide: Path, settings: RunSettings, tmp_path: Path) -> None:
    model.save(tmp_path / "model.safetensors")
    script = f"""
import os, signal, sys
from pathlib import Path
sys.path[:0] = {[str(Path(__file__).parent), str(Path(__file__).parents[1])]!r}
from test_pipeline import RunSettings, SlideJob, SlideModel, Stop, run_slides
slide, model, out = map(Path, sys.argv[1:])
jobs = [SlideJob(name, slide) for name in "abc"]
stop = Stop("b", lambda: os.kill(os.getpid(), signal.SIGKILL))
run_slides(jobs, SlideModel.load(model), RunSettings(out, batch_size=8, workers=1), stop)
"""
    killed = subprocess.run(
        [sys.executable, "-c", script, str(slide), str(tmp_path / "model.safetensors"), str(settings.out_dir)],
        check=False,
        capture_output=True,
        text=True,
        timeout=120,  # its decoding worker holds the pipes open until it ends too
    )
    assert killed.returncode == -9, killed.stderr
    assert names(settings.out_dir) == {"a", ".b.partial", "summary.csv"}
    assert list(read_summary(settings.out_dir / "summary.csv")) == ["a"]
    outcomes = run_slides([SlideJob(name, slide) for name in "abc"], model, settings)
    assert statuses(outcomes) == {"a": "skipped", "b": "ok", "c": "ok"}
    assert names(settings.out_dir) == {"a", "b", "c", "summary.csv"}
    assert all(names(settings.out_dir / name) == OUTPUTS for name in "abc")


def test_full_disk_fails_the_slide_and_leaves_room_for_the_rest(
    model: SlideModel, slide: Path, settings: RunSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = outputs.write_features

    def full(path: Path, *arguments: object) -> None:
        if ".a.partial" in str(path):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        write(path, *arguments)

    monkeypatch.setattr(outputs, "write_features", full)
    outcomes = run_slides([SlideJob("a", slide), SlideJob("b", slide)], model, settings)
    assert statuses(outcomes) == {"a": "failed", "b": "ok"}
    assert "free space" in outcomes[0].reason
    assert names(settings.out_dir) == {"b", "summary.csv"}


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=144k", "none", str(disk)], check=False, capture_output=True
    )
    if mounted.returncode:
        pytest.skip("a small disk needs the right to mount one")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_disk_that_fills_up_half_way_keeps_no_half_file(model: SlideModel, slide: Path, small_disk: Path) -> None:
    (outcome,) = run_slides([SlideJob("a", slide)], model, RunSettings(small_disk, batch_size=8, tokens=True))
    assert outcome.status == "failed"
    assert "free space" in outcome.reason
    assert names(small_disk) == {"summary.csv"}
    assert list(read_summary(small_disk / "summary.csv")) == ["a"]


def test_full_disk_is_found_before_any_slide_is_read(model: SlideModel, small_disk: Path) -> None:
    (small_disk / "ballast").write_bytes(bytes(120 * 1024))
    with pytest.raises(OutputError, match=r"No space left.*free space"):
        run_slides([SlideJob("a", Path("never-read"))], model, RunSettings(small_disk))
    assert names(small_disk) == {"ballast"}


def test_output_below_a_file_is_found_before_any_slide_is_read(model: SlideModel, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="choose another --out"):
        run_slides([SlideJob("a", Path("never-read"))], model, RunSettings(tmp_path / "file" / "out"))


def test_strange_summary_is_not_overwritten(model: SlideModel, slide: Path, settings: RunSettings) -> None:
    settings.out_dir.mkdir()
    (settings.out_dir / "summary.csv").write_text("patient,age\n")
    with pytest.raises(OutputError, match="move that file away"):
        run_slides([SlideJob("a", slide)], model, settings)
    assert (settings.out_dir / "summary.csv").read_text() == "patient,age\n"


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


@pytest.mark.parametrize(("change", "words"), [({"ink": "off"}, "ink: auto"), ({"force": False}, "force: True")])
def test_other_rules_for_ink_and_for_dark_slides_are_another_request(
    model: SlideModel, slide: Path, settings: RunSettings, change: dict[str, object], words: str
) -> None:
    settings = replace(settings, force="force" in change)
    run_slides([SlideJob("a", slide)], model, settings)
    (outcome,) = run_slides([SlideJob("a", slide)], model, replace(settings, **change))
    assert outcome.status == "failed"
    assert words in outcome.reason


def test_outputs_from_before_there_were_rules_for_ink_are_finished(
    model: SlideModel, slide: Path, settings: RunSettings
) -> None:
    (made,) = run_slides([SlideJob("a", slide)], model, settings)
    assert (made.prediction.settings["ink"], made.prediction.settings["force"]) == ("auto", False)
    path = settings.out_dir / "a" / "prediction.json"
    fields = json.loads(path.read_text())
    del fields["settings"]["ink"], fields["settings"]["force"]
    path.write_text(json.dumps(fields))
    (outcome,) = run_slides([SlideJob("a", slide)], model, settings)
    assert outcome.status == "skipped"
    (outcome,) = run_slides([SlideJob("a", slide)], model, replace(settings, force=True))
    assert outcome.status == "skipped", "a slide that passed without force passes with it"


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
