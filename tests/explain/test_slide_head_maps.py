"""Explanations of every slide head, with encoders of each pooling, against the gradient of the whole graph."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from slide_checkpoints import CASES, C, tiles
from torch import Tensor

from maskattn.explain.embedding_path import MOST_NODES, TOLERANCE
from maskattn.explain.hierarchical import HierarchicalCDAM
from maskattn.explain.slide_heads import SlideHeadCDAM
from maskattn.nn.encoders.tile_encoder import EncoderCard, TileEncoder
from maskattn.nn.slide_model import SlideModel, SlideModelConfig
from maskattn.nn.slide_models.head import SlideHead, TileGrid
from maskattn.nn.slide_models.layouts import head_from_checkpoint
from maskattn.nn.slide_models.pooling import PooledHead
from maskattn.nn.slide_models.vit import ViTHead
from maskattn.nn.vit import VisionTransformer

NAMES = [*sorted(CASES), "maximum", "ours", "ours, mean-pooled"]
COUNT = 7


def head_of(name: str, width: int = C) -> SlideHead:
    torch.manual_seed(len(name))
    if name == "maximum":
        return PooledHead(width, 2, "max").double()
    if name.startswith("ours"):
        pool = {"global_pool": "avg"} if "mean" in name else {}
        vit = {"img_size": 6, "patch_size": 1, "in_chans": width, "num_classes": 2, "embed_dim": 16, "depth": 2}
        head = ViTHead({**vit, "num_heads": 2, **pool}).double()
        for weight in head.parameters():
            torch.nn.init.normal_(weight, std=0.3)
        return head
    case = CASES[name]()
    return head_from_checkpoint(case.checkpoint, **case.options).head


def encoder_with(pool: str) -> TileEncoder:
    """A small encoder whose features are C wide."""
    width = C // 2 if pool == "token_avg" else C
    torch.manual_seed(3)
    vit = VisionTransformer(
        img_size=32, patch_size=8, embed_dim=width, depth=2, num_heads=2, reg_tokens=2, global_pool=pool
    ).double()
    for weight in vit.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    return TileEncoder(vit, EncoderCard("small", pool, (0.5,) * 3, (0.25,) * 3, 32, 32)).double().eval()


def tile_coords(count: int = COUNT) -> tuple[Tensor, TileGrid]:
    _, um, cells = tiles(count)
    return um, TileGrid(cells[:, 1], cells[:, 0], (6, 7))


def pixels() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    keep = torch.rand(COUNT, 4, 4, generator=generator) < 0.6
    keep[:, 0, 0] = True
    return torch.randint(0, 256, (COUNT, 3, 32, 32), generator=generator, dtype=torch.uint8), keep


@pytest.mark.parametrize("pool", ["token", "avg", "token_avg"])
@pytest.mark.parametrize("name", NAMES)
def test_token_relevance_is_the_gradient_of_the_whole_graph(name, pool):
    head, encoder, (um, grid), (images, keep) = head_of(name), encoder_with(pool), tile_coords(), pixels()
    seen: list[Tensor] = []

    def remember(module: object, inputs: object, output: Tensor) -> Tensor:
        seen.append(output.detach().requires_grad_())
        return seen[-1]

    handle = encoder.vit.last_block.norm1.register_forward_hook(remember)
    logits = head(encoder.encode_tiles(images, keep), um, grid)  # tiles and tokens in one graph
    handle.remove()
    expected = torch.zeros(len(logits), *keep.shape, dtype=torch.float64)
    kept_index = keep.flatten().nonzero()[:, 0]
    of_grid = torch.cat([torch.arange(3, 3 + int(k.sum())) + at for k, at in zip(keep, _starts(keep), strict=True)])
    for c in range(len(logits)):
        (gradient,) = torch.autograd.grad(logits[c], seen[0], retain_graph=True)
        expected[c].view(-1)[kept_index] = (seen[0] * gradient).sum(1)[of_grid].detach()

    explain = SlideHeadCDAM(head, encoder, method="cdam")
    with torch.no_grad():
        z = encoder.encode_tiles(images, keep)
    of_tiles = explain.tiles(z, um, grid)
    batches = [slice(0, 4), slice(4, COUNT)]
    maps = [explain.tokens(images[b], keep[b], of_tiles.gradient_KTC[:, b]).relevance_KBHW for b in batches]
    torch.testing.assert_close(torch.cat(maps, dim=1), expected, rtol=1e-7, atol=1e-8)
    assert expected.abs().max() > 1e-4


def _starts(keep: Tensor) -> list[int]:
    """Where each tile's packed tokens begin: a class token, two registers and the kept tokens each."""
    counts = 3 + keep.flatten(1).sum(1)
    return (counts.cumsum(0) - counts).tolist()


