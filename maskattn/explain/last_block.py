"""The last block as explanations take it: from the input T of its attention on.

Where the block is as it was built, its own methods do this. Where something hangs on it (a hook, an adapter, a
parametrisation), the block is called, and T is put in the place of what its first norm gives.

Dimension key: B images, T packed tokens, K outputs, C channels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from maskattn.nn.blocks import PackedTokens, is_as_built
from maskattn.nn.vit import VisionTransformer
from maskattn.shapes import Float

__all__ = ["input_of_attention", "output_from", "output_with_values", "reads_class_token_alone", "values_and_origin"]


def reads_class_token_alone(model: VisionTransformer) -> bool:
    """Whether the prediction is a function of one attention row of the last block, read from its weights."""
    return model.global_pool == "token" and is_as_built(model.last_block)


def input_of_attention(model: VisionTransformer, tokens: PackedTokens) -> Float[Tensor, "T C"]:
    """T: what the last block's first norm gives.

    Args:
        model: the vision transformer.
        tokens: what ``model.before_last_block`` gave.
    """
    block = model.last_block
    if is_as_built(block):
        return block.norm1(tokens.rows_TC)
    seen: list[Tensor] = []
    _call(block, tokens, lambda module, inputs, output: seen.append(output))
    return seen[0]


def output_from(
    model: VisionTransformer, tokens: PackedTokens, normed_TC: Float[Tensor, "T C"]
) -> Float[Tensor, "B K"]:
    """The model's output with ``normed_TC`` for T, every row of it differentiable. Arguments as above."""
    block = model.last_block
    if is_as_built(block):
        return model.pool(block.mix(tokens, normed_TC))
    return model.pool(tokens.with_rows(_call(block, tokens, lambda module, inputs, output: normed_TC)))


def values_and_origin(
    model: VisionTransformer, tokens: PackedTokens
) -> tuple[Float[Tensor, "T C"], Float[Tensor, "1 C"]]:
    """The last attention's values, and what they are where a token is 0. Arguments as above."""
    seen: list[Tensor] = []
    _call(model.last_block, tokens, lambda module, inputs, output: seen.append(output), part="attn.qkv")
    qkv = model.last_block.attn.qkv
    origin = qkv(seen[0].new_zeros(1, model.embed_dim)) if seen[0].numel() else seen[0].new_zeros(1, seen[0].shape[1])
    return seen[0].chunk(3, dim=1)[2], origin.chunk(3, dim=1)[2]


def output_with_values(
    model: VisionTransformer, tokens: PackedTokens, values_TC: Float[Tensor, "T C"]
) -> Float[Tensor, "B K"]:
    """The model's output with other values in its last attention, whose weights stay; differentiable in them."""

    def put_in(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        return torch.cat([output[:, : 2 * values_TC.shape[1]], values_TC], dim=1)

    return model.pool(tokens.with_rows(_call(model.last_block, tokens, put_in, part="attn.qkv")))


_WHERE = {"norm1": "first norm, norm1", "attn.qkv": "attention's projection, attn.qkv"}


def _call(block: nn.Module, tokens: PackedTokens, hook: Any, part: str = "norm1") -> Tensor:
    """The block's output, with a hook on one of its parts after all others that hang there."""
    norm: Any = block
    for name in part.split("."):
        norm = getattr(norm, name, None)
    if not isinstance(norm, nn.Module):
        raise ValueError(
            f"an explanation differentiates at the last block's {_WHERE[part]}, and this model's last block "
            f"{type(block).__name__} has none; explain the model before its blocks are replaced"
        )
    called: list[bool] = []

    def counted(module: nn.Module, inputs: Any, output: Any) -> Any:
        called.append(True)
        return hook(module, inputs, output)

    handle = norm.register_forward_hook(counted)
    try:
        output = block(tokens.rows_TC, tokens)
    finally:
        handle.remove()
    if len(called) != 1:
        raise ValueError(
            f"an explanation differentiates at the last block's {_WHERE[part]}, and this model's last block calls "
            f"it {len(called)} times; explain the model before its blocks are replaced"
        )
    return output
