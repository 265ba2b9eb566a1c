"""Packing: from a ``keep`` mask to the rows of the tokens that take part, and back.

A batch of B sequences of N tokens is *packed* by concatenating the kept tokens of all sequences into T rows. The names
``cu_seqlens`` and ``max_seqlen`` are those of FlashAttention. Packing and unpacking each take one kernel launch on a
GPU and one pass of the C++ extension on the CPU; torch's own functions are used where they are faster or the extension
was not built. They are registered as ``maskattn::gather_rows`` and ``maskattn::scatter_rows``, each the gradient of the
other.

Dimension key: B sequences, N tokens of each, T packed tokens.
"""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from maskattn import native_packing
from maskattn.derived import known_lengths, note_lengths
from maskattn.extension import has_extension
from maskattn.leaves import leaf_function
from maskattn.registration import define
from maskattn.shapes import Bool, Int, Shaped
from maskattn.transforms import is_mapped, take_one_by_one, transformable

__all__ = ["Packing", "gather_rows", "is_jit_traced", "pack", "packing_and_answer", "scatter_rows", "unpack"]


@dataclass(frozen=True)
class Packing:
    """The positions of the kept tokens of a batch.

    Attributes:
        indices: (T,) int64, the row of each kept token in the batch flattened to (B·N, ...), ascending.
        cu_seqlens: (B + 1,) int32, the first of the T rows of each sequence; the last entry is T.
        max_seqlen: length of the longest sequence, in tokens.
        batch_size: B.
        num_tokens: N, tokens of each sequence before packing.
        row_of_token: (B·N,) int32, the inverse of ``indices``: the row of each token among the T, −1 if it is not kept.
            Computed from ``indices`` if it is not given, without synchronising with the device.
    """

    indices: Int[Tensor, "T"]
    cu_seqlens: Int[Tensor, "B_plus_1"]
    max_seqlen: int
    batch_size: int
    num_tokens: int
    row_of_token: Int[Tensor, "BN"] | None = None

    def __post_init__(self) -> None:
        if self.row_of_token is None:
            rows = torch.arange(self.indices.shape[0], dtype=torch.int32, device=self.indices.device)
            none = torch.full((self.batch_size * self.num_tokens,), -1, dtype=torch.int32, device=rows.device)
            object.__setattr__(self, "row_of_token", none.index_copy(0, self.indices, rows))

    @classmethod
    def from_keep(cls, keep_BN: Bool[Tensor, "B N"]) -> Packing:
        """Build the packing of a mask of kept tokens.

        A CUDA mask costs one synchronisation with the device, which reads the number of kept tokens (the size of
        ``indices``) and the longest sequence (which launches need). Nothing else here or in :func:`pack` and
        :func:`unpack` synchronises. A mask on the CPU can be packed there and moved with :meth:`to` without one.

        Args:
            keep_BN: (B, N) bool, True = the token takes part.

        Raises:
            TypeError: the mask is not boolean.
            ValueError: the mask does not have two dimensions, has no values to read (meta device, ``torch.vmap``), or
                is traced by ``torch.jit.trace``, which would freeze them.
        """
        return _read_mask(keep_BN)

    @property
    def total(self) -> int:
        """T, the number of kept tokens of the batch."""
        return self.indices.shape[0]

    @property
    def sequence_of_token(self) -> Int[Tensor, "T"]:
        """(T,) int64, the sequence of each packed row; computed without synchronising with the device."""
        return torch.div(self.indices, self.num_tokens, rounding_mode="floor")

    def to(self, device: torch.device | str) -> Packing:
        """Return the same packing with its tensors on another device."""
        row_of_token, cu_seqlens = self.row_of_token, self.cu_seqlens.to(device, non_blocking=True)
        known = known_lengths(self.cu_seqlens)
        if known is not None:
            note_lengths(cu_seqlens, *known)
        return Packing(
            self.indices.to(device, non_blocking=True),
            cu_seqlens,
            self.max_seqlen,
            self.batch_size,
            self.num_tokens,
            None if row_of_token is None else row_of_token.to(device, non_blocking=True),
        )


