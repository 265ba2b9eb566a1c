"""``maskattn extract`` and ``maskattn encoders`` from the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from small_slides import write_slide
from typer.testing import CliRunner, Result

pytest.importorskip("timm")

import timm
import torch
from safetensors.torch import save_file

from maskattn.cli.app import app
from maskattn.nn.encoders.table import ENCODERS
from maskattn.slide.layouts import read_features

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def slide(tmp_path: Path) -> Path:
    return write_slide(tmp_path / "disc.tiff")


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    network = timm.create_model("vit_tiny_patch16_224", num_classes=0)
    save_file(network.state_dict(), path := tmp_path_factory.mktemp("weights") / "tiny.safetensors")
    return path


def maskattn(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def one_line(result: Result) -> str:
    (error,) = result.stderr.splitlines()
    return error


def test_features_come_out_and_a_second_run_skips(slide: Path, weights: Path, tmp_path: Path) -> None:
    asked = (
        "extract",
        slide,
        "--encoder",
        "timm:vit_tiny_patch16_224",
        "--weights",
        weights,
        "--out",
        tmp_path / "out",
    )
    asked += ("--spacing-um", 1, "--patch-size", 64)
    result = maskattn(*asked)
    assert result.exit_code == 0, result.output
    assert "timm:vit_tiny_patch16_224 runs packed; licence of its weights: unknown" in result.stderr
    assert "ok       disc: " in result.stderr
    assert "1 of 1 slides have features" in result.stdout
    (path,) = (tmp_path / "out").rglob("features_*/disc.h5")
    assert read_features(path).features_TC.shape[1] == 192
    assert "skipped  disc: " in maskattn(*asked).stderr
    refused = maskattn(*asked, "--token-mask", "tissue")
    assert refused.exit_code == 1
    assert "got token_mask: none in" in refused.stderr


def test_errors_take_one_line_before_any_slide_is_opened(slide: Path, weights: Path, tmp_path: Path) -> None:
    for arguments, told in (
        (("--encoder", "uni3"), "the nearest names: uni, "),
        (("--encoder", "timm:vit_tiny_patch16_224", "--weights", weights), "give --mag 20 or --spacing-um 0.5"),
        (("--encoder", weights), "or give --num-heads"),
        (("--encoder", "hibou-b"), "allow it with --trust-code"),
        (("--encoder", "conch", "--weights", weights), "must be those of conch, whose tower has attn_pool_contrast"),
        (("--encoder", "uni", "--mag", 20, "--spacing-um", 1), "give one of the two"),
    ):
        result = maskattn("extract", slide, "--out", tmp_path / "out", *arguments)
        assert result.exit_code == 2, result.output
        assert told in one_line(result), result.stderr


def test_an_encoder_that_is_no_transformer_gives_features_and_is_not_masked(slide: Path, tmp_path: Path) -> None:
    network = timm.create_model("resnet10t", num_classes=0)
    save_file(network.state_dict(), path := tmp_path / "resnet.safetensors")
    asked = ("extract", slide, "--encoder", "timm:resnet10t", "--weights", path, "--spacing-um", 1, "--patch-size", 64)
    result = maskattn(*asked, "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    (file,) = (tmp_path / "out").rglob("features_*/disc.h5")
    assert read_features(file).features_TC.shape[1] == 512
    refused = maskattn(*asked, "--out", tmp_path / "masked", "--token-mask", "tissue")
    assert refused.exit_code == 2
    assert "needs a packed vision transformer, got timm:resnet10t: ResNet cannot be turned into" in one_line(refused)
    assert not list((tmp_path / "masked").rglob("*.*"))


def test_weights_that_cannot_be_read_are_named(slide: Path, weights: Path, tmp_path: Path) -> None:
    (tmp_path / "cut.safetensors").write_bytes(weights.read_bytes()[:5000])
    torch.save(torch.nn.Identity(), tmp_path / "code.pt")
    for name, told in (
        ("cut.safetensors", "must be a complete file"),
        ("code.pt", "got the code torch.nn.modules.linear"),
    ):
        asked = ("--encoder", "timm:vit_tiny_patch16_224", "--weights", tmp_path / name, "--spacing-um", 1)
        result = maskattn("extract", slide, "--out", tmp_path / "out", *asked)
        assert result.exit_code == 2, result.output
        assert told in one_line(result)
        assert name in one_line(result)


def test_a_torchvision_of_another_torch_is_told_as_such(
    slide: Path, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*args: object, **kwargs: object) -> None:
        raise RuntimeError("operator torchvision::nms does not exist")

    monkeypatch.setattr(timm, "create_model", fails)
    asked = ("--encoder", "timm:vit_tiny_patch16_224", "--weights", weights, "--spacing-um", 1)
    result = maskattn("extract", slide, "--out", tmp_path / "out", *asked)
    assert result.exit_code == 2
    assert "torchvision must be built for the torch that is installed, got one that fails to import" in one_line(result)


def test_weights_of_timm_that_cannot_be_reached_are_named_as_the_hub_has_them(
    slide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreachable(*args: object, **kwargs: object) -> None:
        raise ConnectionError("no network")

    monkeypatch.setattr(timm, "create_model", unreachable)
    asked = ("--encoder", "timm:vit_tiny_patch16_224", "--spacing-um", 1)
    result = maskattn("extract", slide, "--out", tmp_path / "out", *asked)
    assert result.exit_code == 2
    assert "run `hf download timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k`" in one_line(result)


def test_the_table_of_encoders_and_one_of_them() -> None:
    lines = maskattn("encoders").stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["name", *ENCODERS]
    assert "256 → 224   0.5  yes    yes   CC-BY-NC-ND-4.0" in lines[1]
    told = maskattn("encoders", "virchow_2").stderr
    assert "got 'virchow_2'; the nearest names: virchow2" in told
    one = maskattn("encoders", "uni_v2").stdout
    assert "hub_id: MahmoodLab/UNI2-h\n" in one
    assert "source: model card in mahmoodlab/UNI README; TRIDENT\n" in one
    rows = json.loads(maskattn("encoders", "--json").stdout)
    assert {row["name"]: row["embed_dim"] for row in rows} == {name: row.embed_dim for name, row in ENCODERS.items()}
