"""Metrics against plain loops over single predictions, and on maps whose value is known."""

from __future__ import annotations

import pytest
import torch
from small_vits import random_vit, sample

from maskattn.explain import CDAM, Concept, metrics


def perturbed(model, x, keep, gone, perturbation):
    """The logits of one image whose tokens ``gone`` (H, W) are perturbed."""
    if perturbation == "drop":
        return model(x, keep & ~gone)[0]
    substitute = metrics.blurred(x) if perturbation == "blur" else x.mean(dim=(2, 3), keepdim=True).expand_as(x)
    pixels = gone.repeat_interleave(16, 0).repeat_interleave(16, 1)
    return model(torch.where(pixels, substitute, x), keep)[0]


@pytest.mark.parametrize("perturbation", ["drop", "blur", "mean"])
def test_removal_curves_are_those_of_a_loop(perturbation):
    model, (x, keep) = random_vit(), sample()
    maps, target = torch.randn(2, 4, 4), torch.tensor([1, 3])
    curves = metrics.removal_curves(
        model, x, maps, target, keep, perturbation=perturbation, steps=5, internal_batch_size=3
    )
    for b in range(2):
        kept = keep[b].flatten().nonzero().flatten()
        order = kept[maps[b].flatten()[kept].argsort(descending=True)]
        for q, share in enumerate(torch.linspace(0, 1, 6)):
            count = int((share * len(kept)).round())
            for curve, first in (
                (curves.most_first_BQ, order[:count]),
                (curves.least_first_BQ, order[len(order) - count :]),
            ):
                gone = torch.zeros(16, dtype=torch.bool)
                gone[first] = True
                logits = perturbed(model, x[b : b + 1], keep[b : b + 1], gone.view(4, 4), perturbation)
                torch.testing.assert_close(curve[b, q], logits[target[b]].detach())


def test_correctness_is_the_area_between_the_curves():
    share = torch.tensor([0.0, 0.5, 1.0])
    curves = metrics.RemovalCurves(share, torch.tensor([[2.0, 0.0, 0.0]]), torch.tensor([[2.0, 2.0, 0.0]]))
    torch.testing.assert_close(curves.correctness, torch.tensor([1.0]))


def test_the_opposite_map_has_the_opposite_correctness():
    model, (x, keep) = random_vit(), sample()
    maps = CDAM(model).attribute(x, 0, keep)
    one, other = (metrics.removal_curves(model, x, m, 0, keep).correctness for m in (maps, -maps))
    torch.testing.assert_close(one, -other)


def test_box_changes_are_those_of_a_loop_and_ablation_like_relevance_follows_them():
    model, (x, keep) = random_vit(), sample()
    boxes = metrics.random_boxes((4, 4), 6, torch.Generator().manual_seed(0))
    changes = metrics.box_changes(model, x, boxes, 2, keep, internal_batch_size=4)
    for b in range(2):
        whole = model(x[b : b + 1], keep[b : b + 1])[0, 2]
        for s, box in enumerate(boxes):
            without = perturbed(model, x[b : b + 1], keep[b : b + 1], box, "drop")[2]
            torch.testing.assert_close(changes[b, s], (whole - without).detach())
    maps = torch.randn(2, 4, 4, dtype=torch.float64)
    inside = torch.einsum("bhw,shw->bs", maps, boxes.double())
    expected = torch.stack([torch.corrcoef(torch.stack([inside[b], changes[b]]))[0, 1] for b in range(2)])
    torch.testing.assert_close(metrics.box_sensitivity(maps, boxes, changes), expected)


def test_boxes_lie_in_the_grid_and_are_full():
    boxes = metrics.random_boxes((3, 8), 200, torch.Generator().manual_seed(1))
    assert boxes.shape == (200, 3, 8)
    for box in boxes:
        rows, columns = box.any(1).nonzero(), box.any(0).nonzero()
        assert box.sum() == (rows.max() - rows.min() + 1) * (columns.max() - columns.min() + 1)
        assert box.any(1).sum() <= 1
        assert box.any(0).sum() <= 4
    assert boxes.any(0).all()


def test_compactness_counts_small_kept_tokens():
    maps = torch.tensor([[[1.0, -0.04], [0.05, -0.5]]])
    assert metrics.compactness(maps).item() == 0.5
    keep = torch.tensor([[[True, False], [True, True]]])
    assert metrics.compactness(maps, keep).item() == pytest.approx(1 / 3)


def test_contrast_is_one_for_the_own_object_alone_and_zero_on_average_for_maps_that_know_no_class():
    own, other = torch.zeros(2, 1, 2, 2, dtype=torch.bool)
    own[..., 0], other[..., 1] = True, True
    assert metrics.object_contrast(own.float(), own, other).item() == 1
    assert metrics.object_contrast(own.float() - other.float(), own, other).item() == 1
    assert metrics.object_contrast(torch.zeros(1, 2, 2), own, other).item() == 0
    maps = torch.rand(1, 2, 2)
    one, two = metrics.object_contrast(maps, own, other), metrics.object_contrast(maps, other, own)
    torch.testing.assert_close(one + two, torch.zeros(1))


def test_background_mass_and_correlation_of_known_maps():
    maps = torch.tensor([[[3.0, -1.0]], [[0.0, 0.0]]])
    background = torch.tensor([[[False, True]], [[True, True]]])
    assert metrics.background_mass(maps, background).tolist() == [0.25, 0.0]
    torch.testing.assert_close(
        metrics.correlation_of_maps(maps[:1], -2 * maps[:1]), torch.tensor([-1.0], dtype=torch.float64)
    )
    assert metrics.correlation_of_maps(maps[1:], maps[:1]).item() == 0


def test_blur_keeps_constants_and_moves_the_mean_little():
    x = torch.randn(1, 3, 40, 24, dtype=torch.float64)
    torch.testing.assert_close(metrics.blurred(torch.full_like(x, 0.7)), torch.full_like(x, 0.7))
    assert metrics.blurred(x).std() < 0.2 * x.std()


def test_concepts_can_be_judged_and_wrong_arguments_are_named():
    model, (x, keep) = random_vit(), sample()
    concept = Concept.from_images(model, x, keep)
    maps = CDAM(model).attribute(x, concept, keep)
    assert metrics.removal_curves(model, x, maps, concept, keep).correctness.shape == (2,)
    with pytest.raises(ValueError, match="perturbation='noise'"):
        metrics.removal_curves(model, x, maps, 0, keep, perturbation="noise")
    with pytest.raises(ValueError, match="a target with 4"):
        metrics.removal_curves(model, x, maps, "all", keep)
    with pytest.raises(ValueError, match="pass the map of one class"):
        metrics.removal_curves(model, x, maps[:, None], 0, keep)
