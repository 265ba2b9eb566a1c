"""Multi-head self-attention over packed tokens, with timm's parameters.

A key is an affine function of its token, then normalised if the model has a q/k norm, then rotated if it has rotary
positions. Explanations need the derivative of the key with respect to the scale of its token, through all three steps.

Dimension key: B images, T packed tokens, R tokens that are read, C channels, H heads, D head width.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from maskattn.nn.inference_linear import linear, product
from maskattn.nn.packed_tokens import PackedTokens
from maskattn.nn.positions import alibi_slopes, rotate
from maskattn.shapes import Float

__all__ = ["Attention", "AttentionOptions"]


@dataclass(frozen=True)
class AttentionOptions:
    """The options of a self-attention layer other than its width and its number of heads, under timm's names.

    Attributes:
        qkv_bias, proj_bias: whether the projections have biases.
        qk_norm: whether queries and keys are normalised, head by head.
        scale_attn_norm: whether the output is normalised before the projection.
        norm_eps: ε of these norms.
        attn_drop_rate, proj_drop_rate: the shares of weights, and of output features, dropped in training.
        impl: the implementation of attention; None takes the best.
    """

    qkv_bias: bool = True
    proj_bias: bool = True
    qk_norm: bool = False
    scale_attn_norm: bool = False
    norm_eps: float = 1e-6
    attn_drop_rate: float = 0.0
    proj_drop_rate: float = 0.0
    impl: str | None = None


class Attention(nn.Module):
    """Multi-head self-attention with timm's parameters ``qkv`` and ``proj``, over packed tokens."""

    def __init__(self, dim: int, num_heads: int, options: AttentionOptions) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.impl = options.impl
        self.attn_drop_rate = options.attn_drop_rate
        width, eps = dim // num_heads, options.norm_eps
        self.qkv = nn.Linear(dim, 3 * dim, bias=options.qkv_bias)
        self.q_norm = nn.LayerNorm(width, eps=eps) if options.qk_norm else nn.Identity()
        self.k_norm = nn.LayerNorm(width, eps=eps) if options.qk_norm else nn.Identity()
        self.norm = nn.LayerNorm(dim, eps=eps) if options.scale_attn_norm else nn.Identity()
        self.proj = nn.Linear(dim, dim, bias=options.proj_bias)
        self.proj_drop = nn.Dropout(options.proj_drop_rate)

    @property
    def dropout_p(self) -> float:
        """The share of attention weights that the next call drops: 0 in eval mode."""
        return self.attn_drop_rate if self.training else 0.0

    def forward(self, normed_TC: Float[Tensor, "T C"], tokens: PackedTokens) -> Float[Tensor, "T C"]:
        """Attend within each sequence, normalised rows (T, C) → (T, C); ``tokens`` gives the layout of the rows."""
        q, k, v = self.queries_keys_and_values(normed_TC, tokens)
        out = tokens.attend(
            q,
            k,
            v,
            coords=tokens.coords_T2,
            slopes=None if tokens.coords_T2 is None else alibi_slopes(self.num_heads, tokens.coords_T2),
            dropout_p=self.dropout_p,
            impl=self.impl,
        )
        return self.project(out)

    def queries_keys_and_values(
        self, normed_TC: Float[Tensor, "T C"], tokens: PackedTokens
    ) -> tuple[Float[Tensor, "T H D"], Float[Tensor, "T H D"], Float[Tensor, "T H D"]]:
        """Compute q, unscaled, k and v of all tokens, (T, H, D) each, by calling the modules on normalised rows."""
        q, k, v = linear(self.qkv, normed_TC).unflatten(-1, (3, self.num_heads, -1)).unbind(1)  # [T, H, D]
        q, k = self.q_norm(q), self.k_norm(k)
        if tokens.rotation is not None:
            q, k = rotate(q, tokens.rotation), rotate(k, tokens.rotation)
        return q, k, v

    def project(self, out: Tensor) -> Tensor:
        """Project the attention's output per head, (..., H, D) → (..., C)."""
        return self.proj_drop(linear(self.proj, self.norm(out.flatten(-2))))

    def class_token_queries(self, normed_BRC: Tensor) -> Tensor:
        """Compute q (B, R, H, D), unscaled, of tokens (B, R, C) without a position (no rotation), from the weights."""
        return self.q_norm(self._project(normed_BRC, slice(self.qkv.in_features)).unflatten(-1, (self.num_heads, -1)))

    def keys_and_values(self, tokens: PackedTokens) -> tuple[Tensor, Tensor]:
        """Compute k and v alone, (T, H, D) each, of normalised tokens (T, C), from the weights."""
        k, v = self._keys_and_values_before_norm(tokens)
        return self._finish_keys(k, tokens), v

    def key_and_value_origins(self, tokens: PackedTokens) -> tuple[Tensor | None, Tensor | None]:
        """Return the origins for ``token_relevance``: k and v minus their derivatives in the scale of their token.

        They are (H, D) each if k is affine in the token, else (T, H, D) for k; None for 0.
        """
        bias_k = bias_v = None
        if self.qkv.bias is not None:
            _, bias_k, bias_v = self.qkv.bias.unflatten(0, (3, self.num_heads, -1)).unbind(0)
        if isinstance(self.k_norm, nn.Identity) and (tokens.rotation is None or bias_k is None):
            return bias_k, bias_v
        k, _ = self._keys_and_values_before_norm(tokens)
        along = k if bias_k is None else k - bias_k
        if isinstance(self.k_norm, nn.LayerNorm):
            along = _along_layer_norm(self.k_norm, k, along)
        derivative = along if tokens.rotation is None else rotate(along, tokens.rotation)
        return self._finish_keys(k, tokens) - derivative, bias_v

    def _finish_keys(self, k_THD: Tensor, tokens: PackedTokens) -> Tensor:
        k = self.k_norm(k_THD)
        return k if tokens.rotation is None else rotate(k, tokens.rotation)

    def _keys_and_values_before_norm(self, tokens: PackedTokens) -> tuple[Tensor, Tensor]:
        kv = self._project(tokens.rows_TC, slice(self.qkv.in_features, None))
        k, v = kv.unflatten(-1, (2, self.num_heads, -1)).unbind(1)
        return k, v

    def _project(self, x: Tensor, outputs: slice) -> Tensor:
        return product(self.qkv, x, outputs)


def _along_layer_norm(norm: nn.LayerNorm, x: Tensor, direction: Tensor) -> Tensor:
    """Compute the derivative of ``norm`` at ``x`` along ``direction`` d: w/σ · (d − mean d − x̂ · mean(x̂ d))."""
    # Written out, because torch.func.jvp compiles its decompositions with the deprecated torch.jit.script.
    centred = x - x.mean(-1, keepdim=True)
    inverse_std = (centred.square().mean(-1, keepdim=True) + norm.eps).rsqrt()
    x_hat = centred * inverse_std
    direction = direction - direction.mean(-1, keepdim=True)
    return norm.weight * inverse_std * (direction - x_hat * (x_hat * direction).mean(-1, keepdim=True))
