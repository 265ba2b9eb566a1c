"""An encoder is fine-tuned on labelled patches: what learns, what stays, and what comes out loads as an encoder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("timm")
pytest.importorskip("pytorch_lightning")

import timm
from PIL import Image
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner, Result

from maskattn.cli.app import app
from maskattn.errors import SlideError
from maskattn.nn.encoders import load_encoder
from maskattn.nn.slide_models.folder import load_two_stages
from maskattn.training.bags import Draw
from maskattn.training.module import rate_at
from maskattn.training.patches import PatchDataset, find_patches
from maskattn.training.settings import TrainSettings
from maskattn.training.tasks import ClassTask
from maskattn.training.tile_module import TileTraining, prepared

NAME = "timm:vit_tiny_patch16_224"


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Patches of two classes with masks, the left half tissue, and weights of a small encoder."""
    root = tmp_path_factory.mktemp("patches")
    rng = np.random.default_rng(0)
    for name, colour in (("benign", 200), ("tumour", 90)):
        (root / "patches" / name).mkdir(parents=True)
        for index in range(6):
            pixels = np.clip(rng.normal(colour, 20, (64, 64, 3)), 0, 255).astype(np.uint8)
            mask = np.zeros((64, 64), np.uint8)
            mask[:, :32] = 255
            Image.fromarray(pixels).save(root / "patches" / name / f"p{index // 2}_{name}{index}.png")
            Image.fromarray(mask).save(root / "patches" / name / f"p{index // 2}_{name}{index}_mask.png")
    network = timm.create_model("vit_tiny_patch16_224", num_classes=0)
    save_file(network.state_dict(), root / "tiny.safetensors")
    return root / "patches", root / "tiny.safetensors"


def settings_of(files: tuple[Path, Path], **changed: Any) -> TrainSettings:
    given = {"stage": "tile", "encoder": NAME, "epochs": 1, "batch_size": 4, "device": "cpu"}
    return TrainSettings(patches=files[0], weights=files[1], **{**given, **changed})


def maskattn(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["train", "--stage", "tile", *(str(argument) for argument in arguments)])


def test_an_encoder_is_fine_tuned_and_loads_again(files: tuple[Path, Path], tmp_path: Path) -> None:
    asked = ("--patches", files[0], "--encoder", NAME, "--weights", files[1], "--token-mask", "tissue")
    more = ("--drop-tokens", 0.5, "--freeze", 10, "--recompute", "--batch-size", 6, "--epochs", 1, "--device", "cpu")
    result = maskattn(*asked, *more, "--validation-share", 0.34, "--out", tmp_path / "run")
    assert result.exit_code == 0, result.output
    before, after = load_file(files[1]), load_file(tmp_path / "run" / "encoder.safetensors")
    assert set(before) == set(after)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved
    assert all(name.startswith(("blocks.10.", "blocks.11.", "norm.")) for name in moved)
    encoder = load_encoder(NAME, weights=tmp_path / "run" / "encoder.safetensors")
    model = load_two_stages(tmp_path / "run", encoder)
    assert model.card.classes == ("benign", "tumour")
    with pytest.raises(ValueError, match="hash of the encoder's weights"):
        load_two_stages(tmp_path / "run", load_encoder(NAME, weights=files[1]))


def test_rates_fall_towards_the_lowest_layer_and_frozen_blocks_have_none(files: tuple[Path, Path]) -> None:
    settings = settings_of(files, freeze=2, layer_decay=0.5, lr=1e-3, drop_path=0.2)
    encoder = prepared(load_encoder(NAME, weights=files[1]), settings)
    cohort = find_patches(settings)
    groups = TileTraining(encoder, ClassTask(2), settings, cohort, []).parameter_groups()
    rate_of = {id(weight): group["lr"] for group in groups for weight in group["params"]}
    named = dict(encoder.vit.named_parameters())
    assert id(named["blocks.1.mlp.fc1.weight"]) not in rate_of
    assert id(named["patch_embed.proj.weight"]) not in rate_of
    below, top = (rate_of[id(named[f"blocks.{index}.mlp.fc1.weight"])] for index in (10, 11))
    assert top == pytest.approx(2 * below)
    assert [encoder.vit.blocks[index].drop_path1.share for index in (0, 11)] == [0, 0.2]


def test_masks_beside_the_patches_say_which_tokens_take_part(files: tuple[Path, Path], tmp_path: Path) -> None:
    cohort = find_patches(settings_of(files))
    data = PatchDataset(cohort.cases, 224, 16, masked=True)
    item = data[Draw(0, 0)]
    assert item.pixels_3XY.shape == (3, 224, 224)
    assert item.keep_HW is not None
    assert bool(item.keep_HW[:, :7].all())
    assert not item.keep_HW[:, 7:].any()
    drawn = PatchDataset(cohort.cases, 224, 16, masked=True, seed=0, drop=0.5)
    kept = [drawn[Draw(0, epoch)].keep_HW for epoch in range(6)]
    assert {int(keep.sum()) for keep in kept} == {49}
    assert any(not torch.equal(kept[0], other) for other in kept[1:])
    assert torch.equal(kept[2], drawn[Draw(0, 2)].keep_HW)


def test_patches_of_one_patient_stay_together(files: tuple[Path, Path]) -> None:
    cohort = find_patches(settings_of(files, patient_pattern="^(p[0-9]+)_"))
    assert set(cohort.patients) == {"p0", "p1", "p2"}
    with pytest.raises(ValueError, match="must have a group and match every name"):
        find_patches(settings_of(files, patient_pattern="^(x)"))


def test_patches_that_cannot_be_used_are_named(files: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a folder of images for each class, got None"):
        find_patches(TrainSettings(stage="tile"))
    for name in ("a", "b"):
        (tmp_path / "one" / name).mkdir(parents=True)
    (tmp_path / "one" / "a" / "x.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"two classes or more, each with images .* a \(1 patches\), b \(0 patches\)"):
        find_patches(settings_of((tmp_path / "one", files[1])))
    (tmp_path / "one" / "b" / "y.png").write_bytes(b"")
    cohort = find_patches(settings_of((tmp_path / "one", files[1])))
    with pytest.raises(SlideError, match=r"must be a readable image, got .*x\.png"):
        PatchDataset(cohort.cases, 224, 16, masked=False)[Draw(0, 0)]
    with pytest.raises(SlideError, match="needs a mask next to every patch"):
        PatchDataset(find_patches(settings_of(files)).cases[:1], 224, 16, masked=True)._keep_of(tmp_path / "z.png")


def test_what_is_of_slide_models_is_refused(files: tuple[Path, Path], tmp_path: Path) -> None:
    result = maskattn("--patches", files[0], "--features", tmp_path, "--out", tmp_path / "run")
    assert result.exit_code == 2
    assert "--stage tile reads --patches, got features in addition" in result.stderr
    result = maskattn("--patches", files[0], "--out", tmp_path / "run")
    assert "must have --encoder" in result.stderr


def test_the_rate_rises_then_falls() -> None:
    factor = rate_at(TrainSettings(warmup=0.1), 100)
    assert [factor(0), factor(9)] == pytest.approx([0.1, 0.9801], abs=1e-3)
    assert factor(99) < 0.001
    assert rate_at(TrainSettings(schedule="constant"), 100)(99) == 1
