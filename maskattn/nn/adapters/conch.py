"""Conversion of the layers after CONCH's trunk: attention pooling, norm and projection.

The trunk is a timm model. One query of its own width reads all tokens after the trunk's norm, the class token too
(``attn_pool_contrast``); then follow ``ln_contrast`` and the projection, x @ ``proj_contrast``. The layers that read
the tokens for captions (``attn_pool_caption``, ``ln_caption``) are left out.

The layout follows vision_tower.py, transformer.py and coca_model.py of mahmoodlab/CONCH 141cc09.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from maskattn.nn.adapters.conversion import refuse

__all__ = ["HEAD_WIDTH", "has_conch_pool", "pool_of_conch", "without_caption_pool"]

HEAD_WIDTH = 64
"""Channels of each head of the trunk, which the tensors do not record; the pool has 8 heads, our default."""

_POOL = "attn_pool_contrast."
_IN_CAPTION_POOL = ("attn_pool_caption.", "ln_caption.")
_RENAMED = {
    f"{theirs}.{part}": f"attn_pool.{ours}.{part}"
    for theirs, ours in (
        (f"{_POOL}ln_q", "norm_q"),
        (f"{_POOL}ln_k", "norm_k"),
        (f"{_POOL}attn.out_proj", "proj"),
        ("ln_contrast", "norm"),
    )
    for part in ("weight", "bias")
}
_WEIGHTS = tuple(f"{_POOL}attn.{name}_proj_weight" for name in "qkv")
_JOINT, _BIAS, _QUERY, _PROJECTION = (
    f"{_POOL}attn.in_proj_weight",
    f"{_POOL}attn.in_proj_bias",
    f"{_POOL}query",
    "proj_contrast",
)


def has_conch_pool(keys: Iterable[str]) -> bool:
    """Return whether these are the keys of an image tower with CONCH's attention pooling."""
    return any(_POOL in key for key in keys)


def without_caption_pool(after_trunk: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors after the trunk without those of the layers for captions."""
    return {key: x for key, x in after_trunk.items() if not key.startswith(_IN_CAPTION_POOL)}


def pool_of_conch(after_trunk: Mapping[str, Tensor], prefix: str, name: str) -> dict[str, Tensor]:
    """Return the layers after the trunk as the state of our pool and, with a projection, of our head.

    Args:
        after_trunk: the tensors after the trunk, without the tower's prefix.
        prefix: the tower's prefix, for messages.
        name: the checkpoint's name in messages.

    Raises:
        UnsupportedModelError: a key is missing or unknown, or there are several queries.
    """
    # torch's attention keeps the three weights in one if the query is as wide as the tokens.
    weights = (_JOINT,) if _JOINT in after_trunk else _WEIGHTS
    known = {*_RENAMED, *weights, _BIAS, _QUERY, _PROJECTION}
    wrong = [f"it has no {prefix}{key}" for key in sorted(known - after_trunk.keys() - {_PROJECTION})]
    wrong += [f"{prefix}{key} has no place" for key in sorted(after_trunk.keys() - known)]
    if _QUERY in after_trunk and len(after_trunk[_QUERY]) != 1:
        wrong.append(f"{prefix}{_QUERY} is of {len(after_trunk[_QUERY])} queries, and ours has one")
    refuse(name, wrong)
    q, k, v = after_trunk[_JOINT].chunk(3) if _JOINT in after_trunk else (after_trunk[key] for key in _WEIGHTS)
    q_bias, kv_bias = after_trunk[_BIAS].tensor_split([len(q)])
    ours = {_RENAMED[key]: x for key, x in after_trunk.items() if key in _RENAMED}
    ours |= {"attn_pool.query": after_trunk[_QUERY][None], "attn_pool.q.weight": q, "attn_pool.q.bias": q_bias}
    ours |= {"attn_pool.kv.weight": torch.cat([k, v]), "attn_pool.kv.bias": kv_bias}
    if _PROJECTION in after_trunk:
        ours["head.weight"] = after_trunk[_PROJECTION].T.contiguous()
        ours["head.bias"] = ours["head.weight"].new_zeros(len(ours["head.weight"]))
    return ours
