"""The public attention operations: check the arguments, choose the implementation, run the op.

Dimension key: B sequences, N grid tokens, Tq and Tk packed query and key tokens, R readout queries, H heads, D head
width.
"""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor

from maskattn.attention import ops
from maskattn.shapes import Bool, Float, Int

__all__ = ["masked_attention", "packed_attention", "readout"]

MAX_READOUT_QUERIES = 16


def packed_attention(
    q: Float[Tensor, "Tq H D"],
    k: Float[Tensor, "Tk H D"],
    v: Float[Tensor, "Tk H D"],
    cu_seqlens_q: Int[Tensor, "B_plus_1"],
    cu_seqlens_k: Int[Tensor, "B_plus_1"],
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    scale: float | None = None,
    key_bias: Float[Tensor, "..."] | None = None,
    return_lse: bool = False,
    impl: str | None = None,
) -> Float[Tensor, "Tq H D"] | tuple[Float[Tensor, "Tq H D"], Float[Tensor, "H Tq"]]:
    """Attention within each of B packed sequences; query and key sequences may differ in length, and be empty.

    A query whose sequence has no key gives 0, lse −inf and gradient 0.

    Args:
        q: (Tq, H, D) float.
        k, v: (Tk, H, D), of q's dtype and device.
        cu_seqlens_q, cu_seqlens_k: (B + 1,) int32, the first row of each sequence, ending with Tq or Tk.
        max_seqlen_q, max_seqlen_k: no sequence is longer.
        scale: factor of the scores, 1/√D if None.
        key_bias: (Tk,) or (Tk, H), finite, added to the scores of its key; differentiable.
        return_lse: also return the log-sum-exp of the scores, (H, Tq), differentiable.
        impl: "triton", "torch" or "reference"; None takes the best one that supports the call.

    Returns:
        out (Tq, H, D), or (out, lse).

    Raises:
        TypeError, ValueError: shapes, dtypes or devices do not fit, or ``impl`` lacks a feature of the call.

    Example:
        >>> keep = torch.tensor([[True, True, False], [True, False, False]])
        >>> packing = Packing.from_keep(keep)
        >>> x = torch.randn(packing.total, 2, 16)
        >>> lengths = packing.cu_seqlens, packing.cu_seqlens, packing.max_seqlen, packing.max_seqlen
        >>> packed_attention(x, x, x, *lengths).shape
        torch.Size([3, 2, 16])
    """
    _check_packed(q, k, v)
    _check_cu_seqlens("cu_seqlens_q", cu_seqlens_q, q)
    _check_cu_seqlens("cu_seqlens_k", cu_seqlens_k, q)
    if cu_seqlens_q.shape != cu_seqlens_k.shape:
        raise ValueError(
            "cu_seqlens_q and cu_seqlens_k must describe as many sequences, got "
            f"{cu_seqlens_q.shape[0] - 1} and {cu_seqlens_k.shape[0] - 1}; give a sequence without keys length 0"
        )
    _check_bias(key_bias, q, ((k.shape[0],), (k.shape[0], k.shape[1])), "(Tk,) or (Tk, H)")
    impl = _choose(impl, q, key_bias)
    out, lse = ops.packed_attention(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        key_bias,
        q.shape[-1] ** -0.5 if scale is None else scale,
        return_lse,
        impl,
    )
    return (out, lse) if return_lse else out


