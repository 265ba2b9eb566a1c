"""The public attention operations: check the arguments, choose the implementation, run the op.

Dimension key: B sequences, N grid tokens, Tq and Tk packed query and key tokens, R readout queries, H heads, D head
width, K classes.
"""

from __future__ import annotations

from torch import Tensor

from maskattn.attention import operations, ops
from maskattn.attention.calls import as_asked, as_autocast, options_of_call
from maskattn.attention.checks import (
    check_bias,
    check_coords,
    check_dense,
    check_keep,
    check_packed,
    check_readout,
    check_relevance,
    check_sequences,
)
from maskattn.attention.implementation import choose
from maskattn.leaves import leaf_function
from maskattn.packing import Packing
from maskattn.shapes import Bool, Float, Int
from maskattn.transforms import is_transformed

__all__ = ["masked_attention", "packed_attention", "readout", "token_relevance"]


@leaf_function
def packed_attention(
    q: Float[Tensor, "Tq H D"],
    k: Float[Tensor, "Tk H D"],
    v: Float[Tensor, "Tk H D"],
    cu_seqlens_q: Int[Tensor, "B_plus_1"] | Packing | tuple[Packing, Packing],
    cu_seqlens_k: Int[Tensor, "B_plus_1"] | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    *,
    scale: float | None = None,
    key_bias: Float[Tensor, "..."] | None = None,
    coords: Float[Tensor, "T 2"] | tuple[Float[Tensor, "Tq 2"], Float[Tensor, "Tk 2"]] | None = None,
    slopes: Float[Tensor, "H"] | None = None,
    dropout_p: float = 0.0,
    precision: str = "ieee",
    deterministic: bool = True,
    return_lse: bool = False,
    impl: str | None = None,
) -> Float[Tensor, "Tq H D"] | tuple[Float[Tensor, "Tq H D"], Float[Tensor, "H Tq"]]:
    """Attention within each of B packed sequences; query and key sequences may differ in length or be empty.

    A query whose sequence has no key gives 0, lse −inf and gradient 0. Under ``torch.autocast`` q, k and v are cast to
    its dtype, as for ``scaled_dot_product_attention``.

    Args:
        q: (Tq, H, D) float.
        k, v: (Tk, H, D), of q's dtype and device.
        cu_seqlens_q, cu_seqlens_k: (B + 1,) int32, the first token of each sequence, ending with Tq or Tk. A
            ``Packing`` of queries and keys, or a pair with one for each, replaces these and the two below.
        max_seqlen_q, max_seqlen_k: upper bounds of the sequences' lengths.
        scale: factor of the scores; None is 1/√D.
        key_bias: (Tk,) or (Tk, H), added to the scores of its key; differentiable. A key with −inf takes no part;
            +inf and NaN give NaN for all queries that see the key.
        coords: (T, 2), the position of each token, or a pair (Tq, 2), (Tk, 2) if queries and keys differ:
            two-dimensional ALiBi, which adds −slope·distance to the scores. A token without a position (class token,
            register) is a row of NaN and has distance 0 from all tokens. Not differentiable.
        slopes: (H,), per unit of ``coords``; required with them; differentiable.
        dropout_p: share of the attention weights dropped, in [0, 1); drawn from torch's generator of the device.
        precision: the multiplication of float32. "ieee" multiplies it as it is, which tensor cores cannot. "tf32x3"
            also allows three products of TensorFloat-32 on tensor cores instead of each, within the error budget of
            float32; impl "triton" uses them on compute capability 8.x, 9.0 and 12.0 for head widths of at most 64,
            without ALiBi and dropout. All else is no less exact and treats it as "ieee".
        deterministic: whether the same inputs must give the same bits. False also allows gradients that are summed in
            any order: impl "gluon" then computes backward in one pass, for head widths of at most 128 without ALiBi,
            which no GPU has run yet. All else is deterministic in any case, and so is that under
            ``torch.use_deterministic_algorithms``.
        return_lse: also return the log-sum-exp of the scores, (H, Tq), differentiable.
        impl: "triton", "cpu", "torch" or "reference"; None takes the best one that supports the call.

    Returns:
        out (Tq, H, D), or (out, lse).

    Raises:
        TypeError, ValueError: shapes, dtypes or devices do not fit, or ``impl`` lacks a feature of the call.

    Example:
        >>> keep = torch.tensor([[True, True, False], [True, False, False]])
        >>> packing = Packing.from_keep(keep)
        >>> x = torch.randn(packing.total, 2, 16)
        >>> packed_attention(x, x, x, packing).shape
        torch.Size([3, 2, 16])
    """
    q, k, v = as_autocast(q, k, v)
    check_packed(q, k, v)
    sequences = check_sequences(q, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    Tk, H, _ = k.shape
    check_bias(key_bias, q, ((Tk,), (Tk, H)), "(Tk,) or (Tk, H)")
    positions = check_coords(coords, slopes, q, H, (q.shape[0],), (Tk,))
    options = options_of_call(q, scale, key_bias, slopes, positions, dropout_p, precision, deterministic)
    impl = choose(impl, q, options)
    out, lse, _ = operations.packed_attention(q, k, v, *sequences, *ops.flat_options(options), return_lse, impl)
    return (out, lse) if return_lse else out


@leaf_function
def masked_attention(
    q: Float[Tensor, "B H Nq D"],
    k: Float[Tensor, "B H N D"],
    v: Float[Tensor, "B H N D"],
    keep: Bool[Tensor, "B N"],
    *,
    scale: float | None = None,
    key_bias: Float[Tensor, "..."] | None = None,
    coords: Float[Tensor, "..."] | tuple[Float[Tensor, "..."], Float[Tensor, "..."]] | None = None,
    slopes: Float[Tensor, "H"] | None = None,
    dropout_p: float = 0.0,
    precision: str = "ieee",
    deterministic: bool = True,
    skip_queries: bool = True,
    return_lse: bool = False,
    impl: str | None = None,
) -> Float[Tensor, "B H Nq D"] | tuple[Float[Tensor, "B H Nq D"], Float[Tensor, "B H Nq"]]:
    """Attention over the kept keys of dense tensors, in the layout of torch's ``scaled_dot_product_attention``.

    Background rows of k and v (and of q, if ``skip_queries``) are never read; their outputs and gradients are 0. Under
    ``torch.autocast`` q, k and v are cast to its dtype.

    Args:
        q: (B, H, Nq, D) float; Nq = N if ``skip_queries``.
        k, v: (B, H, N, D), of q's dtype and device.
        keep: (B, N) bool, True = the token takes part.
        scale: factor of the scores; None is 1/√D.
        key_bias: (B, N) or (B, H, N), added to the scores of its key; differentiable. A key with −inf takes no part.
        coords: (N, 2) or (B, N, 2), the position of each token, or a pair (of queries, of keys); see
            :func:`packed_attention`.
        slopes: (H,), per unit of ``coords``; required with them; differentiable.
        dropout_p: share of the attention weights dropped, in [0, 1).
        precision: "ieee" or "tf32x3"; see :func:`packed_attention`.
        deterministic: see :func:`packed_attention`; no implementation sums these gradients in any order yet.
        skip_queries: whether background queries are skipped (output 0, lse −inf) or attend to the kept keys like all
            others, as in ``nn.MultiheadAttention`` with ``key_padding_mask``.
        return_lse: also return the log-sum-exp of the scores, (B, H, Nq), differentiable.
        impl: "triton", "cpu", "torch" or "reference"; None takes the best one that supports the call.

    Returns:
        out (B, H, Nq, D), or (out, lse).

    Raises:
        TypeError, ValueError: shapes, dtypes or devices do not fit, or ``impl`` lacks a feature of the call.
    """
    q, k, v = as_autocast(q, k, v)
    check_dense(q, k, v)
    check_keep(q, k, keep, skip_queries)
    B, H, N = k.shape[:3]
    check_bias(key_bias, q, ((B, N), (B, H, N)), "(B, N) or (B, H, N)")
    positions = check_coords(coords, slopes, q, H, (B, q.shape[2]), (B, N))
    options = options_of_call(q, scale, key_bias, slopes, positions, dropout_p, precision, deterministic)
    impl = choose(impl, q, options)
    out, lse, _ = operations.masked_attention(q, k, v, keep, skip_queries, *ops.flat_options(options), return_lse, impl)
    return (out, lse) if return_lse else out


@leaf_function
def readout(
    q: Float[Tensor, "B R H D"],
    k: Float[Tensor, "T H D"],
    v: Float[Tensor, "T H D"],
    cu_seqlens: Int[Tensor, "B_plus_1"],
    max_seqlen: int,
    *,
    scale: float | None = None,
    key_bias: Float[Tensor, "..."] | None = None,
    coords: tuple[Float[Tensor, "B R 2"], Float[Tensor, "T 2"]] | None = None,
    slopes: Float[Tensor, "H"] | None = None,
    dropout_p: float = 0.0,
    return_rows: bool = False,
    return_lse: bool = False,
    impl: str | None = None,
) -> Float[Tensor, "B R H D"] | tuple[Float[Tensor, "..."], ...]:
    """Attention of a few queries of each sequence (class token, registers) over its packed keys.

    Args:
        q: (B, R, H, D) float, 1 ≤ R ≤ 16.
        k, v: (T, H, D), of q's dtype and device.
        cu_seqlens: (B + 1,) int32, the first token of each key sequence, ending with T.
        max_seqlen: an upper bound of the sequences' lengths.
        scale: factor of the scores; None is 1/√D.
        key_bias: (T,) or (T, H), added to the scores of its key; differentiable. A key with −inf takes no part.
        coords: a pair, the positions of the queries (B, R, 2) and of the keys (T, 2); see :func:`packed_attention`.
        slopes: (H,), per unit of ``coords``; required with them; differentiable.
        dropout_p: share of the attention weights dropped, in [0, 1).
        return_rows: also return the attention rows (R, H, T): the softmax weight of token t for query r of its
            sequence, before dropout; differentiable.
        return_lse: also return the log-sum-exp of the scores, (B, R, H), differentiable.
        impl: "triton", "cpu", "torch" or "reference"; None takes the best one that supports the call.

    Returns:
        out (B, R, H, D), followed by rows and lse, in this order, if requested.

    Raises:
        TypeError, ValueError: shapes, dtypes or devices do not fit, or ``impl`` lacks a feature of the call.
    """
    q, k, v = as_autocast(q, k, v)
    check_readout(q, k, v, cu_seqlens)
    B, R, H, _ = q.shape
    check_bias(key_bias, q, ((k.shape[0],), (k.shape[0], H)), "(T,) or (T, H)")
    positions = check_coords(coords, slopes, q, H, (B, R), (k.shape[0],))
    options = options_of_call(q, scale, key_bias, slopes, positions, dropout_p)
    impl = choose(impl, q, options)
    out, lse, _, rows = operations.readout(
        q, k, v, cu_seqlens, max_seqlen, *ops.flat_options(options), return_lse, return_rows, impl
    )
    return as_asked(out, rows, lse, return_rows, return_lse)


@leaf_function
def token_relevance(
    q: Float[Tensor, "B R H D"],
    k: Float[Tensor, "T H D"],
    v: Float[Tensor, "T H D"],
    out: Float[Tensor, "B R H D"],
    lse: Float[Tensor, "B R H"],
    grad_out: Float[Tensor, "K B R H D"],
    cu_seqlens: Int[Tensor, "B_plus_1"],
    max_seqlen: int,
    *,
    key_origin: Float[Tensor, "..."] | None = None,
    value_origin: Float[Tensor, "..."] | None = None,
    scale: float | None = None,
    key_bias: Float[Tensor, "..."] | None = None,
    coords: tuple[Float[Tensor, "B R 2"], Float[Tensor, "T 2"]] | None = None,
    slopes: Float[Tensor, "H"] | None = None,
    impl: str | None = None,
) -> Float[Tensor, "K T"]:
    """The relevance of every token for every class, for scores that depend only on a :func:`readout`.

    It is the derivative of score c as token t is scaled, S_ct = Σ_j x_tj ∂f_c/∂x_tj, where x are the tokens from which
    keys and values are computed. The closed form takes one pass over k and v for all classes, and no graph. Not
    differentiable.

    Args:
        q, k, v, cu_seqlens, max_seqlen, scale, key_bias, coords, slopes: the arguments of the readout.
        out, lse: the results of the readout, (B, R, H, D) and (B, R, H). For an lse beyond ±128, the rounding error of
            float32 is corrected on the CPU; on other devices weights are then off by a factor of up to e^(2⁻²⁴·|lse|).
        grad_out: (K, B, R, H, D), the gradient of each class's score with respect to ``out``.
        key_origin, value_origin: (H, D) or (T, H, D), keys and values of tokens x = 0: the biases of affine maps. In
            general, k minus the derivative of k along x. None for 0.
        impl: "triton", "cpu", "torch" or "reference"; None takes the best one that supports the call.

    Returns:
        S (K, T), float32 (float64 for float64).

    Raises:
        TypeError, ValueError: shapes, dtypes or devices do not fit, or ``impl`` lacks a feature of the call.

    Source: arXiv 2312.02364 for S; the closed form is this package's.
    """
    check_readout(q, k, v, cu_seqlens)
    (B, R, H, _), T = q.shape, k.shape[0]
    check_relevance(q, k, out, lse, grad_out, key_origin, value_origin)
    check_bias(key_bias, q, ((T,), (T, H)), "(T,) or (T, H)")
    positions = check_coords(coords, slopes, q, H, (B, R), (T,))
    options = options_of_call(q, scale, key_bias, slopes, positions, 0.0)
    tensors: tuple[Tensor | None, ...] = q, k, v, out, lse, grad_out.to(q.dtype), key_origin, value_origin, cu_seqlens
    impl = choose(impl, q, options)
    if not is_transformed(tensors):  # under a transform, a derivative is refused instead
        tensors = tuple(None if x is None else x.detach() for x in tensors)
    return operations.token_relevance(*tensors, max_seqlen, *ops.flat_options(options), impl)
