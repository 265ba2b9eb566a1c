"""Types of the C++ extension built from csrc/.

Every array but the mask of ``token_coverage`` may also be a DLPack capsule of a tensor on the CPU
(``torch.utils.dlpack.to_dlpack``), bfloat16 as it is; it is read, not consumed.
"""

import numpy as np
from numpy.typing import NDArray
from typing_extensions import Required, TypedDict, Unpack

Rows = NDArray[np.float32] | NDArray[np.uint16]
Floats = NDArray[np.float32]

class Terms(TypedDict, total=False):
    """The keywords of every attention operation: the terms of the score, threads and instruction set.

    Attributes:
        scale: any finite number.
        key_bias: (Tk,) or (Tk, H) for packed keys, (B, N) or (B, H, N) for dense ones; None for none.
        coords_q, coords_k: positions of the tokens in any unit, NaN for tokens without one: (Tq, 2) and (Tk, 2), or
            (B, Nq, 2) and (B, N, 2), or (B, R, 2) and (T, 2) for a readout.
        slopes: (H,), subtracted from the score per unit of distance; given together with both coords.
        threads: number of threads; 0, the default, for one per core.
        instruction_set: one of instruction_sets(); "", the default, for the best.
    """

    scale: Required[float]
    key_bias: Floats | None
    coords_q: Floats | None
    coords_k: Floats | None
    slopes: Floats | None
    threads: int
    instruction_set: str

def token_coverage(
    mask: NDArray[np.bool_] | NDArray[np.uint8],
    px_lv0_x: float,
    px_lv0_y: float,
    origin_x_lv0: float,
    origin_y_lv0: float,
    token_w_lv0: float,
    token_h_lv0: float,
    rows: int,
    cols: int,
    threads: int = 0,
) -> NDArray[np.float32]:
    """Return the area-weighted tissue fraction of each token of a lattice, (rows, cols) float32 in [0, 1].

    Args:
        mask: (Hm, Wm) bool or uint8, C-contiguous; values other than 0 are tissue. Its corner is at level-0 (0, 0).
        px_lv0_x: width of a mask pixel in level-0 pixels.
        px_lv0_y: height of a mask pixel in level-0 pixels.
        origin_x_lv0: left edge of the lattice in level-0 pixels.
        origin_y_lv0: top edge of the lattice in level-0 pixels.
        token_w_lv0: width of a token in level-0 pixels, fractions allowed.
        token_h_lv0: height of a token in level-0 pixels, fractions allowed.
        rows: number of tokens from top to bottom.
        cols: number of tokens from left to right.
        threads: number of threads; 0 for one per core.

    Raises:
        TypeError: the mask is not a bool or uint8 numpy array, or a number is of the wrong type.
        ValueError: the mask is not a C-contiguous plane, or a size, position or count is out of range.
    """

def lay_over(
    picture: NDArray[np.uint8],
    grey: NDArray[np.uint8],
    token: NDArray[np.int32],
    colour: NDArray[np.int32],
    mixtures: NDArray[np.uint8],
    result: NDArray[np.uint8],
) -> None:
    """Lay a map over a picture: each pixel becomes ``mixtures[colour[token], grey]``, or stays where that colour is −1.

    The GIL is released meanwhile.

    Args:
        picture: (Y, X, 3), like all of the following C-contiguous.
        grey: (Y, X), the picture without its colours.
        token: (Y, X), an index into ``colour`` for each pixel.
        colour: (V,), an index into ``mixtures`` for each token, or a negative number.
        mixtures: (C, 256, 3), each colour mixed with each grey.
        result: (Y, X, 3), written; its rows may be further apart.

    Raises:
        TypeError: an argument is not an array, or of the wrong dtype.
        ValueError: a shape or stride breaks the rules above, or an index is out of range.
    """

def instruction_sets() -> list[str]:
    """Return the instruction sets that this machine supports, best first, of avx512_bf16, avx512, avx2 and portable."""

def attention_forward(
    q: Rows,
    k: Rows,
    v: Rows,
    cu_seqlens_q: NDArray[np.int32],
    cu_seqlens_k: NDArray[np.int32],
    out: Rows,
    lse: Floats,
    *,
    lse_rest: Floats | None = None,
    **terms: Unpack[Terms],
) -> None:
    """Compute the attention of packed sequences; the specification is ``maskattn.attention.reference``.

    score_ij = scale · q_i·k_j + key_bias_j − slope ‖x_i − x_j‖, with distance 0 where either position is NaN. A query
    without keys, or whose keys all have a bias of −inf, gets out 0 and lse −inf. Sums are computed in float32. The
    result does not depend on the number of threads; the GIL is released.

    Args:
        q: (Tq, H, D) float32, or bfloat16 as uint16; D is 16 to 256 in steps of 8. It must be contiguous along D and
            may have any other strides, as may k, v and out.
        k, v: (Tk, H, D) of q's dtype.
        cu_seqlens_q, cu_seqlens_k: (B + 1,), from 0 to Tq and Tk; sequence b has rows cu_seqlens[b] to [b + 1].
        out: (Tq, H, D) of q's dtype, written. It must not share memory with an input or with lse.
        lse: (H, Tq), written.
        lse_rest: (H, Tq), written: the part that rounding took from lse if there is a bias or positions. The backward
            needs it to know how many keys share a large score; None without a backward.

    Raises:
        TypeError: an argument is not an array, or of the wrong dtype.
        ValueError: a shape, stride or number breaks the rules above, or an output is read-only or overlaps itself.
        MemoryError: no memory for the packed keys and values.
    """

