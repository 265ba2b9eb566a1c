"""The scripts that judge maps on real images, run on drawn ones: what they read, skip and compute."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

for module in ("cv2", "sklearn", "captum", "matplotlib", "tifffile", "PIL"):
    pytest.importorskip(module)
ROOT = Path(__file__).resolve().parents[2]

from PIL import Image  # noqa: E402 (what may be missing is skipped first)

from bench.evidence.real import of_tissue  # noqa: E402 (what may be missing is skipped first)
from bench.evidence.real_images import composites, crops, normalised  # noqa: E402 (what may be missing is skipped first)
from bench.evidence.real_judging import boxes_of, drops_of, in_bfloat16, maps_of, remembering  # noqa: E402 (what may be missing is skipped first)
from bench.evidence.real_probes import Probes, leave_one_patient_out  # noqa: E402 (what may be missing is skipped first)
from bench.evidence.real_progress import Progress  # noqa: E402 (what may be missing is skipped first)
from bench.evidence.real_rows import Counts, tissue_rows  # noqa: E402 (what may be missing is skipped first)
from bench.evidence.real_slide import BENIGN, GLASS, SICK, paste  # noqa: E402 (what may be missing is skipped first)
from bench.evidence.row_experiments import Reading, experiments, facts  # noqa: E402 (what may be missing is skipped first)
from maskattn.explain import METHODS  # noqa: E402 (what may be missing is skipped first)
from maskattn.nn import VisionTransformer  # noqa: E402 (what may be missing is skipped first)


def small_vit(**arguments: object) -> VisionTransformer:
    sizes = {"img_size": 64, "patch_size": 16, "embed_dim": 32, "depth": 3, "num_heads": 4}
    model = VisionTransformer(**{**sizes, **arguments}).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model.requires_grad_(False)


@pytest.fixture
def real(tmp_path):
    """A folder as GlaS is laid out: four patients, malignant images dark, glands in the upper half."""
    folder = tmp_path / "glas"
    folder.mkdir()
    rng = np.random.default_rng(0)
    rows = []
    for i in range(8):
        part, sick = ("train" if i < 6 else "test"), i % 2 == 1
        name = f"{part}_{i}"
        pixels = rng.integers(0, 60, (230, 260, 3)) + (20 if sick else 160)
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{name}.jpg")
        glands = np.zeros((230, 260), np.uint8)
        glands[:115] = 255
        Image.fromarray(glands).save(folder / f"{name}_glands.png")
        rows.append({"name": name, "patient": str(i % 4), "grade": "malignant" if sick else "benign", "subgrade": ""})
    with (folder / "grades.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return tmp_path


def test_crops_are_of_one_part_and_know_grade_patient_and_glands(real):
    training, test = crops(real, "train"), crops(real, "test")
    assert len(training.names) == 12
    assert {name.split("_")[0] for name in training.names} == {"train"}
    assert {name.split("_")[0] for name in test.names} == {"test"}
    assert (
        training.pixels_B3XY[training.malignant_B].mean() < training.pixels_B3XY[~training.malignant_B].mean()
    ).item()
    glands = training.glands((14, 14))
    assert glands[:, :6].all()
    assert not glands[:, 8:].any()


def test_composites_have_their_malignant_half_where_they_say(real):
    pairs = composites(crops(real, "train"), 6, seed=0)
    areas = pairs.areas((4, 4))
    dark = torch.nn.functional.adaptive_avg_pool2d(pairs.pixels_B3XY.mean(1, keepdim=True), (4, 4))[:, 0] < 0.4
    assert torch.equal(dark, areas[:, 0])
    assert all(benign != malignant for benign, malignant in pairs.patients)
    assert pairs.malignant_left_B.tolist() == [True, False] * 3


def test_a_probe_never_sees_the_patient_it_is_asked_about():
    features = torch.randn(40, 8)
    patients = [str(i % 4) for i in range(40)]
    labels = torch.arange(40) % 8 < 4
    probes = Probes(features, labels, patients)
    before = [part.clone() for part in probes.without(["1", "2"])]
    changed = features.clone()
    changed[torch.tensor([p in ("1", "2") for p in patients])] = 1e3
    after = Probes(changed, labels, patients).without(["2", "1"])
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert not torch.equal(before[0], Probes(changed, labels, patients).without(["3"])[0])
    separable = torch.where(labels, 3.0, -3.0)[:, None] + 0.1 * features
    assert leave_one_patient_out(Probes(separable, labels, patients)) == (1.0, 1.0)


def test_the_backbone_runs_once_for_all_methods_and_their_maps_are_the_methods_own():
    model, image = small_vit(), torch.randn(1, 3, 64, 64)
    runs = []
    model.blocks[0].register_forward_hook(lambda *_: runs.append(1))
    names = ["cdam", "integrated-norm", "integrated-weights", "integrated-value", "attention"]
    direction = torch.randn(32)
    maps = maps_of(remembering(model), in_bfloat16(model), image, lambda z: z @ direction, names)
    assert len(runs) == 1
    for name in names:
        torch.testing.assert_close(maps[name], METHODS[name](model).attribute(image, lambda z: z @ direction))
    assert list(maps) == [*names, "random"]


def test_slow_methods_give_the_maps_that_they_give_in_float32_whatever_they_run_in():
    model, image = small_vit(), torch.randn(1, 3, 64, 64)
    direction = torch.randn(32)
    names = ["token-ablation", "rise", "integrated-gradients", "smoothgrad"]
    maps = maps_of(remembering(model), in_bfloat16(model), image, lambda z: z @ direction, names)
    for name in names:
        options = {"m": 200} if name == "rise" else {}
        whole = METHODS[name](model, **options).attribute(
            image, lambda z: z @ direction, generator=torch.Generator().manual_seed(0)
        )
        assert maps[name].dtype == torch.float32
        assert torch.corrcoef(torch.stack([maps[name].flatten(), whole.flatten()]))[0, 1] > 0.99, name


def test_a_run_resumes_where_it_was_and_counts_its_time(tmp_path):
    made = []

    def make():
        made.append(1)
        return {"contrast": {"cdam": 0.5}}

    first = Progress(tmp_path, "tissue", "an encoder")
    assert first.row("composite 0", make) == {"contrast": {"cdam": 0.5}}
    again = Progress(tmp_path, "tissue", "an encoder")
    assert again.row("composite 0", make) == {"contrast": {"cdam": 0.5}}
    assert again.seconds == first.seconds >= 0
    assert len(made) == 1
    Progress(tmp_path, "tissue", "another encoder").row("composite 0", make)
    assert len(made) == 2


def test_tissue_is_judged_quickly_first_and_slowly_where_asked(real, tmp_path):
    encoder, counts = "DINOv2 ViT-S/14", Counts(2, 2, dropped=1, boxed=1, boxes=6, slow=2, slides=0)
    model = small_vit(img_size=224)
    names = ["cdam", "integrated-norm", "token-ablation"]
    judged = tissue_rows(real, tmp_path, encoder, model, names, counts)
    contrast = judged.measure("contrast")
    assert [set(row) for row in contrast] == [{"cdam", "integrated-norm", "random"}] * 2 + [{"token-ablation"}] * 2
    assert len(judged.measure("correctness, drop")) == 2
    assert set(judged.measure("correlation with token ablation")[0]) == {"cdam", "integrated-norm", "random"}
    again = tissue_rows(real, tmp_path, encoder, model, names, counts)
    assert again.rows == judged.rows
    text = of_tissue(judged, encoder, names, counts)
    assert "2 (2 for the slow methods)" in text
    assert text.count("\n| ") == 5  # the head, three methods and noise


def test_dropping_and_boxes_favour_the_map_that_knows():
    model, image = small_vit(depth=1), torch.randn(1, 3, 64, 64)
    direction = torch.randn(32)

    def target(z):
        return z @ direction

    best = METHODS["token-ablation"](model).attribute(image, target)
    maps = {"best": best, "worst": -best}
    drops = drops_of(in_bfloat16(model), image, maps, target)
    assert drops["best"] > 0 > drops["worst"]
    boxes = boxes_of(in_bfloat16(model), image, maps, target, 20)
    assert boxes["best"] > 0.5
    assert boxes["worst"] == pytest.approx(-boxes["best"], abs=1e-6)


@pytest.fixture
def reading():
    model = small_vit(reg_tokens=2)
    model.double()
    tokens = model.before_last_block(model.embed(torch.randn(1, 3, 64, 64, dtype=torch.float64)))
    direction = torch.randn(32, dtype=torch.float64)
    return Reading(model, tokens, lambda z: z @ direction)


def test_the_two_terms_are_cdam_and_the_row_is_dropped_exactly(reading):
    maps = experiments(reading, {})
    P = reading.tokens.num_prefix
    torch.testing.assert_close(maps["CDAM"], reading.by("cdam")[P:])
    torch.testing.assert_close(maps["its value term alone"] + maps["its key term alone"], maps["CDAM"])
    torch.testing.assert_close(maps["path of T (norm)"], reading.by("integrated-norm")[P:])
    read = reading.row.read
    scores = torch.einsum("thd,hd->th", read.k_THD, read.q_B1HD[0, 0]) * read.k_THD.shape[-1] ** -0.5
    whole = reading.row.scores(read.out_B1HD)[0, 0, 0]
    for i in (0, 7):
        left = torch.arange(len(scores)) != P + i
        out = torch.einsum("th,thd->hd", scores[left].softmax(dim=0), read.v_THD[left])
        lost = whole - reading.row.scores(out[None, None])[0, 0, 0]
        torch.testing.assert_close(maps["dropped from the row, exactly"][i], lost)


def test_scores_have_no_zero_of_their_own_but_cdam_gives_them_one(reading):
    """A constant added to the class token's scores leaves the prediction, and changes CDAM's key term alone."""
    a, x, _, vg, _ = reading.parts
    torch.testing.assert_close((x + 3).softmax(dim=0), x.softmax(dim=0))
    key, moved = (a * x * vg).sum(dim=1), (a * (x + 3) * vg).sum(dim=1)
    torch.testing.assert_close(moved - key, 3 * (a * vg).sum(dim=1))
    assert (moved - key).abs().max() > 1e-3
    assert 0 <= facts(reading)["share of them below 0"] <= 1


def test_pasted_slides_hold_what_their_cells_say(real):
    glass = [np.full((224, 224, 3), 240, np.uint8)]
    truth = paste(crops(real, "test"), glass, seed=0)
    assert {
        int(kind): int(count) for kind, count in zip(*np.unique(truth.cells_SS, return_counts=True), strict=True)
    } == {
        GLASS: 15,
        BENIGN: 5,
        SICK: 5,
    }
    means = truth.image_XY3.reshape(5, 224, 5, 224, 3).mean(axis=(1, 3, 4))
    assert (means[truth.cells_SS == GLASS] == 240).all()
    assert means[truth.cells_SS == SICK].max() < means[truth.cells_SS == BENIGN].min()


def test_missing_material_is_skipped_and_named(tmp_path):
    command = [sys.executable, "-m", "bench.evidence.real", "--real", str(tmp_path), "--encoders", "--quick"]
    found = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=tmp_path, env=found)
    assert result.returncode == 0, result.stderr
    assert "skipped: attention on glass" in result.stdout


def test_pixels_are_normalised_channel_by_channel():
    pixels = torch.full((1, 3, 2, 2), 0.5)
    assert normalised(pixels, (0.5, 0.25, 0.0), (1.0, 0.5, 0.25))[0, :, 0, 0].tolist() == [0.0, 0.5, 2.0]
