"""What a user would pick instead, by name: each takes dense (B, H, N, D) tensors and a (B, N) mask of kept tokens.

Dimension key: B sequences, N tokens, H heads, D head width.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from maskattn import Packing, masked_attention, packed_attention

__all__ = ["CONTENDERS", "prepare"]

CONTENDERS = ("packed", "masked", "sdpa bool mask", "sdpa unmasked")


def prepare(
    contender: str, q: Tensor, k: Tensor, v: Tensor, keep: Tensor
) -> tuple[Callable[..., Tensor], list[Tensor]]:
    """A function of tensors and those tensors, all work that a model does once already done.

    "packed" is ours inside a model that packed its tokens before the first block; "masked" packs in the call.
    """
    if contender == "packed":
        packing = Packing.from_keep(keep)
        rows = [x.transpose(1, 2).flatten(0, 1)[packing.indices].clone() for x in (q, k, v)]
        lengths = packing.cu_seqlens, packing.cu_seqlens, packing.max_seqlen, packing.max_seqlen
        return lambda q, k, v: packed_attention(q, k, v, *lengths), rows
    if contender == "masked":
        return lambda q, k, v: masked_attention(q, k, v, keep), [q, k, v]
    mask = keep[:, None, None, :] if contender == "sdpa bool mask" else None
    return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=mask), [q, k, v]


def random_inputs(tokens: int, kept: float, heads: int = 6, width: int = 64, batch: int = 1) -> tuple[Tensor, ...]:
    """Seeded q, k, v (B, H, N, D) and keep (B, N) with about the share ``kept`` of tokens."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(batch, heads, tokens, width, generator=generator) for _ in range(3))
    return q, k, v, torch.rand(batch, tokens, generator=generator) < kept
