"""Checkpoints in open_clip's layout, compared with the tower written out in torch's own modules."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maskattn.nn import from_state_dict, load_vit

C, HEADS, DEPTH, PATCH, SIDE, SPACE = 128, 2, 2, 16, 64, 24


class QuickGELU(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


class PlainBlock(nn.Module):
    """A residual attention block with open_clip's names."""

    def __init__(self, act: str, scaled: bool) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(C), nn.LayerNorm(C)
        self.attn = nn.MultiheadAttention(C, HEADS, batch_first=True)
        self.mlp = nn.Sequential()
        self.mlp.add_module("c_fc", nn.Linear(C, 4 * C))
        self.mlp.add_module("gelu", QuickGELU() if act == "quick_gelu" else nn.GELU())
        self.mlp.add_module("c_proj", nn.Linear(4 * C, C))
        for name in ("ls_1", "ls_2"):
            part = nn.Module()
            if scaled:
                part.gamma = nn.Parameter(torch.ones(C))
            setattr(self, name, part)

    def forward(self, x: Tensor) -> Tensor:
        normed = self.ln_1(x)
        x = x + self.attn(normed, normed, normed, need_weights=False)[0] * getattr(self.ls_1, "gamma", 1)
        return x + self.mlp(self.ln_2(x)) * getattr(self.ls_2, "gamma", 1)


class PlainTower(nn.Module):
    """CLIP's vision transformer: class token, norm before the blocks, norm and projection of the class token after."""

    def __init__(self, act: str = "gelu", scaled: bool = False, projected: bool = True) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, C, PATCH, PATCH, bias=False)
        self.class_embedding = nn.Parameter(torch.zeros(C))
        self.positional_embedding = nn.Parameter(torch.zeros((SIDE // PATCH) ** 2 + 1, C))
        self.ln_pre, self.ln_post = nn.LayerNorm(C), nn.LayerNorm(C)
        self.transformer = nn.Module()
        self.transformer.resblocks = nn.ModuleList(PlainBlock(act, scaled) for _ in range(DEPTH))
        if projected:
            self.proj = nn.Parameter(torch.zeros(C, SPACE))
        for p in self.parameters():
            nn.init.normal_(p, std=0.15)

    def forward(self, x: Tensor) -> Tensor:
        patches = self.conv1(x).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.class_embedding.expand(len(x), 1, C), patches], dim=1) + self.positional_embedding
        tokens = self.ln_pre(tokens)
        for block in self.transformer.resblocks:
            tokens = block(tokens)
        pooled = self.ln_post(tokens[:, 0])
        return pooled @ self.proj if hasattr(self, "proj") else pooled


def checkpoint(tower: nn.Module, prefix: str = "visual.") -> dict[str, Tensor]:
    """The tower beside a text tower, as a whole CLIP is saved."""
    texts = {
        "positional_embedding": torch.randn(12, 32),
        "text_projection": torch.randn(32, SPACE),
        "token_embedding.weight": torch.randn(60, 32),
        "transformer.resblocks.0.attn.in_proj_weight": torch.randn(96, 32),
        "ln_final.weight": torch.ones(32),
        "logit_scale": torch.tensor(3.0),
    }
    start = prefix.removesuffix("visual.")
    return {f"{prefix}{k}": x for k, x in tower.state_dict().items()} | {f"{start}{k}": x for k, x in texts.items()}


@pytest.mark.parametrize("act", ["gelu", "quick_gelu"])
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("projected", [False, True])
def test_the_image_tower_loads_with_its_projection(act, scaled, projected):
    torch.manual_seed(0)
    tower, x = PlainTower(act, scaled, projected).eval(), torch.randn(2, 3, SIDE, SIDE)
    ours = from_state_dict(checkpoint(tower), act_layer=act)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), tower(x), rtol=1e-4, atol=1e-4)
    assert ours.num_classes == (SPACE if projected else 0)
    assert not ours.training


def test_wrappers_prefixes_and_files_are_read(tmp_path):
    tower, x = PlainTower("quick_gelu").eval(), torch.randn(1, 3, SIDE, SIDE)
    saved = {"epoch": 3, "state_dict": checkpoint(tower, "module.visual.")}
    torch.save(saved, tmp_path / "quiltnet.pt")
    with torch.no_grad():
        ours = load_vit(tmp_path / "quiltnet.pt", act_layer="quick_gelu")
        torch.testing.assert_close(ours(x), tower(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("quick", [True, False])
def test_a_folder_says_activation_and_heads(quick, tmp_path):
    from safetensors.torch import save_file

    from maskattn.explain.text_concepts import temperature_of

    tower, x = PlainTower("quick_gelu" if quick else "gelu").eval(), torch.randn(1, 3, SIDE, SIDE)
    save_file({k: t.contiguous() for k, t in checkpoint(tower).items()}, tmp_path / "open_clip_model.safetensors")
    vision = {"image_size": SIDE, "layers": DEPTH, "width": C, "patch_size": PATCH, "head_width": C // HEADS}
    config = {"model_cfg": {"embed_dim": SPACE, "quick_gelu": quick, "vision_cfg": vision}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    with torch.no_grad():
        torch.testing.assert_close(load_vit(tmp_path)(x), tower(x), rtol=1e-4, atol=1e-4)
    assert temperature_of(tmp_path) == pytest.approx(torch.tensor(3.0).exp().item())
    config["model_cfg"]["vision_cfg"]["pool_type"] = "avg"
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="pool_type='avg'"):
        load_vit(tmp_path)
    (tmp_path / "open_clip_model.safetensors").unlink()
    config["model_cfg"]["vision_cfg"]["pool_type"] = "tok"
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    with pytest.raises(FileNotFoundError, match=r"open_clip_model\.safetensors or"):
        load_vit(tmp_path)


def test_a_tower_of_timms_loads_with_the_linear_projection_above_it():
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    sizes = {"img_size": SIDE, "patch_size": PATCH, "embed_dim": 48, "depth": 2, "num_heads": 4, "num_classes": 0}
    trunk = timm.models.VisionTransformer(**sizes).eval()
    x, projection = torch.randn(2, 3, SIDE, SIDE), torch.randn(SPACE, 48)
    state = {f"visual.trunk.{k}": t for k, t in trunk.state_dict().items()} | {"visual.head.proj.weight": projection}
    with torch.no_grad():
        ours = from_state_dict(state, num_heads=4)
        torch.testing.assert_close(ours(x), F.linear(trunk(x), projection), rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match=r"head\.mlp between"):
        from_state_dict(state | {"visual.head.mlp.fc1.weight": torch.randn(8, 48)}, num_heads=4)


def test_parts_that_ours_lacks_are_named():
    state = checkpoint(PlainTower())
    with pytest.raises(ValueError, match="act_layer must be given"):
        from_state_dict(state, name="clip.pt")
    with pytest.raises(ValueError, match="attention pooling with several queries"):
        from_state_dict(state | {"visual.attn_pool.query": torch.randn(256, C)}, act_layer="gelu")
    resnet = {"visual.layer1.0.conv1.weight": torch.randn(8, 8, 1, 1), "visual.conv1.weight": torch.randn(8, 3, 3, 3)}
    with pytest.raises(ValueError, match="a ResNet as the image tower"):
        from_state_dict(resnet, act_layer="gelu")
    with pytest.raises(ValueError, match="something"):
        from_state_dict(state | {"visual.something": torch.randn(3)}, act_layer="gelu")
