"""A slide's run with concepts in place of a trained slide model: scores of every concept, and maps, in one pass."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("transformers")

from maskattn.explain.text_concepts import TextConcepts
from maskattn.explain.zero_shot import zero_shot_head, zero_shot_model
from maskattn.slide.layouts import read_features
from maskattn.slide.manifest import SlideJob
from maskattn.slide.prediction import read_prediction
from maskattn.slide.reader import SlideReader
from maskattn.slide.request import RunSettings
from maskattn.slide.run import run_slides


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    """A folder with a small random image tower of CLIP and its projection."""
    import transformers

    torch.manual_seed(0)
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.CLIPVisionConfig(**small, image_size=64, patch_size=16, projection_dim=12)
    transformers.CLIPVisionModelWithProjection(config).eval().save_pretrained(tmp_path / "clip")
    return tmp_path / "clip"


def test_a_slides_scores_are_its_best_tiles_means_and_its_maps_sum_to_them(
    clip: Path, slide: Path, settings: RunSettings
) -> None:
    words = TextConcepts(("gland", "fat"), torch.randn(2, 12, generator=torch.Generator().manual_seed(1)), 20.0)
    model = zero_shot_model(str(clip), words, best=3, spacing_um=1.0)
    (outcome,) = run_slides([SlideJob("disc", slide)], model, replace(settings, tokens=True))
    assert outcome.status == "ok", outcome.reason
    folder = settings.out_dir / "disc"
    prediction = read_prediction(folder / "prediction.json")
    z = torch.from_numpy(read_features(folder / "features.h5").features_TC)
    cosines = F.cosine_similarity(z[None], words.vectors_KC[:, None], dim=2)
    expected = 20 * cosines.sort(dim=1, descending=True).values[:, :3].mean(dim=1)
    assert list(prediction.logits) == ["gland", "fat"]
    torch.testing.assert_close(torch.tensor(list(prediction.logits.values())), expected, rtol=1e-4, atol=1e-4)
    with h5py.File(folder / "relevance.h5") as file:
        of_tiles = torch.from_numpy(file["tiles/relevance"][:])
        assert "tokens" in file
    torch.testing.assert_close(of_tiles.sum(dim=1).float(), expected, rtol=1e-3, atol=1e-3)
    assert ((of_tiles != 0).sum(dim=1) == 3).all()
    assert {of_map["map_check"] for of_map in prediction.maps.values()} <= {"passed", "weak", "contradicts"}


def test_the_command_runs_concepts_and_says_what_is_missing(clip: Path, slide: Path, tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from maskattn.cli.app import app

    vectors = torch.randn(2, 12, generator=torch.Generator().manual_seed(1)).numpy()
    np.save(tmp_path / "words.npy", vectors)
    (tmp_path / "words.txt").write_text("gland\nfat")
    given = ["infer", str(slide), "--concepts", str(tmp_path / "words.npy"), "--out", str(tmp_path / "out")]
    tiles = ["--encoder", str(clip), "--tile-spacing-um", "1", "--best-tiles", "3", "--temperature", "20"]
    result = CliRunner().invoke(app, [*given, *tiles])
    assert result.exit_code == 0, result.stderr
    (found,) = (tmp_path / "out").glob("*/prediction.json")
    words = TextConcepts(("gland", "fat"), torch.from_numpy(vectors), 20.0)
    z = torch.from_numpy(read_features(found.parent / "features.h5").features_TC)
    torch.testing.assert_close(
        torch.tensor([*read_prediction(found).logits.values()]), zero_shot_head(words, 3)(z), rtol=1e-4, atol=1e-4
    )
    alone = CliRunner().invoke(app, given)
    assert (alone.exit_code, "name it with --encoder" in alone.stderr) == (2, True)
    both = CliRunner().invoke(app, [*given, *tiles, "--model", str(clip)])
    assert (both.exit_code, "give one of them" in both.stderr) == (2, True)


def test_weights_fill_the_network_that_timm_names_with_its_projection(slide: Path, tmp_path: Path) -> None:
    """Its own activation and pixel statistics too, which a file of weights does not contain."""
    timm = pytest.importorskip("timm")
    from safetensors.torch import save_file
    from typer.testing import CliRunner

    from maskattn.cli.app import app

    torch.manual_seed(0)
    name = "vit_tiny_patch16_224"
    network = timm.create_model(name, num_classes=12).eval()
    save_file(network.state_dict(), tmp_path / "tower.safetensors")
    np.save(tmp_path / "words.npy", torch.randn(2, 12).numpy())
    given = ["infer", str(slide), "--concepts", str(tmp_path / "words.npy"), "--out", str(tmp_path / "out")]
    tiles = ["--tile-spacing-um", "1", "--weights", str(tmp_path / "tower.safetensors"), "--no-check"]
    result = CliRunner().invoke(app, [*given, *tiles, "--encoder", f"timm:{name}"])
    assert result.exit_code == 0, result.stderr
    (found,) = (tmp_path / "out").glob("*/features.h5")
    features = read_features(found)
    with SlideReader(slide) as reader:
        side = features.patch_size_lv0
        x_lv0, y_lv0 = (int(x) for x in features.coords_T2[0])
        pixels = torch.from_numpy(reader.read_region(x_lv0, y_lv0, (side, side), (224, 224)).copy())
    x = (pixels.permute(2, 0, 1)[None] / 255 - 0.5) / 0.5
    expected = network(x)[0].detach()
    assert F.cosine_similarity(torch.from_numpy(features.features_TC[0]), expected, dim=0) > 0.98
    refused = CliRunner().invoke(app, [*given, *tiles, "--encoder", str(tmp_path / "tower.safetensors")])
    assert (refused.exit_code, "--weights needs --encoder timm:NAME" in refused.stderr) == (2, True)


def test_concepts_of_another_embedding_space_are_refused(clip: Path) -> None:
    with pytest.raises(ValueError, match="the slide model reads, 5, got 12 channels of clip"):
        zero_shot_model(str(clip), TextConcepts(("gland",), torch.ones(1, 5)))
