"""Readout and token relevance as torch sees them; see ``ops.py``.

Dimension key: B sequences, T packed tokens, R readout queries, H heads, D head width, K classes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from maskattn.attention.checks import check_lengths
from maskattn.attention.implementations import implementation
from maskattn.attention.ops import (
    GRADIENTS,
    OPTIONS,
    contiguous,
    fake_gradients,
    fake_lse,
    fake_rest,
    flat_gradients,
    given,
    like,
    once_differentiable,
    without_autocast,
)
from maskattn.attention.tangents import readout_tangent, refuse_places
from maskattn.attention.torch_blocks import rest_of_lse
from maskattn.options import Options
from maskattn.transforms import refuse, transformable

__all__ = ["readout", "token_relevance"]

LARGE_LSE = 128.0


@torch.library.custom_op(
    "maskattn::readout",
    mutates_args=(),
    schema=(
        f"(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens, SymInt max_seqlen, {OPTIONS}, bool need_lse, "
        "bool need_rows, str impl) -> (Tensor, Tensor, Tensor, Tensor)"
    ),
)
def _readout(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, *rest: Any) -> tuple[Tensor, ...]:
    """q (B, R, H, D), k, v (T, H, D) → out (B, R, H, D), lse (B, R, H), its rest, rows (R, H, T)."""
    options, (need_lse, need_rows, impl) = Options(*rest[:7]), rest[7:]
    check_lengths("cu_seqlens", cu_seqlens, k.shape[0], max_seqlen)
    with without_autocast(q):
        return contiguous(
            implementation(impl).readout_forward(q, k, v, cu_seqlens, max_seqlen, options, need_lse, need_rows)
        )


@_readout.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, *rest: Any) -> tuple[Tensor, ...]:
    need_lse, need_rows, impl = rest[7:]
    lse = fake_lse(q, tuple(q.shape[:3]), need_lse or need_rows, impl)
    rows = lse.new_empty((q.shape[1], q.shape[2], k.shape[0] if need_rows else 0))
    return q.new_empty(q.shape), lse, fake_rest(lse, impl, Options(*rest[:7])), rows


@torch.library.custom_op(
    "maskattn::readout_backward",
    mutates_args=(),
    schema=(
        "(Tensor grad_out, Tensor? grad_lse, Tensor? grad_rows, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
        f"Tensor lse_rest, Tensor cu_seqlens, SymInt max_seqlen, {OPTIONS}, str impl) -> {GRADIENTS}"
    ),
)
def _readout_backward(grad_out: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    """Gradients of q, k, v, of the key bias and of the slopes (of no elements where there are none)."""
    tensors, options, impl = rest[:10], Options(*rest[10:17]), rest[17]
    with without_autocast(grad_out):
        return flat_gradients(implementation(impl).readout_backward(grad_out, *tensors, options))


@_readout_backward.register_fake
def _(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    grad_rows: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *rest: Any,
) -> tuple[Tensor, ...]:
    return fake_gradients(q, k, v, Options(*rest[5:12]))


readout_backward = once_differentiable(_readout_backward, "readout")


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, v, cu_seqlens, max_seqlen, scale, bias, slopes, coords_q, coords_k, p, seed, *asked = inputs
    ctx.save_for_backward(q, k, v, *output[:3], cu_seqlens, bias, slopes, coords_q, coords_k, seed)
    ctx.set_materialize_grads(False)
    ctx.constants = max_seqlen, scale, p, *asked


def _differentiate(
    ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None, _: None, grad_rows: Tensor | None
) -> tuple[Tensor | None, ...]:
    q, k, v, out, lse, lse_rest, cu_seqlens, bias, slopes, coords_q, coords_k, seed = ctx.saved_tensors
    refuse_places(*ctx.needs_input_grad[8:10])
    max_seqlen, scale, p, need_lse, need_rows, impl = ctx.constants
    grad_out = torch.zeros_like(out) if grad_out is None else grad_out
    options = scale, bias, slopes, coords_q, coords_k, p, seed
    dq, dk, dv, dbias, dslopes = readout_backward(
        grad_out,
        grad_lse if need_lse else None,
        grad_rows if need_rows else None,
        q,
        k,
        v,
        out,
        lse,
        lse_rest,
        cu_seqlens,
        max_seqlen,
        *options,
        impl,
    )
    return dq, dk, dv, None, None, None, *given(dbias, bias, dslopes, slopes), None, None, None, None, None, None, None


def _push(ctx: Any, *moved: Tensor | None) -> tuple[Tensor, ...]:
    q, k, v, _, lse, lse_rest, cu_seqlens, bias, slopes, coords_q, coords_k, seed = ctx.saved_tensors
    max_seqlen, scale, p, _, need_rows, _ = ctx.constants
    refuse_places(*(x is not None for x in moved[8:10]))
    options = scale, bias, slopes, coords_q, coords_k, p, seed
    out_moved, lse_moved, rows_moved = readout_tangent(
        q, k, v, cu_seqlens, max_seqlen, *options, *moved[:3], *moved[6:8]
    )
    rows_moved = rows_moved if need_rows else rows_moved[..., :0].contiguous()
    return out_moved, like(lse_moved, lse), torch.zeros_like(lse_rest), rows_moved


_readout.register_autograd(_differentiate, setup_context=_save)
readout = transformable(_readout, _save, _differentiate, _push)


@torch.library.custom_op(
    "maskattn::token_relevance",
    mutates_args=(),
    schema=(
        "(Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor grad_out, Tensor? key_origin, "
        f"Tensor? value_origin, Tensor cu_seqlens, SymInt max_seqlen, {OPTIONS}, str impl) -> Tensor"
    ),
)
def _relevance(q: Tensor, *rest: Any) -> Tensor:
    """S (K, T), float32 or wider; see ``reference.token_relevance``. Not differentiable."""
    tensors, options, impl = rest[:9], Options(*rest[9:16]), rest[16]
    cu_seqlens, max_seqlen = tensors[7:]
    k, _, _, lse, grad_out = tensors[:5]
    check_lengths("cu_seqlens", cu_seqlens, k.shape[0], max_seqlen)
    with without_autocast(q):
        if impl != "reference" and _is_large(lse):
            # Relevance is linear in the gradients of each row, as it is in what the row's weights are divided by.
            lse_rest = rest_of_lse(q, k, lse, cu_seqlens, max_seqlen, options)
            grad_out = (grad_out * lse_rest.neg().exp()[..., None]).to(grad_out.dtype)
        return implementation(impl).token_relevance(q, *tensors[:4], grad_out, *tensors[5:], options).contiguous()


def _is_large(lse: Tensor) -> bool:
    """Whether weights that are made of a float32 lse alone would be off, as far as it costs no wait for the device."""
    return lse.device.type == "cpu" and bool((lse.abs().masked_fill(lse.isinf(), 0) > LARGE_LSE).any())


@_relevance.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, grad_out: Tensor, *rest: Any) -> Tensor:
    dtype = q.dtype if rest[-1] == "reference" else torch.promote_types(q.dtype, torch.float32)
    return q.new_empty((grad_out.shape[0], k.shape[0]), dtype=dtype)


def _refuse_relevance(*_: Any) -> Any:
    raise NotImplementedError(
        "token_relevance has no derivative, got one asked for by torch.func or forward-mode AD; detach its inputs, or "
        "use reference.token_relevance of maskattn.attention, which torch differentiates"
    )


token_relevance = refuse(_relevance, _refuse_relevance)
