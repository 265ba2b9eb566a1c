"""The building blocks of a vision transformer, over packed tokens.

Modules and parameters have timm's names, and therefore timm's state-dict keys.

Dimension key: B images, N = H·W grid tokens of each, P prefix tokens (class token, registers), T packed tokens
(prefix tokens included), R tokens that are read, K values of a flattened patch, C channels, H heads, D head width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

from maskattn.distributed.shared import of_first_process
from maskattn.nn.inference_linear import multiplies_natively, product
from maskattn.nn.mlps import ACTIVATIONS, MLPS
from maskattn.nn.native_blocks import apply_whole
from maskattn.nn.packed_tokens import PackedTokens
from maskattn.nn.plain_modules import forwards_of, has_plain_parameters, is_plain
from maskattn.nn.self_attention import Attention, AttentionOptions
from maskattn.packing import Packing, is_jit_traced
from maskattn.shapes import Float
from maskattn.transforms import is_transformed

__all__ = [
    "Attention",
    "AttentionOptions",
    "Block",
    "BlockOptions",
    "ClassTokenAttention",
    "DropPath",
    "LayerScale",
    "PackedTokens",
    "PatchEmbedding",
    "is_as_built",
]


@dataclass(frozen=True)
class ClassTokenAttention:
    """The attention of one block's class tokens to all tokens.

    Attributes:
        q_B1HD: (B, 1, H, D), the queries of the class tokens, unscaled.
        k_THD, v_THD: (T, H, D), the keys and values of all tokens.
        out_B1HD: (B, 1, H, D), the attention output at the class tokens.
        lse_B1H: (B, 1, H), the log-sum-exp of their scores.
        key_origin, value_origin: k and v minus their derivatives with respect to the scale of their token, (H, D) or
            (T, H, D); None for 0.
    """

    q_B1HD: Float[Tensor, "B 1 H D"]
    k_THD: Float[Tensor, "T H D"]
    v_THD: Float[Tensor, "T H D"]
    out_B1HD: Float[Tensor, "B 1 H D"]
    lse_B1H: Float[Tensor, "B 1 H"]
    key_origin: Float[Tensor, "..."] | None
    value_origin: Float[Tensor, "..."] | None


@dataclass(frozen=True)
class BlockOptions:
    """The options of a block other than its width and its number of heads, under timm's names.

    Attributes:
        attention: the options of its attention layer.
        mlp_ratio: the number of the MLP's hidden features per channel.
        mlp_layer: a key of :data:`maskattn.nn.mlps.MLPS`.
        act_layer: a key of :data:`maskattn.nn.mlps.ACTIVATIONS`.
        scale_mlp_norm: whether the MLP's hidden features are normalised.
        init_values: the initial value of LayerScale; None leaves LayerScale out.
    """

    attention: AttentionOptions = field(default_factory=AttentionOptions)
    mlp_ratio: float = 4.0
    mlp_layer: str = "mlp"
    act_layer: str = "gelu"
    scale_mlp_norm: bool = False
    init_values: float | None = None


class LayerScale(nn.Module):
    """A learnt factor for each channel."""

    def __init__(self, dim: int, init: float) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), init))

    def forward(self, x: Tensor) -> Tensor:
        """Scale the channels, (..., C) → (..., C)."""
        return x * self.gamma


class DropPath(nn.Module):
    """Stochastic depth: in training, the residual branch of some images is dropped for all of their tokens, as in timm.

    Args:
        share: the probability that an image's branch is dropped; branches that stay are divided by 1 − share.
    """

    def __init__(self, share: float) -> None:
        super().__init__()
        self.share = share

    def forward(self, x: Tensor, tokens: PackedTokens) -> Tensor:
        """Drop the branches of some images; ``x`` has packed rows (T, C) or R rows per image (B, R, C)."""
        if not self.training or self.share == 0:
            return x
        stays = 1 - self.share
        factor_B = x.new_empty(tokens.packing.batch_size).bernoulli_(stays).div_(stays)
        if tokens.shards is not None:
            factor_B = of_first_process(factor_B, tokens.shards)
        if x.ndim == 2:
            return x * factor_B.index_select(0, tokens.packing.sequence_of_token)[:, None]
        return x * factor_B[:, None, None]


class Block(nn.Module):
    """A pre-norm transformer block over packed tokens.

    Args:
        dim, num_heads: C and H.
        options: see :class:`BlockOptions`.
        drop_path: the probability that an image's residual branch is dropped in training.
    """

    def __init__(self, dim: int, num_heads: int, options: BlockOptions, drop_path: float = 0.0) -> None:
        super().__init__()
        attention, init = options.attention, options.init_values
        eps, drop = attention.norm_eps, attention.proj_drop_rate
        self.norm1 = nn.LayerNorm(dim, eps=eps)
        self.attn = Attention(dim, num_heads, attention)
        self.ls1 = nn.Identity() if init is None else LayerScale(dim, init)
        self.drop_path1 = DropPath(drop_path)
        self.norm2 = nn.LayerNorm(dim, eps=eps)
        self.mlp = MLPS[options.mlp_layer](
            dim,
            int(dim * options.mlp_ratio),
            options.act_layer,
            attention.proj_bias,
            eps if options.scale_mlp_norm else None,
            drop,
        )
        self.ls2 = nn.Identity() if init is None else LayerScale(dim, init)
        self.drop_path2 = DropPath(drop_path)

    def forward(self, rows_TC: Float[Tensor, "T C"], tokens: PackedTokens) -> Float[Tensor, "T C"]:
        """Run the block, (T, C) → (T, C); ``tokens`` gives the layout of the rows, and its own rows are not read."""
        natively = multiplies_natively(rows_TC, tokens) is not None and is_as_built(self)
        whole = apply_whole(self, rows_TC, tokens) if natively else None
        return self._mixed(rows_TC, self.norm1(rows_TC), tokens) if whole is None else whole

    def mix(self, tokens: PackedTokens, normed_TC: Float[Tensor, "T C"]) -> PackedTokens:
        """Run the block from its attention's input on; explanations differentiate with respect to ``normed_TC``."""
        return tokens.with_rows(self._mixed(tokens.rows_TC, normed_TC, tokens))

    def _mixed(self, rows_TC: Tensor, normed_TC: Tensor, tokens: PackedTokens) -> Tensor:
        update = self.ls1(self.attn(normed_TC, tokens))
        return self.feed_forward(rows_TC + self.drop_path1(update, tokens), tokens)

    def read(self, tokens: PackedTokens) -> Float[Tensor, "B 1 C"]:
        """Compute the block's output at the class token alone: one attention row, and no MLP for any other token.

        It reads the layers' weights instead of calling them, so it equals a call only if :func:`is_as_built`.
        """
        operands = self._class_token_operands(self._normed(tokens))
        out = self._read(*operands, tokens, dropout_p=self.attn.dropout_p)
        return self.finish(tokens, cast(Tensor, out))

    def read_attention(
        self, tokens: PackedTokens, normed_TC: Float[Tensor, "T C"] | None = None
    ) -> ClassTokenAttention:
        """Compute the class token's attention with everything that its derivatives need.

        It reads the layers' weights, as :meth:`read` does. ``normed_TC`` replaces the output of the first norm.
        """
        normed = self._normed(tokens) if normed_TC is None else tokens.with_rows(normed_TC)
        q, k, v = self._class_token_operands(normed)
        out, lse = self._read(q, k, v, tokens, return_lse=True)
        origins = self.attn.key_and_value_origins(normed)
        return ClassTokenAttention(q, k, v, out, lse, *origins)

    def read_weights(self, tokens: PackedTokens) -> Float[Tensor, "H T"]:
        """Compute the softmax weight of each token in the attention row of its sequence's class token.

        Raises:
            ValueError: the attention layer has been replaced or patched.
        """
        if is_as_built(self):
            operands = self._class_token_operands(self._normed(tokens))
        else:
            q, k, v = self.attn.queries_keys_and_values(self._input_of_attention(tokens), tokens)
            operands = tokens.with_rows(q).first(), k, v
        _, rows_1HT = self._read(*operands, tokens, return_rows=True)
        return rows_1HT[0]

    def _input_of_attention(self, tokens: PackedTokens) -> Float[Tensor, "T C"]:
        """Return the attention's input when the block is called, after all hooks and adapters."""
        seen: list[Tensor] = []
        if type(self.attn) is not Attention or "forward" in self.attn.__dict__:
            raise ValueError(
                "an attention row is read from this package's own attention layer, and the last block's has been "
                f"replaced or patched, got {type(self.attn).__name__}; read the row before that, or use CDAM"
            )
        hook = self.attn.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
        try:
            self(tokens.rows_TC, tokens)
        finally:
            hook.remove()
        return seen[0]

    def _normed(self, tokens: PackedTokens) -> PackedTokens:
        return tokens.with_rows(self.norm1(tokens.rows_TC))

    def _class_token_operands(self, normed: PackedTokens) -> tuple[Tensor, Tensor, Tensor]:
        """Return q (B, 1, H, D) of the class tokens, unscaled, and k, v (T, H, D) of all tokens."""
        return self.attn.class_token_queries(normed.first()), *self.attn.keys_and_values(normed)

    def finish(self, tokens: PackedTokens, out_B1HD: Float[Tensor, "B 1 H D"]) -> Float[Tensor, "B 1 C"]:
        """Compute the block's output at the class tokens from their attention output per head.

        Args:
            tokens: the block's input.
            out_B1HD: the attention output at the class tokens.
        """
        update = self.ls1(self.attn.project(out_B1HD))
        return self.feed_forward(tokens.first() + self.drop_path1(update, tokens), tokens)

    def feed_forward(self, x: Tensor, tokens: PackedTokens) -> Tensor:
        """Run the block's second half, row by row: norm, MLP and residual; ``tokens`` gives the layout of the rows."""
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))), tokens)

    def _read(self, q: Tensor, k: Tensor, v: Tensor, tokens: PackedTokens, **options: Any) -> Any:
        # A class token has no position, so ALiBi adds nothing to its row.
        return tokens.read(q, k, v, impl=self.attn.impl, **options)


