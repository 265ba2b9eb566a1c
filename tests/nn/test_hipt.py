"""HIPT, level by level, against its levels run one patch and one region at a time."""

from __future__ import annotations

import pytest
import torch
from small_regions import SIDE, some_regions, with_random_weights
from torch import Tensor

from maskattn.explain import AttentionMap, FactorisedAttention
from maskattn.explain.factorised import normalise
from maskattn.nn import HIPT, VisionTransformer
from maskattn.nn.hipt import slide_level
from maskattn.packing import Packing


def small_hipt() -> HIPT:
    both = {"depth": 2, "num_heads": 6, "pos_embed_resample": "dino"}
    patch = VisionTransformer(img_size=64, embed_dim=48, **both)
    region = VisionTransformer(img_size=2, patch_size=1, in_chans=48, embed_dim=24, embed_act="gelu", **both)
    return with_random_weights(HIPT(patch, region, slide_level(24, 3), patch_px=32).double())


def patches_of(region: Tensor, keep: Tensor) -> list[tuple[int, int, Tensor, Tensor]]:
    found = []
    for i in range(3):
        for j in range(4):
            part = keep[i * SIDE : (i + 1) * SIDE, j * SIDE : (j + 1) * SIDE]
            if part.any():
                found.append((i, j, region[:, i * 32 : (i + 1) * 32, j * 32 : (j + 1) * 32], part))
    return found