def masked_attention(
    q: Float[Tensor, "B H Nq D"],
    k: Float[Tensor, "B H N D"],
    v: Float[Tensor, "B H N D"],
    keep: Bool[Tensor, "B N"],
    *,
    scale: float | None = None,
    key_bias: Float[Tensor, "..."] | None = None,
    skip_queries: bool = True,
    return_lse: bool = False,
    impl: str | None = None,
) -> Float[Tensor, "B H Nq D"] | tuple[Float[Tensor, "B H Nq D"], Float[Tensor, "B H Nq"]]:
    """Attention over the kept keys of dense tensors, laid out as for torch's ``scaled_dot_product_attention``.

    Background rows of k and v (and of q, if ``skip_queries``) are never read; their outputs and gradients are 0.

    Args:
        q: (B, H, Nq, D) float; Nq = N if ``skip_queries``.
        k, v: (B, H, N, D), of q's dtype and device.
        keep: (B, N) bool, True = the token takes part.
        scale: factor of the scores, 1/√D if None.
        key_bias: (B, N) or (B, H, N), finite, added to the scores of its key; differentiable.
        skip_queries: background queries give 0 and lse −inf. False: every query attends to the kept keys, as
            ``nn.MultiheadAttention`` has it with ``key_padding_mask``.
        return_lse: also return the log-sum-exp of the scores, (B, H, Nq), differentiable.
        impl: "triton", "torch" or "reference"; None takes the best one that supports the call.

    Returns:
        out (B, H, Nq, D), or (out, lse).

    Raises:
        TypeError, ValueError: shapes, dtypes or devices do not fit, or ``impl`` lacks a feature of the call.
    """
    if q.ndim != 4 or k.shape != v.shape or (k.shape[:2], k.shape[3:]) != (q.shape[:2], q.shape[3:]):
        raise ValueError(
            "masked_attention needs q (B, H, Nq, D) and k, v (B, H, N, D), "
            f"got q.shape={tuple(q.shape)}, k.shape={tuple(k.shape)}, v.shape={tuple(v.shape)}"
        )
    _check_alike(q, k, v)
    B, H, N = k.shape[:3]
    if keep.dtype != torch.bool:
        raise TypeError(f"keep must be bool (True = the token takes part), got keep.dtype={keep.dtype}")
    if keep.shape != (B, N):
        raise ValueError(f"keep must have shape (B, N) = ({B}, {N}), got keep.shape={tuple(keep.shape)}")
    if keep.device != q.device:
        raise ValueError(f"keep must lie on q's device {q.device}, got {keep.device}; move it with keep.to(q.device)")
    if skip_queries and q.shape[2] != N:
        raise ValueError(
            f"skip_queries=True reads keep for the queries too, so Nq must equal N={N}, got q.shape={tuple(q.shape)}; "
            "pass skip_queries=False for cross-attention"
        )
    _check_bias(key_bias, q, ((B, N), (B, H, N)), "(B, N) or (B, H, N)")
    impl = _choose(impl, q, key_bias)
    out, lse = ops.masked_attention(
        q, k, v, keep, key_bias, q.shape[-1] ** -0.5 if scale is None else scale, skip_queries, return_lse, impl
    )
    return (out, lse) if return_lse else out


def readout(
    q: Float[Tensor, "B R H D"],
    k: Float[Tensor, "T H D"],
    v: Float[Tensor, "T H D"],
    cu_seqlens: Int[Tensor, "B_plus_1"],
    max_seqlen: int,
    *,
    scale: float | None = None,
    key_bias: Float[Tensor, "..."] | None = None,
    return_rows: bool = False,
    return_lse: bool = False,
    impl: str | None = None,
) -> Float[Tensor, "B R H D"] | tuple[Float[Tensor, "..."], ...]:
    """Attention of a few queries of each sequence (class token, registers) over its packed keys.

    Args:
        q: (B, R, H, D) float, 1 ≤ R ≤ 16.
        k, v: (T, H, D), of q's dtype and device.
        cu_seqlens: (B + 1,) int32, the first row of each key sequence, ending with T.
        max_seqlen: no sequence is longer.
        scale: factor of the scores, 1/√D if None.
        key_bias: (T,) or (T, H), finite, added to the scores of its key; differentiable.
        return_rows: also return the attention rows (R, H, T): the softmax weight of token t in row r of its sequence.
        return_lse: also return the log-sum-exp of the scores, (B, R, H).
        impl: "triton", "torch" or "reference"; None takes the best one that supports the call.

    Returns:
        out (B, R, H, D); with rows and lse behind it, in this order, where asked.

    Raises:
        TypeError, ValueError: shapes, dtypes or devices do not fit, or ``impl`` lacks a feature of the call.
    """
    if q.ndim != 4 or not 1 <= q.shape[1] <= MAX_READOUT_QUERIES:
        raise ValueError(
            f"readout needs q (B, R, H, D) with 1 ≤ R ≤ {MAX_READOUT_QUERIES}, got q.shape={tuple(q.shape)}; "
            "use packed_attention for more queries"
        )
    B, R, H, D = q.shape
    _check_cu_seqlens("cu_seqlens", cu_seqlens, q)
    if cu_seqlens.shape[0] != B + 1:
        raise ValueError(
            f"cu_seqlens must have B + 1 = {B + 1} entries, got cu_seqlens.shape={tuple(cu_seqlens.shape)}"
        )
    starts = torch.arange(0, (B + 1) * R, R, dtype=torch.int32, device=q.device)
    scale = D**-0.5 if scale is None else scale
    need_lse = return_lse or return_rows
    _check_packed(q.reshape(B * R, H, D), k, v)
    _check_bias(key_bias, q, ((k.shape[0],), (k.shape[0], H)), "(T,) or (T, H)")
    out, lse = ops.packed_attention(
        q.reshape(B * R, H, D),
        k,
        v,
        starts,
        cu_seqlens,
        R,
        max_seqlen,
        key_bias,
        scale,
        need_lse,
        _choose(impl, q, key_bias),
    )
    out = out.view(B, R, H, D)
    if not need_lse:
        return out
    lse = lse.view(H, B, R).permute(1, 2, 0)
    extras = (_attention_rows(q, k, lse, cu_seqlens, key_bias, scale),) if return_rows else ()
    return (out, *extras, *((lse,) if return_lse else ()))


