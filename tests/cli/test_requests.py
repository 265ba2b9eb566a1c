"""What a command is asked for has an effect or is refused, and what its outputs say is what was run."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from small_slides import small_model, write_slide
from typer.testing import CliRunner, Result

from maskattn import png_files
from maskattn.cli import slide_runs
from maskattn.cli.app import app
from maskattn.errors import ManifestError
from maskattn.explain.single_image import read_keep
from maskattn.nn import VisionTransformer
from maskattn.nn.checkpoints import load_vit
from maskattn.nn.slide_model import SlideModel
from maskattn.slide.manifest import SlideJob
from maskattn.slide.request import RunSettings
from maskattn.slide.run import run_slides
from maskattn.slide.sinks import heatmaps

pytestmark = pytest.mark.usefixtures("one_thread", "small_bundle")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A slide, its mask and manifests, an image and weights."""
    write_slide(tmp_path / "disc.tiff")
    plane = np.zeros((42, 56), dtype=np.uint8)
    plane[10:30, 10:30] = 2
    Image.fromarray(plane).save(tmp_path / "mask.png")
    (tmp_path / "masks.csv").write_text("slide_id,slide_path,mask_path\na,disc.tiff,mask.png\nb,disc.tiff,\n")
    Image.fromarray(np.full((32, 32, 3), 128, np.uint8)).save(tmp_path / "photo.png")
    vit = VisionTransformer(img_size=32, embed_dim=32, depth=1, num_heads=2, num_classes=3)
    torch.save(vit.state_dict(), tmp_path / "vit.pt")
    return tmp_path


def maskattn(line: str, folder: Path) -> Result:
    return CliRunner().invoke(app, [word.replace("@", f"{folder}/") for word in line.split()])


EXPLAIN = "explain @photo.png --model @vit.pt --num-heads 2 --out @p"


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("tissue @disc.tiff --mask-value 2 --out @views", "got 2 and no mask"),
        ("infer @disc.tiff --out @o --mask-value 2 --mask-value 3", "got 2, 3 and no mask"),
        ("infer @disc.tiff --out @o --no-mask --mask @mask.png", "--no-mask attends to glass too"),
        ("infer @masks.csv --out @o --no-mask", "mask.png for 'a'"),
        ("infer @disc.tiff --out @o --no-mask --mask-value 2", "and no mask"),
        ("tissue @disc.tiff --out @v.jpg", "--out must be a PNG, or a folder for it, got"),
        ("tissue @disc.tiff --out @v.tif", "name it"),
        ("tissue @disc.tiff --out @mask.csv", "choose another name"),
        ("tissue @disc.tiff --mask @mask.png --out @mask.png", "must not replace an input"),
        (f"{EXPLAIN}.jpg", "--out must be a PNG"),
        ("explain @photo.png --model @vit.pt --num-heads 2 --out @photo.png", "must not replace an input"),
        (f"{EXPLAIN} --pixel-std 0 1 1", "deviations above 0"),
        (f"{EXPLAIN} --pixel-mean nan 1 1", "finite means"),
        ("explain @photo.png --model timm:vit_tiny_patch16_224 --num-heads 3", "leave it out"),
        ("explain @photo.png --model hf-hub:org/model --num-heads 3", "leave it out"),
        ("explain @photo.png --model @ --num-heads 3", "leave it out"),
    ],
)
def test_an_option_without_effect_or_sense_is_refused_before_any_work(folder: Path, line: str, words: str) -> None:
    (folder / "mask.csv").touch()
    before = sorted(folder.rglob("*"))
    kept = (folder / "mask.png").read_bytes(), (folder / "photo.png").read_bytes()
    result = maskattn(line, folder)
    assert result.exit_code == 2, result.output
    assert words in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert [path for path in sorted(folder.rglob("*")) if path not in before and path.is_file()] == []
    assert kept == ((folder / "mask.png").read_bytes(), (folder / "photo.png").read_bytes())


