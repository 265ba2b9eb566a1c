"""Which cases are read together and in which order: a function of the seed and the epoch alone.

So a training that goes on after it was killed reads what it would have read, and nothing of a sampler is to be stored.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from torch.utils.data import Sampler

from maskattn.training.bags import Draw

__all__ = ["CaseBatches", "InOrder"]


class CaseBatches(Sampler[list[Draw]]):
    """Batches of cases, in an order of each epoch's own.

    Args:
        cases: how many there are.
        batch_size: in a batch, of all processes together.
        seed: of the order.
        spread: for each case whether it is rare and must be in every batch (the events of a survival task): batches
            are then of ``batch_size`` cases or more, and these are spread over them.
        rank: which process this is.
        processes: how many there are; each takes its share of every batch.
    """

    def __init__(
        self,
        cases: int,
        batch_size: int,
        seed: int,
        spread: Sequence[bool] | None = None,
        rank: int = 0,
        processes: int = 1,
    ) -> None:
        self._cases, self._batch_size, self._seed, self._spread = cases, batch_size, seed, spread
        self._rank, self._processes = rank, processes
        self._epoch = 0
        self.sampler = self  # Lightning tells the sampler of a batch sampler which epoch it is

    def set_epoch(self, epoch: int) -> None:
        """Draw the order of this epoch from now on."""
        self._epoch = epoch

    def __len__(self) -> int:
        if self._spread is not None:
            return max(1, self._cases // self._batch_size)
        return -(-self._cases // self._batch_size)

    def __iter__(self) -> Iterator[list[Draw]]:
        rng = np.random.default_rng([self._seed, self._epoch])
        order = rng.permutation(self._cases)
        if self._spread is None:
            parts = [order[at : at + self._batch_size] for at in range(0, self._cases, self._batch_size)]
        else:
            parts = np.array_split(_spread(order, np.asarray(self._spread), rng), len(self))
        for part in parts:
            # Every process has something to do in every step.
            padded = np.resize(part, -(-len(part) // self._processes) * self._processes)
            yield [Draw(int(index), self._epoch) for index in padded[self._rank :: self._processes]]


class InOrder(Sampler[Draw]):
    """All cases, or one process's share of them, in order.

    Args:
        cases: how many there are.
        rank: which process this is.
        processes: how many there are.
    """

    def __init__(self, cases: int, rank: int = 0, processes: int = 1) -> None:
        self._indices = range(rank, cases, processes)

    def __len__(self) -> int:
        return len(self._indices)

    def __iter__(self) -> Iterator[Draw]:
        return (Draw(index, 0) for index in self._indices)


def _spread(order: np.ndarray, rare: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The order with the rare ones at even distances."""
    keys = np.empty(len(order), np.float64)
    for kind in (True, False):
        ours = rare[order] == kind
        count = int(ours.sum())
        keys[ours] = (np.arange(count) + rng.random(count)) / max(1, count)
    return order[np.argsort(keys, kind="stable")]