def _attention_rows(
    q_BRHD: Tensor, k_THD: Tensor, lse_BRH: Tensor, cu_seqlens: Tensor, key_bias: Tensor | None, scale: float
) -> Tensor:
    """(R, H, T) softmax weights, one readout query at a time, so that nothing larger than k is held."""
    tokens = torch.arange(k_THD.shape[0], device=k_THD.device, dtype=cu_seqlens.dtype)
    sequence = torch.bucketize(tokens, cu_seqlens[1:], right=True)
    dtype = lse_BRH.dtype
    rows = []
    for r in range(q_BRHD.shape[1]):
        scores_TH = scale * (q_BRHD[:, r][sequence].to(dtype) * k_THD.to(dtype)).sum(dim=-1)
        if key_bias is not None:
            scores_TH = scores_TH + (key_bias[:, None] if key_bias.ndim == 1 else key_bias).to(dtype)
        rows.append((scores_TH - lse_BRH[:, r][sequence]).exp().T)
    return torch.stack(rows)


def _choose(impl: str | None, q: Tensor, key_bias: Tensor | None) -> str:
    if impl is None:
        return "triton" if q.is_cuda and _missing_in_triton(q, key_bias) is None else "torch"
    if impl not in ops.IMPLS:
        raise ValueError(f"impl must be one of {', '.join(ops.IMPLS)} or None, got impl={impl!r}")
    lacks = _missing_in_triton(q, key_bias) if impl == "triton" else None
    if lacks is not None:
        raise ValueError(f"impl='triton' {lacks}; pass impl=None to let the package choose, or impl='torch'")
    return impl


def _missing_in_triton(q: Tensor, key_bias: Tensor | None) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "needs the package triton, which is not installed"
    from maskattn.kernels.configs import supports

    return supports(q, key_bias)


def _check_packed(q: Tensor, k: Tensor, v: Tensor) -> None:
    if q.ndim != 3 or k.shape != v.shape or k.shape[1:] != q.shape[1:]:
        raise ValueError(
            "packed attention needs q (Tq, H, D) and k, v (Tk, H, D), "
            f"got q.shape={tuple(q.shape)}, k.shape={tuple(k.shape)}, v.shape={tuple(v.shape)}"
        )
    _check_alike(q, k, v)


def _check_alike(q: Tensor, k: Tensor, v: Tensor) -> None:
    if not q.dtype.is_floating_point:
        raise TypeError(f"attention needs floating-point tensors, got q.dtype={q.dtype}")
    if not q.dtype == k.dtype == v.dtype:
        raise TypeError(f"q, k and v must share a dtype, got {q.dtype}, {k.dtype} and {v.dtype}")
    if not q.device == k.device == v.device:
        raise ValueError(f"q, k and v must share a device, got {q.device}, {k.device} and {v.device}")


def _check_cu_seqlens(name: str, cu_seqlens: Tensor, q: Tensor) -> None:
    if cu_seqlens.dtype != torch.int32:
        raise TypeError(f"{name} must be int32, got {cu_seqlens.dtype}; use Packing.cu_seqlens, or .to(torch.int32)")
    if cu_seqlens.ndim != 1 or cu_seqlens.shape[0] < 1:
        raise ValueError(f"{name} must have shape (B + 1,), got {name}.shape={tuple(cu_seqlens.shape)}")
    if cu_seqlens.device != q.device:
        raise ValueError(f"{name} must lie on q's device {q.device}, got {cu_seqlens.device}")


def _check_bias(key_bias: Tensor | None, q: Tensor, shapes: tuple[tuple[int, ...], ...], names: str) -> None:
    if key_bias is None:
        return
    if not key_bias.dtype.is_floating_point:
        raise TypeError(f"key_bias must be floating point, got key_bias.dtype={key_bias.dtype}")
    if tuple(key_bias.shape) not in shapes:
        raise ValueError(f"key_bias must have shape {names}, here {shapes}, got key_bias.shape={tuple(key_bias.shape)}")
    if key_bias.device != q.device:
        raise ValueError(f"key_bias must lie on q's device {q.device}, got {key_bias.device}")