_BLOCK_PARTS = forwards_of(
    (Block, Attention, LayerScale, DropPath, *MLPS.values(), nn.Linear, nn.LayerNorm, nn.Identity, nn.Dropout)
)


def is_as_built(block: nn.Module) -> bool:
    """Return whether a block is unmodified, so that its output at the class token may be computed from its weights.

    A hook, a parametrisation, an adapter, and a replaced, quantised or sharded layer must be called, with every row.
    """
    return is_plain(block, _BLOCK_PARTS) and has_plain_parameters(cast(Block, block).attn.qkv)


_CONVOLUTION = forwards_of([nn.Conv2d])


class PatchEmbedding(nn.Module):
    """A linear layer on each patch, stored as timm's convolution ``proj`` so that timm's weights load.

    Args:
        patch_size: the side of a patch, in px.
        in_chans: the number of image channels.
        dim: C.
        bias: whether the layer has a bias.
        act: the activation after the layer, as in encoders of embeddings; None has none.
    """

    def __init__(self, patch_size: int, in_chans: int, dim: int, bias: bool = True, act: str | None = None) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.in_chans = in_chans
        self.act = act
        self.proj = nn.Conv2d(in_chans, dim, patch_size, stride=patch_size, bias=bias)

    def forward(self, patches_TK: Float[Tensor, "T K"]) -> Float[Tensor, "T C"]:
        """Embed flattened patches, (T, in_chans·p·p) → (T, C), with the patches' precision at least.

        Under autocast a layer's output has half the precision of its input; the sums of all blocks, which start here,
        must not.
        """
        if is_plain(self.proj, _CONVOLUTION) and has_plain_parameters(self.proj):
            rows = product(self.proj, patches_TK)
        else:
            rows = self.proj(patches_TK.unflatten(1, (-1, self.patch_size, self.patch_size))).flatten(1)
        rows = rows if self.act is None else ACTIVATIONS[self.act](rows)
        return rows.to(torch.promote_types(rows.dtype, patches_TK.dtype))

    def cut(self, images_BIHW: Tensor, packing: Packing) -> Float[Tensor, "T K"]:
        """Cut (B, in_chans, X, Y) images into their kept patches (T, in_chans·p·p); background pixels are not read."""
        height, width = self.grid_of(images_BIHW)
        B, channels = images_BIHW.shape[:2]
        p = self.patch_size
        images = self.whole_patches(images_BIHW)
        patches = _in_words(images.reshape(B, channels, height, p, width, p)).permute(0, 2, 4, 1, 3, 5)
        token = packing.indices % packing.num_tokens
        kept = patches[packing.sequence_of_token, token // width, token % width].flatten(1)
        return kept if kept.dtype == images.dtype else kept.view(images.dtype)

    def grid_of(self, images_BIHW: Tensor) -> tuple[int, int]:
        """Return the rows and columns of tokens in these images; pixels past the last complete patch do not count.


        Raises:
            ValueError: the images are not (B, in_chans, X, Y), or are smaller than a patch.
        """
        shape, p = tuple(images_BIHW.shape), self.patch_size
        if len(shape) != 4 or shape[1] != self.in_chans or min(shape[2:]) < p:
            raise ValueError(
                f"images must be (B, {self.in_chans}, X, Y), no smaller than a patch of {p} px, got x.shape={shape}"
            )
        return shape[2] // p, shape[3] // p

    def whole_patches(self, images_BIXY: Tensor) -> Float[Tensor, "B I X Y"]:
        """Return the images without the rows and columns past the last complete patch."""
        height, width = self.grid_of(images_BIXY)
        return images_BIXY[:, :, : height * self.patch_size, : width * self.patch_size]


# Bytes that torch moves as one element, each with a dtype of that size.
_WORDS = {16: torch.complex128, 8: torch.int64, 4: torch.int32, 2: torch.int16}


def _in_words(pixels: Tensor) -> Tensor:
    """View uint8 pixels as elements of several neighbours in the last dimension, which are indexed much faster.

    Pixels that cannot be viewed so, and those of traced or transformed programs, are returned as they are.
    """
    if pixels.dtype != torch.uint8 or pixels.stride(-1) != 1 or torch.compiler.is_compiling() or is_jit_traced():
        return pixels
    if type(pixels) is not Tensor or is_transformed((pixels,)):
        return pixels
    multiples = (pixels.shape[-1], pixels.storage_offset(), *pixels.stride()[:-1])
    width = math.gcd(*multiples, max(_WORDS))
    return pixels.view(_WORDS[width]) if width in _WORDS else pixels
