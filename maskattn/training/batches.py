"""Batches of cases, whose contents and order depend only on the seed and the epoch.

A resumed training therefore reads what it would have read without the interruption, and no sampler state is stored.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from torch.utils.data import Sampler

from maskattn.training.bags import Draw

__all__ = ["CaseBatches", "InOrder"]


class CaseBatches(Sampler[list[Draw]]):
    """Batches of cases, in a new order in each epoch.

    Args:
        cases: number of cases.
        batch_size: cases of a batch, over all processes.
        seed: seed of the order.
        spread: for each case, whether it is rare and must be spread evenly over the batches (the events of a survival
            task); batches then have ``batch_size`` cases or more.
        rank: index of this process.
        processes: number of processes; each takes its share of every batch.
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
        self._cases, self._seed, self._spread = cases, seed, spread
        self._rank, self._processes = rank, processes
        self._epoch = 0
        if spread is None:
            sizes = [min(batch_size, cases - start) for start in range(0, cases, batch_size)]
        else:
            sizes = [len(part) for part in np.array_split(np.arange(cases), max(1, cases // batch_size))]
        self._sizes = sizes
        self.sampler = self  # Lightning calls set_epoch of a batch sampler's sampler

    def set_epoch(self, epoch: int) -> None:
        """Use the order of this epoch from now on."""
        self._epoch = epoch

    def __len__(self) -> int:
        return len(self._sizes)

    def __iter__(self) -> Iterator[list[Draw]]:
        rng = np.random.default_rng([self._seed, self._epoch])
        order = rng.permutation(self._cases)
        if self._spread is not None:
            order = _spread(order, np.asarray(self._spread), rng)
        for batch in np.split(order, np.cumsum(self._sizes)[:-1]):
            # A process without a case of its own takes part in the step with a case of weight 0.
            own = batch[self._rank :: self._processes] if self._rank < len(batch) else batch[:1]
            yield [Draw(int(index), self._epoch) for index in own]

    def weight(self, batch: int) -> float:
        """Return the factor of this process's mean loss in a batch.

        The mean of the weighted losses over the processes is the mean over the cases of the batch, so that each case
        counts once in a last batch that does not divide by the processes.
        """
        size = self._sizes[batch]
        return len(range(self._rank, size, self._processes)) * self._processes / size


class InOrder(Sampler[Draw]):
    """All cases, or one process's share of them, in order.

    Args:
        cases: number of cases.
        rank: index of this process.
        processes: number of processes.
    """

    def __init__(self, cases: int, rank: int = 0, processes: int = 1) -> None:
        self._indices = range(rank, cases, processes)

    def __len__(self) -> int:
        return len(self._indices)

    def __iter__(self) -> Iterator[Draw]:
        return (Draw(index, 0) for index in self._indices)


def _spread(order: np.ndarray, rare: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return the order with the rare cases at even distances."""
    keys = np.empty(len(order), np.float64)
    for kind in (True, False):
        of_kind = rare[order] == kind
        count = int(of_kind.sum())
        keys[of_kind] = (np.arange(count) + rng.random(count)) / max(1, count)
    return order[np.argsort(keys, kind="stable")]
