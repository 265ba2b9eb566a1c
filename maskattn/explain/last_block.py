"""The last block as a function of T, the input of its attention.

If the block is as it was built, its own methods compute this. If it has been changed (by a hook, an adapter or a
parametrisation), the block is called, and T replaces the output of its first norm.

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
    """Return whether the prediction depends only on the class token's attention row in an unmodified last block."""
    return model.global_pool == "token" and is_as_built(model.last_block)


def input_of_attention(model: VisionTransformer, tokens: PackedTokens) -> Float[Tensor, "T C"]:
    """Compute T, the output of the last block's first norm.

    Args:
        model: the vision transformer.
        tokens: the output of ``model.before_last_block``.

    Raises:
        ValueError: the last block has been replaced by one without that norm, or that does not call it once.
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
    """Compute the model's output with ``normed_TC`` for T, differentiable in every row.

    Other arguments and errors are as in :func:`input_of_attention`.
    """
    block = model.last_block
    if is_as_built(block):
        return model.pool(block.mix(tokens, normed_TC))
    return model.pool(tokens.with_rows(_call(block, tokens, lambda module, inputs, output: normed_TC)))


def values_and_origin(
    model: VisionTransformer, tokens: PackedTokens
) -> tuple[Float[Tensor, "T C"], Float[Tensor, "1 C"]]:
    """Compute the last attention's values, and the value of a token of 0.

    Arguments and errors are as in :func:`input_of_attention`.
    """
    seen: list[Tensor] = []
    _call(model.last_block, tokens, lambda module, inputs, output: seen.append(output), part="attn.qkv")
    qkv = model.last_block.attn.qkv
    origin = qkv(seen[0].new_zeros(1, model.embed_dim)) if seen[0].numel() else seen[0].new_zeros(1, seen[0].shape[1])
    return seen[0].chunk(3, dim=1)[2], origin.chunk(3, dim=1)[2]


def output_with_values(
    model: VisionTransformer, tokens: PackedTokens, values_TC: Float[Tensor, "T C"]
) -> Float[Tensor, "B K"]:
    """Compute the model's output with ``values_TC`` in its last attention, whose weights stay; differentiable in them.

    Other arguments and errors are as in :func:`input_of_attention`.
    """

    def put_in(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        return torch.cat([output[:, : 2 * values_TC.shape[1]], values_TC], dim=1)

    return model.pool(tokens.with_rows(_call(model.last_block, tokens, put_in, part="attn.qkv")))


_WHERE = {"norm1": "first norm, norm1", "attn.qkv": "attention's projection, attn.qkv"}


def _call(block: nn.Module, tokens: PackedTokens, hook: Any, part: str = "norm1") -> Tensor:
    """Return the block's output, with a hook on one of its submodules that runs after all others there."""
    submodule: Any = block
    for name in part.split("."):
        submodule = getattr(submodule, name, None)
    if not isinstance(submodule, nn.Module):
        raise ValueError(
            f"an explanation differentiates at the last block's {_WHERE[part]}, and this model's last block "
            f"{type(block).__name__} has none; explain the model before its blocks are replaced"
        )
    called: list[bool] = []

    def counted(module: nn.Module, inputs: Any, output: Any) -> Any:
        called.append(True)
        return hook(module, inputs, output)

    handle = submodule.register_forward_hook(counted)
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
