"""Networks without initial weights: only what is drawn at random is left out, and nothing of it stays."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import nn

from maskattn.nn.encoders import load_encoder
from maskattn.nn.encoders.timm_network import _pretrained
from maskattn.nn.unfilled import has_unfilled, unfilled

NETWORKS = ("vit_tiny_patch16_224", "eva02_tiny_patch14_224", "swin_tiny_patch4_window7_224", "beit_base_patch16_224")


@pytest.mark.parametrize("name", NETWORKS)
def test_only_random_values_are_left_out(name):
    arguments = {"depths": (1, 1, 1, 1)} if "swin" in name else {"depth": 1}
    usual = timm.create_model(name, num_classes=0, **arguments)
    with unfilled(mark=True):
        bare = timm.create_model(name, num_classes=0, **arguments)
    left_out = 0
    for key, expected in usual.state_dict().items():
        found = bare.state_dict()[key]
        if found.isnan().any():
            assert found.isnan().all(), key
            left_out += found.numel()
            assert not (expected == expected.flatten()[0]).all(), key
        elif not key.endswith(("cls_token", "pos_embed")):  # timm draws some of these as new tensors
            assert torch.equal(found, expected), key
    assert left_out > 0.9 * sum(x.numel() for x in usual.parameters() if x.ndim == 2)
    for (key, expected), (_, found) in zip(usual.named_buffers(), bare.named_buffers(), strict=True):
        assert torch.equal(found, expected), key


def test_weights_of_a_file_are_all_that_a_network_holds(tmp_path):
    theirs = timm.create_model("vit_tiny_patch16_224", num_classes=0, depth=2).eval()
    torch.save(theirs.state_dict(), tmp_path / "weights.pth")
    encoder = load_encoder("timm:vit_tiny_patch16_224", weights=tmp_path / "weights.pth", depth=2)
    tiles = torch.randint(0, 256, (2, 3, 224, 224), dtype=torch.uint8)
    expected = theirs((tiles / 255 - 0.5) / 0.5)
    torch.testing.assert_close(encoder.encode_tiles(tiles), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("loads_all", [True, False])
def test_initial_weights_are_drawn_where_the_hub_has_none(loads_all):
    weights = nn.Linear(8, 8).state_dict()
    created = []

    def create(source, *, pretrained):
        assert source == "hf-hub:a/b"
        assert pretrained
        created.append(nn.Sequential(nn.Linear(8, 8), nn.Identity() if loads_all else nn.Linear(8, 8)))
        created[-1][0].load_state_dict(weights)
        return created[-1]

    network = _pretrained(create, "hf-hub:a/b", {})
    assert len(created) == (1 if loads_all else 2)
    assert network is created[-1]
    assert not has_unfilled(network)
    assert torch.equal(network[0].weight, weights["weight"])


def test_networks_built_afterwards_are_as_usual():
    with unfilled(mark=True):
        nn.Linear(4, 4)
    assert not has_unfilled(nn.Linear(4, 4))