@pytest.mark.parametrize(
    "option",
    [
        *("--spacing-um 0", "--spacing-um -1", "--spacing-um nan", "--spacing-um 264.6"),
        *("--batch-size 0", "--batch-size 10000000", "--tokens-per-batch 0", "--workers -1", "--workers 100000"),
    ],
)
def test_a_number_out_of_range_is_refused(folder: Path, option: str) -> None:
    result = maskattn(f"infer @disc.tiff --out @o {option}", folder)
    assert result.exit_code == 2
    assert option.split()[0] in result.stderr
    assert not (folder / "o").exists()


def unmasked(model: SlideModel) -> SlideModel:
    return SlideModel(replace(model.config, masked=False)).eval()


def test_a_model_that_attends_to_all_takes_no_mask(folder: Path) -> None:
    unmasked(small_model()).save(folder / "plain.safetensors")
    line = "infer @disc.tiff --out @o --model @plain.safetensors"
    result = maskattn(f"{line} --mask @mask.png", folder)
    assert result.exit_code == 2
    assert "this model attends to the whole slide" in result.stderr
    assert maskattn(line, folder).exit_code == 0
    settings = json.loads((folder / "o" / "disc" / "prediction.json").read_text())["settings"]
    assert (settings["masked"], settings["mask"], settings["mask_values"]) == (False, None, None)


def test_the_same_is_refused_in_python(folder: Path) -> None:
    job = SlideJob("disc", folder / "disc.tiff", mask_path=folder / "mask.png")
    model = small_model()
    for jobs, settings, built in (
        ([job], RunSettings(folder / "o", masked=False), model),
        ([job], RunSettings(folder / "o"), unmasked(model)),
        ([replace(job, mask_path=None)], RunSettings(folder / "o", mask_values=(1,)), model),
    ):
        with pytest.raises(ManifestError):
            run_slides(jobs, built, settings)
    assert not (folder / "o").exists()


def test_a_prediction_says_what_was_run(folder: Path) -> None:
    line = "infer @masks.csv --out @o --mask-value 2 --workers 3"
    result = maskattn(line, folder)
    assert result.exit_code == 0, result.output
    settings = {
        name: json.loads((folder / "o" / name / "prediction.json").read_text())["settings"] for name in ("a", "b")
    }
    assert {name: (said["mask"], said["mask_values"], said["masked"]) for name, said in settings.items()} == {
        "a": ("mask.png", [2], True),
        "b": (None, None, True),
    }
    # A small slide has fewer batches than the workers that were asked for.
    assert {said["workers"] for said in settings.values()} == {1}
    again = maskattn(line, folder)
    assert "skipped  a" in again.stderr
    assert "skipped  b" in again.stderr
    assert "asked for" in maskattn(line.replace("2", "3"), folder).stderr


@pytest.mark.parametrize("command", ["tissue @disc.tiff", "explain @photo.png --model @vit.pt --num-heads 2"])
@pytest.mark.parametrize(
    ("out", "where"),
    [("@one.png", "one.png"), ("@v.2", "v.2/*.png"), ("@deep/er", "deep/er/*.png"), ("@f.png", "f.png/*.png")],
)
def test_a_picture_goes_to_a_png_or_into_a_folder(folder: Path, command: str, out: str, where: str) -> None:
    (folder / "f.png").mkdir()
    result = maskattn(f"{command} --out {out}", folder)
    assert result.exit_code == 0, result.output
    (picture,) = folder.glob(where)
    with Image.open(picture) as image:
        assert image.format == "PNG"


@pytest.mark.parametrize("command", ["tissue @disc.tiff", "explain @photo.png --model @vit.pt --num-heads 2"])
def test_a_disk_that_fills_while_a_picture_is_written_is_one_line(
    folder: Path, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)  # explain's writer
    monkeypatch.setattr(png_files, "_deflated", full)  # tissue's, after its first bytes
    result = maskattn(f"{command} --out @views/x.png", folder)
    assert result.exit_code == 2
    assert result.stderr.splitlines() == [
        f"maskattn: the picture must be written completely, got {folder}/views/x.png: No space left on device; "
        "free space or choose another --out"
    ]
    assert list((folder / "views").iterdir()) == []


