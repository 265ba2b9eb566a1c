"""Attention rows and rollout of slide heads against full matrices of weights, on slides small enough to hold them."""

from __future__ import annotations

import math

import pytest
import torch
from slide_checkpoints import CASES, K, tiles
from torch import Tensor, nn

from maskattn.nn.slide_models import attention_rows
from maskattn.nn.slide_models.head import SlideHead, TileGrid
from maskattn.nn.slide_models.hipt import HIPTHead
from maskattn.nn.slide_models.layouts import head_from_checkpoint
from maskattn.nn.slide_models.pooling import PooledHead
from maskattn.nn.slide_models.vit import ViTHead, tokens_on_grid

VITS = ["STAMP vit", "TITAN", "TITAN, cascade", "Prov-GigaPath", "Prov-GigaPath, two layers", "ours", "ours, averaged"]


def head_of(name: str) -> SlideHead:
    torch.manual_seed(len(name))
    if name == "hipt":
        return HIPTHead(24, K, 12).double().eval()
    if name.startswith("ours"):
        pool = {"global_pool": "avg"} if "averaged" in name else {}
        vit = {"img_size": 6, "patch_size": 1, "in_chans": 24, "num_classes": 2, "embed_dim": 16, "depth": 3}
        head = ViTHead({**vit, "num_heads": 2, **pool}).double().eval()
        for weight in head.parameters():
            nn.init.normal_(weight, std=0.3)
        return head
    case = CASES[name]()
    return head_from_checkpoint(case.checkpoint, **case.options).head


def slide(count: int = 23) -> tuple[Tensor, Tensor, TileGrid]:
    z, um, cells = tiles(count)
    return z, um, TileGrid(cells[:, 1], cells[:, 0], (6, 7))


def matrices_of_vit(head: SlideHead, z: Tensor, grid: TileGrid) -> tuple[list[Tensor], list[Tensor], Tensor, int]:
    """Of every block the full weights (H, N, N), and its output; the tiles' order; the prefix tokens."""
    tokens, order = tokens_on_grid(head.vit, z, grid)
    P = tokens.num_prefix
    cells = torch.stack([grid.rows_T, grid.columns_T], 1)[order].double()
    weights, outputs = [], []
    for block in head.vit.blocks:
        x = block.norm1(tokens.rows_TC)
        heads = block.attn.num_heads
        q, k, _ = block.attn.qkv(x).unflatten(1, (3, heads, -1)).permute(1, 2, 0, 3)
        scores = torch.einsum("hqd,hkd->hqk", q, k) / math.sqrt(q.shape[-1])
        if tokens.coords_T2 is not None:
            far = (cells[:, None] - cells[None]).norm(dim=2)
            for h in range(heads):
                scores[h, P:, P:] -= 2 ** (-8 * (h + 1) / heads) * far
        weights.append(scores.exp() / scores.exp().sum(2, keepdim=True))
        tokens = head.vit.run_blocks(tokens, slice(len(weights) - 1, len(weights)))
        outputs.append(tokens.rows_TC)
    return weights, outputs, order, P


def in_order_of_tiles(rows_N: Tensor, order: Tensor) -> Tensor:
    result = torch.empty_like(rows_N)
    result[..., order] = rows_N
    return result


def weights_of_pooler(pooler: nn.Module, tokens: Tensor) -> Tensor:
    """(H, Q, N), from the projections of torch's layer."""
    dim, heads = tokens.shape[1], pooler.attn.num_heads
    (wq, wk, _), (bq, bk, _) = pooler.attn.in_proj_weight.split(dim), pooler.attn.in_proj_bias.split(dim)
    q, k = pooler.ln_q(pooler.query) @ wq.T + bq, pooler.ln_k(tokens) @ wk.T + bk
    q, k = (x.unflatten(1, (heads, -1)).transpose(0, 1) for x in (q, k))
    return (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1)


def pooled_row(head: SlideHead, outputs: Tensor) -> Tensor:
    """The row of TITAN's pooling, (heads, N)."""
    normed = head.vit.norm(outputs)
    if head.attn_pool is None:
        return weights_of_pooler(head.attn_pool_contrastive, normed)[:, 0]
    between = weights_of_pooler(head.attn_pool_contrastive, head.attn_pool(normed))[:, 0]
    return between @ weights_of_pooler(head.attn_pool, normed).mean(0)


@pytest.mark.parametrize("name", ["TITAN", "TITAN, cascade", "Prov-GigaPath", "Prov-GigaPath, two layers", "STAMP vit"])
def test_the_row_of_a_transformer_is_that_of_the_full_matrix(name):
    head, (z, um, grid) = head_of(name), slide()
    weights, outputs, order, P = matrices_of_vit(head, z, grid)
    rows = pooled_row(head, outputs[-1]) if "TITAN" in name else weights[-1][:, 0]
    found = head.attention(z, um, grid)
    torch.testing.assert_close(found.double(), in_order_of_tiles(rows[:, P:], order), rtol=1e-5, atol=1e-7)
    assert found.std(dim=1).min() > 1e-4


@pytest.mark.parametrize("name", VITS)
def test_rollout_of_a_transformer_is_the_product_of_its_full_matrices(name):
    head, (z, um, grid) = head_of(name), slide()
    weights, outputs, order, P = matrices_of_vit(head, z, grid)
    N = len(z) + P
    product = torch.eye(N, dtype=torch.float64)
    for of_layer in weights:
        product = (of_layer.mean(0) + torch.eye(N, dtype=torch.float64)) / 2 @ product
    row = torch.eye(N, dtype=torch.float64)[0]
    if "TITAN" in name:
        row = pooled_row(head, outputs[-1]).mean(0)
    elif "averaged" in name:
        row = torch.cat([torch.zeros(P), torch.ones(len(z)) / len(z)]).double()
    found = head.rollout(z, um, grid)
    torch.testing.assert_close(found, in_order_of_tiles((row @ product)[P:], order), rtol=1e-6, atol=1e-9)
    assert found.std() > 1e-4