@leaf_function
def pack(x: Shaped[Tensor, "B N *rest"], packing: Packing) -> Shaped[Tensor, "T *rest"]:
    """Gather the kept tokens of a batch into T rows: (B, N, ...) → (T, ...).

    Rows that are not kept are never read, and their gradient is 0.

    Raises:
        ValueError: ``x`` is not a (B, N, ...) batch of the shape that was packed.
    """
    if tuple(x.shape[:2]) != (packing.batch_size, packing.num_tokens):
        raise ValueError(
            f"pack needs x of shape (B, N, ...) = ({packing.batch_size}, {packing.num_tokens}, ...), as the packing "
            f"was made for, got x.shape={tuple(x.shape)}; build the Packing from this batch's own keep mask"
        )
    return gather_rows(x.flatten(0, 1), packing.indices, _rows_of_tokens(packing))


@leaf_function
def unpack(rows: Shaped[Tensor, "T *rest"], packing: Packing) -> Shaped[Tensor, "B N *rest"]:
    """Scatter T packed rows to their positions in the batch: (T, ...) → (B, N, ...); every other row is 0.

    Raises:
        ValueError: ``rows`` does not have one row for each kept token.
    """
    if rows.shape[0] != packing.total:
        raise ValueError(
            f"unpack needs one row for each of the T={packing.total} kept tokens, got rows.shape={tuple(rows.shape)}; "
            "use the Packing that packed them"
        )
    dense = scatter_rows(rows, packing.indices, _rows_of_tokens(packing))
    return dense.unflatten(0, (packing.batch_size, packing.num_tokens))


def _gather(x: Tensor, indices: Tensor, row_of_token: Tensor) -> Tensor:
    if _has_kernels(x.device):
        from maskattn.kernels.attention import gather

        return gather.gather_rows(x, indices)
    if has_extension() and native_packing.gathers(x, indices.shape[0]):
        return native_packing.gather_rows(x, indices)
    return x.index_select(0, indices)


def _scatter(rows: Tensor, indices: Tensor, row_of_token: Tensor) -> Tensor:
    if _has_kernels(rows.device):
        from maskattn.kernels.attention import gather

        return gather.scatter_rows(rows, row_of_token)
    if has_extension() and native_packing.scatters(rows):
        return native_packing.scatter_rows(rows, row_of_token)
    return rows.new_zeros((row_of_token.shape[0], *rows.shape[1:])).index_copy_(0, indices, rows)


def _gathered(x: Tensor, indices: Tensor, row_of_token: Tensor) -> Tensor:
    return x.new_empty((indices.shape[0], *x.shape[1:]))


def _scattered(rows: Tensor, indices: Tensor, row_of_token: Tensor) -> Tensor:
    return rows.new_empty((row_of_token.shape[0], *rows.shape[1:]))


def _save_positions(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1:])


