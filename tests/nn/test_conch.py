"""CONCH's image tower, compared with the tower written out in torch's and timm's own modules; its maps and features."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

timm = pytest.importorskip("timm")

from maskattn.explain import METHODS, IntegratedCDAM  # noqa: E402 (timm may not be there)
from maskattn.explain.single_image import explain_image  # noqa: E402 (as above)
from maskattn.explain.text_concepts import TextConcepts  # noqa: E402 (as above)
from maskattn.nn import VisionTransformer, from_state_dict, load_encoder, load_vit  # noqa: E402 (as above)
from maskattn.nn.encoders import load_entry  # noqa: E402 (as above)
from maskattn.nn.encoders.table import ENCODERS  # noqa: E402 (as above)

C, PATCH, SIDE = 128, 16, 64
SIZES = {"img_size": SIDE, "patch_size": PATCH, "embed_dim": C, "depth": 2, "num_heads": C // 64, "num_classes": 0}


class PlainPooler(nn.Module):
    """Learnt queries that read the tokens, with CONCH's names."""

    def __init__(self, width: int, queries: int) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.randn(queries, width))
        self.attn = nn.MultiheadAttention(width, 8, kdim=C, vdim=C, batch_first=True)
        self.ln_q, self.ln_k = nn.LayerNorm(width), nn.LayerNorm(C)

    def forward(self, tokens: Tensor) -> Tensor:
        keys = self.ln_k(tokens)
        queries = self.ln_q(self.query).expand(len(tokens), -1, -1)
        return self.attn(queries, keys, keys, need_weights=False)[0]


class PlainTower(nn.Module):
    """timm's trunk, the pooler for texts with norm and projection, and the pooler for captions, which is not called."""

    def __init__(self, width: int = 64, **sizes: object) -> None:
        super().__init__()
        self.trunk = timm.models.VisionTransformer(**{**SIZES, "dynamic_img_size": True, **sizes})
        self.attn_pool_contrast, self.attn_pool_caption = PlainPooler(width, 1), PlainPooler(C, 5)
        self.ln_contrast, self.ln_caption = nn.LayerNorm(width), nn.LayerNorm(C)
        self.proj_contrast = nn.Parameter(torch.zeros(width, width))
        torch.manual_seed(0)
        for p in self.parameters():
            nn.init.normal_(p, std=0.15)

    def read(self, tokens: Tensor) -> Tensor:
        return self.ln_contrast(self.attn_pool_contrast(tokens)[:, 0])

    def forward(self, x: Tensor) -> Tensor:
        return self.read(self.trunk.forward_features(x)) @ self.proj_contrast

    def of_kept(self, x: Tensor, keep_N: Tensor) -> Tensor:
        """Of one image whose other tokens leave after the positions are added."""
        tokens = self.trunk._pos_embed(self.trunk.patch_embed(x))
        tokens = tokens[:, torch.cat([keep_N.new_ones(1), keep_N])]
        return self.read(self.trunk.norm(self.trunk.blocks(tokens))) @ self.proj_contrast


def plain(width: int = 64, **sizes: object) -> PlainTower:
    return PlainTower(width, **sizes).double().eval()


def checkpoint(tower: nn.Module, prefix: str = "visual.") -> dict[str, Tensor]:
    """The tower beside parts of the towers of texts and captions, as CONCH is saved."""
    texts = {
        "text.token_embedding.weight": torch.randn(60, 32),
        "text.transformer.resblocks.0.attn.in_proj_weight": torch.randn(96, 32),
        "text_decoder.cross_attn.0.ln_1.weight": torch.ones(32),
        "logit_scale": torch.tensor(3.0),
    }
    start = prefix.removesuffix("visual.")
    return {f"{prefix}{k}": x for k, x in tower.state_dict().items()} | {f"{start}{k}": x for k, x in texts.items()}


def images(B: int = 2, side: int = SIDE) -> Tensor:
    return torch.randn(B, 3, side, side, dtype=torch.float64)


def some_kept() -> Tensor:
    keep = torch.rand(2, 4, 4) > 0.4
    keep[:, 0, 0], keep[:, 3, 3] = True, False
    return keep


