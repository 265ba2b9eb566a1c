"""Packed and masked attention as torch sees them: ``torch.library`` schemas, fake kernels and autograd.

Each public operation is one op with the implementation's name as an argument. The backward is an op of its own, so that
``torch.compile`` keeps both opaque and whole; its own derivative is refused by name. ``maskattn.transforms`` has what
``torch.func`` and forward-mode AD need besides.

Dimension key: B sequences, N grid tokens, Tq and Tk packed query and key tokens, H heads, D head width.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from maskattn.attention.checks import check_lengths
from maskattn.attention.implementations import implementation
from maskattn.attention.tangents import masked_tangent, no_second_derivative, packed_tangent, refuse_places
from maskattn.options import Gradients, Options, Sequences, keeps_rest
from maskattn.transforms import refuse, transformable

__all__ = [
    "GRADIENTS",
    "OPTIONS",
    "contiguous",
    "fake_gradients",
    "fake_lse",
    "fake_rest",
    "flat_gradients",
    "flat_options",
    "given",
    "is_autocast",
    "like",
    "masked_attention",
    "once_differentiable",
    "packed_attention",
    "without_autocast",
]

SEQUENCES = "Tensor cu_seqlens_q, Tensor cu_seqlens_k, SymInt max_seqlen_q, SymInt max_seqlen_k"
OPTIONS = (
    "float scale, Tensor? key_bias, Tensor? slopes, Tensor? coords_q, Tensor? coords_k, float dropout_p, "
    "Tensor? dropout_seed"
)
OUTPUTS = "(Tensor, Tensor, Tensor)"  # out, lse and its rest
GRADIENTS = "(Tensor, Tensor, Tensor, Tensor, Tensor)"


def flat_options(options: Options) -> tuple[Any, ...]:
    """The arguments that ``OPTIONS`` names."""
    return (
        options.scale,
        options.key_bias,
        options.slopes,
        options.coords_q,
        options.coords_k,
        options.dropout_p,
        options.dropout_seed,
    )


def without_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """Inside an op dtypes are what the caller chose; autocast would turn float32 sums into halves."""
    kind = x.device.type
    return torch.autocast(kind, enabled=False) if is_autocast(kind) else nullcontext()


def is_autocast(kind: str) -> bool:
    """Whether ``torch.autocast`` is on for a device type; there are some, like meta, that it does not know."""
    return torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)


def flat_gradients(grads: Gradients) -> tuple[Tensor, ...]:
    """An op returns contiguous tensors only, so an absent gradient is one of no elements."""
    given = grads.q, grads.k, grads.v, grads.key_bias, grads.slopes
    return tuple(grads.q.new_empty(0) if x is None else x.contiguous() for x in given)


def fake_gradients(q: Tensor, k: Tensor, v: Tensor, options: Options) -> tuple[Tensor, ...]:
    """Shapes and dtypes of :func:`flat_gradients`."""
    given = q, k, v, options.key_bias, options.slopes
    return tuple(q.new_empty(0) if x is None else x.new_empty(x.shape) for x in given)


def fake_lse(q: Tensor, shape: tuple[Any, ...], need_lse: bool, impl: str) -> Tensor:
    """float32 or wider, but the specification's own dtype; impl "torch" pays extra for it and leaves it out unasked."""
    dtype = q.dtype if impl == "reference" else torch.promote_types(q.dtype, torch.float32)
    return q.new_empty(shape if need_lse or impl != "torch" else (*shape[:-1], 0), dtype=dtype)