def _gather_back(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    return scatter_rows(grad, *ctx.saved_tensors), None, None


def _scatter_back(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    return gather_rows(grad, *ctx.saved_tensors), None, None


def _gather_tangent(ctx: Any, moved: Tensor, *_: None) -> Tensor:
    return gather_rows(moved, *ctx.saved_tensors)


def _scatter_tangent(ctx: Any, moved: Tensor, *_: None) -> Tensor:
    return scatter_rows(moved, *ctx.saved_tensors)


def _map_rows(call: Any, info: Any, in_dims: tuple[int | None, ...], x: Tensor, *shared: Tensor) -> tuple[Tensor, int]:
    """Treat samples with the same positions as channels of the rows, and process others one by one."""
    if in_dims[0] is not None and in_dims[1:] == (None, None):
        return call(x.movedim(in_dims[0], 1), *shared), 1
    return take_one_by_one(call, info, in_dims, x, *shared)


_gather_op = define("gather_rows", "(Tensor x, Tensor indices, Tensor row_of_token) -> Tensor", _gather, _gathered)
_scatter_op = define(
    "scatter_rows", "(Tensor rows, Tensor indices, Tensor row_of_token) -> Tensor", _scatter, _scattered
)
_gather_op.register_autograd(_gather_back, setup_context=_save_positions)
_scatter_op.register_autograd(_scatter_back, setup_context=_save_positions)
_gather_transformable = transformable(_gather_op, _save_positions, _gather_back, _gather_tangent, _map_rows)
_scatter_transformable = transformable(_scatter_op, _save_positions, _scatter_back, _scatter_tangent, _map_rows)


def gather_rows(x: Tensor, indices: Tensor, row_of_token: Tensor) -> Tensor:
    """Gather the rows at ``indices`` (T,), whose inverse is ``row_of_token`` (rows,): (rows, ...) → (T, ...)."""
    return _gather_transformable(x, indices, row_of_token)


def scatter_rows(rows: Tensor, indices: Tensor, row_of_token: Tensor) -> Tensor:
    """Scatter rows to ``indices`` (T,), whose inverse is ``row_of_token``: (T, ...) → (rows, ...); zeros elsewhere."""
    return _scatter_transformable(rows, indices, row_of_token)


@leaf_function
def _read_mask(keep_BN: Tensor) -> Packing:
    """Implement :meth:`Packing.from_keep` as a module-level function, which ``torch.fx`` can name."""
    return _pack_mask(keep_BN, None)[0]


def packing_and_answer(keep_BN: Bool[Tensor, "B N"], question: Bool[Tensor, ""]) -> tuple[Packing, bool]:
    """Build the packing of a mask, and read a bool on its device, with one synchronisation for both."""
    if torch.compiler.is_compiling():
        return _read_mask(keep_BN), bool(question)
    return _pack_mask(keep_BN, question)


def _pack_mask(keep_BN: Tensor, question: Tensor | None) -> tuple[Packing, bool]:
    """Return the packing of a mask and the answer to ``question``; False without a question."""
    _check_keep(keep_BN)
    if not torch.compiler.is_compiling() and has_extension():
        found = native_packing.kept_tokens(keep_BN)
        if found is not None:
            indices, cu_seqlens, max_seqlen, row_of_token = found
            note_lengths(cu_seqlens, indices.shape[0], max_seqlen)
            packing = Packing(indices, cu_seqlens, max_seqlen, keep_BN.shape[0], keep_BN.shape[1], row_of_token)
            return packing, question is not None and bool(question)
    lengths = keep_BN.sum(dim=1, dtype=torch.int32)
    cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
    kept = keep_BN.reshape(-1)
    row = kept.cumsum(0, dtype=torch.int32) - 1
    asked = lengths if question is None else torch.cat([lengths, question[None].to(torch.int32)])
    counts = _read(asked, keep_BN)
    answer = question is not None and bool(counts.pop())
    total = sum(counts)
    note_lengths(cu_seqlens, total, max(counts, default=0))
    # Like kept.nonzero(), which would synchronise again; background is written to one row past the end.
    tokens = torch.arange(kept.shape[0], device=kept.device)
    indices = tokens.new_empty(total + 1).scatter_(0, row.where(kept, total).long(), tokens)[:total]
    packing = Packing(
        indices=indices,
        cu_seqlens=cu_seqlens,
        max_seqlen=max(counts, default=0),
        batch_size=keep_BN.shape[0],
        num_tokens=keep_BN.shape[1],
        row_of_token=row.where(kept, -1),
    )
    return packing, answer


def _has_kernels(device: torch.device) -> bool:
    """Return whether the kernels run there: on a GPU, or on the CPU if Triton has been imported to interpret them."""
    if device.type == "cuda":
        if importlib.util.find_spec("triton") is None:
            return False
    elif "triton" not in sys.modules:
        return False
    from maskattn.kernels.attention.gather import runs_on

    return runs_on(device)


def _rows_of_tokens(packing: Packing) -> Tensor:
    assert packing.row_of_token is not None  # __post_init__ sets it
    return packing.row_of_token


def _read(lengths: Tensor, keep_BN: Tensor) -> list[int]:
    """Read lengths on the host, which is impossible on the meta device and under torch.vmap."""
    meta = keep_BN.device.type == "meta"
    if not torch.compiler.is_compiling() and (meta or is_mapped(lengths)):
        where = "keep.device=meta" if meta else "a mask that torch.vmap maps over"
        raise ValueError(
            f"Packing.from_keep needs to read the mask, because its kept tokens become rows, got {where}; "
            "build the Packing outside, or use masked_attention, which takes the mask itself"
        )
    return lengths.tolist()


def _check_keep(keep_BN: Tensor) -> None:
    if keep_BN.dtype != torch.bool:
        raise TypeError(
            f"keep must be a bool mask (True = the token takes part), got keep.dtype={keep_BN.dtype}; "
            "compare it with its threshold first, e.g. keep = fraction > 0"
        )
    if keep_BN.ndim != 2:
        raise ValueError(f"keep must have shape (B, N), got keep.shape={tuple(keep_BN.shape)}; flatten the grid first")
    if is_jit_traced():
        raise ValueError(
            "a mask cannot be packed under torch.jit.trace, which would freeze the number of kept tokens, got one; "
            "export the model with torch.export, use masked_attention, which takes the mask itself, or trace without a "
            "mask"
        )


def is_jit_traced() -> bool:
    """Return whether ``torch.jit.trace`` is active."""
    return bool(torch.jit.is_tracing())  # type: ignore[attr-defined]
