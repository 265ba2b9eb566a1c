"""Checks of the callers' arguments. Each error states the rule, then what came, then the remedy."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from maskattn.options import RULES
from maskattn.packing import Packing
from maskattn.transforms import is_transformed

__all__ = [
    "MAX_READOUT_QUERIES",
    "check_bias",
    "check_coords",
    "check_cu_seqlens",
    "check_dense",
    "check_keep",
    "check_lengths",
    "check_values",
    "check_packed",
    "check_readout",
    "check_relevance",
    "check_sequences",
]

MAX_READOUT_QUERIES = 16


def check_packed(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Check packed tensors: q (Tq, H, D), k and v (Tk, H, D)."""
    of_queries, of_keys = q.shape, k.shape
    if len(of_queries) != 3 or of_keys != v.shape or of_keys[1:] != of_queries[1:]:
        raise ValueError(
            "packed attention needs q (Tq, H, D) and k, v (Tk, H, D), "
            f"got q.shape={tuple(q.shape)}, k.shape={tuple(k.shape)}, v.shape={tuple(v.shape)}"
        )
    _check_alike(q, k, v)


def check_dense(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Check dense tensors: q (B, H, Nq, D), k and v (B, H, N, D)."""
    if q.ndim != 4 or k.shape != v.shape or (k.shape[:2], k.shape[3:]) != (q.shape[:2], q.shape[3:]):
        raise ValueError(
            "masked_attention needs q (B, H, Nq, D) and k, v (B, H, N, D), "
            f"got q.shape={tuple(q.shape)}, k.shape={tuple(k.shape)}, v.shape={tuple(v.shape)}"
        )
    _check_alike(q, k, v)


def check_readout(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor) -> None:
    """Check a readout's tensors: q (B, R, H, D), k and v (T, H, D), cu_seqlens (B + 1,)."""
    if q.ndim != 4 or not 1 <= q.shape[1] <= MAX_READOUT_QUERIES:
        raise ValueError(
            f"readout needs q (B, R, H, D) with 1 ≤ R ≤ {MAX_READOUT_QUERIES}, got q.shape={tuple(q.shape)}; "
            "use packed_attention for more queries"
        )
    check_cu_seqlens("cu_seqlens", cu_seqlens, q)
    if cu_seqlens.shape[0] != q.shape[0] + 1:
        raise ValueError(
            f"cu_seqlens must have B + 1 = {q.shape[0] + 1} entries, got cu_seqlens.shape={tuple(cu_seqlens.shape)}"
        )
    check_packed(q.flatten(0, 1), k, v)


def check_relevance(
    q: Tensor,
    k: Tensor,
    out: Tensor,
    lse: Tensor,
    grad_out: Tensor,
    key_origin: Tensor | None,
    value_origin: Tensor | None,
) -> None:
    """What a readout of q and k returned, gradients of it for each class, and origins (H, D) or (T, H, D)."""
    (B, R, H, D), T = q.shape, k.shape[0]
    for name, x, shape in (("out", out, (B, R, H, D)), ("lse", lse, (B, R, H))):
        if tuple(x.shape) != shape:
            raise ValueError(f"{name} must be readout's, of shape {shape}, got {name}.shape={tuple(x.shape)}")
    if grad_out.ndim != 5 or tuple(grad_out.shape[1:]) != (B, R, H, D):
        raise ValueError(
            f"grad_out must have shape (K, B, R, H, D) = (K, {B}, {R}, {H}, {D}), got {tuple(grad_out.shape)}; "
            "give a single class an axis of its own, grad_out[None]"
        )
    for name, origin in (("key_origin", key_origin), ("value_origin", value_origin)):
        if origin is not None and tuple(origin.shape) not in ((H, D), (T, H, D)):
            raise ValueError(
                f"{name} must have shape (H, D) or (T, H, D), here ({H}, {D}) or ({T}, {H}, {D}), "
                f"got {name}.shape={tuple(origin.shape)}"
            )


def check_keep(q: Tensor, k: Tensor, keep: Tensor, skip_queries: bool) -> None:
    """Check a mask: keep (B, N) bool; with ``skip_queries`` the queries are the same tokens."""
    B, N = k.shape[0], k.shape[2]
    if keep.dtype != torch.bool:
        raise TypeError(f"keep must be bool (True = the token takes part), got keep.dtype={keep.dtype}")
    if keep.shape != (B, N):
        raise ValueError(f"keep must have shape (B, N) = ({B}, {N}), got keep.shape={tuple(keep.shape)}")
    if keep.device != q.device:
        raise ValueError(f"keep must be on q's device {q.device}, got {keep.device}; move it with keep.to(q.device)")
    if skip_queries and q.shape[2] != N:
        raise ValueError(
            f"skip_queries=True applies keep to the queries, too, so Nq must equal N={N}, got "
            f"q.shape={tuple(q.shape)}; pass skip_queries=False for cross-attention"
        )


def check_cu_seqlens(name: str, cu_seqlens: Tensor, q: Tensor) -> None:
    """Check offsets: (B + 1,) int32 on q's device."""
    if cu_seqlens.dtype != torch.int32:
        raise TypeError(f"{name} must be int32, got {cu_seqlens.dtype}; use Packing.cu_seqlens, or .to(torch.int32)")
    if cu_seqlens.ndim != 1 or cu_seqlens.shape[0] < 1:
        raise ValueError(f"{name} must have shape (B + 1,), got {name}.shape={tuple(cu_seqlens.shape)}")
    if cu_seqlens.device != q.device:
        raise ValueError(f"{name} must be on q's device {q.device}, got {cu_seqlens.device}")


def check_sequences(
    q: Tensor,
    cu_seqlens_q: Tensor | Packing | tuple[Packing, Packing],
    cu_seqlens_k: Tensor | None,
    max_seqlen_q: int | None,
    max_seqlen_k: int | None,
) -> tuple[Tensor, Tensor, int, int]:
    """Return cu_seqlens and max_seqlen of queries and keys, given as such, as a Packing, or as a pair of Packings."""
    if not isinstance(cu_seqlens_q, Tensor):
        if not (cu_seqlens_k is None and max_seqlen_q is None and max_seqlen_k is None):
            raise ValueError("a Packing includes all four lengths, got others in addition; pass only the Packing")
        of_queries, of_keys = (cu_seqlens_q, cu_seqlens_q) if isinstance(cu_seqlens_q, Packing) else cu_seqlens_q
        cu_seqlens_q, cu_seqlens_k = of_queries.cu_seqlens, of_keys.cu_seqlens
        max_seqlen_q, max_seqlen_k = of_queries.max_seqlen, of_keys.max_seqlen
    elif cu_seqlens_k is None or max_seqlen_q is None or max_seqlen_k is None:
        given = {"cu_seqlens_k": cu_seqlens_k, "max_seqlen_q": max_seqlen_q, "max_seqlen_k": max_seqlen_k}
        lacking = ", ".join(name for name, x in given.items() if x is None)
        raise TypeError(
            "packed_attention needs cu_seqlens_q, cu_seqlens_k, max_seqlen_q and max_seqlen_k, or a Packing, got no "
            f"{lacking}; pass the Packing instead"
        )
    check_cu_seqlens("cu_seqlens_q", cu_seqlens_q, q)
    if cu_seqlens_k is not cu_seqlens_q:
        check_cu_seqlens("cu_seqlens_k", cu_seqlens_k, q)
        if cu_seqlens_q.shape != cu_seqlens_k.shape:
            raise ValueError(
                "cu_seqlens_q and cu_seqlens_k must describe the same number of sequences, got "
                f"{cu_seqlens_q.shape[0] - 1} and {cu_seqlens_k.shape[0] - 1}; give a sequence without keys length 0"
            )
    return cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k


def check_lengths(name: str, cu_seqlens: Tensor, rows: int, max_seqlen: int) -> None:
    """Check that sequences start at 0, do not overlap, end with the last row, and are no longer than ``max_seqlen``.

    Only tensors on the CPU are checked, whatever the implementation; reading others would synchronise with the device.
    """
    if cu_seqlens.device.type != "cpu":
        return
    starts = cu_seqlens.tolist()
    lengths = [end - start for start, end in pairwise(starts)]
    # The rules of all errors below at once, for small calls.
    if lengths and starts[0] == 0 <= min(lengths) and starts[-1] == rows and max(lengths) <= max_seqlen:
        return
    if starts[0] != 0:
        raise ValueError(f"{name} must start at 0, got {name}[0]={starts[0]}; put a 0 in front")
    if min(lengths, default=0) < 0:
        at = next(i for i, length in enumerate(lengths) if length < 0)
        raise ValueError(
            f"{name} must never decrease, got {name}[{at + 1}]={starts[at + 1]} after {starts[at]}; "
            "sum up the lengths of the sequences"
        )
    if starts[-1] != rows:
        raise ValueError(
            f"{name} must end with the number of rows, {rows}, got {name}[{len(lengths)}]={starts[-1]}; "
            "make the remaining rows a sequence of their own, or cut them off"
        )
    if max(lengths, default=0) > max_seqlen:
        raise ValueError(
            f"max_seqlen must be at least the longest sequence of {name}, {max(lengths)} rows, "
            f"got {max_seqlen}; use Packing.max_seqlen"
        )


def check_bias(key_bias: Tensor | None, q: Tensor, shapes: tuple[tuple[int, ...], ...], names: str) -> None:
    """Check that a key bias, if given, is floating point and has one of the shapes."""
    if key_bias is None:
        return
    _check_floating("key_bias", key_bias, q)
    if tuple(key_bias.shape) not in shapes:
        raise ValueError(f"key_bias must have shape {names}, here {shapes}, got key_bias.shape={tuple(key_bias.shape)}")


def check_coords(
    coords: Tensor | tuple[Tensor, Tensor] | None,
    slopes: Tensor | None,
    q: Tensor,
    heads: int,
    positions_q: tuple[int, ...],
    positions_k: tuple[int, ...],
) -> tuple[Tensor | None, Tensor | None]:
    """Return the positions of queries and keys in float32 (float64 for float64), or None twice.

    Args:
        coords: positions of all tokens, if queries and keys are the same, or a pair for queries and keys; for dense
            tensors the axis B may be omitted, for positions common to all sequences.
        slopes: (H,).
        q: the queries.
        heads: H.
        positions_q, positions_k: the expected shapes of the positions, without their last axis of 2.
    """
    if (coords is None) != (slopes is None):
        given, lacking = ("coords", "slopes") if slopes is None else ("slopes", "coords")
        raise ValueError(f"coords and slopes go together, got {given} without {lacking}; pass both for 2-D ALiBi")
    if coords is None or slopes is None:
        return None, None
    _check_floating("slopes", slopes, q)
    if slopes.shape != (heads,):
        raise ValueError(f"slopes must have shape (H,) = ({heads},), got slopes.shape={tuple(slopes.shape)}")
    if isinstance(coords, Tensor):
        if positions_q != positions_k:
            raise ValueError(
                f"queries {positions_q} and keys {positions_k} differ, so coords must be a pair, one for each; "
                f"got one tensor of shape {tuple(coords.shape)}"
            )
        coords = coords, coords
    if len(coords) != 2:
        raise ValueError(f"coords must be a tensor or a pair (of queries, of keys), got {len(coords)} tensors")
    return _check_positions("queries", coords[0], q, positions_q), _check_positions("keys", coords[1], q, positions_k)


def check_values(**options: float | str) -> None:
    """Check options that are numbers or words by the rules in their declaration."""
    for name, value in options.items():
        rule = RULES[name]
        if not rule.holds(value):
            raise ValueError(f"{name} must be {rule.must_be}, got {name}={value!r}; {rule.remedy}")


def _check_positions(whose: str, coords: Tensor, q: Tensor, positions: tuple[int, ...]) -> Tensor:
    _check_floating("coords", coords, q)
    if len(positions) == 2 and coords.shape == (positions[1], 2):
        coords = coords.expand(*positions, 2)
    if coords.shape != (*positions, 2):
        raise ValueError(
            f"coords of the {whose} must have shape {(*positions, 2)}, (x, y) of each token, "
            f"got coords.shape={tuple(coords.shape)}; give tokens without a position NaN"
        )
    # Under a transform the tensor stays attached, so that its derivative is refused instead of being 0.
    coords = coords if is_transformed((coords,)) else coords.detach()
    return coords.to(torch.promote_types(q.dtype, torch.float32))


def _check_floating(name: str, x: Tensor, q: Tensor) -> None:
    if not x.dtype.is_floating_point:
        raise TypeError(f"{name} must be floating point, got {name}.dtype={x.dtype}; convert it with {name}.float()")
    if x.device != q.device:
        raise ValueError(f"{name} must be on q's device {q.device}, got {x.device}; move it with {name}.to(q.device)")


def _check_alike(q: Tensor, k: Tensor, v: Tensor) -> None:
    if not q.dtype.is_floating_point:
        raise TypeError(f"attention needs floating-point tensors, got q.dtype={q.dtype}")
    if not q.dtype == k.dtype == v.dtype:
        raise TypeError(f"q, k and v must share a dtype, got {q.dtype}, {k.dtype} and {v.dtype}")
    if not q.device == k.device == v.device:
        raise ValueError(f"q, k and v must share a device, got {q.device}, {k.device} and {v.device}")