def once_differentiable(backward: Any, operation: str) -> Callable[..., tuple[Tensor, ...]]:
    """A backward op whose own derivative says what to do instead."""
    reason = no_second_derivative(operation)

    def save_nothing(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        """Nothing is needed to refuse."""

    backward.register_autograd(reason, setup_context=save_nothing)
    return refuse(backward, reason)


def contiguous(outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """An op returns contiguous tensors only."""
    return tuple(x.contiguous() for x in outputs)


def fake_rest(lse: Tensor, impl: str, options: Options) -> Tensor:
    """The rest of lse, of no elements where an implementation needs none."""
    return lse.new_empty(lse.shape if keeps_rest(impl, options) else 0)


def given(dbias: Tensor, bias: Tensor | None, dslopes: Tensor, slopes: Tensor | None) -> tuple[Tensor | None, ...]:
    """The gradients of bias and slopes, None where there are none."""
    return None if bias is None else dbias, None if slopes is None else dslopes


def like(tangent: Tensor, output: Tensor) -> Tensor:
    """A tangent in the dtype of its output, which has no elements where it was not asked for."""
    return tangent.to(output.dtype) if tangent.shape == output.shape else torch.zeros_like(output)


@torch.library.custom_op(
    "maskattn::packed_attention",
    mutates_args=(),
    schema=f"(Tensor q, Tensor k, Tensor v, {SEQUENCES}, {OPTIONS}, bool need_lse, str impl) -> {OUTPUTS}",
)
def _packed(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    """q (Tq, H, D), k, v (Tk, H, D) → out (Tq, H, D), lse (H, Tq) and its rest, see ``options.keeps_rest``."""
    sequences, options, (need_lse, impl) = Sequences(*rest[:4]), Options(*rest[4:11]), rest[11:]
    # Here, where torch.compile and transforms have real numbers.
    check_lengths("cu_seqlens_q", sequences.cu_seqlens_q, q.shape[0], sequences.max_seqlen_q)
    check_lengths("cu_seqlens_k", sequences.cu_seqlens_k, k.shape[0], sequences.max_seqlen_k)
    with without_autocast(q):
        return contiguous(implementation(impl).packed_forward(q, k, v, sequences, options, need_lse))


@_packed.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    need_lse, impl = rest[11:]
    lse = fake_lse(q, (q.shape[1], q.shape[0]), need_lse, impl)
    return q.new_empty(q.shape), lse, fake_rest(lse, impl, Options(*rest[4:11]))


@torch.library.custom_op(
    "maskattn::packed_attention_backward",
    mutates_args=(),
    schema=(
        "(Tensor grad_out, Tensor? grad_lse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
        f"Tensor lse_rest, {SEQUENCES}, {OPTIONS}, str impl) -> {GRADIENTS}"
    ),
)
def _packed_backward(grad_out: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    """Gradients of q, k, v, of the key bias and of the slopes (of no elements where there are none)."""
    tensors, sequences, options, impl = rest[:7], Sequences(*rest[7:11]), Options(*rest[11:18]), rest[18]
    with without_autocast(grad_out):
        return flat_gradients(implementation(impl).packed_backward(grad_out, *tensors, sequences, options))


@_packed_backward.register_fake
def _(grad_out: Tensor, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return fake_gradients(q, k, v, Options(*rest[7:14]))


packed_attention_backward = once_differentiable(_packed_backward, "packed_attention")


def _save_packed(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_q, max_k, scale, bias, slopes, coords_q, coords_k, p, seed = inputs[:14]
    ctx.save_for_backward(q, k, v, *output, cu_seqlens_q, cu_seqlens_k, bias, slopes, coords_q, coords_k, seed)
    ctx.set_materialize_grads(False)
    ctx.constants = max_q, max_k, scale, p, *inputs[14:]


def _differentiate_packed(
    ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None, _: None
) -> tuple[Tensor | None, ...]:
    q, k, v, out, lse, lse_rest, cu_seqlens_q, cu_seqlens_k, bias, slopes, coords_q, coords_k, seed = ctx.saved_tensors
    refuse_places(*ctx.needs_input_grad[10:12])
    max_q, max_k, scale, p, need_lse, impl = ctx.constants
    grad_out = torch.zeros_like(out) if grad_out is None else grad_out
    sequences = cu_seqlens_q, cu_seqlens_k, max_q, max_k
    options = scale, bias, slopes, coords_q, coords_k, p, seed
    dq, dk, dv, dbias, dslopes = packed_attention_backward(
        grad_out, grad_lse if need_lse else None, q, k, v, out, lse, lse_rest, *sequences, *options, impl
    )
    return (
        dq,
        dk,
        dv,
        None,
        None,
        None,
        None,
        None,
        *given(dbias, bias, dslopes, slopes),
        None,
        None,
        None,
        None,
        None,
        None,
    )


def _push_packed(ctx: Any, *moved: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v, _, lse, lse_rest, cu_seqlens_q, cu_seqlens_k, bias, slopes, coords_q, coords_k, seed = ctx.saved_tensors
    max_q, max_k, scale, p, _, _ = ctx.constants
    refuse_places(*(x is not None for x in moved[10:12]))
    options = scale, bias, slopes, coords_q, coords_k, p, seed
    sequences = cu_seqlens_q, cu_seqlens_k, max_q, max_k
    out_moved, lse_moved = packed_tangent(q, k, v, *sequences, *options, *moved[:3], *moved[8:10])
    return out_moved, like(lse_moved, lse), torch.zeros_like(lse_rest)


_packed.register_autograd(_differentiate_packed, setup_context=_save_packed)
packed_attention = transformable(_packed, _save_packed, _differentiate_packed, _push_packed)


@torch.library.custom_op(
    "maskattn::masked_attention",
    mutates_args=(),
    schema=(
        f"(Tensor q, Tensor k, Tensor v, Tensor keep, bool skip_queries, {OPTIONS}, bool need_lse, str impl) "
        f"-> {OUTPUTS}"
    ),
)
def _masked(q: Tensor, k: Tensor, v: Tensor, keep: Tensor, skip_queries: bool, *rest: Any) -> tuple[Tensor, ...]:
    """q (B, H, Nq, D), k, v (B, H, N, D), keep (B, N) → out (B, H, Nq, D), lse (B, H, Nq) and its rest."""
    options, (need_lse, impl) = Options(*rest[:7]), rest[7:]
    with without_autocast(q):
        return contiguous(implementation(impl).masked_forward(q, k, v, keep, skip_queries, options, need_lse))


@_masked.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, keep: Tensor, skip_queries: bool, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    need_lse, impl = rest[7:]
    lse = fake_lse(q, tuple(q.shape[:3]), need_lse, impl)
    return q.new_empty(q.shape), lse, fake_rest(lse, impl, Options(*rest[:7]))


@torch.library.custom_op(
    "maskattn::masked_attention_backward",
    mutates_args=(),
    schema=(
        "(Tensor grad_out, Tensor? grad_lse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
        f"Tensor lse_rest, Tensor keep, bool skip_queries, {OPTIONS}, str impl) -> {GRADIENTS}"
    ),
)
def _masked_backward(grad_out: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    """Gradients of q, k, v, of the key bias and of the slopes; 0 at background positions."""
    tensors, keep, skip_queries, options, impl = rest[:7], rest[7], rest[8], Options(*rest[9:16]), rest[16]
    with without_autocast(grad_out):
        return flat_gradients(implementation(impl).masked_backward(grad_out, *tensors, keep, skip_queries, options))


@_masked_backward.register_fake
def _(grad_out: Tensor, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return fake_gradients(q, k, v, Options(*rest[5:12]))


masked_attention_backward = once_differentiable(_masked_backward, "masked_attention")


def _save_masked(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, v, keep, skip_queries, scale, bias, slopes, coords_q, coords_k, p, seed, need_lse, impl = inputs
    ctx.save_for_backward(q, k, v, *output, keep, bias, slopes, coords_q, coords_k, seed)
    ctx.set_materialize_grads(False)
    ctx.constants = skip_queries, scale, p, need_lse, impl


def _differentiate_masked(
    ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None, _: None
) -> tuple[Tensor | None, ...]:
    q, k, v, out, lse, lse_rest, keep, bias, slopes, coords_q, coords_k, seed = ctx.saved_tensors
    refuse_places(*ctx.needs_input_grad[8:10])
    skip_queries, scale, p, need_lse, impl = ctx.constants
    grad_out = torch.zeros_like(out) if grad_out is None else grad_out
    options = scale, bias, slopes, coords_q, coords_k, p, seed
    dq, dk, dv, dbias, dslopes = masked_attention_backward(
        grad_out, grad_lse if need_lse else None, q, k, v, out, lse, lse_rest, keep, skip_queries, *options, impl
    )
    return dq, dk, dv, None, None, None, *given(dbias, bias, dslopes, slopes), None, None, None, None, None, None


def _push_masked(ctx: Any, *moved: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v, _, lse, lse_rest, keep, bias, slopes, coords_q, coords_k, seed = ctx.saved_tensors
    skip_queries, scale, p, _, _ = ctx.constants
    refuse_places(*(x is not None for x in moved[8:10]))
    options = scale, bias, slopes, coords_q, coords_k, p, seed
    out_moved, lse_moved = masked_tangent(q, k, v, keep, skip_queries, *options, *moved[:3], *moved[6:8])
    return out_moved, like(lse_moved, lse), torch.zeros_like(lse_rest)


_masked.register_autograd(_differentiate_masked, setup_context=_save_masked)
masked_attention = transformable(_masked, _save_masked, _differentiate_masked, _push_masked)
