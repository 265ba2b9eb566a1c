"""The operations as torch sees them: ``torch.library`` schemas, fake kernels and autograd.

Each public operation is one op with the implementation's name as an argument; a launcher below it does the work. The
backward is an op of its own, so that ``torch.compile`` keeps both opaque and whole. Second derivatives are refused:
the backward ops have no autograd formula.

Dimension key: B sequences, N grid tokens, Tq and Tk packed query and key tokens, H heads, D head width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from maskattn.attention import reference, torch_sdpa

__all__ = ["IMPLS", "masked_attention", "packed_attention"]

IMPLS = ("triton", "torch", "reference")


@torch.library.custom_op("maskattn::packed_attention", mutates_args=())
def packed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    key_bias: Tensor | None,
    scale: float,
    need_lse: bool,
    impl: str,
) -> tuple[Tensor, Tensor]:
    """q (Tq, H, D), k, v (Tk, H, D) → out (Tq, H, D), lse (H, Tq)."""
    if impl == "triton":
        from maskattn.kernels.forward import packed_forward

        return packed_forward(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, key_bias, scale)
    if impl == "torch":
        return torch_sdpa.packed_forward(q, k, v, cu_seqlens_q, cu_seqlens_k, key_bias, scale, need_lse)
    out, lse = reference.packed_attention(q, k, v, cu_seqlens_q, cu_seqlens_k, key_bias=key_bias, scale=scale)
    return out.contiguous(), lse.contiguous()


@packed_attention.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    key_bias: Tensor | None,
    scale: float,
    need_lse: bool,
    impl: str,
) -> tuple[Tensor, Tensor]:
    lse = _fake_lse(q, (q.shape[1], q.shape[0]), impl, need_lse)
    return torch.empty_like(q, memory_format=torch.contiguous_format), lse


@torch.library.custom_op("maskattn::packed_attention_backward", mutates_args=())
def packed_attention_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    key_bias: Tensor | None,
    scale: float,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and of the key bias (of no elements where there is none)."""
    if impl == "triton":
        from maskattn.kernels.backward import packed_backward

        grads: tuple[Tensor | None, ...] = packed_backward(
            grad_out,
            grad_lse,
            q,
            k,
            v,
            out,
            lse,
            cu_seqlens_q,
            cu_seqlens_k,
            max_seqlen_q,
            max_seqlen_k,
            key_bias,
            scale,
        )
    elif impl == "torch":
        grads = torch_sdpa.packed_backward(grad_out, grad_lse, q, k, v, cu_seqlens_q, cu_seqlens_k, key_bias, scale)
    else:

        def attend(q_: Tensor, k_: Tensor, v_: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
            return reference.packed_attention(q_, k_, v_, cu_seqlens_q, cu_seqlens_k, key_bias=bias, scale=scale)

        grads = _pull_back(attend, (q, k, v, key_bias), grad_out, grad_lse)
    return _without_none(grads)


@packed_attention_backward.register_fake
def _(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    key_bias: Tensor | None,
    scale: float,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _fake_gradients(q, k, v, key_bias)


def _save_packed(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_q, max_k, key_bias, scale, need_lse, impl = inputs
    ctx.save_for_backward(q, k, v, *output, cu_seqlens_q, cu_seqlens_k, key_bias)
    ctx.set_materialize_grads(False)
    ctx.options = max_q, max_k, scale, need_lse, impl


def _differentiate_packed(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, key_bias = ctx.saved_tensors
    max_q, max_k, scale, need_lse, impl = ctx.options
    grad_out = torch.zeros_like(out) if grad_out is None else grad_out
    grad_lse = grad_lse if need_lse else None
    dq, dk, dv, dbias = packed_attention_backward(
        grad_out, grad_lse, q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, max_q, max_k, key_bias, scale, impl
    )
    return dq, dk, dv, None, None, None, None, None if key_bias is None else dbias, None, None, None


packed_attention.register_autograd(_differentiate_packed, setup_context=_save_packed)


@torch.library.custom_op("maskattn::masked_attention", mutates_args=())
def masked_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keep: Tensor,
    key_bias: Tensor | None,
    scale: float,
    skip_queries: bool,
    need_lse: bool,
    impl: str,
) -> tuple[Tensor, Tensor]:
    """q (B, H, Nq, D), k, v (B, H, N, D), keep (B, N) → out (B, H, Nq, D), lse (B, H, Nq)."""
    if impl == "triton":
        from maskattn.kernels.forward import masked_forward

        return masked_forward(q, k, v, keep, key_bias, scale, skip_queries)
    if impl == "torch":
        return torch_sdpa.masked_forward(q, k, v, keep, key_bias, scale, skip_queries, need_lse)
    out, lse = reference.masked_attention(q, k, v, keep, key_bias=key_bias, scale=scale, skip_queries=skip_queries)
    return out.contiguous(), lse.contiguous()


@masked_attention.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keep: Tensor,
    key_bias: Tensor | None,
    scale: float,
    skip_queries: bool,
    need_lse: bool,
    impl: str,
) -> tuple[Tensor, Tensor]:
    lse = _fake_lse(q, tuple(q.shape[:3]), impl, need_lse)
    return torch.empty_like(q, memory_format=torch.contiguous_format), lse


@torch.library.custom_op("maskattn::masked_attention_backward", mutates_args=())
def masked_attention_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    keep: Tensor,
    key_bias: Tensor | None,
    scale: float,
    skip_queries: bool,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and of the key bias (of no elements where there is none); 0 at background positions."""
    if impl == "triton":
        from maskattn.kernels.backward import masked_backward

        grads: tuple[Tensor | None, ...] = masked_backward(
            grad_out, grad_lse, q, k, v, out, lse, keep, key_bias, scale, skip_queries
        )
    elif impl == "torch":
        grads = torch_sdpa.masked_backward(grad_out, grad_lse, q, k, v, keep, key_bias, scale, skip_queries)
    else:

        def attend(q_: Tensor, k_: Tensor, v_: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
            return reference.masked_attention(q_, k_, v_, keep, key_bias=bias, scale=scale, skip_queries=skip_queries)

        grads = _pull_back(attend, (q, k, v, key_bias), grad_out, grad_lse)
    return _without_none(grads)


@masked_attention_backward.register_fake
def _(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    keep: Tensor,
    key_bias: Tensor | None,
    scale: float,
    skip_queries: bool,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _fake_gradients(q, k, v, key_bias)


def _save_masked(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, keep, key_bias, scale, skip_queries, need_lse, impl = inputs
    ctx.save_for_backward(q, k, v, *output, keep, key_bias)
    ctx.set_materialize_grads(False)
    ctx.options = scale, skip_queries, need_lse, impl


def _differentiate_masked(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    q, k, v, out, lse, keep, key_bias = ctx.saved_tensors
    scale, skip_queries, need_lse, impl = ctx.options
    grad_out = torch.zeros_like(out) if grad_out is None else grad_out
    grad_lse = grad_lse if need_lse else None
    dq, dk, dv, dbias = masked_attention_backward(
        grad_out, grad_lse, q, k, v, out, lse, keep, key_bias, scale, skip_queries, impl
    )
    return dq, dk, dv, None, None if key_bias is None else dbias, None, None, None, None


masked_attention.register_autograd(_differentiate_masked, setup_context=_save_masked)


def _pull_back(
    attend: Callable[..., tuple[Tensor, Tensor]],
    inputs: tuple[Tensor, Tensor, Tensor, Tensor | None],
    grad_out: Tensor,
    grad_lse: Tensor | None,
) -> tuple[Tensor | None, ...]:
    """Differentiate the specification; torch.func, because an op's body runs below autograd."""
    present = tuple(x for x in inputs if x is not None)
    (_, lse), pull_back = torch.func.vjp(attend, *present)[:2]
    grads = pull_back((grad_out, torch.zeros_like(lse) if grad_lse is None else grad_lse.to(lse.dtype)))
    return (*grads, *([None] * (4 - len(grads))))


def _without_none(grads: tuple[Tensor | None, ...]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """An op returns tensors only, so an absent gradient is one of no elements."""
    device = next(g.device for g in grads if g is not None)
    dq, dk, dv, dbias = (torch.empty(0, device=device) if g is None else g.contiguous() for g in grads)
    return dq, dk, dv, dbias


def _fake_gradients(*inputs: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _without_none(
        tuple(None if x is None else torch.empty_like(x, memory_format=torch.contiguous_format) for x in inputs)
    )


def _fake_lse(q: Tensor, shape: tuple[int, ...], impl: str, need_lse: bool) -> Tensor:
    """float32 or wider, but the specification's own dtype; impl "torch" pays extra for it and leaves it out unasked."""
    dtype = q.dtype if impl == "reference" else torch.promote_types(q.dtype, torch.float32)
    shape = shape if need_lse or impl != "torch" else (*shape[:-1], 0)
    return q.new_empty(shape, dtype=dtype)
