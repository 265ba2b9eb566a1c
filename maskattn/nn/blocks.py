"""The parts of a vision transformer, over packed tokens.

Module and parameter names are timm's, so that state-dict keys are too.

Dimension key: B images, N = H·W grid tokens of each, P prefix tokens (class token, registers), T packed tokens
(prefix tokens among them), R tokens that are read, K numbers of a flattened patch, C channels, H heads, D head width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maskattn.attention.api import packed_attention, readout
from maskattn.packing import Packing
from maskattn.shapes import Float

__all__ = ["Attention", "Block", "ClassTokenAttention", "LayerScale", "Mlp", "PackedTokens", "PatchEmbedding"]


@dataclass(frozen=True)
class PackedTokens:
    """Tokens on their way through the model.

    Attributes:
        rows_TC: (T, C), prefix and kept grid tokens, sequence after sequence.
        packing: where they lie in (B, P + N).
        grid_HW: rows and columns of the token grid.
        num_prefix: P.
    """

    rows_TC: Float[Tensor, "T C"]
    packing: Packing
    grid_HW: tuple[int, int]
    num_prefix: int

    def with_rows(self, rows_TC: Float[Tensor, "T C2"]) -> PackedTokens:
        """The same tokens with other features."""
        return PackedTokens(rows_TC, self.packing, self.grid_HW, self.num_prefix)

    def first(self) -> Float[Tensor, "B 1 C"]:
        """The first token of each sequence: the class token, where there is one."""
        return self.rows_TC[self.packing.cu_seqlens[:-1].long()][:, None]


@dataclass(frozen=True)
class ClassTokenAttention:
    """One block's attention as the class tokens see it.

    Attributes:
        q_B1HD: (B, 1, H, D), their queries, unscaled.
        k_THD, v_THD: (T, H, D), keys and values of all tokens.
        out_B1HD: (B, 1, H, D), what they read.
        lse_B1H: (B, 1, H), the log-sum-exp of their scores.
    """

    q_B1HD: Float[Tensor, "B 1 H D"]
    k_THD: Float[Tensor, "T H D"]
    v_THD: Float[Tensor, "T H D"]
    out_B1HD: Float[Tensor, "B 1 H D"]
    lse_B1H: Float[Tensor, "B 1 H"]


class Attention(nn.Module):
    """Multi-head self-attention with timm's parameters ``qkv`` and ``proj``, over packed tokens."""

    def __init__(self, dim: int, num_heads: int, qkv_bias: bool, impl: str | None) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.impl = impl
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)

    def forward(self, rows_TC: Tensor, packing: Packing) -> Tensor:
        """(T, C) → (T, C), each sequence within itself."""
        q, k, v = self.qkv(rows_TC).unflatten(-1, (3, self.num_heads, -1)).unbind(1)  # [T, H, D]
        lengths = (packing.cu_seqlens, packing.cu_seqlens, packing.max_seqlen, packing.max_seqlen)
        out = cast(Tensor, packed_attention(q, k, v, *lengths, impl=self.impl))
        return self.proj(out.flatten(1))

    def keys_and_values(self, rows_TC: Tensor) -> tuple[Tensor, Tensor]:
        """(T, C) → k and v alone, (T, H, D) each."""
        k, v = (
            self._project(rows_TC, slice(self.qkv.in_features, None)).unflatten(-1, (2, self.num_heads, -1)).unbind(1)
        )
        return k, v

    def queries(self, rows_BRC: Tensor) -> Tensor:
        """(B, R, C) → q (B, R, H, D), unscaled."""
        return self._project(rows_BRC, slice(self.qkv.in_features)).unflatten(-1, (self.num_heads, -1))

    def key_and_value_biases(self) -> tuple[Tensor, Tensor] | None:
        """The biases of k and v, (H, D) each, or None."""
        if self.qkv.bias is None:
            return None
        _, bias_k, bias_v = self.qkv.bias.unflatten(0, (3, self.num_heads, -1))
        return bias_k, bias_v

    def _project(self, x: Tensor, outputs: slice) -> Tensor:
        return F.linear(x, self.qkv.weight[outputs], None if self.qkv.bias is None else self.qkv.bias[outputs])


class Mlp(nn.Module):
    """``fc2(gelu(fc1(x)))``."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) → (..., C)."""
        return self.fc2(F.gelu(self.fc1(x)))


