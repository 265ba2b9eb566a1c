"""GigaPath- and TITAN-style slide encoders against their layouts written out densely, with random weights."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from maskattn.explain.token_scores import score_tokens_by_autograd, score_tokens_in_closed_form
from maskattn.nn import encode_placed_tiles, from_gigapath, from_titan
from maskattn.nn.slide_encoders import place_tiles, placed_tokens

K, C, HEADS, DEPTH = 20, 48, 4, 2


def tiles(count: int = 15) -> tuple[Tensor, Tensor]:
    """Embeddings and pixel coordinates of tiles of 256 px on a 6 × 5 grid, in random order."""
    cells = torch.randperm(30)[:count]
    return torch.randn(count, K, dtype=torch.float64), torch.stack([cells % 5, cells // 5], dim=1) * 256 + 17


def normal(*shape: int) -> Tensor:
    return 0.3 * torch.randn(*shape, dtype=torch.float64)


def linear(state: dict[str, Tensor], name: str, outputs: int, inputs: int) -> None:
    state[f"{name}.weight"], state[f"{name}.bias"] = normal(outputs, inputs), normal(outputs)


def norm(state: dict[str, Tensor], name: str, width: int) -> None:
    state[f"{name}.weight"], state[f"{name}.bias"] = 1 + normal(width), normal(width)


def apply_linear(state: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    return F.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])


def apply_norm(state: dict[str, Tensor], name: str, x: Tensor, eps: float) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], eps)


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | float = 0.0) -> Tensor:
    q, k, v = (x.unflatten(1, (HEADS, -1)).transpose(0, 1) for x in (q, k, v))
    scores = q @ k.transpose(1, 2) / math.sqrt(q.shape[-1]) + bias
    return (scores.softmax(-1) @ v).transpose(0, 1).flatten(1)


def gigapath_state() -> dict[str, Tensor]:
    state = {"cls_token": normal(1, 1, C)}
    linear(state, "patch_embed.proj", C, K)
    for i in range(DEPTH):
        layer = f"encoder.layers.{i}"
        for part in "qkv":
            linear(state, f"{layer}.self_attn.{part}_proj", C, C)
        linear(state, f"{layer}.self_attn.out_proj", C, C)
        linear(state, f"{layer}.ffn.fc1", 4 * C, C)
        linear(state, f"{layer}.ffn.fc2", C, 4 * C)
        for name, width in (("self_attn_layer_norm", C), ("self_attn.inner_attn_ln", C), ("final_layer_norm", C)):
            norm(state, f"{layer}.{name}", width)
        norm(state, f"{layer}.ffn.ffn_layernorm", 4 * C)
    norm(state, "encoder.layer_norm", C)
    norm(state, "norm", C)
    return state


def sines(position: Tensor) -> Tensor:
    angles = position.double()[:, None] / 10000 ** (torch.arange(C // 4, dtype=torch.float64) / (C // 4))
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def dense_gigapath(state: dict[str, Tensor], x: Tensor, coords: Tensor, mean: bool) -> Tensor:
    """LongNet's pre-norm layers with norms inside, every tile attending to every tile."""
    cell = coords // 256
    # Row x, column y of its table of sines, the column's half first.
    positions = torch.cat([sines(cell[:, 1]), sines(cell[:, 0])], dim=1)
    x = apply_linear(state, "patch_embed.proj", x) + positions
    x = torch.cat([state["cls_token"][0], x])
    for i in range(DEPTH):
        layer = f"encoder.layers.{i}"
        normed = apply_norm(state, f"{layer}.self_attn_layer_norm", x, 1e-5)
        out = attend(*(apply_linear(state, f"{layer}.self_attn.{part}_proj", normed) for part in "qkv"))
        out = apply_norm(state, f"{layer}.self_attn.inner_attn_ln", out, 1e-5)
        x = x + apply_linear(state, f"{layer}.self_attn.out_proj", out)
        hidden = apply_linear(state, f"{layer}.ffn.fc1", apply_norm(state, f"{layer}.final_layer_norm", x, 1e-5))
        hidden = apply_norm(state, f"{layer}.ffn.ffn_layernorm", F.gelu(hidden), 1e-5)
        x = x + apply_linear(state, f"{layer}.ffn.fc2", hidden)
    x = apply_norm(state, "encoder.layer_norm", x, 1e-5)
    return apply_norm(state, "norm", x[1:].mean(dim=0) if mean else x[0], 1e-6)


@pytest.mark.parametrize("pool", ["token", "avg"])
def test_gigapaths_layout_with_full_attention(pool):
    state, (x, coords) = gigapath_state(), tiles()
    encoder = from_gigapath({"model": state}, num_heads=HEADS, global_pool=pool)
    x.requires_grad_()
    expected = dense_gigapath(state, x, coords, pool == "avg")
    got = encode_placed_tiles(encoder, x, coords, 256)
    # The table of sines is float32, as GigaPath's is.
    torch.testing.assert_close(got.float(), expected.float())
    weights = torch.linspace(-1, 1, C, dtype=torch.float64)
    grads = [torch.autograd.grad((out * weights).sum(), x)[0].float() for out in (got, expected)]
    torch.testing.assert_close(*grads)