def encode_region_by_hand(model: HIPT, region: Tensor, keep: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The region's embedding, its grid of patch embeddings, and which patches take part."""
    grid, kept = torch.zeros(1, 48, 3, 4, dtype=torch.float64), torch.zeros(1, 3, 4, dtype=torch.bool)
    for i, j, pixels, part in patches_of(region, keep):
        grid[0, :, i, j] = model.patch_encoder(pixels[None], part[None])[0]
        kept[0, i, j] = True
    return model.region_encoder(grid, kept)[0], grid, kept


def test_regions_are_patches_encoded_one_by_one_without_those_of_glass():
    model, (regions, keep) = small_hipt(), some_regions(4, 0.7)
    embeddings, with_tissue = model.encode_regions(regions, keep)
    assert with_tissue.tolist() == [True, True, False, True]
    expected = torch.stack([encode_region_by_hand(model, regions[b], keep[b])[0] for b in (0, 1, 3)])
    torch.testing.assert_close(embeddings, expected)


def test_a_region_without_a_mask_is_the_plain_hierarchy():
    model, (regions, _) = small_hipt(), some_regions(4, 0.7)
    patches = regions.unfold(2, 32, 32).unfold(3, 32, 32).permute(0, 2, 3, 1, 4, 5)  # [B, n, m, 3, p, p]
    grid = model.patch_encoder(patches.flatten(0, 2)).unflatten(0, (4, 3, 4)).permute(0, 3, 1, 2)
    embeddings, with_tissue = model.encode_regions(regions)
    assert with_tissue.all()
    torch.testing.assert_close(embeddings, model.region_encoder(grid))


def test_slides_are_regions_with_tissue_and_the_whole_graph_has_gradients():
    model, (regions, keep) = small_hipt(), some_regions(4, 0.7)
    regions.requires_grad_()
    embeddings, with_tissue = model.encode_regions(regions, keep)
    logits = model(embeddings, with_tissue.view(2, 2))
    dense = torch.zeros(1, 24, 2, 2, dtype=torch.float64)
    dense[0, :, 0, 0], dense[0, :, 0, 1], dense[0, :, 1, 1] = embeddings
    torch.testing.assert_close(logits, model.slide_encoder(dense, with_tissue.view(1, 2, 2))[0])
    logits.square().sum().backward()
    pixels = keep.repeat_interleave(16, 1).repeat_interleave(16, 2)[:, None].expand_as(regions)
    assert (regions.grad[~pixels] == 0).all()
    assert regions.grad[pixels].abs().sum() > 0
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_glass_is_never_read_at_any_level():
    model, (regions, keep) = small_hipt(), some_regions(4, 0.7)
    glass = ~keep.repeat_interleave(16, 1).repeat_interleave(16, 2)[:, None].expand_as(regions)
    expected, _ = model.encode_regions(regions, keep)
    assert torch.equal(model.encode_regions(regions.masked_fill(glass, float("nan")), keep)[0], expected)


def test_regions_of_glass_alone_have_no_embedding():
    model, (regions, keep) = small_hipt(), some_regions(4, 0.7)
    embeddings, with_tissue = model.encode_regions(regions, torch.zeros_like(keep))
    assert embeddings.shape == (0, 24)
    assert not with_tissue.any()


def test_published_layouts_load(tmp_path):
    model = small_hipt()
    patch, region = dict(model.patch_encoder.state_dict()), dict(model.region_encoder.state_dict())
    region["phi.0.weight"] = region.pop("patch_embed.proj.weight").flatten(1)
    region["phi.0.bias"] = region.pop("patch_embed.proj.bias")
    for name, state in (("patch", patch), ("region", region)):
        backbone = {f"module.backbone.{k}": v for k, v in state.items()}
        torch.save({"teacher": {**backbone, "module.head.mlp.0.weight": torch.zeros(1)}}, tmp_path / f"{name}.pth")
    loaded = HIPT.load(tmp_path / "patch.pth", tmp_path / "region.pth", num_classes=3)
    loaded = HIPT(loaded.patch_encoder, loaded.region_encoder, model.slide_encoder, patch_px=32).eval()
    regions, keep = some_regions(4, 0.7)
    torch.testing.assert_close(loaded.encode_regions(regions, keep)[0], model.encode_regions(regions, keep)[0])


def test_the_published_sizes():
    model = HIPT.random(num_classes=2)
    assert sum(p.numel() for p in model.patch_encoder.parameters()) == 21_665_664  # ViT-S/16
    assert model.region_encoder.pos_embed.shape == (1, 197, 192)
    assert len(model.slide_encoder.blocks) == 2
    assert model.patch_px == 256


def test_encoders_that_do_not_fit_and_wrong_regions_are_named():
    model, (regions, keep) = small_hipt(), some_regions(4, 0.7)
    with pytest.raises(ValueError, match="patch and region encoder must agree"):
        HIPT(model.region_encoder, model.region_encoder, model.slide_encoder)
    with pytest.raises(ValueError, match="patch_px must be a multiple"):
        HIPT(model.patch_encoder, model.region_encoder, model.slide_encoder, patch_px=40)
    with pytest.raises(ValueError, match="multiples of patch_px=32"):
        model.encode_regions(regions[:, :, :90])
    with pytest.raises(ValueError, match="keep must be bool over the regions' tokens"):
        model.encode_regions(regions, keep[:, :3])
    with pytest.raises(ValueError, match="2 embeddings and 4 kept regions"):
        model(torch.randn(2, 24, dtype=torch.float64), torch.ones(2, 2, dtype=torch.bool))


def rank(values: Tensor) -> Tensor:
    """scipy's rankdata(method="min") / count."""
    return torch.tensor([1 + int((values < v).sum()) for v in values], dtype=values.dtype) / len(values)


def share_of_range(values: Tensor) -> Tensor:
    extent = values.max() - values.min()
    return (values - values.min()) / extent if extent > 0 else torch.ones_like(values)


@pytest.mark.parametrize(("scale", "by_hand"), [("rank", rank), ("minmax", share_of_range)])
@pytest.mark.parametrize(
    ("trained", "weights"),
    [
        ((), (0.7, 0.7, 2 * 0.7 + 0.3)),
        (("region",), (0.3, 0.7, 0.7 + 2 * 0.3)),
        (("patch", "region"), (0.3, 0.3, 3 * 0.3)),
    ],
)
def test_factorised_map_is_the_published_formula(trained, weights, scale, by_hand):
    model, (regions, keep) = small_hipt(), some_regions(4, 0.7)
    attention = FactorisedAttention(model, gamma=0.3, trained=trained, scale=scale)
    embeddings, with_tissue = model.encode_regions(regions, keep)
    slide_T = attention.slide(embeddings, with_tissue.view(2, 2))
    slide_B = torch.zeros(4, dtype=torch.float64).masked_scatter(with_tissue, slide_T)
    maps = attention.regions(regions, keep, slide_B)

    dense = torch.zeros(1, 24, 2, 2, dtype=torch.float64)
    dense[0].flatten(1)[:, with_tissue] = embeddings.T
    row = AttentionMap(model.slide_encoder).attribute(dense, with_tissue.view(1, 2, 2))
    torch.testing.assert_close(slide_T, by_hand(row.flatten()[with_tissue]))
    region_weight, patch_weight, total = weights
    for b in (0, 1, 3):
        _, grid, kept = encode_region_by_hand(model, regions[b], keep[b])
        of_region = torch.zeros(3, 4, dtype=torch.float64)
        of_region[kept[0]] = by_hand(AttentionMap(model.region_encoder).attribute(grid, kept)[0][kept[0]])
        expected = torch.zeros(3 * SIDE, 4 * SIDE, dtype=torch.float64)
        for i, j, pixels, part in patches_of(regions[b], keep[b]):
            of_patch = by_hand(AttentionMap(model.patch_encoder).attribute(pixels[None], part[None])[0][part])
            here = region_weight * of_region[i, j] + patch_weight * of_patch + 0.3 * slide_B[b]
            expected[i * SIDE : (i + 1) * SIDE, j * SIDE : (j + 1) * SIDE][part] = here / total
        torch.testing.assert_close(maps.combined_Bhw[b], expected)
    assert (maps.combined_Bhw[~keep] == 0).all()
    assert (maps.patch_Bhw[~keep] == 0).all()
    assert (maps.region_Bhw[~keep] == 0).all()
    assert (maps.combined_Bhw[keep] <= 1).all()


def test_ties_take_the_lowest_rank_and_equal_values_the_full_range():
    values, packing = (
        torch.tensor([2.0, 1.0, 2.0, 5.0, 5.0]),
        Packing.from_keep(torch.tensor([[True] * 3, [True, True, False]])),
    )
    torch.testing.assert_close(normalise(values, packing, "rank"), torch.tensor([2 / 3, 1 / 3, 2 / 3, 0.5, 0.5]))
    torch.testing.assert_close(normalise(values, packing, "minmax"), torch.tensor([1.0, 0.0, 1.0, 1.0, 1.0]))


def test_wrong_weights_and_scales_are_named():
    model = small_hipt()
    for arguments in ({"gamma": 1.5}, {"trained": ("slide",)}, {"scale": "softmax"}):
        with pytest.raises(ValueError, match="gamma must be in"):
            FactorisedAttention(model, **arguments)
    with pytest.raises(ValueError, match="counts only frozen levels"):
        FactorisedAttention(model, gamma=0, trained=("patch", "region"))
