"""The division of the rows of a batch of sequences among the processes of a group.

Every process holds a chunk of each sequence, of any length including 0, concatenated like packed tokens. A sequence
consists of the chunks of all processes in the order of their ranks. A long sequence may be divided in any way:
attention depends on the coordinates of tokens, not on their order.

Dimension key: W processes, B sequences, T rows of this process.
"""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import accumulate, pairwise
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor

from maskattn.attention.checks import check_lengths
from maskattn.distributed.agreement import agree
from maskattn.distributed.transport import gather_numbers
from maskattn.packing import Packing
from maskattn.shapes import Int

__all__ = ["Shards", "even_slice", "starts_of"]


@dataclass(frozen=True, eq=False)
class Shards:
    """The chunks of B sequences that each process of a group holds; made by :meth:`of` in all processes together.

    Attributes:
        group: the process group.
        rank: this process's rank within the group.
        lengths: W tuples of B numbers, the rows of each sequence in each process.
        device: the device of the rows.
        checked: compare every call among the processes before it runs, so that differing shapes raise an error in all
            of them; on a GPU this synchronises with the device. False skips the comparison.
        plans: a cache of the operations' plans for these shards and others; it keeps no shards alive.
    """

    group: dist.ProcessGroup
    rank: int
    lengths: tuple[tuple[int, ...], ...]
    device: torch.device
    checked: bool = True
    plans: MutableMapping[Shards, Any] = field(default_factory=WeakKeyDictionary, repr=False)

    @classmethod
    def of(
        cls, rows: Packing | Int[Tensor, "B_plus_1"], group: dist.ProcessGroup | None = None, *, checked: bool = True
    ) -> Shards:
        """Exchange the numbers of rows with the other processes, all of which call it.

        Args:
            rows: the packing of this process's rows, or their cu_seqlens, (B + 1,) int32; a sequence without rows in
                this process has length 0.
            group: a process group of ``torch.distributed``; None is the default group.
            checked: see :class:`Shards`.

        Raises:
            GroupError: the processes have different numbers of sequences, or one of them does not answer.
            ValueError: cu_seqlens do not start at 0 or decrease.
            RuntimeError: ``torch.distributed`` has no default group.

        Example:
            >>> shards = Shards.of(torch.tensor([0, 3], dtype=torch.int32))  # doctest: +SKIP
        """
        group = _default_group() if group is None else group
        cu_seqlens = rows.cu_seqlens if isinstance(rows, Packing) else rows
        starts, problem = _starts(cu_seqlens)
        agree("Shards.of", {"number of sequences": len(starts) - 1}, problem, group, cu_seqlens.device)
        own = [end - start for start, end in pairwise(starts)]
        lengths = tuple(tuple(each) for each in gather_numbers(own, group, cu_seqlens.device)) if own else ()
        return cls(group, group.rank(), lengths or ((),) * group.size(), cu_seqlens.device, checked)

    @property
    def size(self) -> int:
        """W, the number of processes."""
        return len(self.lengths)

    @property
    def batch_size(self) -> int:
        """B, the number of sequences."""
        return len(self.lengths[0])

    @property
    def rows(self) -> int:
        """T, the number of rows of this process."""
        return sum(self.lengths[self.rank])

    @cached_property
    def total(self) -> tuple[int, ...]:
        """The number of rows of each sequence in all processes together."""
        return tuple(map(sum, zip(*self.lengths, strict=True)))

    @property
    def cu_seqlens(self) -> Int[Tensor, "B_plus_1"]:
        """(B + 1,) int32, the boundaries of this process's chunks among its rows."""
        return self.cu_seqlens_of(self.rank)

    @property
    def max_seqlen(self) -> int:
        """The length of the longest chunk of this process."""
        return max(self.lengths[self.rank], default=0)

    def cu_seqlens_of(self, process: int) -> Int[Tensor, "B_plus_1"]:
        """Return (B + 1,) int32, the boundaries of a process's chunks among its rows."""
        return self._cu_seqlens[process]

    def offsets_of(self, process: int) -> Int[Tensor, "B"]:
        """Return (B,) int32, the positions of a process's chunks within the whole sequences."""
        return self._offsets[process]

    @cached_property
    def _offsets(self) -> list[Tensor]:
        lengths = torch.tensor(self.lengths, dtype=torch.int32).view(self.size, self.batch_size)
        before = (lengths.cumsum(0, dtype=torch.int32) - lengths).to(self.device)
        # Separate tensors, so that all are aligned, for which kernels are compiled once.
        return [each.clone() for each in before]

    @cached_property
    def _cu_seqlens(self) -> list[Tensor]:
        return [starts_of(each, self.device) for each in self.lengths]

    def taking(self, sequences: Sequence[int]) -> Shards:
        """Return the shards of some of these sequences, in this order, which may repeat; without a message."""
        return self._with(tuple(tuple(each[b] for b in sequences) for each in self.lengths))

    def without_first(self, count: int) -> Shards:
        """Return the shards without the first ``count`` rows of each sequence, which process 0 holds."""
        first, *others = self.lengths
        return self._with((tuple(n - count for n in first), *others))

    def _with(self, lengths: tuple[tuple[int, ...], ...]) -> Shards:
        return replace(self, lengths=lengths, plans=WeakKeyDictionary())

    @cached_property
    def positions(self) -> Int[Tensor, "T"]:
        """(T,) int64, the indices of this process's rows in the concatenation of the whole sequences."""
        starts = starts_of(self.total, torch.device("cpu")).tolist()
        before = [sum(each[b] for each in self.lengths[: self.rank]) for b in range(self.batch_size)]
        ranges = [
            torch.arange(starts[b] + before[b], starts[b] + before[b] + self.lengths[self.rank][b])
            for b in range(self.batch_size)
        ]
        return torch.cat([*ranges, torch.empty(0, dtype=torch.int64)]).to(self.device)


def even_slice(total: int, group: dist.ProcessGroup | None = None) -> slice:
    """Return this process's slice of ``total`` rows, if they are divided as evenly as possible among the processes.

    Raises:
        RuntimeError: ``torch.distributed`` has no default group.

    Example:
        >>> even_slice(10)  # doctest: +SKIP
        slice(0, 5, None)
    """
    group = _default_group() if group is None else group
    rank, size = group.rank(), group.size()
    return slice(total * rank // size, total * (rank + 1) // size)


def starts_of(lengths: tuple[int, ...] | list[int], device: torch.device) -> Tensor:
    """Return cu_seqlens (B + 1,) int32 of B lengths."""
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)


def _default_group() -> dist.ProcessGroup:
    if not (dist.is_available() and dist.is_initialized()):
        raise RuntimeError(
            "a call over a process group needs a group, got None and no default group of torch.distributed; call "
            "torch.distributed.init_process_group first, for example in a program started with torchrun"
        )
    group = dist.group.WORLD
    assert group is not None
    return group


def _starts(cu_seqlens: Tensor) -> tuple[list[int], Exception | None]:
    """Return cu_seqlens as a list, and the error if they are invalid."""
    try:
        if cu_seqlens.dtype != torch.int32 or cu_seqlens.ndim != 1 or not len(cu_seqlens):
            raise ValueError(
                f"cu_seqlens must be (B + 1,) int32, got shape {tuple(cu_seqlens.shape)} of {cu_seqlens.dtype}; use a "
                "Packing's"
            )
        starts: list[int] = cu_seqlens.tolist()
        on_cpu = cu_seqlens.cpu()
        check_lengths("cu_seqlens", on_cpu, starts[-1], max(starts))
    except ValueError as error:
        return [0], error
    return starts, None