def titan_state() -> dict[str, Tensor]:
    state = {"vision_encoder.cls_token": normal(1, 1, C)}
    linear(state, "vision_encoder.patch_embed.0", C, K)
    for i in range(DEPTH):
        block = f"vision_encoder.blocks.{i}"
        linear(state, f"{block}.attn.qkv", 3 * C, C)
        linear(state, f"{block}.attn.proj", C, C)
        linear(state, f"{block}.mlp.fc1", 4 * C, C)
        linear(state, f"{block}.mlp.fc2", C, 4 * C)
        norm(state, f"{block}.norm1", C)
        norm(state, f"{block}.norm2", C)
    norm(state, "vision_encoder.norm", C)
    state["vision_encoder.attn_pool.query"] = normal(3, C)
    state["vision_encoder.attn_pool_contrastive.query"] = normal(1, C)
    state["vision_encoder.proj"] = normal(C, C)
    state["text_encoder.token_embedding.weight"] = normal(7, C)
    return state


def dense_titan(state: dict[str, Tensor], x: Tensor, coords: Tensor) -> Tensor:
    state = {key.removeprefix("vision_encoder."): value for key, value in state.items()}
    cell = (coords // 256).double()
    slopes = torch.tensor([2 ** (-2.0 * (h + 1)) for h in range(HEADS)], dtype=torch.float64)
    bias = F.pad(-slopes[:, None, None] * torch.cdist(cell, cell), (1, 0, 1, 0))
    x = torch.cat([state["cls_token"][0], F.gelu(apply_linear(state, "patch_embed.0", x))])
    for i in range(DEPTH):
        block = f"blocks.{i}"
        qkv = apply_linear(state, f"{block}.attn.qkv", apply_norm(state, f"{block}.norm1", x, 1e-6))
        x = x + apply_linear(state, f"{block}.attn.proj", attend(*qkv.chunk(3, dim=1), bias))
        hidden = F.gelu(apply_linear(state, f"{block}.mlp.fc1", apply_norm(state, f"{block}.norm2", x, 1e-6)))
        x = x + apply_linear(state, f"{block}.mlp.fc2", hidden)
    return apply_norm(state, "norm", x, 1e-6)[0]


def test_titans_layout_with_alibi_in_the_kernel():
    state, (x, coords) = titan_state(), tiles()
    encoder = from_titan(state, num_heads=HEADS)
    x.requires_grad_()
    expected, got = dense_titan(state, x, coords), encode_placed_tiles(encoder, x, coords, 256)
    torch.testing.assert_close(got, expected)
    weights = torch.linspace(-1, 1, C, dtype=torch.float64)
    torch.testing.assert_close(*(torch.autograd.grad((out * weights).sum(), x)[0] for out in (got, expected)))


@pytest.mark.parametrize(
    "build",
    [lambda: from_gigapath(gigapath_state(), num_heads=HEADS), lambda: from_titan(titan_state(), num_heads=HEADS)],
)
def test_cdam_of_slide_encoders_in_closed_form_is_autograds(build):
    encoder, (x, coords) = build().double(), tiles()
    tokens = encoder.before_last_block(placed_tokens(encoder, x, coords, 256))
    concept = torch.randn(C, dtype=torch.float64)
    closed, _ = score_tokens_in_closed_form(encoder, tokens, lambda z: z @ concept)
    graph, _ = score_tokens_by_autograd(encoder, tokens, lambda z: z @ concept)
    torch.testing.assert_close(closed[:, 1:], graph[:, 1:])


def test_the_order_of_tiles_does_not_matter_nor_with_alibi_does_the_origin():
    x, coords = tiles()
    encoder = from_titan(titan_state(), num_heads=HEADS)
    expected = encode_placed_tiles(encoder, x, coords, 256)
    order = torch.randperm(len(x))
    torch.testing.assert_close(encode_placed_tiles(encoder, x[order], coords[order], 256), expected)
    torch.testing.assert_close(encode_placed_tiles(encoder, x, coords + 1024, 256), expected)


@pytest.mark.slow
def test_alibi_over_many_tiles_holds_no_square_matrix():
    program = """
import resource, torch
from maskattn.nn import VisionTransformer, encode_placed_tiles
encoder = VisionTransformer(
    img_size=1, patch_size=1, in_chans=16, embed_dim=16, depth=2, num_heads=1, pos_embed="alibi"
)
cells = torch.randperm(400 * 400)[:8000]
coords = torch.stack([cells % 400, cells // 400], dim=1)
with torch.inference_mode():
    encode_placed_tiles(encoder, torch.randn(8, 16), coords[:8], 1)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    encode_placed_tiles(encoder, torch.randn(8000, 16), coords, 1)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300, check=True)
    assert int(result.stdout) * 1024 < 8000 * 8000 * 4 / 2


def test_wrong_coordinates_are_named():
    x, coords = tiles()
    with pytest.raises(ValueError, match="share one with tile_size=512"):
        place_tiles(x, coords, 512)
    with pytest.raises(ValueError, match=r"got coords.shape=\(15, 3\)"):
        place_tiles(x, torch.zeros(15, 3), 256)
    with pytest.raises(ValueError, match="≥ 0"):
        place_tiles(x, coords - 9999, 256)


def test_unexpected_keys_are_named():
    state = gigapath_state()
    state["encoder.layers.0.moe.gate"] = normal(3)
    with pytest.raises(ValueError, match=r"encoder\.layers\.0\.moe\.gate has no place"):
        from_gigapath(state, num_heads=HEADS)
    del state["norm.weight"]
    with pytest.raises(ValueError, match="it has no norm"):
        from_gigapath(state, num_heads=HEADS)