@pytest.mark.parametrize("name", NAMES)
def test_tile_relevance_is_the_embedding_times_its_gradient(name):
    head, (um, grid) = head_of(name), tile_coords(23)
    z = tiles(23)[0].requires_grad_()
    logits = head(z, um, grid)
    gradients = torch.stack([torch.autograd.grad(logit, z, retain_graph=True)[0] for logit in logits])
    found = SlideHeadCDAM(head, method="cdam").tiles(z, um, grid)
    torch.testing.assert_close(found.logits_K, logits.detach())
    torch.testing.assert_close(found.gradient_KTC, gradients)
    assert found.sums is None
    if not isinstance(head, ViTHead):  # which is explained at its last block
        torch.testing.assert_close(found.relevance_KT, (z * gradients).sum(2).detach())


@pytest.mark.parametrize("name", NAMES)
def test_the_default_accounts_for_the_whole_score(name):
    # The pseudo-inverse of TransMIL's attention bends the path: it is explained where that is short.
    head, (um, grid), z = head_of(name), tile_coords(23), (0.02 if name == "TransMIL" else 0.3) * tiles(23)[0]
    explain = SlideHeadCDAM(head, m=128)
    found, alone = explain.tiles(z, um, grid), explain.tiles(z, um, grid, gradient=False)
    difference = found.logits_K - head(torch.zeros_like(z), um, grid)
    torch.testing.assert_close(torch.einsum("tc,ktc->k", z, found.gradient_KTC), difference, rtol=5e-3, atol=5e-3)
    total = found.relevance_KT.sum(1) + found.sums.prefix_K + found.sums.gap_K
    torch.testing.assert_close(total, found.sums.difference_K)
    if not isinstance(head, ViTHead):
        torch.testing.assert_close(found.sums.difference_K, difference)
        assert found.sums.gap_K.abs().max() < 5e-3
    torch.testing.assert_close(alone.relevance_KT, found.relevance_KT)
    assert alone.gradient_KTC is None


@pytest.mark.parametrize("name", ["TransMIL", "TITAN", "ours", "CLAM_SB", "MIL_fc"])
def test_the_path_takes_nodes_until_its_gap_is_small_and_tells_it(name):
    # Where TransMIL's embeddings are large its pseudo-inverse bends the path without end, and the bound is reached.
    head, (um, grid), z = head_of(name), tile_coords(23), (0.1 if name == "TransMIL" else 1) * tiles(23)[0]
    found, eight = SlideHeadCDAM(head).tiles(z, um, grid), SlideHeadCDAM(head, m=8).tiles(z, um, grid)
    difference = head(z, um, grid) - head(torch.zeros_like(z), um, grid)
    told = difference - torch.einsum("tc,ktc->k", z, found.gradient_KTC)
    torch.testing.assert_close(found.path.gap_K, told, rtol=1e-6, atol=1e-9)
    assert found.path.gap_K.abs().max() < TOLERANCE * difference.abs().max()
    assert eight.path.nodes == 8 <= found.path.nodes <= MOST_NODES
    assert found.path.gap_K.abs().max() <= eight.path.gap_K.abs().max()
    if name == "TransMIL":  # whose pseudo-inverse bends the path
        assert found.path.nodes > 8
    assert SlideHeadCDAM(head, method="cdam").tiles(z, um, grid).path is None


@pytest.mark.parametrize("name", ["CLAM_MB", "STAMP vit", "ours", "TITAN"])
def test_maps_follow_the_tiles_whatever_their_order(name):
    head, z, (um, grid) = head_of(name), tiles(23)[0], tile_coords(23)
    explain, order = SlideHeadCDAM(head), torch.randperm(23)
    found = explain.tiles(z, um, grid)
    moved = TileGrid(grid.rows_T[order], grid.columns_T[order], grid.shape_HW)
    shuffled = explain.tiles(z[order], um[order], moved)
    for one, other in (
        (shuffled.relevance_KT, found.relevance_KT[:, order]),
        (shuffled.attention_T, found.attention_T[order]),
        (shuffled.gradient_KTC, found.gradient_KTC[:, order]),
    ):
        torch.testing.assert_close(one, other)


