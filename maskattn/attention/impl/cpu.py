"""impl "cpu": the C++ kernels of csrc/, which take torch's memory without a copy.

The extension checks every shape, stride and dtype, and uses as many threads as torch. Beyond its results a call takes
16 MiB, or the packed operands of one head if they are more, and 9 MiB a thread at most; up to 48 MiB stay for later
calls.

Dimension key: B sequences, N grid tokens, Tq and Tk packed query and key tokens, R readout queries, H heads, D head
width, K classes.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from maskattn.extension import argument_of, extension
from maskattn.large_results import empty_like
from maskattn.operands import QKV, ClassGradients, KeySequences, Mask, Origins, Sequences
from maskattn.options import DIFFERENTIABLE, Options
from maskattn.results import Gradients, OutputGradients, Outputs, ReadoutGradients, ReadoutOutputs

# The kernels take no allowance: they always multiply float32 as it is, and sum in one order.
OPTIONS = frozenset({"scale", "key_bias", "slopes", "coords_q", "coords_k", "precision", "deterministic"})
WITH_REST = frozenset({"key_bias", "slopes"})
READS_OUTPUTS = True
_TENSORS = sorted(OPTIONS - {"scale", "precision", "deterministic"})  # the options that are tensors

HEAD_WIDTHS = range(16, 257, 8)


def supports(q: Tensor, options: Options) -> str | None:
    """The reason why the kernels cannot run a call, as the end of a sentence; None if they can."""
    if q.device.type != "cpu":
        return f"needs tensors on the CPU, got q.device={q.device}"
    if q.dtype not in (torch.float32, torch.bfloat16):
        return f"needs float32 or bfloat16, got q.dtype={q.dtype}"
    if q.shape[-1] not in HEAD_WIDTHS:
        return f"needs a head width of 16 to 256 in steps of 8, got D={q.shape[-1]}"
    return None


def packed_forward(qkv: QKV, where: Sequences, options: Options, need_lse: bool) -> Outputs:
    """Attention of packed sequences."""
    q = qkv.q
    results = _empty_outputs(q, (q.shape[1], q.shape[0]), options)
    extension().attention_forward(
        *_strided(q, qkv.k, qkv.v),
        *_starts(where),
        argument_of(results.out),
        argument_of(results.lse),
        **_rest(results),
        **_score_arguments(options),
    )
    return results


def packed_backward(
    grads: OutputGradients, qkv: QKV, outputs: Outputs, where: Sequences, options: Options
) -> Gradients:
    """Gradients of :func:`packed_forward`."""
    found, of_options = _empty_gradients(qkv, options)
    extension().attention_backward(
        *_given(grads, qkv, outputs),
        *_starts(where),
        *_strided(found.q, found.k, found.v),
        **of_options,
        **_rest(outputs),
        grad_lse=_floats(grads.grad_lse),
        **_score_arguments(options),
    )
    return _in_dtypes(found, options)


def masked_forward(qkv: QKV, where: Mask, options: Options, need_lse: bool) -> Outputs:
    """Attention of dense tensors over their kept keys; the others are never read."""
    q = qkv.q
    results = _empty_outputs(q, tuple(q.shape[:3]), options)
    extension().masked_attention_forward(
        *_strided(q, qkv.k, qkv.v),
        argument_of(where.keep.contiguous()),
        argument_of(results.out),
        argument_of(results.lse),
        skip_queries=where.skip_queries,
        **_rest(results),
        **_score_arguments(options),
    )
    return results


def masked_backward(grads: OutputGradients, qkv: QKV, outputs: Outputs, where: Mask, options: Options) -> Gradients:
    """Gradients of :func:`masked_forward`, 0 at background positions."""
    found, of_options = _empty_gradients(qkv, options)
    extension().masked_attention_backward(
        *_given(grads, qkv, outputs),
        argument_of(where.keep.contiguous()),
        *_strided(found.q, found.k, found.v),
        skip_queries=where.skip_queries,
        **of_options,
        **_rest(outputs),
        grad_lse=_floats(grads.grad_lse),
        **_score_arguments(options),
    )
    return _in_dtypes(found, options)


def readout_forward(qkv: QKV, where: KeySequences, options: Options, need_lse: bool, need_rows: bool) -> ReadoutOutputs:
    """Attention of a few queries of each sequence over its packed keys."""
    B, R, H, _ = qkv.q.shape
    left = _empty_outputs(qkv.q, (B, R, H), options)
    rows = left.lse.new_empty((R, H, qkv.k.shape[0] if need_rows else 0))
    extension().readout_forward(
        *_strided(qkv.q, qkv.k, qkv.v),
        argument_of(where.cu_seqlens.contiguous()),
        argument_of(left.out),
        argument_of(left.lse),
        rows=argument_of(rows) if need_rows else None,
        **_rest(left),
        **_score_arguments(options),
    )
    return ReadoutOutputs(left.out, left.lse, left.lse_rest, rows)


def readout_backward(
    grads: ReadoutGradients, qkv: QKV, outputs: Outputs, where: KeySequences, options: Options
) -> Gradients:
    """Gradients of :func:`readout_forward`."""
    found, of_options = _empty_gradients(qkv, options)
    extension().readout_backward(
        *_given(grads, qkv, outputs),
        argument_of(where.cu_seqlens.contiguous()),
        *_strided(found.q, found.k, found.v),
        **of_options,
        **_rest(outputs),
        grad_lse=_floats(grads.grad_lse),
        grad_rows=_floats(grads.grad_rows),
        **_score_arguments(options),
    )
    return _in_dtypes(found, options)


def token_relevance(
    qkv: QKV, classes: ClassGradients, origins: Origins, where: KeySequences, options: Options
) -> Tensor:
    """The relevance (K, T) of every token for every class."""
    relevance = torch.empty((classes.grad_out.shape[0], qkv.k.shape[0]), dtype=torch.float32)
    own = {name: None if x is None else _strided(x.to(qkv.q.dtype))[0] for name, x in vars(origins).items()}
    extension().token_relevance(
        *_strided(qkv.q, qkv.k, qkv.v, classes.out),
        argument_of(classes.lse),
        _strided(classes.grad_out)[0],
        argument_of(where.cu_seqlens.contiguous()),
        argument_of(relevance),
        **own,
        **_score_arguments(options),
    )
    return relevance


def _strided(*tensors: Tensor) -> tuple[Any, ...]:
    """Arrays of tensors whose last axis is contiguous."""
    return tuple([argument_of(x if x.stride(-1) == 1 else x.contiguous()) for x in tensors])


def _floats(x: Tensor | None) -> Any:
    return None if x is None else argument_of(x.detach().to(torch.float32).contiguous())


def _starts(where: Sequences) -> tuple[Any, Any]:
    of_queries = argument_of(where.cu_seqlens_q.contiguous())
    if where.cu_seqlens_k is where.cu_seqlens_q:
        return of_queries, of_queries
    return of_queries, argument_of(where.cu_seqlens_k.contiguous())


def _given(grads: OutputGradients, qkv: QKV, outputs: Outputs) -> tuple[Any, ...]:
    """The first arguments of every backward."""
    return *_strided(grads.grad_out, qkv.q, qkv.k, qkv.v, outputs.out), argument_of(outputs.lse)


def _rest(outputs: Outputs) -> dict[str, Any]:
    return {} if outputs.lse_rest.numel() == 0 else {"lse_rest": argument_of(outputs.lse_rest)}


def _score_arguments(options: Options) -> dict[str, Any]:
    """The options and the number of threads, as keyword arguments of the extension."""
    given: dict[str, Any] = {"threads": torch.get_num_threads(), "scale": options.scale}
    for name in _TENSORS:
        x = getattr(options, name)
        if x is not None:
            given[name] = _floats(x)
    return given


def _empty_outputs(q: Tensor, lse_shape: tuple[int, ...], options: Options) -> Outputs:
    lse = q.new_empty(lse_shape, dtype=torch.float32)
    keeps_rest = any(getattr(options, name) is not None for name in WITH_REST)
    return Outputs(empty_like(q), lse, torch.empty_like(lse) if keeps_rest else lse.new_empty(0))


def _empty_gradients(qkv: QKV, options: Options) -> tuple[Gradients, dict[str, Any]]:
    """Uninitialised gradients, those of options in float32 as the kernels sum them, and the latter as arguments."""
    given = ((name, getattr(options, name)) for name in DIFFERENTIABLE)
    sums = {name: torch.empty(x.shape, dtype=torch.float32) for name, x in given if x is not None}
    arrays = {_GRADIENT_OF[name]: argument_of(x) for name, x in sums.items()}
    return Gradients(empty_like(qkv.q), empty_like(qkv.k), empty_like(qkv.v), **sums), arrays


# The extension's names of the options' gradients.
_GRADIENT_OF = {"key_bias": "dbias", "slopes": "dslopes"}


def _in_dtypes(found: Gradients, options: Options) -> Gradients:
    """The gradients, with those of options cast to the options' dtypes."""
    for name in DIFFERENTIABLE:
        sums, given = getattr(found, name), getattr(options, name)
        if sums is not None:
            found = replace(found, **{name: sums.to(given.dtype)})
    return found
