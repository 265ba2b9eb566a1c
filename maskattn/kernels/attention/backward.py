"""Backward attention, with P recomputed from the row sums that forward left (FlashAttention-2, algorithm 2).

With dO and dlse the gradients of the outputs, s the scale, m the dropout factors and x the positions:

    delta_i = Σ_d dO_id out_id − dlse_i       dS_ij = p_ij (m_ij dO_i·v_j − delta_i)

    dq_i = s Σ_j dS_ij k_j    dk_j = s Σ_i dS_ij q_i    dv_j = Σ_i m_ij p_ij dO_i    dbias_j = Σ_i dS_ij

    dslope = −Σ_ij dS_ij ‖x_i − x_j‖

Two passes without atomics make the result deterministic: one program per tile of queries for dq and its terms of dslope
(it also stores delta, and lse in the units of the scores), then one per tile of keys for dk, dv and dbias.

Dimension key: B sequences, N tokens, Tq and Tk packed query and key tokens, H heads, D head width; M queries and N keys
of a tile.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from maskattn.kernels.attention.key_gradient import key_gradient_kernel
from maskattn.kernels.attention.query_gradient import query_gradient_kernel
from maskattn.kernels.language.bundles import ABSENT, Tokens
from maskattn.kernels.launch.arguments import (
    bounds_argument,
    constant_arguments,
    keeps_rest,
    known_strides,
    rest_argument,
    row_values_argument,
    tensors_of,
    terms_argument,
    tokens_argument,
)
from maskattn.kernels.launch.descriptors import describable
from maskattn.kernels.launch.prepared import Launch, launch_prepared
from maskattn.kernels.launch.recording import allocate
from maskattn.kernels.launch.replay import replayed
from maskattn.kernels.launch.rows import Rows, packed_rows_of, readable
from maskattn.kernels.launch.schedule import plan_work
from maskattn.kernels.launch.tail import clear_tail
from maskattn.kernels.tables.lookup import choose
from maskattn.operands import QKV, Sequences
from maskattn.options import Options
from maskattn.results import Gradients, OutputGradients, Outputs

__all__ = ["completed", "differentiate", "packed_backward"]


def packed_backward(
    grads_out: OutputGradients, qkv: QKV, outputs: Outputs, sequences: Sequences, options: Options
) -> Gradients:
    """Return contiguous gradients of :func:`maskattn.kernels.attention.forward.packed_forward`.

    Args:
        grads_out: gradients of out (Tq, H, D), with any strides, and of lse (H, Tq).
        qkv, sequences, options: the arguments of forward.
        outputs: the results of forward.
    """
    tensors = (*vars(qkv).values(), *vars(outputs).values(), *vars(grads_out).values())
    dq, dk, dv, dbias, dslopes = replayed(_packed_backward, tensors, sequences, options)
    if dbias is not None and options.key_bias is not None and options.key_bias.ndim == 1:
        dbias = dbias.sum(0)
    return completed(Gradients(dq, dk, dv), options, dbias, dslopes)


def _packed_backward(tensors: tuple[Any, ...], sequences: Sequences, options: Options) -> tuple[Tensor | None, ...]:
    """Return dq, dk, dv, dbias as (Tk, H), or (H, Tk) if the heads share the bias, and the terms of dslopes."""
    qkv, outputs, grads_out = QKV(*tensors[:3]), Outputs(*tensors[3:6]), OutputGradients(*tensors[6:])
    k = qkv.k
    grads = Gradients(*(allocate(x.shape, x.dtype, x.device) for x in tensors[:3]))
    dbias = dbias_HT = None
    if options.key_bias is not None:
        # Contiguous as (Tk, H) if that is the shape of the bias.
        per_head = options.key_bias.ndim == 2
        shape = k.shape[:2] if per_head else (k.shape[1], k.shape[0])
        dbias = allocate(shape, torch.float32, k.device)
        dbias_HT = dbias.T if per_head else dbias
    rows = packed_rows_of(sequences, qkv.q, k)
    dslopes = differentiate(grads_out, qkv, outputs, *rows, options, grads, dbias_HT)
    of_keys = [(x, 0.0) for x in (grads.k, grads.v, dbias_HT if dbias_HT is None else dbias_HT.T) if x is not None]
    clear_tail(sequences.cu_seqlens_q, sequences.max_seqlen_q, (grads.q, 0.0))
    clear_tail(sequences.cu_seqlens_k, sequences.max_seqlen_k, *of_keys)
    return grads.q, grads.k, grads.v, dbias, dslopes


def completed(grads: Gradients, options: Options, dbias: Tensor | None, dslopes: Tensor | None) -> Gradients:
    """Add the options' gradients, which are summed in float32, converted to the options' dtypes.

    Args:
        grads: the gradients of q, k and v.
        options: the options.
        dbias: the gradient of the bias, of its shape.
        dslopes: the terms of the slopes' gradient, as :func:`differentiate` returns them.
    """
    if dbias is not None and options.key_bias is not None:
        grads = replace(grads, key_bias=dbias.to(options.key_bias.dtype))
    if dslopes is not None and options.slopes is not None:
        grads = replace(grads, slopes=dslopes.sum(1).to(options.slopes.dtype))
    return grads


def differentiate(
    grads_out: OutputGradients,
    qkv: QKV,
    outputs: Outputs,
    q_rows: Rows,
    k_rows: Rows,
    options: Options,
    grads: Gradients,
    dbias: Tensor | None,
) -> Tensor | None:
    """Fill dq, dk, dv and dbias, which is a view of (H, Tk) or (B, H, N); return (H, items), the terms of dslopes."""
    q, k, v, out, grad_out = (readable(x) for x in (*vars(qkv).values(), outputs.out, grads_out.grad_out))
    lse, grad_lse = outputs.lse.contiguous(), grads_out.grad_lse
    delta, scaled_lse = (allocate(lse.shape, lse.dtype, lse.device) for _ in range(2))
    both = _Both(q, k, v, outputs.lse_rest.contiguous(), grad_out, delta, scaled_lse, q_rows, k_rows, options)
    dslopes = _differentiate_queries(both, out, lse, None if grad_lse is None else grad_lse.contiguous(), grads.q)
    _differentiate_keys(both, grads.k, grads.v, dbias)
    return dslopes


class _Both(NamedTuple):
    """The arguments of both passes."""

    q: Tensor
    k: Tensor
    v: Tensor
    lse_rest: Tensor
    grad_out: Tensor
    delta: Tensor
    scaled_lse: Tensor
    q_rows: Rows
    k_rows: Rows
    options: Options

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """All tensors among the arguments."""
        return *self[:7], *tensors_of(self.options), *self.q_rows.tensors, *self.k_rows.tensors

    @property
    def numbers(self) -> tuple[Hashable, ...]:
        """The remaining arguments: head width, heads and the numbers among the options."""
        return self.q.shape[-1], self.q.shape[1], self.options.scale, self.options.dropout_p

    def inputs(self) -> tuple[Tokens, ...]:
        """The first arguments of both kernels."""
        return tuple(tokens_argument(x) for x in (self.q, self.k, self.v))

    def common(self) -> tuple[Any, ...]:
        """The last arguments of both kernels, before the work."""
        terms = terms_argument(self.options, packed=self.q.ndim == 3, natural=keeps_rest(self.options))
        return terms, bounds_argument(self.q_rows), bounds_argument(self.k_rows), self.options.scale, self.q.shape[1]


def _differentiate_queries(both: _Both, out: Tensor, lse: Tensor, grad_lse: Tensor | None, dq: Tensor) -> Tensor | None:
    """Fill dq, delta and the scaled lse; return the terms of dslopes."""
    q, k, v, heads = both.q, both.k, both.v, both.q.shape[1]
    config = choose("query_gradient", q, both.options, both.k_rows.longest)
    work = plan_work(both.q_rows, both.k_rows, config.block_m)
    parts_of_dslopes = None
    if both.options.slopes is not None:
        parts_of_dslopes = allocate((heads, work.items), torch.float32, q.device, fill=0)

    def make() -> Launch:
        described = config.descriptors and describable(k, both.k_rows) and describable(v, both.k_rows)
        arguments = (
            *both.inputs(), tokens_argument(out), row_values_argument(lse), rest_argument(both.lse_rest),
            tokens_argument(both.grad_out), row_values_argument(grad_lse), tokens_argument(dq), parts_of_dslopes,
            row_values_argument(both.delta), row_values_argument(both.scaled_lse), *both.common(), *work,
        )  # fmt: skip
        constants = constant_arguments(q.shape[-1], config, described)
        return Launch(query_gradient_kernel, work.items * heads, described, arguments, constants)

    known = query_gradient_kernel, config, *both.numbers, work.tiles, work.items
    tensors = *both.tensors, out, lse, grad_lse, dq, parts_of_dslopes, work.items_ptr
    launch_prepared(known, tensors, make, q)
    return parts_of_dslopes


def _differentiate_keys(both: _Both, dk: Tensor, dv: Tensor, dbias: Tensor | None) -> None:
    """Fill dk, dv and dbias."""
    q, grad_out, heads = both.q, both.grad_out, both.q.shape[1]
    config = choose("key_gradient", q, both.options, both.q_rows.longest)
    work = plan_work(both.k_rows, both.q_rows, config.block_n)

    def make() -> Launch:
        described = config.descriptors and describable(q, both.q_rows) and describable(grad_out, both.q_rows)
        arguments = (
            *both.inputs(), row_values_argument(both.scaled_lse), rest_argument(both.lse_rest),
            tokens_argument(grad_out), row_values_argument(both.delta), tokens_argument(dk), tokens_argument(dv),
            _dbias_argument(dbias), *both.common(), *work,
        )  # fmt: skip
        constants = constant_arguments(q.shape[-1], config, described)
        return Launch(key_gradient_kernel, work.items * heads, described, arguments, constants)

    known = key_gradient_kernel, config, *both.numbers, work.tiles, work.items
    launch_prepared(known, (*both.tensors, dk, dv, dbias, work.items_ptr), make, q)


def _dbias_argument(dbias: Tensor | None) -> Tokens:
    """The argument for a (H, Tk) or (B, H, N) tensor."""
    if dbias is None:
        return ABSENT
    return Tokens(dbias, *known_strides(*((0, *dbias.stride()) if dbias.ndim == 2 else dbias.stride())))