def masked_attention_forward(
    q: Rows,
    k: Rows,
    v: Rows,
    keep: NDArray[np.bool_],
    out: Rows,
    lse: Floats,
    *,
    skip_queries: bool = True,
    lse_rest: Floats | None = None,
    **terms: Unpack[Terms],
) -> None:
    """Compute the attention of dense tensors over their kept keys; background rows of k, v and bias are never read.

    Args:
        q: (B, H, Nq, D); with ``skip_queries`` background rows are not read, and get out 0 and lse −inf.
        k, v: (B, H, N, D).
        keep: (B, N), True = the token takes part.
        out: (B, H, Nq, D), written.
        lse, lse_rest: (B, H, Nq), written; see attention_forward.
        skip_queries: whether only kept tokens are queries, which needs Nq = N.

    Raises:
        TypeError, ValueError, MemoryError: as in attention_forward, like all operations below.
    """

def attention_backward(
    grad_out: Rows,
    q: Rows,
    k: Rows,
    v: Rows,
    out: Rows,
    lse: Floats,
    cu_seqlens_q: NDArray[np.int32],
    cu_seqlens_k: NDArray[np.int32],
    dq: Rows,
    dk: Rows,
    dv: Rows,
    *,
    lse_rest: Floats | None = None,
    grad_lse: Floats | None = None,
    dbias: Floats | None = None,
    dslopes: Floats | None = None,
    **terms: Unpack[Terms],
) -> None:
    """Compute the gradients of attention_forward; those of a query without keys are 0, whatever its grad_out.

    Args:
        grad_out: (Tq, H, D) of q's dtype.
        grad_lse: (H, Tq); None for zeros.
        q, k, v, cu_seqlens_q, cu_seqlens_k, terms: the arguments of forward.
        out, lse, lse_rest: the results of forward; lse_rest may be None for zeros.
        dq, dk, dv: written, with the shapes and dtype of q, k and v.
        dbias: written, with the shape of key_bias; None if it is not wanted.
        dslopes: (H,), written; None if it is not wanted.
    """

def masked_attention_backward(
    grad_out: Rows,
    q: Rows,
    k: Rows,
    v: Rows,
    out: Rows,
    lse: Floats,
    keep: NDArray[np.bool_],
    dq: Rows,
    dk: Rows,
    dv: Rows,
    *,
    skip_queries: bool = True,
    lse_rest: Floats | None = None,
    grad_lse: Floats | None = None,
    dbias: Floats | None = None,
    dslopes: Floats | None = None,
    **terms: Unpack[Terms],
) -> None:
    """Compute the gradients of masked_attention_forward, 0 for background rows; arguments as in attention_backward."""

def readout_forward(
    q: Rows,
    k: Rows,
    v: Rows,
    cu_seqlens: NDArray[np.int32],
    out: Rows,
    lse: Floats,
    *,
    rows: Floats | None = None,
    lse_rest: Floats | None = None,
    **terms: Unpack[Terms],
) -> None:
    """Compute the attention of R queries of each sequence over its packed keys; K and V are read once.

    Args:
        q: (B, R, H, D), R from 1 to 16.
        k, v: (T, H, D).
        cu_seqlens: (B + 1,), from 0 to T, the boundaries of the key sequences.
        out: (B, R, H, D), written; 0 for sequences without keys.
        lse: (B, R, H), written; −inf for sequences without keys.
        lse_rest: (B, R, H), written: the part that rounding took from lse, which the rows and the backward need.
        rows: (R, H, T), contiguous along T, written: the softmax weight of each token in the rows of its sequence.
    """

def readout_backward(
    grad_out: Rows,
    q: Rows,
    k: Rows,
    v: Rows,
    out: Rows,
    lse: Floats,
    cu_seqlens: NDArray[np.int32],
    dq: Rows,
    dk: Rows,
    dv: Rows,
    *,
    lse_rest: Floats | None = None,
    grad_lse: Floats | None = None,
    grad_rows: Floats | None = None,
    dbias: Floats | None = None,
    dslopes: Floats | None = None,
    **terms: Unpack[Terms],
) -> None:
    """Compute the gradients of readout_forward.

    Args:
        grad_out: (B, R, H, D) of q's dtype.
        grad_lse: (B, R, H); None for zeros.
        grad_rows: (R, H, T), contiguous along T; None for zeros. With it K is read twice.
        q, k, v, cu_seqlens, terms: the arguments of forward.
        out, lse, lse_rest: the results of forward; lse_rest may be None for zeros.
        dq, dk, dv: written, with the shapes and dtype of q, k and v.
        dbias: written, with the shape of key_bias; None if it is not wanted.
        dslopes: (H,), written; None if it is not wanted.
    """