@pytest.mark.parametrize("width", [64, C, 192])
@torch.no_grad()
def test_the_tower_loads_with_its_pooling_and_projection(width):
    tower, x = plain(width), images()
    ours = from_state_dict(checkpoint(tower))
    torch.testing.assert_close(ours(x), tower(x))
    torch.testing.assert_close(ours.forward_features(x), tower.trunk.forward_features(x))
    assert (ours.global_pool, ours.num_heads, ours.num_classes) == ("coca", 2, width)
    before = from_state_dict(checkpoint(tower), num_classes=0)
    torch.testing.assert_close(before(x), tower.read(tower.trunk.forward_features(x)))
    assert before.head_hidden_size == width
    assert not ours.training
    larger = images(side=96)
    torch.testing.assert_close(ours(larger), tower(larger))


@torch.no_grad()
def test_wrappers_prefixes_and_files_are_read(tmp_path):
    tower, x = plain().float(), images().float()
    for index, saved in enumerate(
        (
            {"epoch": 3, "state_dict": checkpoint(tower, "module.visual.")},
            checkpoint(tower),
            tower.state_dict(),
        )
    ):
        torch.save(saved, path := tmp_path / f"{index}.bin")
        torch.testing.assert_close(load_vit(path)(x), tower(x), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_repository_without_a_configuration_loads_from_its_one_file(tmp_path, monkeypatch):
    huggingface_hub = pytest.importorskip("huggingface_hub")
    from huggingface_hub.errors import EntryNotFoundError

    tower, x = plain().float(), images().float()
    torch.save(checkpoint(tower), tmp_path / "pytorch_model.bin")

    def download(repository: str, name: str) -> str:
        if not (tmp_path / name).is_file():
            raise EntryNotFoundError.__new__(EntryNotFoundError)
        return str(tmp_path / name)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    torch.testing.assert_close(load_vit("hf-hub:MahmoodLab/CONCH")(x), tower(x), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_masked_tokens_are_as_if_absent_and_their_pixels_change_nothing():
    tower, x, keep = plain(), images(), some_kept()
    ours = from_state_dict(checkpoint(tower))
    expected = torch.cat([tower.of_kept(x[b : b + 1], keep[b].flatten()) for b in range(2)])
    masked = ours(x, keep)
    torch.testing.assert_close(masked, expected)
    glass = ~keep.repeat_interleave(PATCH, 1).repeat_interleave(PATCH, 2)[:, None].expand_as(x)
    assert torch.equal(ours(x.masked_fill(glass, torch.nan), keep), masked)
    assert not torch.allclose(ours(x), masked)
    nothing = ours(x, torch.zeros_like(keep))
    torch.testing.assert_close(nothing[0], nothing[1])
    assert nothing.isfinite().all()


def test_gradients_are_the_towers():
    tower, x = plain(), images()
    ours = from_state_dict(checkpoint(tower))
    weights = torch.randn(2, 64, dtype=torch.float64)
    gradients = []
    for model in (ours, tower):
        at = x.clone().requires_grad_()
        (model(at) * weights).sum().backward()
        gradients.append(at.grad)
    torch.testing.assert_close(*gradients)
    pooler = tower.attn_pool_contrast
    torch.testing.assert_close(ours.attn_pool.query.grad[0], pooler.query.grad)
    k_and_v = torch.cat([pooler.attn.k_proj_weight.grad, pooler.attn.v_proj_weight.grad])
    torch.testing.assert_close(ours.attn_pool.kv.weight.grad, k_and_v)
    torch.testing.assert_close(ours.attn_pool.norm.weight.grad, tower.ln_contrast.weight.grad)
    torch.testing.assert_close(ours.head.weight.grad, tower.proj_contrast.grad.T)
    torch.testing.assert_close(ours.blocks[0].attn.qkv.weight.grad, tower.trunk.blocks[0].attn.qkv.weight.grad)


def test_its_file_as_ours_loads_again(tmp_path):
    ours = from_state_dict(checkpoint(plain()))
    torch.save(ours.state_dict(), path := tmp_path / "ours.pt")
    x = images(1)
    with torch.no_grad():
        assert torch.equal(load_vit(path, num_heads=2)(x), ours(x))


def concepts() -> TextConcepts:
    return TextConcepts(("gland", "fat", "stroma"), torch.randn(3, 64, dtype=torch.float64))


def by_definition(tower: PlainTower, x: Tensor, words: TextConcepts, m: int) -> tuple[Tensor, Tensor]:
    """Integrated gradients of one image's concept scores at the last attention's input, and what they sum to."""
    trunk = tower.trunk
    with torch.no_grad():
        tokens = trunk.blocks[:-1](trunk._pos_embed(trunk.patch_embed(x)))
        T = trunk.blocks[-1].norm1(tokens)

    def scores(at: Tensor) -> Tensor:
        last = trunk.blocks[-1]
        rows = tokens + last.attn(at)
        return words(tower.read(trunk.norm(rows + last.mlp(last.norm2(rows)))) @ tower.proj_contrast)[0]

    nodes, weights = (torch.from_numpy(part) for part in np.polynomial.legendre.leggauss(m))
    total = torch.zeros(3, T.shape[1], dtype=T.dtype)
    for node, weight in zip((nodes + 1) / 2, weights / 2, strict=True):
        jacobian = torch.autograd.functional.jacobian(scores, node * T)[:, 0]
        total += weight * (jacobian * T).sum(-1)
    with torch.no_grad():
        return total[:, 1:].unflatten(1, (4, 4)), scores(T) - scores(torch.zeros_like(T))


def test_concepts_are_explained_by_the_path_norm_which_is_complete():
    tower, x, words = plain(), images(1), concepts()
    ours = from_state_dict(checkpoint(tower))
    explained = explain_image(ours, x, words, method="integrated-norm")
    expected, _ = by_definition(tower, x, words, 8)
    torch.testing.assert_close(explained.maps_MHW, expected)
    with torch.no_grad():
        torch.testing.assert_close(explained.scores_M, words(tower(x))[0])
    assert len(explained.checks) == 3
    account = IntegratedCDAM(ours, m=60, path="norm").account(ours, ours.before_last_block(ours.embed(x)), words)
    _, difference = by_definition(tower, x, words, 1)
    torch.testing.assert_close(account.difference_BM[0], difference)
    assert account.gap_BM.abs().max() < 1e-6 * account.difference_BM.abs().max()


@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if not method.compared])
def test_every_method_explains_it_or_says_why_not(name):
    ours, x, keep = from_state_dict(checkpoint(plain())), images(), some_kept()
    explainer = METHODS[name](ours)
    if METHODS[name].class_token_alone:
        with pytest.raises(ValueError, match=r"got global_pool='coca'.*use IntegratedCDAM"):
            explainer.attribute(x, 0, keep)
        return
    maps = explainer.attribute(x, concepts(), keep)
    assert maps.shape == (2, 3, 4, 4)
    assert maps.isfinite().all()
    assert (maps.transpose(0, 1)[:, ~keep] == 0).all()
    assert (maps.transpose(0, 1)[:, keep] != 0).any()


