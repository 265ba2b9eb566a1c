"""Calls of every public operation with its gradients, with tensors on the CPU and launches that run nothing.

Dimension key: B sequences, T packed tokens, R readout queries, H heads, D head width, K classes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import maskattn
from bench.aot.launches import Launch, recorded_launches
from maskattn.attention import operations
from maskattn.attention.ops import flat_options
from maskattn.kernels.attention.gather import gather_rows, scatter_rows
from maskattn.options import Options

__all__ = ["OF_CHUNKS", "ON_HOPPER", "OPERATIONS", "Shape", "launches_of", "run"]

HEADS, CLASSES = 2, 3


@dataclass(frozen=True)
class Shape:
    """The sizes and options of a call.

    Attributes:
        lengths: lengths of the sequences.
        queries: queries of a readout.
        head_width: D.
        dtype: dtype of queries, keys and values.
        options: whether options are used: a key bias, ALiBi and dropout.
        without: names of arguments that are left out of these.
        shared_bias: whether all heads have the same bias.
        precision, deterministic: the options of attention over sequences and masks.
        far_apart: whether queries, keys and values are spread over more than 2^31 elements of memory, most of which is
            never touched. More than 256 rows are still read in place; fewer are copied.
    """

    lengths: tuple[int, ...]
    queries: int = 1
    head_width: int = 32
    dtype: torch.dtype = torch.bfloat16
    options: bool = False
    without: tuple[str, ...] = ()
    shared_bias: bool = False
    precision: str = "ieee"
    deterministic: bool = True
    far_apart: bool = False

    @property
    def cu_seqlens(self) -> Tensor:
        """(B + 1,) int32, the first token of each sequence, ending with T."""
        return torch.tensor([0, *torch.tensor(self.lengths).cumsum(0)], dtype=torch.int32)

    def leaves(self, count: int, *shape: int) -> list[Tensor]:
        """Return tensors of the dtype that require a gradient."""
        if not self.far_apart:
            return [torch.zeros(shape, dtype=self.dtype, requires_grad=True) for _ in range(count)]
        apart = 2**31 // (math.prod(shape[:-1]) - 1) // 16 * 16 + 16
        strides = *(apart * math.prod(shape[axis + 1 : -1]) for axis in range(len(shape) - 1)), 1
        return [torch.empty_strided(shape, strides, dtype=self.dtype).requires_grad_() for _ in range(count)]

    def keywords(self, bias_shape: tuple[int, ...], coords: Any) -> dict[str, Any]:
        """Return the options of a call."""
        if not self.options:
            return {}
        keywords = {
            "key_bias": torch.zeros(bias_shape, requires_grad=True),
            "coords": coords,
            "slopes": torch.zeros(HEADS, requires_grad=True),
            "dropout_p": 0.1,
        }
        return {name: x for name, x in keywords.items() if name not in self.without}

    @property
    def allowed(self) -> dict[str, Any]:
        """What the call allows: a precision, and sums in any order."""
        return {"precision": self.precision, "deterministic": self.deterministic}


def launches_of(operation: str, shapes: Sequence[Shape], target: str) -> list[Launch]:
    """Return the launches of an operation and its backward, in order, for calls with each of the shapes."""
    with recorded_launches(target) as launches:
        for shape in shapes:
            run(operation, shape)
    return launches


def run(operation: str, shape: Shape) -> None:
    """Call an operation and its backward."""
    (OPERATIONS | OF_CHUNKS | ON_HOPPER)[operation](shape)


def packed_attention(shape: Shape, impl: str = "triton") -> None:
    T = sum(shape.lengths)
    keywords = shape.keywords((T,) if shape.shared_bias else (T, HEADS), torch.zeros(T, 2))
    if impl == "gluon":
        keywords.pop("dropout_p", None)
    sequences = (shape.cu_seqlens,) * 2 + (max(shape.lengths),) * 2
    qkv = shape.leaves(3, T, HEADS, shape.head_width)
    out, lse = maskattn.packed_attention(*qkv, *sequences, **keywords, **shape.allowed, return_lse=True, impl=impl)
    (out.float().sum() + lse.sum()).backward()


def packed_attention_in_gluon(shape: Shape) -> None:
    packed_attention(shape, impl="gluon")


def masked_attention(shape: Shape, skip_queries: bool = True) -> None:
    B, N = len(shape.lengths), max(shape.lengths)
    keep = torch.arange(N) < torch.tensor(shape.lengths)[:, None]
    keywords = shape.keywords((B, N) if shape.shared_bias else (B, HEADS, N), torch.zeros(B, N, 2))
    qkv = shape.leaves(3, B, HEADS, N, shape.head_width)
    out = maskattn.masked_attention(*qkv, keep, **keywords, **shape.allowed, skip_queries=skip_queries, impl="triton")
    out.sum().backward()


def masked_attention_of_every_query(shape: Shape) -> None:
    masked_attention(shape, skip_queries=False)


def readout(shape: Shape, return_rows: bool = False) -> None:
    B, T = len(shape.lengths), sum(shape.lengths)
    coords = torch.zeros(B, shape.queries, 2), torch.zeros(T, 2)
    keywords = shape.keywords((T,) if shape.shared_bias else (T, HEADS), coords)
    (q,), (k, v) = (
        shape.leaves(1, B, shape.queries, HEADS, shape.head_width),
        shape.leaves(2, T, HEADS, shape.head_width),
    )
    lengths = shape.cu_seqlens, max(shape.lengths)
    out, lse, *rows = maskattn.readout(
        q, k, v, *lengths, **keywords, return_rows=return_rows, return_lse=True, impl="triton"
    )
    (out.float().sum() + lse.sum() + sum((x * x.detach()).sum() for x in rows)).backward()


def readout_with_rows(shape: Shape) -> None:
    readout(shape, return_rows=True)


def relevance(shape: Shape, classes: int = CLASSES) -> None:
    B, T, R, D = len(shape.lengths), sum(shape.lengths), shape.queries, shape.head_width
    keywords = shape.keywords((T,) if shape.shared_bias else (T, HEADS), (torch.zeros(B, R, 2), torch.zeros(T, 2)))
    keywords.pop("dropout_p", None)
    (q,), (k, v) = shape.leaves(1, B, R, HEADS, D), shape.leaves(2, T, HEADS, D)
    origin = torch.zeros((T, HEADS, D) if shape.options else (HEADS, D))
    lse, (grad,) = torch.zeros(B, R, HEADS), shape.leaves(1, classes, *q.shape)
    q, k, v, grad = (x.detach() for x in (q, k, v, grad))
    maskattn.token_relevance(
        q, k, v, q, lse, grad, shape.cu_seqlens, max(shape.lengths), key_origin=origin, value_origin=origin, **keywords,
        impl="triton",
    )  # fmt: skip


def relevance_of_one_class(shape: Shape) -> None:
    relevance(shape, classes=1)


def packed_attention_of_chunks(shape: Shape) -> None:
    """Attention of queries and keys that are chunks of longer sequences, with dropout by their positions in these."""
    T = sum(shape.lengths)
    q, k, v = shape.leaves(3, T, HEADS, shape.head_width)
    options = flat_options(_of_chunks(shape, torch.zeros(T, 2), torch.zeros(T, 2)))
    lengths = (shape.cu_seqlens,) * 2 + (max(shape.lengths),) * 2
    out, lse, _ = operations.packed_attention(q, k, v, *lengths, *options, True, "triton")
    (out.float().sum() + lse.sum()).backward()


def readout_of_chunks(shape: Shape) -> None:
    """The same for a readout."""
    B, T = len(shape.lengths), sum(shape.lengths)
    (q,) = shape.leaves(1, B, shape.queries, HEADS, shape.head_width)
    k, v = shape.leaves(2, T, HEADS, shape.head_width)
    options = flat_options(_of_chunks(shape, torch.zeros(B, shape.queries, 2), torch.zeros(T, 2)))
    lengths = shape.cu_seqlens, max(shape.lengths)
    out, *_ = operations.readout(q, k, v, *lengths, *options, False, False, "triton")
    out.sum().backward()


def _of_chunks(shape: Shape, coords_q: Tensor, coords_k: Tensor) -> Options:
    B, T = len(shape.lengths), sum(shape.lengths)
    given = shape.keywords((T,) if shape.shared_bias else (T, HEADS), ())
    alibi = (given["slopes"], coords_q, coords_k) if "slopes" in given else (None, None, None)
    seed, (first_q, first_k) = torch.zeros(1, dtype=torch.int64), torch.zeros(2, B, dtype=torch.int32)
    return Options(0.125, given.get("key_bias"), *alibi, 0.1, seed, query_offsets=first_q, key_offsets=first_k)


def packing(shape: Shape) -> None:
    B, N, T = len(shape.lengths), max(shape.lengths), sum(shape.lengths)
    (dense,) = shape.leaves(1, B * N, HEADS, shape.head_width)
    index = torch.arange(T) % (B * N)
    scatter_rows(gather_rows(dense.detach(), index), torch.zeros(B * N, dtype=torch.int32))


OPERATIONS = {
    each.__name__: each
    for each in (
        packed_attention,
        masked_attention,
        masked_attention_of_every_query,
        readout,
        readout_with_rows,
        relevance,
        relevance_of_one_class,
        packing,
    )
}

# The operations over a process group call these for the keys of each process.
OF_CHUNKS = {each.__name__: each for each in (packed_attention_of_chunks, readout_of_chunks)}

# Operations that exist only in half precision and for compute capability 9.0.
ON_HOPPER = {"packed_attention_in_gluon": packed_attention_in_gluon}
