"""``maskattn explain``: a picture and scores of one image, and the contents of its figures."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("typer")
pytest.importorskip("PIL")
pytest.importorskip("matplotlib")
pytest.importorskip("safetensors")

from PIL import Image
from typer.testing import CliRunner, Result

from maskattn.cli.app import app
from maskattn.explain import CDAM, METHODS, AttentionMap, Concept, IntegratedCDAM, single_image
from maskattn.explain.map_check import MapCheck
from maskattn.explain.methods import DEFAULT_METHOD
from maskattn.explain.pictures import draw_explanation
from maskattn.explain.single_image import explain_image, normalisation_of, normalised, read_image, read_keep, size_for
from maskattn.nn import VisionTransformer
from maskattn.nn.encoders.entry import CLIP
from maskattn.nn.encoders.table import ENCODERS


@pytest.fixture
def vit() -> VisionTransformer:
    model = VisionTransformer(img_size=64, patch_size=16, embed_dim=32, depth=2, num_heads=2, num_classes=5).eval()
    for p in model.parameters():
        nn.init.normal_(p, std=0.2)
    return model


@pytest.fixture
def weights(vit: VisionTransformer, tmp_path: Path) -> Path:
    from safetensors.torch import save_file

    path = tmp_path / "vit.safetensors"
    save_file(vit.state_dict(), path)
    return path


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    path = tmp_path / "photo.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (80, 140, 3), np.uint8)).save(path)
    return path


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["explain", *map(str, arguments)])


def test_the_command_writes_a_picture_and_prints_the_models_scores(vit, weights, photo, tmp_path):
    out = tmp_path / "panel.png"
    mean = ("--pixel-mean", 0.5, 0.5, 0.5, "--pixel-std", 0.5, 0.5, 0.5)
    result = run(photo, "--model", weights, "--num-heads", 2, "--target", 3, "--target", 1, *mean, "--out", out)
    assert result.exit_code == 0, result.stderr
    x = normalised(read_image(photo, (64, 112)), (0.5,) * 3, (0.5,) * 3)
    logits = vit(x)[0]
    said = [line.split(" (")[0] for line in result.stdout.splitlines()]
    assert said[:2] == [f"class {c}: {logits[c].item():.3g}" for c in (3, 1)]
    assert said[2] == f"method      {METHODS[DEFAULT_METHOD].title}"
    figures = json.loads(out.with_suffix(".json").read_text())
    assert list(figures["maps"]) == ["class 3", "class 1"]
    for c, figure in zip((3, 1), figures["maps"].values(), strict=True):
        assert figure["score"] == pytest.approx(logits[c].item(), rel=1e-4)
        assert figure["method"] == METHODS[DEFAULT_METHOD].title
        assert figure["map_check"] in ("passed", "weak", "contradicts")
        assert figure["spread_at_random"] > 0
    with Image.open(out) as picture:
        assert picture.size[0] > 800


def test_a_saved_classifier_of_transformers_is_explained_as_it_comes(photo, tmp_path):
    transformers = pytest.importorskip("transformers")
    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    model = transformers.ViTForImageClassification(transformers.ViTConfig(image_size=64, num_labels=5, **small)).eval()
    model.save_pretrained(tmp_path / "saved")
    result = run(photo, "--model", tmp_path / "saved", "--target", 2, "--out", tmp_path / "panel.png")
    assert result.exit_code == 0, result.stderr
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    x = normalised(read_image(photo, (64, 112)), mean, std)
    logit = model(x, interpolate_pos_encoding=True).logits[0, 2].item()
    assert result.stdout.splitlines()[0].split(" (")[0] == f"class 2: {logit:.3g}"


@pytest.mark.parametrize(
    ("file", "content", "expected"),
    [
        ("preprocessor_config.json", {"image_mean": [0.5] * 3, "image_std": [0.25] * 3}, ((0.5,) * 3, (0.25,) * 3)),
        ("config.json", {"pretrained_cfg": {"mean": [0.1] * 3, "std": [0.2] * 3}}, ((0.1,) * 3, (0.2,) * 3)),
        ("open_clip_config.json", {"preprocess_cfg": {"mean": [0.3] * 3, "std": [0.4] * 3}}, ((0.3,) * 3, (0.4,) * 3)),
        ("open_clip_config.json", {"model_cfg": {"embed_dim": 512}}, CLIP),
        ("config.json", {"model_type": "vit"}, ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))),
    ],
)
def test_pixels_are_normalised_as_the_models_folder_or_repository_says(file, content, expected, tmp_path, monkeypatch):
    (tmp_path / file).write_text(json.dumps(content))
    assert normalisation_of(str(tmp_path)) == expected
    assert normalisation_of(str(tmp_path / "weights.pt")) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    hub = pytest.importorskip("huggingface_hub")
    missing = pytest.importorskip("huggingface_hub.errors").EntryNotFoundError

    def download(name: str, wanted: str) -> str:
        assert name == "org/model"
        if wanted != file:
            raise missing.__new__(missing)
        return str(tmp_path / file)

    monkeypatch.setattr(hub, "hf_hub_download", download)
    assert normalisation_of("hf-hub:org/model") == expected


@pytest.mark.parametrize("name", ["conch", "quiltnet-b16", "uni"])
def test_pixels_of_a_repository_in_the_table_are_normalised_as_the_table_says(name):
    entry = ENCODERS[name]
    assert normalisation_of(f"hf-hub:{entry.hub_id}") == (entry.pixel_mean, entry.pixel_std)


def test_the_command_takes_masks_concepts_and_the_other_methods(weights, photo, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    mask = tmp_path / "mask.png"
    Image.fromarray(np.tri(20, 30, dtype=np.uint8) * 255).save(mask)
    for options in (
        ("--concept", photo),
        *(("--method", method) for method in ("smooth", "integrated", "integrated-norm")),
        ("--keep", mask),
    ):
        result = run(photo, "--model", weights, "--num-heads", 2, *options)
        assert result.exit_code == 0, result.stderr
        assert (tmp_path / "photo_explained.png").exists()
    assert len(result.stdout.splitlines()) == 6  # the three likeliest classes, the method, and where the files are


def test_a_map_that_contradicts_is_named_over_the_map_and_on_stdout_and_no_check_skips_the_test(
    weights, photo, tmp_path, monkeypatch
):
    def contradict(model, tokens, targets, relevance_MN, **options):
        return [MapCheck("contradicts", z=-3.0)] * len(relevance_MN)

    monkeypatch.setattr(single_image, "check_tokens", contradict)
    given = (photo, "--model", weights, "--num-heads", 2, "--target", 1, "--out", tmp_path / "p.png")
    assert "(map check: contradicts)" in run(*given).stdout.splitlines()[0]
    assert "map check" not in run(*given, "--no-check").stdout
    (figure,) = json.loads((tmp_path / "p.json").read_text())["maps"].values()
    assert figure["map_check"] == "not asked for"


def test_the_check_of_an_image_is_by_the_models_own_predictions_without_the_tokens(vit):
    x, keep = torch.randn(1, 3, 64, 64), torch.ones(1, 4, 4, dtype=torch.bool)
    keep[0, 0] = False
    found = explain_image(vit, x, [4, 0], keep)
    for place, target in enumerate((4, 0)):
        order = found.maps_MHW[place].masked_fill(~keep[0], -torch.inf).flatten().argsort(descending=True)
        check, most, least = found.checks[place], *torch.zeros(2, 1, 16, dtype=torch.bool)
        most[0, order[:2]], least[0, order[10:12]] = True, True
        assert check.most_relevant_alone == pytest.approx(vit(x, most)[0, target].item(), abs=1e-5)
        assert check.least_relevant_alone == pytest.approx(vit(x, least)[0, target].item(), abs=1e-5)


def test_the_backbone_runs_once_for_scores_maps_and_attention(vit, monkeypatch):
    ran = []
    whole = type(vit).before_last_block
    monkeypatch.setattr(type(vit), "before_last_block", lambda self, tokens: ran.append(1) or whole(self, tokens))
    explain_image(vit, torch.randn(1, 3, 64, 64), check=False)
    assert len(ran) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--target", "9"), "0 … 4"),
        (("--method", "lime"), "got 'lime'"),
        (("--target", "1", "--concept", "PHOTO"), "got --target and --concept; leave the others out"),
    ],
)
def test_wrong_requests_are_one_line_and_leave_no_picture(weights, photo, tmp_path, options, message):
    options = [photo if option == "PHOTO" else option for option in options]
    result = run(photo, "--model", weights, "--num-heads", 2, *options, "--out", tmp_path / "panel.png")
    assert result.exit_code == 2
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert not (tmp_path / "panel.png").exists()


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ModuleNotFoundError("No module named 'timm'", name="timm"), "pip install 'maskattn[timm]'"),
        (ModuleNotFoundError("No module named 'transformers'", name="transformers"), "pip install 'maskattn[hf]'"),
        (ModuleNotFoundError("Could not import module 'ViTModel'"), "Could not import module 'ViTModel'"),
    ],
    ids=str,
)
def test_a_library_that_is_not_there_or_does_not_load_is_named(error, message, photo, monkeypatch):
    def load(*arguments: object, **options: object) -> None:
        raise error

    monkeypatch.setattr("maskattn.nn.checkpoints.load_vit", load)
    result = run(photo, "--model", "timm:vit")
    assert result.exit_code in (1, 2)
    assert message in result.stderr
    assert "None" not in result.stderr


def test_an_explanation_holds_what_the_methods_give(vit):
    x, keep = torch.randn(1, 3, 64, 64), torch.rand(1, 4, 4) > 0.3
    found = explain_image(vit, x, [4, 0], keep)
    assert found.names == ("class 4", "class 0")
    assert torch.equal(found.maps_MHW, METHODS[DEFAULT_METHOD](vit).attribute(x, [4, 0], keep)[0])
    assert found.method == METHODS[DEFAULT_METHOD].title
    assert torch.equal(found.attention_HW, AttentionMap(vit).attribute(x, keep)[0])
    torch.testing.assert_close(found.scores_M, vit(x, keep)[0, [4, 0]].detach())
    concept = Concept.from_images(vit, x)
    found = explain_image(vit, x, concept, method="integrated")
    assert torch.equal(found.maps_MHW, IntegratedCDAM(vit).attribute(x, concept))
    several = explain_image(vit, x, Concept(torch.stack([concept.direction, -concept.direction])), method="cdam")
    assert several.names == ("concept 0", "concept 1")
    torch.testing.assert_close(several.scores_M[0], -several.scores_M[1])
    assert torch.equal(several.maps_MHW[0], CDAM(vit).attribute(x, concept)[0])
    best = explain_image(vit, x).names
    assert best[0] == f"class {int(vit(x).argmax())}"


def test_a_model_without_classes_asks_for_a_concept():
    bare = VisionTransformer(img_size=32, embed_dim=32, depth=1, num_heads=2).eval()
    with pytest.raises(ValueError, match="num_classes=0"):
        explain_image(bare, torch.zeros(1, 3, 32, 32))


def test_the_shorter_side_becomes_the_models_and_tokens_are_whole(vit, photo):
    assert size_for(vit, photo) == (64, 112)
    vit.dynamic_img_size = False
    assert size_for(vit, photo) == (64, 64)


def test_a_mask_keeps_tokens_that_are_not_all_black(tmp_path):
    mask = np.zeros((40, 60), np.uint8)
    mask[9, 59] = 1
    Image.fromarray(mask).save(tmp_path / "mask.png")
    keep = read_keep(tmp_path / "mask.png", (4, 6))
    assert keep.shape == (1, 4, 6)
    assert keep[0].nonzero().tolist() == [[0, 5]]


def test_the_figure_has_the_image_and_every_map_with_its_scale():
    maps = {"class 1: 2": torch.tensor([[1.0, -3.0]]), "class 2: 1": torch.zeros(1, 2)}
    figure = draw_explanation(np.zeros((16, 32, 3), np.uint8), torch.tensor([[0.2, 0.1]]), maps, "two")
    titles = [axis.get_title() for axis in figure.axes if axis.get_title()]
    assert titles == ["input", "attention", "class 1: 2", "class 2: 1"]
    drawn = {axis.get_title(): axis.images[-1] for axis in figure.axes if axis.get_title()}
    assert drawn["attention"].get_clim()[0] == 0
    low, high = drawn["class 1: 2"].get_clim()
    assert low == -high
    assert high == pytest.approx(3, rel=0.01)
    assert len(figure.axes) == 4 + 3  # a colour bar for each map
    bars = [axis.get_ylabel() for axis in figure.axes if not axis.get_title()]
    assert bars == ["attention", "relevance (+ for, − against)", "relevance (+ for, − against)"]
    masked = draw_explanation(np.zeros((16, 32, 3), np.uint8), None, maps, keep_HW=torch.tensor([[True, False]]))
    assert masked.axes[1].images[-1].get_array().mask.tolist() == [[False, True]]  # background is left uncoloured
    with pytest.raises(ValueError, match=r"\(Y, X, 3\)"):
        draw_explanation(np.zeros((16, 32), np.uint8), None, maps)