def test_a_limit_that_a_picture_meets_while_it_is_written_leaves_no_half_of_it(tmp_path: Path) -> None:
    code = f"""
import pathlib, resource
import numpy as np
from maskattn.cli.pictures import picture_written
from maskattn.slide.overlay import write_mask_overlay
from maskattn.slide.tissue import TissueMask
noise = np.random.default_rng(0).integers(0, 255, (420, 560, 3), np.uint8)
tissue = TissueMask(np.ones((42, 56), bool), 10.0, (10.0, 10.0), "file", 1.0)
path = pathlib.Path({str(tmp_path / "views.png")!r})
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
with picture_written(path):
    write_mask_overlay(path, noise, tissue, 560)
"""
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert "OutputError: the picture must be written completely, got" in done.stderr
    assert "views.png: File too large; free space or choose another --out" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_num_heads_is_refused_where_the_model_says_it(folder: Path) -> None:
    for source in ("timm:vit_tiny_patch16_224", "hf-hub:org/model", folder):
        with pytest.raises(ValueError, match="num_heads is for a file of weights"):
            load_vit(source, num_heads=3)


def test_a_slide_with_a_name_that_no_font_has_runs_without_a_warning(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    titles = []
    begin = heatmaps.begin_heatmap
    monkeypatch.setattr(heatmaps, "begin_heatmap", lambda *given: titles.append(given[3]) or begin(*given))
    monkeypatch.setattr(heatmaps, "drawable", lambda name: "" if "\u4e00" <= name[0] <= "\u9fff" else name)
    (folder / "肝脏_01.tiff").write_bytes((folder / "disc.tiff").read_bytes())
    for name in ("肝脏_01", "disc"):
        result = maskattn(f"infer @{name}.tiff --out @o", folder)
        assert result.exit_code == 0, result.output
        assert (folder / "o" / name / "attention.png").is_file()
    by = "by Integrated CDAM"
    assert [title.split(",")[0] for title in titles] == [
        f"relevance for class 'benign' {by}",
        f"relevance for class 'low/high' {by}",
        "attention of the class token; model small",
        f"disc: relevance for class 'benign' {by}",
        f"disc: relevance for class 'low/high' {by}",
        "disc: attention of the class token; model small",
    ]
    assert titles[5] == "disc: attention of the class token; model small, a demonstration model"
    assert caplog.records == []


def test_explain_reads_a_mask_as_a_slides_is_read(folder: Path) -> None:
    rgba = np.full((32, 32, 4), 255, np.uint8)
    rgba[:, 16:, 3] = 0
    Image.fromarray(rgba).save(folder / "keep.png")
    assert read_keep(folder / "keep.png", (2, 2)).tolist() == [[[True, False], [True, False]]]
    Image.fromarray(rgba[..., 3] * 0).save(folder / "keep.png")
    result = maskattn("explain @photo.png --model @vit.pt --num-heads 2 --keep @keep.png --out @x.png", folder)
    assert result.exit_code == 2
    assert "--keep must leave some of the image" in result.stderr
    assert not (folder / "x.png").exists()


def test_classes_have_files_of_their_own_whatever_they_are_called() -> None:
    assert heatmaps.file_names_of(("benign", "low/high")) == ["benign", "low_high"]
    assert heatmaps.file_names_of(("a/b", "A_b", "a_b_0")) == ["a_b_0", "A_b_1", "a_b_0_2"]
    names = heatmaps.file_names_of(("x" * 400, "x" * 401, "肝" * 100, "tab\t\n"))
    assert len(set(names)) == 4
    assert all(len(name.encode()) <= 160 and name.isprintable() for name in names)


@pytest.mark.parametrize(("given", "kept"), [(None, "128"), ("1024", "1024")])
def test_a_run_bounds_what_onednn_keeps_unless_the_user_does(
    monkeypatch: pytest.MonkeyPatch, given: str | None, kept: str
) -> None:
    name = "ONEDNN_PRIMITIVE_CACHE_CAPACITY"
    monkeypatch.setenv(name, given or "")
    if given is None:
        monkeypatch.delenv(name)

    class Work:
        process_gib = None

        def on(self, device: str, *, alone: bool) -> None:
            raise RuntimeError(f"{device} with {os.environ[name]}")

    with pytest.raises(RuntimeError, match=f"with {kept}$"):
        slide_runs.run(Work(), slide_runs.Where(), lambda outcome: [])
