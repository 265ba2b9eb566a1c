"""Slide heads against each layout's model written out plainly, with random weights in float64."""

from __future__ import annotations

import pytest
import torch
from slide_checkpoints import CASES, K, tiles

from maskattn.nn.slide_models.head import SlideHead, TileGrid
from maskattn.nn.slide_models.layouts import head_from_checkpoint
from maskattn.nn.slide_models.pooling import PooledHead


def grid_of(cells: torch.Tensor) -> TileGrid:
    return TileGrid(cells[:, 1], cells[:, 0], (6, 7))


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("count", [1, 2, 23])
def test_logits_and_gradients_are_those_of_the_layouts_model_written_out(name, count):
    torch.manual_seed(len(name))
    case, (z, um, cells) = CASES[name](), tiles(count)
    found = head_from_checkpoint(case.checkpoint, **case.options)
    z.requires_grad_()
    expected, got = case.logits(z, um, cells), found.head(z, um, grid_of(cells))
    # GigaPath's table of sines is float32, as its own is.
    exact = {"rtol": 1e-5, "atol": 1e-5} if "GigaPath" in name else {"rtol": 1e-9, "atol": 1e-9}
    torch.testing.assert_close(got, expected, **exact)
    weights = torch.linspace(-1, 2, len(expected), dtype=torch.float64)
    gradients = [torch.autograd.grad((out * weights).sum(), z)[0] for out in (got, expected)]
    torch.testing.assert_close(*gradients, **exact)
    assert found.classes == case.classes
    assert (
        found.layout == name.removesuffix(", cascade").removesuffix(", two layers").split(" of an")[0].split(" wi")[0]
    )


@pytest.mark.parametrize("name", CASES)
def test_a_head_can_be_rebuilt_from_its_arguments_and_weights(name):
    case, (z, um, cells) = CASES[name](), tiles()
    head = head_from_checkpoint(case.checkpoint, **case.options).head
    twin = type(head)(**head.arguments()).double().eval()
    twin.load_state_dict(head.state_dict())
    assert torch.equal(twin(z, um, grid_of(cells)), head(z, um, grid_of(cells)))


@pytest.mark.parametrize("name", sorted(set(CASES) - {"TransMIL"}))
def test_the_order_of_the_tiles_matters_only_to_transmil(name):
    case, (z, um, cells) = CASES[name](), tiles()
    head = head_from_checkpoint(case.checkpoint, **case.options).head
    order = torch.randperm(len(z))
    shuffled = head(z[order], um[order], grid_of(cells[order]))
    torch.testing.assert_close(shuffled, head(z, um, grid_of(cells)))
    attention = head.attention(z, um, grid_of(cells))
    if attention is not None:
        torch.testing.assert_close(head.attention(z[order], um[order], grid_of(cells[order])), attention[:, order])


@pytest.mark.parametrize(
    ("name", "rows"),
    [("CLAM_SB", 1), ("CLAM_MB", K), ("MIL_fc", 1), ("AttentionDeepMIL", 1), ("STAMP vit", 4), ("STAMP mlp", 1)],
)
def test_attention_has_a_row_per_branch_or_head(name, rows):
    case, (z, um, cells) = CASES[name](), tiles()
    attention = head_from_checkpoint(case.checkpoint, **case.options).head.attention(z, um, grid_of(cells))
    assert attention.shape == (rows, len(z))
    assert (attention >= 0).all()
    if name != "STAMP vit":  # whose class token has the rest
        torch.testing.assert_close(attention.double().sum(1), torch.ones(rows, dtype=torch.float64))


def test_maximum_pooling_is_channel_by_channel():
    head, (z, _, _) = PooledHead(24, 2, "max").double(), tiles()
    expected = torch.stack([column.sort().values[-1] for column in z.T]) @ head.mlp[0].weight.T + head.mlp[0].bias
    torch.testing.assert_close(head(z), expected)
    assert head.attention(z) is None


def test_of_the_best_instance_alone_the_others_are_not_read():
    torch.manual_seed(0)
    head, (z, um, cells) = head_of("MIL_fc_mc"), tiles()
    best = int(head.attention(z)[0].argmax())
    assert head.attention(z)[0].sum() == 1
    torch.testing.assert_close(head(z[best : best + 1]), head(z))
    other = (best + 1) % len(z)
    changed = z.clone()
    changed[other] *= 0.99
    torch.testing.assert_close(head(changed), head(z))
    torch.testing.assert_close(head.along_path(z, um, grid_of(cells))(0 * z), head(0 * z))


def head_of(name: str) -> SlideHead:
    case = CASES[name]()
    return head_from_checkpoint(case.checkpoint, **case.options).head


def test_wrong_embeddings_and_missing_coordinates_are_named():
    z, um, cells = tiles()
    with pytest.raises(ValueError, match=r"reads \(T, 24\) embeddings of T ≥ 1 tiles, got \(23, 20\)"):
        head_of("CLAM_SB")(z[:, :20])
    with pytest.raises(ValueError, match=r"got \(0, 24\)"):
        head_of("CLAM_SB")(z[:0])
    with pytest.raises(ValueError, match="reads the tiles' cells on a grid, got none"):
        head_of("TITAN")(z, um)
    with pytest.raises(ValueError, match="reads distances between tiles in µm, got no positions"):
        head_of("STAMP vit, ALiBi")(z, None, grid_of(cells))
    with pytest.raises(ValueError, match="got 22 for 23 embeddings"):
        head_of("CLAM_SB")(z, um[1:])
    with pytest.raises(ValueError, match="got 1 that share one"):
        head_of("TITAN")(z, um, grid_of(torch.cat([cells[:1], cells[:1], cells[2:]])))
    with pytest.raises(ValueError, match="pool='min'"):
        PooledHead(24, 2, "min")
