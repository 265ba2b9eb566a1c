"""Which exchange is chosen, what it moves, and the mean of gradients over processes."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch
from distributed.processes import run_in_processes
from torch import nn

from maskattn.distributed import Shards, average_gradients
from maskattn.distributed import choice as choice_module
from maskattn.distributed.choice import choose_exchange, cost_of


def divided(*lengths: tuple[int, ...]) -> Shards:
    """Shards without a group, of which only the sizes are asked."""

    class Group:
        def size(self) -> int:
            return len(lengths)

    return Shards(cast(Any, Group()), 0, lengths, torch.device("cpu"))


def test_for_one_sequence_both_exchanges_bring_the_keys_that_are_missing_once():
    shards = divided((30,), (10,), (20,))
    ring, gather = (cost_of(name, shards, shards, 8, 4) for name in ("ring", "gather"))
    assert ring.forward == gather.forward == (60 - 10) * 8
    assert (ring.held, gather.held) == (3 * 30 * 8, 60 * 8)
    assert ring.backward == ring.forward + 60 * 4


def test_nothing_is_gathered_of_sequences_that_no_query_asks_for():
    shards = divided((30, 0), (0, 50))
    assert cost_of("gather", shards, shards, 8, 4) == choice_module.Cost(0, 0, 50 * 8)
    assert cost_of("ring", shards, shards, 8, 4).forward == 50 * 8


def test_keys_are_gathered_as_long_as_they_take_little_memory():
    shards = divided(*[(1000,)] * 8)
    row = choice_module.GATHER_AT_MOST // 8000
    assert choose_exchange(shards, shards, row) == "gather"
    assert choose_exchange(shards, shards, 2 * row) == "ring"
    two = divided((1000,), (1000,))  # a ring of two would hold as much
    assert choose_exchange(two, two, 1 << 30) == "gather"


def gradients(rank: int) -> list[Any]:
    parameters = [nn.Parameter(torch.zeros(3)) for _ in range(3)] + [nn.Parameter(torch.zeros(2, dtype=torch.float64))]
    parameters[0].grad = torch.full((3,), 1.0 + rank)
    if rank == 1:
        parameters[1].grad = torch.full((3,), 4.0)
    parameters[3].grad = torch.tensor([1e-12, 2.0 * rank], dtype=torch.float64)
    average_gradients([*parameters, torch.zeros(2)], torch.distributed.group.WORLD)
    return [parameter.grad for parameter in parameters]


def test_gradients_become_their_mean_and_none_counts_as_zero_where_another_process_has_one():
    for first, second, none, double in run_in_processes(gradients, 2):
        assert first.tolist() == [1.5] * 3
        assert second.tolist() == [2.0] * 3
        assert none is None
        assert double.dtype == torch.float64
        assert double.tolist() == pytest.approx([1e-12, 1.0], rel=1e-12)
