from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image
from small_slides import SHAPE, tissue_image, write_slide
from typer.testing import CliRunner, Result

from maskattn.cli.app import app
from maskattn.cli.progress import ProgressBars
from maskattn.demo import synthetic
from maskattn.slide.summary import read_summary

pytestmark = pytest.mark.usefixtures("one_thread", "small_bundle")


@pytest.fixture
def slide(tmp_path: Path) -> Path:
    return write_slide(tmp_path / "disc.tiff")


def maskattn(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def names(folder: Path) -> set[str]:
    return {entry.name for entry in folder.iterdir()}


def one_line(result: Result) -> str:
    """What an error says: a single line without a traceback."""
    errors = [line for line in result.stderr.splitlines() if "Random weights" not in line]
    assert len(errors) == 1, result.stderr
    assert "Traceback" not in result.stderr
    return errors[0]


def test_infer_writes_every_output_and_says_which_model_it_was(slide: Path, tmp_path: Path) -> None:
    result = maskattn("infer", slide, "--out", tmp_path / "out", "--tokens")
    assert result.exit_code == 0, result.output
    assert "small: Random weights." in result.stderr
    assert "ok       disc:" in result.stderr
    assert "1 of 1 slides" in result.stdout
    assert "heatmap_benign.png" in names(tmp_path / "out" / "disc")
    assert json.loads((tmp_path / "out" / "disc" / "prediction.json").read_text())["model"]["demonstration"]


def test_manifest_with_one_bad_row_runs_the_others_and_exits_with_1(slide: Path, tmp_path: Path) -> None:
    rows = ["slide_id,slide_path,spacing_um", "one,disc.tiff,", "bad,nowhere.svs,", "two,disc.tiff,0.9"]
    (tmp_path / "slides.csv").write_text("\n".join(rows))
    for arguments in (("--manifest", tmp_path / "slides.csv"), (tmp_path / "slides.csv",)):
        result = maskattn("infer", *arguments, "--out", tmp_path / "out")
        assert result.exit_code == 1
        assert "failed   bad: a slide must be a file" in result.stderr
        assert "2 of 3 slides" in result.stdout
    rows_by_id = read_summary(tmp_path / "out" / "summary.csv")
    assert {slide_id: row["status"] for slide_id, row in rows_by_id.items()} == {
        "one": "skipped",
        "bad": "failed",
        "two": "skipped",
    }


def test_what_a_folder_holds_besides_slides_is_said_before_and_after_the_run(slide: Path, tmp_path: Path) -> None:
    for name in ("table.xlsx", "old.xlsx", "scan.czi", ".hidden", "._disc.tiff"):
        (tmp_path / name).touch()
    result = maskattn("infer", tmp_path, "--out", tmp_path / "out", "--no-check")
    assert result.exit_code == 0, result.output
    said = f"in {tmp_path}, passed over 3 files that are no slides: 2 .xlsx, 1 .czi"
    assert f"maskattn: {said}" in result.stderr.splitlines()
    assert result.stdout.splitlines()[-2:] == [
        f"1 of 1 slides have outputs; summary: {tmp_path / 'out' / 'summary.csv'}",
        said,
    ]


def test_name_that_is_no_utf8_runs_and_has_a_row_on_any_terminal(slide: Path, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    slide.rename(tmp_path / "in" / os.fsdecode(b"Gef\xe4\xdf.tiff"))
    (tmp_path / "in" / os.fsdecode(b"gone\xff.tiff")).symlink_to(os.fsdecode(b"/n\xff.tiff"))
    for encoding in ("utf-8", "ascii"):
        result = CliRunner(charset=encoding).invoke(
            app, ["infer", str(tmp_path / "in"), "--out", str(tmp_path / "out")]
        )
        assert result.exit_code == 1, result.output
        assert "  Gef%E4%DF: " in result.stderr
        assert "failed   gone%FF: a slide must be a file" in result.stderr
    rows = read_summary(tmp_path / "out" / "summary.csv")
    assert {slide_id: row["status"] for slide_id, row in rows.items()} == {"Gef%E4%DF": "skipped", "gone%FF": "failed"}
    assert "which does not exist" in rows["gone%FF"]["reason"]
    saved = json.loads((tmp_path / "out" / "Gef%E4%DF" / "prediction.json").read_text())
    assert os.fsencode(saved["slide"]["path"]).endswith(b"/Gef\xe4\xdf.tiff")


def test_second_run_skips_and_overwrite_does_not(slide: Path, tmp_path: Path) -> None:
    arguments = ("infer", slide, "--out", tmp_path / "out")
    assert "ok       disc" in maskattn(*arguments).stderr
    assert "skipped  disc" in maskattn(*arguments).stderr
    assert "ok       disc" in maskattn(*arguments, "--overwrite").stderr


def test_slide_without_spacing_needs_the_option(tmp_path: Path) -> None:
    slide = write_slide(tmp_path / "unspaced.tiff", spacing_um=None)
    result = maskattn("infer", slide, "--out", tmp_path / "out")
    assert result.exit_code == 1
    assert "--spacing-um" in one_line(result)
    assert maskattn("infer", slide, "--out", tmp_path / "out", "--spacing-um", 1.0).exit_code == 0


def test_mask_of_the_wrong_size_fails_and_the_right_one_serves(slide: Path, tmp_path: Path) -> None:
    for name, shape in {"wrong": (40, 400), "right": (42, 56)}.items():
        mask = np.zeros(shape, dtype=np.uint8)
        mask[10:30, 10:30] = 2
        Image.fromarray(mask).save(tmp_path / f"{name}.png")
    wrong = maskattn("infer", slide, "--out", tmp_path / "out", "--mask", tmp_path / "wrong.png")
    assert wrong.exit_code == 1
    assert "400 × 40 px" in one_line(wrong)
    right = maskattn("infer", slide, "--out", tmp_path / "out", "--mask", tmp_path / "right.png", "--mask-value", 2)
    assert right.exit_code == 0, right.output
    other = maskattn(
        *("infer", slide, "--out", tmp_path / "o2", "--mask", tmp_path / "right.png", "--mask-value", 7),
    )
    assert other.exit_code == 1
    assert "none of the tissue values 7" in one_line(other)


def test_a_mask_without_tissue_fails_with_a_remedy_that_fits_a_mask(slide: Path, tmp_path: Path) -> None:
    empty = tmp_path / "an empty mask.png"
    Image.fromarray(np.zeros((42, 56), dtype=np.uint8)).save(empty)
    result = maskattn("infer", slide, "--out", tmp_path / "out", "--mask", empty)
    assert result.exit_code == 1
    assert f"the mask file {empty} holds no tissue" in one_line(result)
    assert f"`maskattn tissue {slide} --mask '{empty}'` and correct the mask" in one_line(result)
    assert "stain" not in one_line(result)


def test_all_white_slide_fails_with_what_to_do(tmp_path: Path) -> None:
    slide = write_slide(tmp_path / "white.tiff", np.full((*SHAPE, 3), 245, dtype=np.uint8))
    result = maskattn("infer", slide, "--out", tmp_path / "out")
    assert result.exit_code == 1
    assert "a slide must show tissue" in one_line(result)
    assert "--mask" in one_line(result)
    assert maskattn("infer", slide, "--out", tmp_path / "out", "--no-mask").exit_code == 0


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("histolab_broken.svs", "a text file that begins with"),
        ("openslide_unopenable.tiff", "Unsupported TIFF compression"),
        ("openslide_unreadable.svs", "Bogus marker length"),
        ("openslide_small.svs", ""),
    ],
)
def test_broken_files_fail_with_one_line_and_leave_nothing(
    shared_slides: Path, tmp_path: Path, name: str, words: str
) -> None:
    result = maskattn("infer", shared_slides / name, "--out", tmp_path / "out", "--spacing-um", 0.5)
    assert result.exit_code in (0, 1)
    if words:
        assert result.exit_code == 1
        assert words in one_line(result)
        assert names(tmp_path / "out") == {"summary.csv"}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("gone-*.svs",), "no match"),
        (("gone.csv",), "readable CSV"),
        ((), "at least one slide"),
        (("{slide}", "{copy}", "--mask", "m.png"), "--mask is for one slide, got 2"),
        (("{slide}", "--model", "gone.safetensors"), "got gone.safetensors, which does not exist"),
        (("{slide}", "--impl", "magic"), "impl='magic'"),
        (("{slide}", "--device", "abacus"), "'abacus'"),
    ],
)
def test_wrong_usage_exits_with_2_before_any_work(
    slide: Path, tmp_path: Path, arguments: tuple[str, ...], words: str
) -> None:
    places = {"slide": slide, "copy": write_slide(tmp_path / "copy.tiff")}
    result = maskattn("infer", *(text.format(**places) for text in arguments), "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert words in one_line(result)


def test_unwritable_output_exits_with_2(slide: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    result = maskattn("infer", slide, "--out", tmp_path / "file" / "out")
    assert result.exit_code == 2
    assert "the output folder must be writable" in one_line(result)


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    result = maskattn("info", tmp_path / "gone.svs", "--debug")
    assert result.exit_code == 1
    assert "Traceback" in result.stderr
    assert "check the path" in result.stderr


def test_tissue_draws_an_overlay_and_prints_statistics(slide: Path, tmp_path: Path) -> None:
    result = maskattn("tissue", slide, "--out", tmp_path / "views")
    assert result.exit_code == 0, result.output
    statistics = json.loads(result.stdout)
    assert statistics["tissue_fraction"] == pytest.approx(np.pi * 120**2 / (SHAPE[0] * SHAPE[1]), rel=0.1)
    with Image.open(statistics["overlay"]) as overlay:
        assert overlay.size == SHAPE[::-1]
    named = maskattn("tissue", slide, "--out", tmp_path / "one.png")
    assert json.loads(named.stdout)["overlay"] == str(tmp_path / "one.png")


def test_info_works_without_a_spacing(tmp_path: Path) -> None:
    slide = write_slide(tmp_path / "unspaced.tiff", spacing_um=None)
    result = maskattn("info", slide)
    assert result.exit_code == 0, result.output
    assert "560 × 420 px" in result.stdout
    assert "--spacing-um" in result.stdout
    assert json.loads(maskattn("info", slide, "--json").stdout)["vendor"] == "generic-tiff"


def test_info_of_a_text_file_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "text.svs").write_text("no slide")
    result = maskattn("info", tmp_path / "text.svs")
    assert result.exit_code == 1
    assert "a text file that begins with 'no slide'" in one_line(result)


def test_doctor_runs_what_it_reports() -> None:
    result = maskattn("doctor")
    assert result.exit_code == 0, result.output
    lines = {line[4:28].strip(): line for line in result.stdout.splitlines()}
    assert lines["torch"].startswith("ok")
    assert "runs" in lines["impl 'torch' on cpu"]
    assert "runs" in lines["impl 'reference' on cpu"]


def test_demo_prints_the_known_answer_and_where_the_outputs_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw = synthetic.make_slide
    monkeypatch.setattr(synthetic, "make_slide", lambda seed: draw(seed, size_px=896))
    result = maskattn("demo", "--out", tmp_path / "demo", "--seed", 3)
    assert result.exit_code == 0, result.output
    assert f"known       {synthetic.CLASSES[draw(3, size_px=896).label]}" in result.stdout
    assert "predicted   " in result.stdout
    for line in result.stdout.splitlines():
        if line.startswith(("slide", "output", "summary")):
            assert Path(line.split(maxsplit=1)[1]).is_file()


def test_interrupt_exits_with_130(slide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(ProgressBars, "tiles_done", interrupt)
    result = maskattn("infer", slide, "--out", tmp_path / "out")
    assert result.exit_code == 130
    assert "run the same command again" in one_line(result)


def python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)


def test_missing_extra_is_one_line_that_says_what_to_install(tmp_path: Path) -> None:
    (tmp_path / "x.svs").write_bytes(b"a slide")
    hide = f"import sys; sys.modules['{{0}}'] = None; sys.argv = ['maskattn', 'info', {str(tmp_path / 'x.svs')!r}]; "
    run = "from maskattn.cli import main; main()"
    for module in ("typer", "openslide"):
        done = python(hide.format(module) + run)
        assert done.returncode == 2, done.stderr
        assert done.stderr.startswith("maskattn: ")
        assert f"package {module}" in done.stderr
        assert "pip install 'maskattn[slide]'" in done.stderr
        assert len(done.stderr.splitlines()) == 1


def test_help_needs_none_of_the_heavy_packages() -> None:
    start = time.perf_counter()
    done = python(
        "import sys; sys.argv = ['maskattn', '--help']\n"
        "from maskattn.cli import main\n"
        "try:\n    main()\n"
        "finally:\n    print(sorted({'openslide', 'cv2', 'h5py', 'matplotlib'} & set(sys.modules)))"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"
    assert time.perf_counter() - start < 20


def test_a_dark_slide_is_refused_by_tissue_and_infer_alike_and_force_goes_on(tmp_path: Path) -> None:
    slide = write_slide(tmp_path / "dark.tiff", 255 - tissue_image())
    for command in (("tissue", slide, "--out", tmp_path), ("infer", slide, "--out", tmp_path / "out")):
        refused = maskattn(*command)
        assert refused.exit_code == 1
        assert "got a dark background" in one_line(refused)
        assert "go on with --force" in one_line(refused)
    assert maskattn("tissue", slide, "--out", tmp_path, "--force").exit_code == 0


def test_ink_is_left_out_by_default_and_kept_with_ink_off(tmp_path: Path) -> None:
    image = tissue_image()
    image[20:400, 420:480] = (30, 60, 170)
    slide = write_slide(tmp_path / "marked.tiff", image)
    auto, off = (
        json.loads(maskattn("tissue", slide, "--out", tmp_path, "--ink", rule).stdout) for rule in ("auto", "off")
    )
    assert off["tissue_fraction"] - auto["tissue_fraction"] == pytest.approx(380 * 60 / image[..., 0].size, rel=0.15)
    assert any("ink was taken out" in note and "--ink off keeps it" in note for note in auto["notes"])
    assert off["notes"] == []


def test_ink_off_where_no_tissue_is_sought_is_refused(slide: Path, tmp_path: Path) -> None:
    mask = tmp_path / "mask.png"
    Image.fromarray(np.ones((42, 56), dtype=np.uint8)).save(mask)
    for command, why in (
        (("tissue", slide, "--mask", mask), f"with the mask {mask}"),
        (("infer", slide, "--out", tmp_path / "out", "--mask", mask), "every slide has a mask"),
        (("infer", slide, "--out", tmp_path / "out", "--no-mask"), "glass is attended to too"),
    ):
        result = maskattn(*command, "--ink", "off")
        assert result.exit_code == 2
        assert "--ink controls how tissue is segmented, got --ink off" in one_line(result)
        assert why in one_line(result)
        assert not (tmp_path / "out").exists()


def test_a_series_is_chosen_by_info_tissue_and_infer_alike(tmp_path: Path) -> None:
    path = tmp_path / "several.ome.tif"
    with tifffile.TiffWriter(path, ome=True) as writer:
        for image in (np.full((900, 900, 3), 245, np.uint8), tissue_image()):
            um = {"PhysicalSizeX": 1.0, "PhysicalSizeXUnit": "µm", "PhysicalSizeY": 1.0, "PhysicalSizeYUnit": "µm"}
            writer.write(image, tile=(128, 128), photometric="rgb", metadata={"axes": "YXS", **um})
    listed = json.loads(maskattn("info", path, "--json").stdout)
    assert listed["size"] == "900 × 900 px"
    assert len(listed["series"]) == 2
    assert json.loads(maskattn("info", path, "--series", "1", "--json").stdout)["size"] == "560 × 420 px"
    shares = [
        json.loads(maskattn("tissue", path, "--out", tmp_path, *series).stdout)["tissue_fraction"]
        for series in ((), ("--series", "1"))
    ]
    assert shares[0] == 0 < shares[1]
    assert maskattn("infer", path, "--out", tmp_path / "out").exit_code == 1  # glass alone
    assert maskattn("infer", path, "--out", tmp_path / "out", "--series", "1").exit_code == 0
    (prediction,) = (tmp_path / "out").glob("*/prediction.json")
    said = json.loads(prediction.read_text())
    assert said["settings"]["series"] == 1
    assert said["slide"]["width_px"] == 560
    assert said["slide"]["reader"].startswith("tifffile ")
    assert said["versions"]["imagecodecs"]
    again = maskattn("infer", path, "--out", tmp_path / "out", "--series", "0")
    assert again.exit_code == 1
    assert "got series: 1" in again.stderr