class LayerScale(nn.Module):
    """A learnt factor for each channel."""

    def __init__(self, dim: int, init: float) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), init))

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) → (..., C)."""
        return x * self.gamma


class Block(nn.Module):
    """A pre-norm transformer block over packed tokens."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float,
        qkv_bias: bool,
        init_values: float | None,
        impl: str | None,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, num_heads, qkv_bias, impl)
        self.ls1 = nn.Identity() if init_values is None else LayerScale(dim, init_values)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.ls2 = nn.Identity() if init_values is None else LayerScale(dim, init_values)

    def forward(self, tokens: PackedTokens) -> PackedTokens:
        """(T, C) → (T, C)."""
        return self.mix(tokens, self.norm1(tokens.rows_TC))

    def mix(self, tokens: PackedTokens, normed_TC: Float[Tensor, "T C"]) -> PackedTokens:
        """The block from the input of its attention on; explanations differentiate with respect to ``normed_TC``."""
        attended = tokens.rows_TC + self.ls1(self.attn(normed_TC, tokens.packing))
        return tokens.with_rows(self.feed_forward(attended))

    def read(self, tokens: PackedTokens) -> Float[Tensor, "B 1 C"]:
        """The block's output at the class token alone: one attention row, and no MLP for any other token."""
        q, k, v = self.class_token_operands(tokens)
        lengths = tokens.packing.cu_seqlens, tokens.packing.max_seqlen
        return self.finish(tokens.first(), cast(Tensor, readout(q, k, v, *lengths, impl=self.attn.impl)))

    def read_attention(self, tokens: PackedTokens) -> ClassTokenAttention:
        """The class token's attention with all that its derivatives need."""
        q, k, v = self.class_token_operands(tokens)
        lengths = tokens.packing.cu_seqlens, tokens.packing.max_seqlen
        out, lse = cast(tuple[Tensor, Tensor], readout(q, k, v, *lengths, return_lse=True, impl=self.attn.impl))
        return ClassTokenAttention(q, k, v, out, lse)

    def read_weights(self, tokens: PackedTokens) -> Float[Tensor, "H T"]:
        """The softmax weight of each token in its sequence's class-token row."""
        q, k, v = self.class_token_operands(tokens)
        lengths = tokens.packing.cu_seqlens, tokens.packing.max_seqlen
        _, rows_1HT = cast(tuple[Tensor, Tensor], readout(q, k, v, *lengths, return_rows=True, impl=self.attn.impl))
        return rows_1HT[0]

    def class_token_operands(self, tokens: PackedTokens) -> tuple[Tensor, Tensor, Tensor]:
        """q (B, 1, H, D) of the class tokens, unscaled, and k, v (T, H, D) of all tokens."""
        normed = tokens.with_rows(self.norm1(tokens.rows_TC))
        return self.attn.queries(normed.first()), *self.attn.keys_and_values(normed.rows_TC)

    def finish(self, tokens_BRC: Float[Tensor, "B R C"], out_BRHD: Float[Tensor, "B R H D"]) -> Float[Tensor, "B R C"]:
        """From the attention's output per head to the block's output, for the tokens that were read."""
        return self.feed_forward(tokens_BRC + self.ls1(self.attn.proj(out_BRHD.flatten(-2))))

    def feed_forward(self, x: Tensor) -> Tensor:
        """The block's second half, token by token."""
        return x + self.ls2(self.mlp(self.norm2(x)))


class PatchEmbedding(nn.Module):
    """A linear layer on each patch, kept as timm's convolution ``proj`` so that its weights load."""

    def __init__(self, patch_size: int, in_chans: int, dim: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Conv2d(in_chans, dim, patch_size, stride=patch_size)

    def forward(self, patches_TK: Float[Tensor, "T K"]) -> Float[Tensor, "T C"]:
        """Flattened patches (T, in_chans·p·p) → (T, C)."""
        return F.linear(patches_TK, self.proj.weight.flatten(1), self.proj.bias)

    def cut(self, images_BIHW: Tensor, packing: Packing) -> Float[Tensor, "T K"]:
        """(B, in_chans, H·p, W·p) images to their kept patches (T, in_chans·p·p); background pixels are not read."""
        _, width = self.grid_of(images_BIHW)
        B, channels = images_BIHW.shape[:2]
        p = self.patch_size
        patches = images_BIHW.reshape(B, channels, -1, p, width, p).permute(0, 2, 4, 1, 3, 5)  # [B, H, W, I, p, p]
        token = packing.indices % packing.num_tokens
        return patches[packing.sequence_of_token, token // width, token % width].flatten(1)

    def grid_of(self, images_BIHW: Tensor) -> tuple[int, int]:
        """Rows and columns of tokens in these images.

        Raises:
            ValueError: they are not (B, in_chans, H, W) with sides that are multiples of the patch size.
        """
        shape, p = tuple(images_BIHW.shape), self.patch_size
        if len(shape) != 4 or shape[1] != self.proj.in_channels or 0 in shape[2:] or shape[2] % p or shape[3] % p:
            raise ValueError(
                f"images must be (B, {self.proj.in_channels}, H, W) with H and W multiples of the patch size {p}, got "
                f"x.shape={shape}; pad or crop them first"
            )
        return shape[2] // p, shape[3] // p