@torch.inference_mode()
def test_the_encoder_has_the_features_before_the_projection_and_is_masked(tmp_path, monkeypatch):
    tower = plain(512, depth=1).float()
    torch.save(checkpoint(tower), path := tmp_path / "pytorch_model.bin")
    encoder = load_encoder("conch", weights=path)
    assert (encoder.embed_dim, encoder.tile_px, encoder.pooling, encoder.why_not) == (512, 448, "coca", "")
    assert isinstance(encoder.vit, VisionTransformer)
    pixels = torch.randint(0, 256, (1, 3, 448, 448), dtype=torch.uint8)
    mean, std = (torch.tensor(x)[:, None, None] for x in (encoder.card.pixel_mean, encoder.card.pixel_std))
    expected = tower.read(tower.trunk.forward_features((pixels / 255 - mean) / std))
    torch.testing.assert_close(encoder.encode_tiles(pixels), expected, rtol=1e-4, atol=1e-5)
    keep = torch.rand(1, 28, 28) > 0.6
    glass = ~keep.repeat_interleave(16, 1).repeat_interleave(16, 2)[:, None].expand_as(pixels)
    masked = encoder.encode_tiles(pixels, keep)
    assert torch.equal(encoder.encode_tiles(pixels.masked_fill(glass, 255), keep), masked)
    assert encoder.tile_tokens(pixels, keep).packing.total == int(keep.sum()) + 1
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda repository, name: str(tmp_path / name))
    others = load_encoder("conch", weights=tmp_path), load_encoder("conch"), load_encoder("hf-hub:MahmoodLab/CONCH")
    assert {other.sha256 for other in others} == {encoder.sha256}


