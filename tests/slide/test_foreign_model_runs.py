"""Other tools' slide models run on slides with an encoder, or on features; what does not fit is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from runs import names
from small_slides import small_model, write_slide

from maskattn.errors import ManifestError
from maskattn.explain.slide_heads import SlideHeadCDAM
from maskattn.nn.encoders.tile_encoder import EncoderCard, TileEncoder
from maskattn.nn.slide_models.card import EncoderFacts, read_card
from maskattn.nn.slide_models.folder import load_two_stages, save_model
from maskattn.nn.slide_models.gated_attention import GatedAttentionHead
from maskattn.nn.slide_models.head import TileGrid
from maskattn.nn.slide_models.ordinal import OrdinalHead
from maskattn.nn.slide_models.stamp import DistanceViTHead
from maskattn.nn.slide_models.transmil import TransMILHead
from maskattn.nn.slide_models.two_stage import TwoStageModel
from maskattn.nn.slide_models.vit import ViTHead
from maskattn.nn.vit import VisionTransformer
from maskattn.slide.colours import colour_limit
from maskattn.slide.extract_request import ExtractSettings
from maskattn.slide.extraction import extract_slides
from maskattn.slide.layouts import read_features
from maskattn.slide.manifest import SlideJob
from maskattn.slide.prediction import read_prediction
from maskattn.slide.request import RunSettings
from maskattn.slide.run import run_slides

C = 24


def encoder_of(name: str = "small", seed: int = 0, why_not: str = "") -> TileEncoder:
    torch.manual_seed(seed)
    card = EncoderCard(name, "token", (0.5,) * 3, (0.25,) * 3, 32, 64, 0.5, why_not=why_not)
    if why_not:
        return TileEncoder(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 32 * 32, C)), card, C).eval()
    vit = VisionTransformer(img_size=32, patch_size=8, embed_dim=C, depth=2, num_heads=2)
    for weight in vit.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    return TileEncoder(vit, card).eval()


@pytest.fixture(scope="module")
def clam(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in CLAM's layout."""
    torch.manual_seed(1)
    path = tmp_path_factory.mktemp("clam") / "s_0_checkpoint.pt"
    head = GatedAttentionHead(C, 2, hidden=16, attention_dim=8, branch_per_class=True, instances=True)
    for weight in head.parameters():
        torch.nn.init.normal_(weight)
    torch.save(head.state_dict(), path)
    return path


