"""Users' alternatives and our own attention; each raises :class:`UnsupportedError` for cases that it does not support.

A contender turns a problem into a function and the tensors that it takes. Work that a model does once (packing, block
masks, compilation) is done beforehand, unless the contender's name says otherwise.

Dimension key: B sequences, N tokens, T kept tokens, H heads, D head width.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import lru_cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.gpu.points import Problem
from maskattn import masked_attention, packed_attention

__all__ = ["IMPLS", "PEERS", "UnsupportedError", "attention_of", "contenders", "flex_mask", "is_packed", "ours"]

Attention = tuple[Callable[..., Tensor], list[Tensor]]

# Our implementations on each device.
IMPLS = {"cpu": ("cpu", "torch"), "cuda": ("triton",)}

# Largest memory for the N×N scores of all heads.
DENSE_BYTES = {"cpu": 2 * 2**30, "cuda": 32 * 2**30}


class UnsupportedError(Exception):
    """A contender does not support a case; the message gives the reason."""


def _ours_packed(problem: Problem, impl: str) -> Attention:
    """Return our attention on packed tokens, as in a model that packs them before the first block."""
    bounds = problem.bounds
    return lambda q, k, v: packed_attention(q, k, v, *bounds, impl=impl), problem.rows


def _ours_masked(problem: Problem, impl: str) -> Attention:
    """Return our attention on dense tensors and a mask, as in a single layer."""
    keep = problem.keep
    return lambda q, k, v: masked_attention(q, k, v, keep, impl=impl), problem.dense


def _sdpa_bool_mask(problem: Problem, backend: SDPBackend) -> Attention:
    if backend == SDPBackend.MATH:
        needs_scores(problem)
    if backend == SDPBackend.FLASH_ATTENTION:
        _only(problem, "cpu", "on CUDA the flash backend takes no mask")
    else:
        _backend_exists(problem, backend)
    mask = problem.keep[:, None, None, :]
    return _with_backend(backend, lambda q, k, v: F.scaled_dot_product_attention(q, k, v, mask)), problem.dense


def _sdpa_unmasked(problem: Problem) -> Attention:
    """Return attention over all tokens, background included, which shows the cost of ignoring the mask."""
    return lambda q, k, v: F.scaled_dot_product_attention(q, k, v), problem.dense


def _sdpa_per_sequence(problem: Problem, backend: SDPBackend) -> Attention:
    """Return attention on packed tokens: one batched call if all sequences have the same length, else one call each."""
    _backend_exists(problem, backend)
    lengths, batch = problem.lengths, problem.point.batch
    if backend == SDPBackend.CUDNN_ATTENTION and len(set(lengths)) > 16:
        raise UnsupportedError(f"plans anew for each of {len(set(lengths))} lengths")

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if len(set(lengths)) == 1:
            q, k, v = (x.unflatten(0, (batch, -1)).transpose(1, 2) for x in (q, k, v))
            return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(0, 1)
        pieces = zip(*(x.split(lengths) for x in (q, k, v)), strict=True)
        return torch.cat([_one_sequence(*piece) for piece in pieces])

    return _with_backend(backend, attend), problem.rows


def _one_sequence(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v)[0].transpose(0, 1)


def _varlen_attn(problem: Problem) -> Attention:
    _needs("torch.nn.attention.varlen")
    _only(problem, "cuda", "runs on CUDA alone")
    from torch.nn.attention.varlen import varlen_attn

    bounds = problem.bounds
    return lambda q, k, v: varlen_attn(q, k, v, *bounds), problem.rows


@lru_cache(maxsize=1)
def _compiled_flex_attention() -> Callable[..., Tensor]:
    import torch._dynamo.config
    import torch._functorch.config
    from torch.nn.attention.flex_attention import flex_attention

    # The backward is timed repeatedly on one graph, whose buffers must be kept.
    torch._functorch.config.donated_buffer = False
    torch._dynamo.config.recompile_limit = 1000
    return torch.compile(flex_attention, dynamic=False)


def flex_mask(problem: Problem) -> Callable[[], object]:
    """Return a function that makes FlexAttention's block mask of kept keys and kept queries."""
    from torch.nn.attention.flex_attention import create_block_mask

    keep, tokens, batch, device = problem.keep, problem.point.tokens, problem.point.batch, problem.device

    def both_kept(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return keep[b, query] & keep[b, key]

    # The compiled function does not hold an N×N mask.
    return lambda: create_block_mask(both_kept, batch, None, tokens, tokens, device=device, _compile=device == "cuda")


def _flex(problem: Problem, mask_in_call: bool) -> Attention:
    make_mask, attend = flex_mask(problem), _compiled_flex_attention()
    if mask_in_call:
        return lambda q, k, v: attend(q, k, v, block_mask=make_mask()), problem.dense
    mask = make_mask()
    return lambda q, k, v: attend(q, k, v, block_mask=mask), problem.dense


def _nested(problem: Problem) -> Attention:
    """Return attention in torch's jagged layout; the view that wraps the rows is part of the call."""
    packing, shortest = problem.packing, min(problem.lengths)
    offsets = packing.cu_seqlens.long()

    def jagged(x: Tensor) -> Tensor:
        nested = torch.nested.nested_tensor_from_jagged(x, offsets, min_seqlen=shortest, max_seqlen=packing.max_seqlen)
        return nested.transpose(1, 2)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(jagged(q), jagged(k), jagged(v)).transpose(1, 2).values()

    return attend, problem.rows


def _flash_attn(problem: Problem, package: str) -> Attention:
    _needs(package)
    attend = importlib.import_module(package).flash_attn_varlen_func
    bounds = problem.bounds

    def first(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = attend(q, k, v, *bounds)
        return out[0] if isinstance(out, tuple) else out

    return first, problem.rows


def _xformers(problem: Problem) -> Attention:
    _needs("xformers.ops")
    from xformers.ops import memory_efficient_attention
    from xformers.ops.fmha import BlockDiagonalMask

    bias = BlockDiagonalMask.from_seqlens(problem.lengths)
    return lambda q, k, v: memory_efficient_attention(q[None], k[None], v[None], attn_bias=bias)[0], problem.rows


PEERS: dict[str, Callable[[Problem], Attention]] = {
    "sdpa per sequence, flash": partial(_sdpa_per_sequence, backend=SDPBackend.FLASH_ATTENTION),
    "sdpa per sequence, cudnn": partial(_sdpa_per_sequence, backend=SDPBackend.CUDNN_ATTENTION),
    "sdpa bool mask, efficient": partial(_sdpa_bool_mask, backend=SDPBackend.EFFICIENT_ATTENTION),
    "sdpa bool mask, cudnn": partial(_sdpa_bool_mask, backend=SDPBackend.CUDNN_ATTENTION),
    "sdpa bool mask, flash": partial(_sdpa_bool_mask, backend=SDPBackend.FLASH_ATTENTION),
    "sdpa bool mask, math": partial(_sdpa_bool_mask, backend=SDPBackend.MATH),
    "sdpa unmasked": _sdpa_unmasked,
    "varlen_attn": _varlen_attn,
    "nested, jagged": _nested,
    "flash-attn 3": partial(_flash_attn, package="flash_attn_interface"),
    "flash-attn 2": partial(_flash_attn, package="flash_attn"),
    "xformers": _xformers,
    "flex, block mask": partial(_flex, mask_in_call=False),
    "flex, block mask made in the call": partial(_flex, mask_in_call=True),
}


def ours(kind: str, impls: tuple[str, ...]) -> list[str]:
    """Return our contenders' names, one for each impl, such as "maskattn packed, triton"."""
    return [f"maskattn {kind}, {impl}" for impl in impls]


def contenders(impls: tuple[str, ...]) -> list[str]:
    """Return the names of our contenders and every peer."""
    return [*ours("packed", impls), *ours("masked", impls), *PEERS]


def attention_of(contender: str, problem: Problem) -> Attention:
    """Return a function of q, k and v, and these tensors: (T, H, D) for packed contenders, (B, H, N, D) for others.

    Raises:
        UnsupportedError: the contender does not support the problem on this machine.
    """
    if contender.startswith("maskattn"):
        kind, impl = contender.removeprefix("maskattn ").split(", ")
        return {"packed": _ours_packed, "masked": _ours_masked}[kind](problem, impl)
    return PEERS[contender](problem)


def is_packed(inputs: list[Tensor]) -> bool:
    """Return whether a contender takes packed tensors."""
    return inputs[0].ndim == 3


def needs_scores(problem: Problem, copies: int = 2) -> None:
    """Refuse a contender that holds the N×N scores of all heads, if they take too much memory."""
    p = problem.point
    size = copies * p.batch * p.heads * p.tokens**2 * problem.dtype.itemsize
    if size > DENSE_BYTES[problem.device]:
        raise UnsupportedError(f"holds N×N scores: {size / 2**30:.0f} GiB")


def _with_backend(backend: SDPBackend, attend: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return attend(q, k, v)

    return run


def _backend_exists(problem: Problem, backend: SDPBackend) -> None:
    if problem.device == "cpu" and backend not in (SDPBackend.MATH, SDPBackend.FLASH_ATTENTION):
        raise UnsupportedError("no such backend on a CPU")


def _only(problem: Problem, device: str, reason: str) -> None:
    if problem.device != device:
        raise UnsupportedError(reason)


def _needs(module: str) -> None:
    try:
        found = importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        found = False
    if not found:
        raise UnsupportedError(f"{module.split('.')[0]} is not installed" if "torch" not in module else "newer torch")