def token_relevance(
    q: Rows,
    k: Rows,
    v: Rows,
    out: Rows,
    lse: Floats,
    grad_out: Rows,
    cu_seqlens: NDArray[np.int32],
    relevance: Floats,
    *,
    key_origin: Rows | None = None,
    value_origin: Rows | None = None,
    **terms: Unpack[Terms],
) -> None:
    """Compute the relevance of every token to every class, as specified by ``reference.token_relevance``.

    Args:
        q, k, v, cu_seqlens, terms: the arguments of readout_forward.
        out, lse: the results of readout_forward.
        grad_out: (K, B, R, H, D) of q's dtype, the gradient of each class's score with respect to out.
        relevance: (K, T), contiguous along T, written.
        key_origin, value_origin: (H, D) or (T, H, D) of q's dtype; None for 0.
    """

class LinearLayer:
    """A linear layer with weights packed for an instruction set. Its products are the same for any number of threads.

    Sums and bias are float32. Where a processor cannot multiply bfloat16, it is multiplied as float32.

    Args:
        weight: (O, I), contiguous along I; it is copied. In bfloat16 I is even.
        bias: (O,); None for none.
        instruction_set: one of instruction_sets(); "", the default, for the best.
        threads: number of threads that pack; 0 for one per core.

    Raises:
        TypeError, ValueError, MemoryError: as in attention_forward, like both methods below.
    """

    def __init__(
        self, weight: Floats, bias: Floats | None = None, *, instruction_set: str = "", threads: int = 0
    ) -> None: ...
    def apply(self, x: Floats, out: Floats, *, activation: str = "none", threads: int = 0) -> None:
        """Write activation(x Wᵀ + b) to out; a row of the result does not depend on the other rows.

        Args:
            x: (T, I), contiguous along I, in the dtype of the weights.
            out: (T, O), contiguous along O, in the same dtype, written. It must not share memory with x.
            activation: "none", "gelu", or "gelu_tanh" for GELU by tanh.
            threads: number of threads; 0 for one per core.
        """

class EncoderBlock:
    """A pre-norm transformer block with packed weights, whose norms, sums and residuals are float32.

    Args:
        norm1_weight, norm1_bias, norm2_weight, norm2_bias: (C,); None for ones and zeros.
        norm1_eps, norm2_eps: ε of the norms.
        qkv, proj, fc1, fc2: layers C → 3C, C → C, C → F and F → C, packed for one instruction set, of one dtype, which
            is attention's too. The output features of qkv are (3, H, D).
        scale1, scale2: (C,), the factors of the two updates; None for ones.
        heads: H; D = C / H is 16 to 256 in steps of 8.
        activation: of fc1, as in LinearLayer.apply.
    """

    def __init__(
        self,
        *,
        norm1_weight: Floats | None,
        norm1_bias: Floats | None,
        norm1_eps: float,
        qkv: LinearLayer,
        proj: LinearLayer,
        scale1: Floats | None,
        norm2_weight: Floats | None,
        norm2_bias: Floats | None,
        norm2_eps: float,
        fc1: LinearLayer,
        fc2: LinearLayer,
        scale2: Floats | None,
        heads: int,
        activation: str,
    ) -> None: ...
    def apply(self, x: Floats, cu_seqlens: NDArray[np.int32], out: Floats, *, threads: int = 0) -> None:
        """Write the block's output on packed sequences to out.

        Args:
            x: (T, C) float32, contiguous along C.
            cu_seqlens: (B + 1,), from 0 to T.
            out: (T, C) float32, contiguous along C, written; it may be x.
            threads: number of threads; 0 for one per core.
        """

def move_rows(
    source: NDArray[np.uint8],
    index: NDArray[np.int64] | NDArray[np.int32],
    result: NDArray[np.uint8],
    *,
    threads: int = 0,
) -> None:
    """Write rows of the source by index: row i of the result is row ``index[i]``, or zeros where that is −1.

    Args:
        source: (rows, bytes of a row), each row without gaps.
        index: (count,), each −1 or a row of the source; rows may repeat.
        result: (count, bytes of a row), written, each row without gaps; incomplete if an index is wrong.
        threads: number of threads; 0 for one per core. The result does not depend on it.

    Raises:
        TypeError: an argument is of the wrong type or dtype.
        ValueError: a shape, stride or index is wrong.
    """

def kept_tokens(keep: NDArray[np.bool_]) -> tuple[NDArray[np.int64], NDArray[np.int32], int, NDArray[np.int32]]:
    """Return the positions of a mask's kept tokens, as in ``maskattn.packing.Packing``.

    Args:
        keep: (B, N), C-contiguous.

    Returns:
        indices (T,), cu_seqlens (B + 1,), the longest sequence and row_of_token (B·N,).

    Raises:
        TypeError: the mask is not a bool numpy array.
        ValueError: the mask does not have two axes or has gaps, or more than 2147483647 tokens are kept.
    """

def share_team(library: str) -> bool:
    """Run on the threads of an OpenMP runtime that this process has loaded; return whether it was found.

    Args:
        library: file of the runtime, GNU's or a compatible one.
    """