@pytest.fixture(scope="module")
def features(slide: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("features")
    (outcome,) = extract_slides([SlideJob("disc", slide)], encoder_of(), ExtractSettings(out, batch_size=8))
    assert outcome.status == "ok", outcome.reason
    return out


@pytest.fixture(scope="module")
def slide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_slide(tmp_path_factory.mktemp("slides") / "disc.tiff", spacing_um=0.5)


def loaded(clam: Path, encoder: TileEncoder | None = None, **more: object) -> TwoStageModel:
    return load_two_stages(clam, encoder, classes=("low", "high"), **more)


def run_one(path: Path, model: TwoStageModel, settings: RunSettings):
    (outcome,) = run_slides([SlideJob("disc", path)], model, settings)
    assert outcome.status == "ok", outcome.reason
    return read_prediction(settings.out_dir / "disc" / "prediction.json")


def test_a_slide_and_its_extracted_features_give_the_same_prediction(
    slide: Path, clam: Path, features: Path, settings: RunSettings
) -> None:
    encoded = run_one(slide, loaded(clam, encoder_of()), settings)
    given = replace(settings, out_dir=settings.out_dir / "given", features_dir=features)
    (file,) = features.rglob("disc.h5")
    from_features = run_one(file, loaded(clam), given)
    with_slide = run_one(slide, loaded(clam), replace(given, out_dir=settings.out_dir / "both"))
    assert encoded.logits == pytest.approx(from_features.logits, abs=1e-5)
    assert with_slide.logits == from_features.logits
    tiles = read_features(file)
    expected = loaded(clam).head(torch.from_numpy(tiles.features_TC)).tolist()
    assert list(from_features.logits.values()) == pytest.approx(expected, abs=1e-5)
    assert names(given.out_dir / "disc") == {"prediction.json", "relevance.h5"}
    assert {"heatmap_low.png", "heatmap_high.png", "attention.png"} < names(settings.out_dir / "both" / "disc")
    assert "features.h5" not in names(settings.out_dir / "both" / "disc")
    assert (from_features.slide.reader, encoded.settings["encoder"]) == ("none: features alone", "small")


@pytest.mark.parametrize("token_mask", ["none", "tissue"])
def test_maps_of_tokens_are_those_of_the_explanation(
    slide: Path, clam: Path, features: Path, settings: RunSettings, token_mask: str
) -> None:
    model = loaded(clam, encoder_of(), token_mask=token_mask)
    run_one(slide, model, replace(settings, tokens=True))
    if token_mask == "none":  # from features too, tiles are read for their tokens alone
        given = replace(settings, tokens=True, features_dir=features, out_dir=settings.out_dir / "given")
        run_one(slide, model, given)
        files = [folder / "disc" / "relevance.h5" for folder in (settings.out_dir, given.out_dir)]
        with h5py.File(files[0]) as one, h5py.File(files[1]) as other:
            for table in ("coords", "tiles/relevance", "tokens/relevance"):
                np.testing.assert_allclose(one[table][:], other[table][:], atol=1e-5)
    with (
        h5py.File(settings.out_dir / "disc" / "relevance.h5") as file,
        h5py.File(settings.out_dir / "disc" / "features.h5") as table,
    ):
        found, tokens, keep = file["tiles/relevance"][:], file["tokens/relevance"][:], file["tokens/keep"][:]
        z, coords = torch.from_numpy(table["features"][:]), file["coords"][:]
        assert table["features"].attrs["token_mask"] == token_mask
        assert table["features"].attrs["encoder"] == "small"
        assert file["coords"].attrs["patch_size"] == 64
    expected = SlideHeadCDAM(model.head).tiles(z)
    np.testing.assert_allclose(found, expected.relevance_KT, atol=1e-5)
    assert keep.all() == (token_mask == "none")
    assert (tokens[:, ~keep] == 0).all()
    assert tokens.shape == (2, len(coords), 4, 4)
    assert np.abs(tokens).max() > 1e-3


def test_an_encoder_that_is_not_a_transformer_gives_tile_maps_and_says_why(
    slide: Path, clam: Path, settings: RunSettings
) -> None:
    model = loaded(clam, encoder_of("flat", why_not="it is one linear layer"))
    prediction = run_one(slide, model, replace(settings, tokens=True))
    assert "maps show tiles, not tokens: flat is no packed vision transformer: it is one linear layer" in (
        prediction.notes
    )
    with h5py.File(settings.out_dir / "disc" / "relevance.h5") as file:
        assert "tokens" not in file
    with pytest.raises(ValueError, match=r"--token-mask tissue needs a packed vision transformer, got flat"):
        loaded(clam, encoder_of("flat", why_not="it is one linear layer"), token_mask="tissue")


def test_a_transformer_over_the_grid_reads_the_cells_of_the_features(
    slide: Path, features: Path, settings: RunSettings, tmp_path: Path
) -> None:
    torch.manual_seed(2)
    head = ViTHead({"img_size": 8, "patch_size": 1, "in_chans": C, "num_classes": 2, "embed_dim": 16, "num_heads": 2,
                    "depth": 2, "pos_embed": "alibi"})  # fmt: skip
    card = replace(loaded_card(), classes=("a", "b"))
    folder = save_model(tmp_path / "model", head, card)
    (file,) = features.rglob("disc.h5")
    tiles = read_features(file)
    prediction = run_one(file, load_two_stages(folder), replace(settings, features_dir=features))
    cells = torch.from_numpy(tiles.coords_T2 // tiles.patch_size_lv0)
    grid = TileGrid(cells[:, 1], cells[:, 0], (20, 20))
    expected = head.eval()(torch.from_numpy(tiles.features_TC), None, grid).tolist()
    assert list(prediction.logits.values()) == pytest.approx(expected, abs=1e-5)


def test_rollout_goes_through_all_layers_where_it_is_asked_for(
    features: Path, clam: Path, settings: RunSettings, tmp_path: Path
) -> None:
    torch.manual_seed(2)
    head = TransMILHead(C, 2, dim=32)
    folder = save_model(tmp_path / "model", head, loaded_card())
    (file,) = features.rglob("disc.h5")
    z, head = torch.from_numpy(read_features(file).features_TC), head.eval()
    for how, expected in (("last", head.attention(z).mean(0)), ("rollout", head.rollout(z))):
        one = replace(settings, out_dir=tmp_path / how, features_dir=features, attention=how)
        assert run_one(file, load_two_stages(folder), one).settings["attention"] == how
        with h5py.File(tmp_path / how / "disc" / "relevance.h5") as table:
            np.testing.assert_allclose(table["tiles/attention"][:], expected.detach().numpy(), rtol=1e-4, atol=1e-6)
    (skipped,) = run_slides([SlideJob("disc", file)], load_two_stages(folder), replace(one, attention="last"))
    assert skipped.status == "failed"
    assert "got attention: rollout" in skipped.reason
    with pytest.raises(
        ManifestError, match=r"got s_0_checkpoint \(gated_attention\), which has no layers of attention"
    ):
        run_slides([SlideJob("disc", file)], loaded(clam), replace(one, out_dir=tmp_path / "none"))


@pytest.mark.parametrize("ordinal", [False, True])
def test_rollout_of_stamps_alibi_is_refused_because_its_weights_do_not_sum_to_one(
    ordinal: bool, features: Path, settings: RunSettings, tmp_path: Path
) -> None:
    head = DistanceViTHead(C, 1 if ordinal else 2, dim=16, num_heads=2, hidden=16)
    folder = save_model(tmp_path / "model", OrdinalHead(head) if ordinal else head, loaded_card())
    (file,) = features.rglob("disc.h5")
    asked = replace(settings, features_dir=features, attention="rollout")
    with pytest.raises(
        ManifestError, match=r"whose weights do not sum to 1: .* after the softmax; use --attention last"
    ):
        run_slides([SlideJob("disc", file)], load_two_stages(folder), asked)


@pytest.mark.parametrize("sign", [1, -1])
def test_attention_below_zero_is_drawn_on_both_sides_of_zero(
    sign: int, slide: Path, features: Path, clam: Path, settings: RunSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = {}
    monkeypatch.setattr(
        "maskattn.slide.sinks.heatmaps.begin_heatmap",
        lambda path, thumbnail, values, title, label, kind, *rest: (
            lambda: drawn.update({path.name: (label, kind, values.of_pixels(values.values_V))})
        ),
    )
    rows = GatedAttentionHead.attention
    monkeypatch.setattr(GatedAttentionHead, "attention", lambda *args: sign * rows(*args))
    run_one(slide, loaded(clam), replace(settings, features_dir=features))
    label, kind, values = drawn["attention.png"]
    assert (kind, label) == (
        ("sequential", "attention") if sign > 0 else ("diverging", "attention (this model's may be below 0)")
    )
    low, high = colour_limit(values, kind)
    assert low <= np.nanmin(values) * 0.99
    assert high > 0


def loaded_card():
    from maskattn.nn.slide_models.card import ModelCard

    return ModelCard(name="trained", kind="", classes=("low", "high"), trained_on="nothing", metrics={"AUC": 0.5})


def trained_folder(tmp_path: Path, **more: object) -> Path:
    torch.manual_seed(1)
    card = replace(loaded_card(), encoder=EncoderFacts("small", C, encoder_of().sha256), spacing_um=0.5, patch_px=64)
    return save_model(tmp_path / "model", GatedAttentionHead(C, 2, hidden=16), replace(card, **more))


def test_a_folder_has_a_card_and_gives_the_same_model(tmp_path: Path, slide: Path, settings: RunSettings) -> None:
    folder = trained_folder(tmp_path, token_mask="none")
    assert names(folder) == {"config.json", "model.safetensors", "README.md"}
    card, readme = read_card(folder), (folder / "README.md").read_text()
    assert (card.kind, card.metrics, card.encoder.width) == ("gated_attention", {"AUC": 0.5}, C)
    assert "| trained on | nothing |" in readme
    assert "| AUC | 0.5 |" in readme
    model = load_two_stages(folder, encoder_of())
    again = save_model(tmp_path / "again", model)
    twin = load_two_stages(again, encoder_of())
    for name, x in model.head.state_dict().items():
        assert torch.equal(twin.head.state_dict()[name], x)
    assert run_one(slide, twin, settings).model.name == "trained"


def test_another_encoder_than_the_models_is_refused_unless_told_to_go_on(tmp_path: Path) -> None:
    folder = trained_folder(tmp_path, token_mask="none")
    with pytest.raises(ValueError, match=r"encoder other instead of small for trained; .*--other-encoder"):
        load_two_stages(folder, encoder_of("other"))
    with pytest.raises(ValueError, match="hash of the encoder's weights"):
        load_two_stages(folder, encoder_of(seed=5))
    with pytest.raises(ValueError, match="token mask tissue instead of none"):
        load_two_stages(folder, encoder_of(), token_mask="tissue")
    with pytest.raises(ValueError, match=r"µm per pixel 0\.25 instead of 0\.5"):
        load_two_stages(folder, encoder_of(), spacing_um=0.25)
    model = load_two_stages(folder, encoder_of("other"), token_mask="tissue", other_encoder=True)
    assert (model.card.encoder.name, model.card.token_mask) == ("other", "tissue")
    wide = TileEncoder(
        VisionTransformer(img_size=32, patch_size=8, embed_dim=16, depth=1, num_heads=2), encoder_of().card
    )
    with pytest.raises(ValueError, match="slide model reads, 24, got 16 channels of small"):
        load_two_stages(folder, wide, other_encoder=True)
    with pytest.raises(ValueError, match="got 3 names, a, b, c, for 2 logits"):
        load_two_stages(folder, classes=("a", "b", "c"))
    small_model().save(tmp_path / "own.safetensors")
    with pytest.raises(ValueError, match="includes the tile encoder that it must be run with, got small"):
        load_two_stages(tmp_path / "own.safetensors", encoder_of())
    with pytest.raises(FileNotFoundError, match="must be a folder, a checkpoint, or"):
        load_two_stages(tmp_path / "none")


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_a_head_that_was_saved_in_another_precision_reads_float32_features(
    dtype: torch.dtype, clam: Path, features: Path, settings: RunSettings, tmp_path: Path
) -> None:
    (file,) = features.rglob("disc.h5")
    as_saved = {key: x.to(dtype) for key, x in torch.load(clam, weights_only=True).items()}
    torch.save(as_saved, tmp_path / "saved.pt")
    found = run_one(file, loaded(tmp_path / "saved.pt"), replace(settings, features_dir=features))
    expected = loaded(clam).head(torch.from_numpy(read_features(file).features_TC)).tolist()
    tolerance = 0.05 if dtype == torch.float16 else 1e-5  # of weights with 11 bits
    assert list(found.logits.values()) == pytest.approx(expected, abs=tolerance)


def test_a_model_and_an_encoder_without_a_spacing_are_refused_before_a_slide_is_opened(
    slide: Path, clam: Path, settings: RunSettings
) -> None:
    encoder = encoder_of()
    encoder.card = replace(encoder.card, spacing_um=None)
    with pytest.raises(ManifestError, match=r"a spacing, got none from \S+ or small; give --tile-sp"):
        run_slides([SlideJob("disc", slide)], loaded(clam, encoder), settings)
    assert not settings.out_dir.exists()


def failure(path: Path, model: TwoStageModel, settings: RunSettings) -> str:
    (outcome,) = run_slides([SlideJob("disc", path)], model, settings)
    assert outcome.status == "failed"
    assert names(settings.out_dir) == {"summary.csv"}
    return outcome.reason


def test_features_that_the_model_was_not_trained_with_fail_their_slide_alone(
    tmp_path: Path, slide: Path, features: Path, settings: RunSettings
) -> None:
    given = replace(settings, features_dir=features)
    other = load_two_stages(trained_folder(tmp_path, token_mask="tissue", spacing_um=1.0))
    reason = failure(slide, other, given)
    assert "token mask none instead of tissue; µm per pixel 0.5 instead of 1.0" in reason
    assert "--other-encoder" in reason
    run_one(slide, other, replace(given, other_encoder=True))
    narrow = TwoStageModel(GatedAttentionHead(C - 4, 2, hidden=None), loaded_card()).eval()
    reason = failure(slide, narrow, replace(given, out_dir=tmp_path / "narrow"))
    assert f"got {C} channels in" in reason
    assert f"and {C - 4} for trained" in reason
    (outcome,) = run_slides([SlideJob("another", slide)], other, replace(given, out_dir=tmp_path / "another"))
    assert "got none for 'another'" in outcome.reason


def test_options_that_select_tiles_are_refused_with_stored_features(
    slide: Path, clam: Path, features: Path, settings: RunSettings
) -> None:
    given = replace(settings, features_dir=features)
    with pytest.raises(
        ValueError, match=r"features determine which tiles take part, got --mask .*leave one of them out"
    ):
        run_slides([SlideJob("disc", slide, mask_path=slide)], loaded(clam), given)
    with pytest.raises(ValueError, match="--no-mask"):
        run_slides([SlideJob("disc", slide)], loaded(clam), replace(given, masked=False))