def nystrom_matrix(layer: nn.Module, x: Tensor) -> Tensor:
    """The full weights (8, N, N) of Nyström attention, without what falls on the zeros before the sequence."""
    attention, x = layer.attn, layer.norm(x)
    m, n = attention.landmarks, len(x)
    x = torch.cat([x.new_zeros(-n % m, x.shape[1]), x])
    q, k, _ = attention.to_qkv(x).unflatten(1, (3, 8, -1)).permute(1, 2, 0, 3)
    ql, kl = (y.unflatten(1, (m, -1)).mean(2) for y in (q, k))
    scale = q.shape[-1] ** -0.5
    first, middle, last = (
        (scale * a @ b.mT).softmax(-1) for a, b in ((q, kl), (ql, kl), (ql, k))
    )  # (8, N, m), (8, m, m), (8, m, N)
    inverse = middle.mT / (middle.sum(2).max() * middle.sum(1).max())
    unit = torch.eye(m, dtype=x.dtype)
    for _ in range(6):
        p = middle @ inverse
        inverse = inverse @ (13 * unit - p @ (15 * unit - p @ (7 * unit - p))) / 4
    return (first @ inverse @ last)[:, -n:, -n:]


@pytest.mark.parametrize("count", [1, 4, 16, 23])
def test_transmils_row_and_rollout_are_those_of_the_full_product(count):
    head, (z, um, grid) = head_of("TransMIL"), slide(count)
    rows = head._fc1(z)
    side = math.ceil(math.sqrt(count))
    order = [t % count for t in range(side * side)]
    x = torch.cat([head.cls_token[0], rows[order]])
    first = nystrom_matrix(head.layer1, x)
    second = nystrom_matrix(head.layer2, head.pos_layer(head.layer1(x), side))
    found = head.attention(z, um, grid)
    expected = torch.zeros(8, count, dtype=torch.float64).index_add(1, torch.tensor(order), second[:, 0, 1:])
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    unit = torch.eye(len(x), dtype=torch.float64)
    product = (second.mean(0) + unit) / 2 @ ((first.mean(0) + unit) / 2)
    expected = torch.zeros(count, dtype=torch.float64).index_add(0, torch.tensor(order), product[0, 1:])
    torch.testing.assert_close(head.rollout(z, um, grid), expected, rtol=1e-9, atol=1e-9)


def test_stamps_row_has_the_penalty_of_distance():
    head, (z, um, grid) = head_of("STAMP vit, ALiBi"), slide()
    coords = torch.cat([um.new_zeros(1, 2), um])
    x = torch.cat([head.class_token[None], head.project_features(z)])
    x = head.transformer.layers[0](x, coords)
    attention, heads = head.transformer.layers[1][0], []
    x = attention.norm(x)
    for h in range(4):
        q, k = (getattr(attention.mhsa, f"{part}_encoders")[h](x) for part in ("query", "key"))
        far = (coords[:, None] - coords[None]).norm(dim=2)
        heads.append((q @ k.T / math.sqrt(q.shape[1])).softmax(1) - attention.mhsa.attentions[h].factor() * far)
    torch.testing.assert_close(head.attention(z, um, grid), torch.stack(heads)[:, 0, 1:])
    assert head.rollout(z, um, grid) is None


def test_hipts_rollout_goes_through_its_layers():
    head, (z, _, _) = head_of("hipt"), slide()
    x, unit = head.global_phi(z), torch.eye(len(z), dtype=torch.float64)
    product = unit
    for layer in head.global_transformer.layers:
        torchs = nn.MultiheadAttention(12, 3, batch_first=True).double().eval()
        torchs.load_state_dict(layer.self_attn.state_dict())
        product = (torchs(x[None], x[None], x[None])[1][0] + unit) / 2 @ product
        x = layer(x)
    found = head.rollout(z)
    torch.testing.assert_close(found, head.attention(z)[0] @ product)
    torch.testing.assert_close(found.sum(), torch.tensor(1.0, dtype=torch.float64))


def test_few_queries_at_a_time_give_the_same(monkeypatch):
    head, (z, um, grid) = head_of("TITAN"), slide()
    at_once = head.rollout(z, um, grid)
    monkeypatch.setattr(attention_rows, "_MAX_SCORES", 1)
    torch.testing.assert_close(head.rollout(z, um, grid), at_once)


@pytest.mark.parametrize("name", ["CLAM_SB", "MIL_fc", "AttentionDeepMIL", "STAMP mlp"])
def test_what_has_no_layers_of_attention_has_no_rollout(name):
    z, um, grid = slide()
    assert head_of(name).rollout(z, um, grid) is None
    assert PooledHead(24, 2).rollout(z, um, grid) is None


def test_a_layer_that_only_repeats_its_embeddings_has_no_row():
    case = CASES["Prov-GigaPath, two layers"]()
    vit = head_from_checkpoint(case.checkpoint, **case.options).head.vit
    head = type(head_of("Prov-GigaPath"))(vit, 2, layers=(0,)).double()
    z, um, grid = slide()
    assert head.attention(z, um, grid) is None
    assert head.rollout(z, um, grid) is None