def test_our_slide_model_is_explained_alike_by_either_door():
    arguments = {"embed_dim": C, "depth": 2, "num_heads": 2}
    model = SlideModel(SlideModelConfig("small", ("a", "b"), 32, 0.5, {**arguments, "patch_size": 8}, arguments))
    model = model.double().eval()
    images, keep_Bhw = pixels()
    keep_HW = torch.zeros(3, 4, dtype=torch.bool)
    keep_HW.view(-1)[[0, 2, 3, 5, 6, 9, 11]] = True
    encoder = TileEncoder(model.tile_encoder, EncoderCard("small", "token", (0.5,) * 3, (0.25,) * 3, 32, 32)).double()
    with torch.no_grad():
        z = model.encode_tiles(images, keep_Bhw)
    old, new = HierarchicalCDAM(model), SlideHeadCDAM(ViTHead(model.slide_encoder), encoder)
    before, after = old.tiles(z, keep_HW), new.tiles(z, None, TileGrid.from_keep(keep_HW))
    for field in ("logits_K", "relevance_KT", "attention_T", "gradient_KTC"):
        torch.testing.assert_close(getattr(after, field), getattr(before, field))
    gradient = before.gradient_KTC
    torch.testing.assert_close(
        new.tokens(images, keep_Bhw, gradient).relevance_KBHW, old.tokens(images, keep_Bhw, gradient).relevance_KBHW
    )


def test_what_an_encoder_crops_away_is_nothing_on_the_map():
    vit = VisionTransformer(img_size=16, patch_size=8, embed_dim=C, depth=1, num_heads=2).double()
    encoder = TileEncoder(vit, EncoderCard("crops", "token", (0.5,) * 3, (0.25,) * 3, 32, 32, crop_px=16)).double()
    maps = SlideHeadCDAM(PooledHead(C, 2).double(), encoder).tokens(
        pixels()[0], None, torch.randn(2, COUNT, C).double()
    )
    assert maps.relevance_KBHW.shape == (2, COUNT, 4, 4)
    inside = maps.relevance_KBHW[:, :, 1:3, 1:3]
    assert maps.relevance_KBHW.abs().sum() == inside.abs().sum() > 0.01


def test_token_maps_without_a_transformer_are_refused_with_the_reason():
    gradient = torch.ones(2, COUNT, C)
    with pytest.raises(ValueError, match="packed vision transformer, got none"):
        SlideHeadCDAM(PooledHead(C, 2)).tokens(pixels()[0], None, gradient)
    card = EncoderCard("resnet", "own", (0.5,) * 3, (0.25,) * 3, 32, 32, why_not="it is a convolutional network")
    encoder = TileEncoder(torch.nn.Flatten(), card, C)
    with pytest.raises(ValueError, match="resnet, which is not one: it is a convolutional network"):
        SlideHeadCDAM(PooledHead(C, 2), encoder).tokens(pixels()[0], None, gradient)
    with pytest.raises(ValueError, match="eval mode"):
        SlideHeadCDAM(PooledHead(C, 2, hidden=(4,), dropout=0.5).train()).tiles(torch.ones(3, C))


PROGRAM = """
import resource, sys, torch
from maskattn.explain.slide_heads import SlideHeadCDAM
from maskattn.nn import GatedAttentionHead, TileGrid, TransMILHead, ViTHead
T, C, kind = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
torch.manual_seed(0)
head = {
    "abmil": lambda: GatedAttentionHead(C, 2, hidden=None),
    "clam": lambda: GatedAttentionHead(C, 2, branch_per_class=True),
    "transmil": lambda: TransMILHead(C, 2),
    "vit": lambda: ViTHead({"img_size": 14, "patch_size": 1, "in_chans": C, "num_classes": 2, "embed_dim": 192,
                            "depth": 2, "num_heads": 3}),
}[kind]().eval()
z = torch.randn(T, C)
cells = torch.randperm(300 * 300)[:T]
grid = TileGrid(cells // 300, cells % 300, (300, 300))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
SlideHeadCDAM(head, m=2).tiles(z, None, grid)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**20)
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["abmil", "clam", "transmil", "vit"])
def test_many_tiles_are_explained_in_little_memory(kind):
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM, "12000", "256", kind], capture_output=True, text=True, timeout=300, check=True
    )
    assert float(run.stdout) < 1.0  # GiB; T × T numbers alone would be 0.54 per head