def test_weights_of_another_model_are_refused(tmp_path):
    torch.save(timm.models.VisionTransformer(**SIZES).state_dict(), path := tmp_path / "plain.pt")
    with pytest.raises(ValueError, match=r"must be those of conch.*give the pytorch_model\.bin of MahmoodLab/CONCH"):
        load_encoder("conch", weights=path)
    torch.save(checkpoint(plain()), path)
    with pytest.raises(ValueError, match="conch has features of width 512, got a network of 64"):
        load_encoder("conch", weights=path)
    assert load_entry(replace(ENCODERS["conch"], embed_dim=64), weights=path).embed_dim == 64


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"attn_pool_contrast.query": None}, r"it has no visual\.attn_pool_contrast\.query"),
        ({"attn_pool_contrast.attn.k_proj_weight": None}, r"it has no visual\.attn_pool_contrast\.attn\.k_proj_weight"),
        ({"ln_contrast.bias": None}, r"it has no visual\.ln_contrast\.bias"),
        ({"attn_pool_contrast.query": torch.zeros(3, 64)}, r"attn_pool_contrast\.query is of 3 queries, and ours has"),
        ({"attn_pool_contrast.gate": torch.zeros(3)}, r"visual\.attn_pool_contrast\.gate has no place"),
        (
            {f"attn_pool_contrast.attn.{name}_proj_weight": torch.zeros(64, 96) for name in "kv"},
            r"attn_pool\.kv\.weight is \(128, 96\) instead of \(128, 128\)",
        ),
        ({"ln_contrast.weight": torch.zeros(5)}, r"attn_pool\.norm\.weight is \(5,\) instead of \(64,\)"),
    ],
)
def test_keys_and_shapes_that_do_not_fit_are_named(changed, told):
    state = checkpoint(plain()) | {f"visual.{key}": x for key, x in changed.items()}
    with pytest.raises(ValueError, match=told):
        from_state_dict({key: x for key, x in state.items() if x is not None})


def test_a_tower_without_the_projection_has_no_head():
    state = {key: x for key, x in checkpoint(plain()).items() if not key.endswith("proj_contrast")}
    assert from_state_dict(state).num_classes == 0


def test_the_pools_width_and_heads_are_arguments():
    sizes = {"img_size": 64, "embed_dim": 48, "depth": 1, "num_heads": 3, "global_pool": "coca"}
    x = torch.randn(1, 3, 64, 64)
    assert VisionTransformer(**sizes, pool_dim=40, num_classes=5)(x).shape == (1, 5)
    assert VisionTransformer(**sizes)(x).shape == (1, 48)
    assert VisionTransformer(**sizes, class_token=False, pool_dim=24)(x).shape == (1, 24)
    with pytest.raises(ValueError, match="pool_heads must divide pool_dim, got pool_dim=40, pool_heads=3"):
        VisionTransformer(**sizes, pool_dim=40, pool_heads=3)


def test_its_head_is_replaced_and_its_pool_by_the_class_token():
    model = VisionTransformer(img_size=64, embed_dim=48, depth=1, num_heads=3, global_pool="coca", pool_dim=40)
    x = torch.randn(1, 3, 64, 64)
    model.reset_classifier(7)
    assert model.get_classifier().weight.shape == (7, 40)
    torch.testing.assert_close(model.forward_head(model.forward_features(x)), model(x))
    with pytest.raises(ValueError, match="needs an attention pool of its kind"):
        model.reset_classifier(7, "map")
    model.reset_classifier(7, "token")
    assert model.get_classifier().weight.shape == (7, 48)
    with pytest.raises(ValueError, match="needs an attention pool of its kind"):
        model.reset_classifier(7, "coca")
