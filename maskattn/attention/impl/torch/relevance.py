"""The relevance of tokens in eager torch, a bounded number of keys at a time; ``reference.py`` has the formula.

Dimension key: B sequences, T packed tokens, R readout queries, H heads, D head width, K classes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from maskattn.attention.impl.torch.scores import as_packed, options_of, scores, wide_dtype
from maskattn.operands import QKV, ClassGradients, KeySequences, Origins
from maskattn.options import Options

__all__ = ["token_relevance"]

_PRODUCTS_AT_ONCE = 1 << 22  # 16 MiB of float32


def token_relevance(
    qkv: QKV, classes: ClassGradients, origins: Origins, where: KeySequences, options: Options
) -> Tensor:
    """The relevance (K, T) of every token for every class."""
    q, k, v, wide = qkv.q, qkv.k, qkv.v, wide_dtype(qkv.q)
    K, B, R, H, _ = classes.grad_out.shape
    relevance = torch.zeros((K, k.shape[0]), dtype=wide, device=k.device)
    _, _, packed_options = as_packed(qkv, where, options)
    starts = where.cu_seqlens.tolist()
    step = max(1, _PRODUCTS_AT_ONCE // max(1, K * R * H))
    for b in range(B):
        q_RHD, g_KRHD = q[b].to(wide), classes.grad_out[:, b].to(wide)
        read_KRH = (classes.out[b].to(wide) * g_KRHD).sum(-1)
        lse_HR1 = classes.lse[b].T[..., None].to(wide)
        for first in range(starts[b], starts[b + 1], step):
            keys = slice(first, min(first + step, starts[b + 1]))
            moved_k, moved_v = _moved(k, origins.key_origin, keys), _moved(v, origins.value_origin, keys)
            own = options_of(packed_options, slice(b * R, (b + 1) * R), keys)
            score_HRT, derivatives = scores(q_RHD, k[keys].to(wide), own)
            p_RHT = (score_HRT - lse_HR1.masked_fill(lse_HR1.isinf(), 0)).exp().transpose(0, 1)
            change_HRT = options.scale * torch.einsum("rhd,thd->hrt", q_RHD, moved_k)
            change_RHT = derivatives.along_product(change_HRT).transpose(0, 1)
            from_score = torch.einsum("crhd,thd->crht", g_KRHD, v[keys].to(wide)) - read_KRH[..., None]
            from_value = torch.einsum("crhd,thd->crht", g_KRHD, moved_v)
            relevance[:, keys] = (p_RHT * (from_value + from_score * change_RHT)).sum((1, 2))
    return relevance


def _moved(x: Tensor, origin: Tensor | None, keys: slice) -> Tensor:
    """The derivative of some keys or values as their tokens are scaled."""
    wide = wide_dtype(x)
    own = x[keys].to(wide)
    return own if origin is None else own - (origin[keys] if origin.ndim == 3 else origin).to(wide)
