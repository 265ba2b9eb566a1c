"""``maskattn info MODEL``, and ``infer`` with other tools' models from the command line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from small_slides import small_model, write_slide
from typer.testing import CliRunner, Result

from maskattn.cli.app import app
from maskattn.demo.train import BUNDLED_MODEL
from maskattn.nn.slide_models.gated_attention import GatedAttentionHead
from maskattn.nn.vit import VisionTransformer


def maskattn(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_a_folders_card_is_printed_without_torch() -> None:
    program = (
        "import sys; sys.argv = ['maskattn', 'info', sys.argv[1]]\n"
        "from maskattn.cli import main\n"
        "try: main()\n"
        "except SystemExit as end: assert not end.code, end.code\n"
        "assert 'torch' not in sys.modules"
    )
    run = subprocess.run([sys.executable, "-c", program, str(BUNDLED_MODEL)], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "name: maskattn-demo\n" in run.stdout
    assert "classes: benign, low, high\n" in run.stdout
    assert "demonstration: yes" in run.stdout


def test_the_earlier_pair_and_other_tools_checkpoints_have_a_card_too(tmp_path: Path) -> None:
    small_model().save(tmp_path / "own.safetensors")
    assert "classes: benign, low/high" in maskattn("info", tmp_path / "own.safetensors").stdout
    torch.save(GatedAttentionHead(24, 2).state_dict(), tmp_path / "s_0_checkpoint.pt")
    assert "kind: gated_attention (CLAM_SB)" in maskattn("info", tmp_path / "s_0_checkpoint.pt").stdout
    card = json.loads(maskattn("info", BUNDLED_MODEL, "--json").stdout)
    assert card["slide_model"]["tile_px"] == card["tile_px"] == 128
    (tmp_path / "config.json").write_text('{"name": "x"}')
    result = maskattn("info", tmp_path)
    assert result.exit_code == 2
    assert "must have name, kind and classes" in result.stderr


def test_a_path_with_neither_a_slide_nor_a_model_is_named_as_such(tmp_path: Path) -> None:
    gone = maskattn("info", tmp_path / "models" / "gone")
    assert gone.exit_code == 1
    assert "needs a slide file, a slide model's folder or a checkpoint, got path=" in gone.stderr
    assert "which does not exist" in gone.stderr
    folder = maskattn("info", tmp_path)
    assert folder.exit_code == 1
    assert (
        "which is a folder; check the path (a slide model's folder holds config.json, which this one lacks)"
        in folder.stderr
    )


@pytest.fixture
def given(tmp_path: Path) -> Path:
    """A slide, a checkpoint and an encoder."""
    write_slide(tmp_path / "disc.tiff", spacing_um=0.5)
    torch.manual_seed(0)
    torch.save(GatedAttentionHead(24, 2, hidden=8).state_dict(), tmp_path / "s_0_checkpoint.pt")
    vit = VisionTransformer(img_size=32, patch_size=8, embed_dim=24, depth=1, num_heads=2)
    torch.save(vit.state_dict(), tmp_path / "vit.pt")
    return tmp_path


def test_infer_runs_a_checkpoint_with_an_encoder_and_with_features(given: Path) -> None:
    pair = ("--encoder", given / "vit.pt", "--num-heads", 2)
    model = ("--model", given / "s_0_checkpoint.pt", "--classes", "low, high")
    run = maskattn(
        "infer", given / "disc.tiff", *model, *pair, "--tile-spacing-um", 0.5, "--tokens", "--out", given / "out"
    )
    assert run.exit_code == 0, run.stderr
    extracted = maskattn("extract", given / "disc.tiff", *pair, "--spacing-um", 0.5, "--out", given / "features")
    assert extracted.exit_code == 0, extracted.stderr
    alone = maskattn("infer", "--features", given / "features", *model, "--out", given / "alone")
    assert alone.exit_code == 0, alone.stderr
    found = [json.loads((given / out / "disc" / "prediction.json").read_text()) for out in ("out", "alone")]
    assert found[0]["logits"] == pytest.approx(found[1]["logits"], abs=1e-5)
    assert list(found[0]["logits"]) == ["low", "high"]
    assert any("only features were given" in note for note in found[1]["notes"])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            "infer @disc.tiff --model @s_0_checkpoint.pt",
            "name the encoder that it was trained with (--encoder), or give",
        ),
        ("infer @disc.tiff --model @s_0_checkpoint.pt --encoder nothing", "the nearest names"),
        (
            "infer @disc.tiff --encoder @vit.pt --num-heads 2",
            "includes the tile encoder that it must be run with, got vit",
        ),
        ("infer @disc.tiff --model @vit.pt", "must be one of CLAM, AttentionDeepMIL, TransMIL, STAMP, TITAN"),
        ("infer --features @nowhere --model @s_0_checkpoint.pt", "features must be in a folder"),
        ("infer @disc.tiff --token-mask none", "must be run with its token mask, 'tissue', got 'none'"),
    ],
)
def test_wrong_models_and_encoders_exit_with_2_and_one_line(given: Path, arguments: str, words: str) -> None:
    places = [str(given / word[1:]) if word.startswith("@") else word for word in arguments.split()]
    result = maskattn(*places, "--out", given / "out")
    assert result.exit_code == 2
    assert len(result.stderr.splitlines()) == 1
    assert words in result.stderr
