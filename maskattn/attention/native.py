"""impl "cpu": the C++ kernels of csrc/, handed torch's memory as numpy arrays without a copy.

bfloat16 travels as its bits (uint16). The extension checks every shape, stride and dtype; threads follow torch's.

Dimension key: B sequences, N grid tokens, Tq and Tk packed query and key tokens, R readout queries, H heads, D head
width, K classes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from maskattn.extension import extension
from maskattn.options import Gradients, Options, Sequences, empty_rest

__all__ = [
    "masked_backward",
    "masked_forward",
    "packed_backward",
    "packed_forward",
    "readout_backward",
    "readout_forward",
    "supports",
    "token_relevance",
]

HEAD_WIDTHS = range(16, 257, 8)


def supports(q: Tensor, options: Options) -> str | None:
    """Why the kernels cannot run a call, as the end of a sentence that names them; None if they can."""
    if q.device.type != "cpu":
        return f"needs tensors on the CPU, got q.device={q.device}"
    if q.dtype not in (torch.float32, torch.bfloat16):
        return f"needs float32 or bfloat16, got q.dtype={q.dtype}"
    if q.shape[-1] not in HEAD_WIDTHS:
        return f"needs a head width of 16 to 256 in steps of 8, got D={q.shape[-1]}"
    if options.dropout_p > 0:
        return f"has no dropout, got dropout_p={options.dropout_p}"
    return None


def packed_forward(
    q: Tensor, k: Tensor, v: Tensor, sequences: Sequences, options: Options, need_lse: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """out (Tq, H, D), lse (H, Tq) and its rest."""
    out, lse = _empty(q), torch.empty((q.shape[1], q.shape[0]))
    rest = empty_rest(lse, "cpu", options)
    extension().attention_forward(
        *_rows(q, k, v),
        *_starts(sequences),
        _array(out),
        _array(lse),
        options.scale,
        **_rest(rest),
        **_terms(options),
    )
    return out, lse, rest


def packed_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    lse_rest: Tensor,
    sequences: Sequences,
    options: Options,
) -> Gradients:
    """Gradients of :func:`packed_forward`."""
    dq, dk, dv = _empty(q), _empty(k), _empty(v)
    learnt, dbias, dslopes = _gradients_of_terms(options)
    extension().attention_backward(
        *_rows(grad_out, q, k, v, out),
        _array(lse),
        *_starts(sequences),
        *_rows(dq, dk, dv),
        options.scale,
        **_rest(lse_rest),
        grad_lse=_floats(grad_lse),
        **learnt,
        **_terms(options),
    )
    return _gradients(dq, dk, dv, dbias, dslopes, options)


def masked_forward(
    q: Tensor, k: Tensor, v: Tensor, keep: Tensor, skip_queries: bool, options: Options, need_lse: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """out (B, H, Nq, D), lse (B, H, Nq) and its rest; background rows are never read."""
    out, lse = _empty(q), torch.empty(q.shape[:3])
    rest = empty_rest(lse, "cpu", options)
    extension().masked_attention_forward(
        *_rows(q, k, v),
        keep.contiguous().numpy(),
        _array(out),
        _array(lse),
        options.scale,
        skip_queries=skip_queries,
        **_rest(rest),
        **_terms(options),
    )
    return out, lse, rest


def masked_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    lse_rest: Tensor,
    keep: Tensor,
    skip_queries: bool,
    options: Options,
) -> Gradients:
    """Gradients of :func:`masked_forward`, 0 at background positions."""
    dq, dk, dv = _empty(q), _empty(k), _empty(v)
    learnt, dbias, dslopes = _gradients_of_terms(options)
    extension().masked_attention_backward(
        *_rows(grad_out, q, k, v, out),
        _array(lse),
        keep.contiguous().numpy(),
        *_rows(dq, dk, dv),
        options.scale,
        skip_queries=skip_queries,
        **_rest(lse_rest),
        grad_lse=_floats(grad_lse),
        **learnt,
        **_terms(options),
    )
    return _gradients(dq, dk, dv, dbias, dslopes, options)


def readout_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    options: Options,
    need_lse: bool,
    need_rows: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """out (B, R, H, D), lse (B, R, H), its rest, and rows (R, H, T), of no elements where unasked."""
    B, R, H, _ = q.shape
    out, lse, rows = _empty(q), torch.empty((B, R, H)), torch.empty((R, H, k.shape[0] if need_rows else 0))
    rest = empty_rest(lse, "cpu", options)
    extension().readout_forward(
        *_rows(q, k, v),
        cu_seqlens.contiguous().numpy(),
        _array(out),
        _array(lse),
        options.scale,
        rows=_array(rows) if need_rows else None,
        **_rest(rest),
        **_terms(options),
    )
    return out, lse, rest, rows


def readout_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    grad_rows: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    lse_rest: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    options: Options,
) -> Gradients:
    """Gradients of :func:`readout_forward`."""
    dq, dk, dv = _empty(q), _empty(k), _empty(v)
    learnt, dbias, dslopes = _gradients_of_terms(options)
    extension().readout_backward(
        *_rows(grad_out, q, k, v, out),
        _array(lse),
        cu_seqlens.contiguous().numpy(),
        *_rows(dq, dk, dv),
        options.scale,
        **_rest(lse_rest),
        grad_lse=_floats(grad_lse),
        grad_rows=_floats(grad_rows),
        **learnt,
        **_terms(options),
    )
    return _gradients(dq, dk, dv, dbias, dslopes, options)


def token_relevance(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    grad_out: Tensor,
    key_origin: Tensor | None,
    value_origin: Tensor | None,
    cu_seqlens: Tensor,
    max_seqlen: int,
    options: Options,
) -> Tensor:
    """S (K, T)."""
    relevance = torch.empty((grad_out.shape[0], k.shape[0]))
    origins = {"key_origin": key_origin, "value_origin": value_origin}
    extension().token_relevance(
        *_rows(q, k, v, out),
        _array(lse),
        _rows(grad_out)[0],
        cu_seqlens.contiguous().numpy(),
        _array(relevance),
        options.scale,
        **{name: None if x is None else _rows(x.to(q.dtype))[0] for name, x in origins.items()},
        **_terms(options),
    )
    return relevance


def _rows(*tensors: Tensor) -> tuple[Any, ...]:
    """Arrays of tensors whose last axis is contiguous."""
    return tuple(_array(x if x.stride(-1) == 1 else x.contiguous()) for x in tensors)


def _array(x: Tensor) -> Any:
    x = x.detach()
    return (x.view(torch.uint16) if x.dtype == torch.bfloat16 else x).numpy()


def _rest(x: Tensor) -> dict[str, Any]:
    return {} if x.numel() == 0 else {"lse_rest": _array(x)}


def _floats(x: Tensor | None) -> Any:
    return None if x is None else x.detach().to(torch.float32).contiguous().numpy()


def _terms(options: Options) -> dict[str, Any]:
    """What is added to the scores, and how many threads."""
    if options.dropout_seed is not None:
        raise ValueError(f"impl='cpu' has no dropout, got dropout_p={options.dropout_p}; use impl='torch'")
    terms = {name: getattr(options, name) for name in ("key_bias", "coords_q", "coords_k", "slopes")}
    return {name: _floats(x) for name, x in terms.items()} | {"threads": torch.get_num_threads()}


def _gradients_of_terms(options: Options) -> tuple[dict[str, Any], Tensor | None, Tensor | None]:
    """Arrays to be filled and the tensors that hold them, in float32 as the kernels sum them."""
    dbias, dslopes = (None if x is None else torch.empty(x.shape) for x in (options.key_bias, options.slopes))
    arrays = {"dbias": dbias, "dslopes": dslopes}
    return {name: None if x is None else _array(x) for name, x in arrays.items()}, dbias, dslopes


def _gradients(
    dq: Tensor, dk: Tensor, dv: Tensor, dbias: Tensor | None, dslopes: Tensor | None, options: Options
) -> Gradients:
    """The gradients, those of bias and slopes in these' dtypes."""
    sums = ((dbias, options.key_bias), (dslopes, options.slopes))
    return Gradients(dq, dk, dv, *(None if d is None or x is None else d.to(x.dtype) for d, x in sums))


def _starts(sequences: Sequences) -> tuple[Any, Any]:
    return sequences.cu_seqlens_q.contiguous().numpy(), sequences.cu_seqlens_k.contiguous().numpy()


def _empty(like: Tensor) -> Tensor:
    return torch.empty(like.shape, dtype=like.dtype)
