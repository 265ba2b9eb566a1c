"""Paths of embeddings: nodes where the path bends, the gap reported, and a bound on their number."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from maskattn.explain.embedding_path import MOST_NODES, NODES, TOLERANCE, gradient_alone, mean_gradient


def test_a_smooth_path_costs_eight_nodes_and_is_exact():
    z = torch.randn(5, 3, dtype=torch.float64)
    found = mean_gradient(lambda at: torch.stack([at.sum() ** 3, at.square().sum()]), z)
    assert found.nodes == NODES
    torch.testing.assert_close(found.gradient_KTC[0], torch.full((5, 3), float(z.sum() ** 2), dtype=torch.float64))
    torch.testing.assert_close(found.gradient_KTC[1], z)
    torch.testing.assert_close(found.products_KT, torch.einsum("tc,ktc->kt", z, found.gradient_KTC))
    torch.testing.assert_close(found.gap_K, torch.zeros(2, dtype=torch.float64))


def jump(at: Tensor) -> Tensor:
    """Rises within a thousandth of the path, somewhere on it."""
    return torch.stack([((at.sum() - 0.4) * 1000).tanh() + at.sum(), at.square().sum()])


def test_nodes_lie_where_the_path_bends_until_the_gap_is_small():
    z = torch.full((4, 2), 1 / 8, dtype=torch.float64)
    equal, found = mean_gradient(jump, z, nodes=NODES), mean_gradient(jump, z)
    assert equal.nodes == NODES
    assert equal.gap_K[0].abs() > 10 * TOLERANCE * equal.difference_K[0]
    assert NODES < found.nodes < MOST_NODES
    assert found.gap_K.abs().max() < TOLERANCE * found.difference_K.max()
    # More equal nodes would have to be as many as the bend is short.
    assert mean_gradient(jump, z, nodes=found.nodes).gap_K[0].abs() > 2 * found.gap_K[0].abs()
    torch.testing.assert_close(found.difference_K, jump(z) - jump(0 * z))


def test_a_path_without_an_end_to_its_bends_is_given_up_with_its_gap():
    calls = 0

    def rough(at: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return at.sum()[None] + torch.where(torch.remainder(1e3 * at.sum(), 1) < 0.5, 0.0, 1.0).to(at)

    z = torch.full((2, 2), math.pi / 8, dtype=torch.float64)
    found = mean_gradient(rough, z)
    assert found.nodes <= MOST_NODES
    assert calls < 2 * MOST_NODES
    expected = rough(z) - rough(0 * z) - found.products_KT.sum(dim=1)
    torch.testing.assert_close(found.gap_K, expected)


@pytest.mark.parametrize("nodes", [3, None])
def test_products_alone_are_those_of_the_gradient(nodes):
    z = torch.rand(4, 2, dtype=torch.float64)
    whole, alone = mean_gradient(jump, z, nodes=nodes), mean_gradient(jump, z, nodes=nodes, keep=False)
    assert alone.gradient_KTC is None
    assert alone.nodes == whole.nodes
    torch.testing.assert_close(alone.products_KT, torch.einsum("tc,ktc->kt", z, whole.gradient_KTC))


def test_scores_that_do_not_move_are_not_halved_for_rounding():
    found = mean_gradient(lambda at: 1e4 + 1e-6 * at.sum()[None] ** 2, torch.rand(30, 8))
    assert found.nodes == NODES


def test_the_gradient_at_the_end_takes_no_path():
    z = torch.randn(5, 3, dtype=torch.float64)
    found = gradient_alone(lambda at: at.square().sum()[None], z)
    torch.testing.assert_close(found.gradient_KTC[0], 2 * z)
    torch.testing.assert_close(found.products_KT[0], 2 * z.square().sum(dim=1))
    assert found.nodes == 0
