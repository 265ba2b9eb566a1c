"""The gathered exchange: each process receives all keys of the sequences of which it has queries, then attends once.

A key is sent only to processes that have queries of its sequence, so that a sequence on one process alone costs
nothing. In the backward pass the keys are gathered again, and their gradients are sent to the keys' owners, which add
them up in float32 in the order of the processes.

Dimension key: Tq queries and Tk keys of this process, H heads, D head width.
"""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor

from maskattn.attention.implementation import implementation
from maskattn.distributed.partial import Keys, attend, differentiate, placed, wide
from maskattn.distributed.shards import Shards, starts_of
from maskattn.distributed.transport import Transfer
from maskattn.operands import Sequences
from maskattn.options import Options
from maskattn.results import Gradients, Outputs

__all__ = ["backward", "forward", "gathered_rows"]


def forward(
    q: Tensor, own: Keys, queries: Shards, keys: Shards, options: Options, need_lse: bool, impl: str
) -> Outputs:
    """Attend from this process's queries to the keys of all processes."""
    plan = _plan(queries, keys)
    need_lse = need_lse or implementation(impl).READS_OUTPUTS
    gathered = own.with_tensors(plan.gather(own.tensors))
    return attend(q, gathered, plan.where, placed(options, queries, None), impl, need_lse)


def backward(
    grads: tuple[Tensor, Tensor | None],
    q: Tensor,
    own: Keys,
    outputs: Outputs,
    queries: Shards,
    keys: Shards,
    options: Options,
    impl: str,
) -> Gradients:
    """Return the gradients of :func:`forward`; that of slopes is the contribution of this process's queries."""
    plan = _plan(queries, keys)
    gathered = own.with_tensors(plan.gather(own.tensors))
    here = placed(options, queries, None)
    found = differentiate(grads, q, gathered, outputs, plan.where, here, impl, of_all_keys=True)
    of_keys = [x for x in (found.k, found.v, found.key_bias) if x is not None]
    dk, dv, *dbias = plan.send_home(of_keys)
    return replace(found, k=dk, v=dv, key_bias=dbias[0] if dbias else None)


def gathered_rows(queries: Shards, keys: Shards, process: int) -> tuple[int, int]:
    """Return the number of keys that a process holds after the exchange, and how many it receives from others."""
    needed = _needed(queries, process)
    held = sum(keys.total[b] for b in needed)
    return held, held - sum(keys.lengths[process][b] for b in needed)


def _needed(queries: Shards, process: int) -> list[int]:
    """Return the indices of the sequences of which a process has queries."""
    return [b for b, count in enumerate(queries.lengths[process]) if count]


@dataclass(frozen=True)
class _Plan:
    """The rows of keys that this process sends and receives.

    Nothing in it refers to shards, which keep it: a reference cycle would keep the group alive after its destruction.

    Attributes:
        group: the process group.
        rank: this process's rank within the group.
        rows: the number of this process's rows of keys.
        sent: for each process, the indices of this process's rows that it receives; a slice for all of them.
        received: for each process, the number of its rows that this process receives.
        order: the index of each row of the gathered sequences among the received rows, which are ordered by process;
            None if the orders are the same.
        where: the lengths of this process's queries and of the gathered keys.
    """

    group: dist.ProcessGroup
    rank: int
    rows: int
    sent: list[Tensor | slice]
    received: list[int]
    order: Tensor | None
    where: Sequences

    def gather(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Return all rows of the sequences of which this process has queries, ordered by sequence."""
        own, others = self.rank, self._others()
        found = [x.new_empty((sum(self.received), *x.shape[1:])) for x in tensors]
        pieces = [x.split(self.received) for x in found]
        sends = ((process, x[self.sent[process]]) for process in others for x in tensors)
        receives = ((process, each[process]) for process in others for each in pieces)
        transfer = Transfer(sends, receives, self.group)
        for x, each in zip(tensors, pieces, strict=True):
            each[own].copy_(x[self.sent[own]])
        transfer.wait()
        return found if self.order is None else [x[self.order] for x in found]

    def send_home(self, grads: Sequence[Tensor]) -> list[Tensor]:
        """Return the gradients of this process's rows, summed over all processes; the reverse of :meth:`gather`."""
        own, others = self.rank, self._others()
        if self.order is not None:
            grads = [torch.empty_like(x).index_copy_(0, self.order, x) for x in grads]
        pieces = [x.split(self.received) for x in grads]
        counts = [self._rows_sent(process) for process in range(len(self.sent))]
        coming = {p: [x.new_empty((counts[p], *x.shape[1:])) for x in grads] for p in others}
        sends = ((process, each[process]) for process in others for each in pieces)
        receives = ((process, x) for process in others for x in coming[process])
        Transfer(sends, receives, self.group).wait()
        coming[own] = [each[own] for each in pieces]
        sums = [x.new_zeros((self.rows, *x.shape[1:]), dtype=wide(x)) for x in grads]
        for process in range(len(self.sent)):
            for total, rows in zip(sums, coming[process], strict=True):
                total[self.sent[process]] += rows
        return [total.to(x.dtype) for total, x in zip(sums, grads, strict=True)]

    def _others(self) -> list[int]:
        return [process for process in range(len(self.sent)) if process != self.rank]

    def _rows_sent(self, process: int) -> int:
        rows = self.sent[process]
        return self.rows if isinstance(rows, slice) else len(rows)


def _plan(queries: Shards, keys: Shards) -> _Plan:
    """Return the plan for these shards; it is cached, since every layer of a model needs it."""
    known: MutableMapping[Shards, _Plan] = queries.plans
    if keys not in known:
        known[keys] = _made(queries, keys)
    return known[keys]


def _made(queries: Shards, keys: Shards) -> _Plan:
    lengths = keys.lengths
    own_starts = starts_of(lengths[keys.rank], torch.device("cpu")).tolist()
    sent: list[Tensor | slice] = []
    for process in range(keys.size):
        needed = _needed(queries, process)
        ranges = [torch.arange(own_starts[b], own_starts[b + 1]) for b in needed]
        rows = torch.cat([*ranges, torch.empty(0, dtype=torch.int64)])
        sent.append(slice(None) if len(rows) == keys.rows else rows.to(keys.device))
    needed = _needed(queries, queries.rank)
    received = [sum(each[b] for b in needed) for each in lengths]
    total = [keys.total[b] if b in needed else 0 for b in range(keys.batch_size)]
    where = Sequences(queries.cu_seqlens, starts_of(total, keys.device), queries.max_seqlen, max(total, default=0))
    order = _order(lengths, needed, keys.device)
    return _Plan(keys.group, keys.rank, keys.rows, sent, received, order, where)


def _order(lengths: tuple[tuple[int, ...], ...], needed: list[int], device: torch.device) -> Tensor | None:
    if len(needed) < 2:
        return None
    begin, at = {}, 0
    for process, each in enumerate(lengths):
        for b in needed:
            begin[process, b] = at
            at += each[b]
    ranges = [
        torch.arange(begin[process, b], begin[process, b] + each[b])
        for b in needed
        for process, each in enumerate(lengths)
    ]
    return torch.cat(ranges).to(device)
