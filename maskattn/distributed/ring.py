"""The ring: keys and values are passed around step by step, and a process holds those of two others besides its own.

In step i process r attends to the keys of process r − i, while those of process r − i − 1 are being sent to it. In the
backward pass the keys are passed around again, with their gradients, which are accumulated in float32 and end at the
keys' owners.

Dimension key: W processes, Tq queries of this process, Tk keys of a process, H heads, D head width.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from maskattn.distributed.partial import Keys, Whole, attend, differentiate, placed, wide
from maskattn.distributed.shards import Shards
from maskattn.distributed.transport import Transfer, ordered
from maskattn.operands import Sequences
from maskattn.options import Options
from maskattn.results import Gradients, Outputs

__all__ = ["backward", "forward"]


def forward(
    q: Tensor, own: Keys, queries: Shards, keys: Shards, options: Options, need_lse: bool, impl: str
) -> Outputs:
    """Attend from this process's queries to the keys of all processes."""
    merged = Whole(q)
    for source, block in _round(own, keys):
        if _meet(queries, keys, source):
            where, here = _where(queries, keys, source), placed(options, queries, keys, source)
            merged.add(attend(q, block, where, here, impl))
    return merged.outputs(impl, options)


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
    dq = torch.zeros(q.shape, dtype=wide(q), device=q.device)
    slopes = options.slopes
    dslopes = None if slopes is None else torch.zeros(slopes.shape, dtype=wide(q), device=q.device)
    # The gradients of the keys that this process holds in the current step.
    sums = [torch.zeros(x.shape, dtype=wide(x), device=x.device) for x in _differentiable(own)]
    for source, block in _round(own, keys):
        if _meet(queries, keys, source):
            where, here = _where(queries, keys, source), placed(options, queries, keys, source)
            found = differentiate(grads, q, block, outputs, where, here, impl)
            dq += found.q
            if dslopes is not None and found.slopes is not None:
                dslopes += found.slopes
            of_keys = (x for x in (found.k, found.v, found.key_bias) if x is not None)
            for total, gradient in zip(sums, of_keys, strict=True):
                total += gradient
        sums = _passed_on(sums, keys, source)
    dk, dv, *dbias = (x.to(like.dtype) for x, like in zip(sums, _differentiable(own), strict=True))
    gradients = Gradients(dq.to(q.dtype), dk, dv, *dbias)
    return gradients if slopes is None or dslopes is None else replace(gradients, slopes=dslopes.to(slopes.dtype))


def _differentiable(keys: Keys) -> list[Tensor]:
    return [x for x in (keys.k, keys.v, keys.key_bias) if x is not None]


def _round(own: Keys, keys: Shards) -> Iterator[tuple[int, Keys]]:
    """Yield the keys of each process, this one's first; the next are received while the caller uses these."""
    block, sources = own, list(ordered(keys.rank, keys.size))
    for source, following in zip(sources, [*sources[1:], None], strict=True):
        coming = None if following is None else _empty_rows(block.tensors, sum(keys.lengths[following]))
        transfer = None if coming is None else _pass(block.tensors, coming, keys)
        yield source, block
        if transfer is not None and coming is not None:
            transfer.wait()
            block = block.with_tensors(coming)


def _passed_on(sums: list[Tensor], keys: Shards, source: int) -> list[Tensor]:
    """Send sums to the next process, and return those received from the previous one."""
    coming = _empty_rows(sums, sum(keys.lengths[(source - 1) % keys.size]))
    _pass(sums, coming, keys).wait()
    return coming


def _pass(sent: list[Tensor], coming: list[Tensor], keys: Shards) -> Transfer:
    following, before = (keys.rank + 1) % keys.size, (keys.rank - 1) % keys.size
    return Transfer(((following, x) for x in sent), ((before, x) for x in coming), keys.group)


def _empty_rows(like: list[Tensor], rows: int) -> list[Tensor]:
    return [x.new_empty((rows, *x.shape[1:])) for x in like]


def _meet(queries: Shards, keys: Shards, source: int) -> bool:
    """Return whether any query of this process and any key of another belong to the same sequence."""
    return any(m and n for m, n in zip(queries.lengths[queries.rank], keys.lengths[source], strict=True))


def _where(queries: Shards, keys: Shards, source: int) -> Sequences:
    longest = max(keys.lengths[source], default=0)
    return Sequences(queries.cu_seqlens, keys.cu_seqlens_of(source), queries.max_seqlen, longest)
