"""TransMIL (Shao et al., NeurIPS 2021): two layers of Nyström attention with convolutions over a square between them.

1. h = ReLU(W z + b). Tiles are repeated from the first on until they fill a square of side ⌈√T⌉, and a class token is
   prepended.
2. x ← x + Nyström(LayerNorm(x)).
3. The tokens of the square, in the order of the tiles, become x + conv7(x) + conv5(x) + conv3(x), depthwise.
4. Step 2 again, with other weights; logits = W (LayerNorm(class token)) + b.

Nyström attention (Xiong et al., AAAI 2021) has m landmarks, which are means of consecutive tokens. The sequence is
padded with zeros in front until m divides it, and the result is

    S(q k̃ᵀ) · pinv(S(q̃ k̃ᵀ)) · S(q̃ kᵀ) v + conv33(v),

where S is the softmax over rows and pinv is six steps of Razavi's iteration. Both outer factors are computed as
attention with m keys or m queries, so that nothing of size N × N exists and their weights are never stored.

The head's attention is the class token's row of that product in the second layer; since a pseudo-inverse has negative
entries, so can the row. Rollout ignores the convolutions, as it ignores MLPs elsewhere.

Parameters have the names of TransMIL and of STAMP's version of it.

Dimension key: T tiles, N tokens with class token and repeats, C channels, H heads, D head width,
m landmarks, K classes.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from maskattn.nn.slide_models.head import SlideHead, TileGrid

__all__ = ["TransMILHead"]

_HEADS = 8
_PINV_STEPS = 6
_VALUE_KERNEL = 33
# Above this number of tokens, the backward pass recomputes a layer instead of keeping its intermediate results.
_RECOMPUTE_ABOVE = 8192


class NystromAttention(nn.Module):
    """Nyström attention, whose landmarks are the means of m groups of consecutive tokens.

    Args:
        dim: C; there are 8 heads and C/2 landmarks.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.landmarks = dim // 2
        self.to_qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.to_out = nn.Sequential(nn.Linear(dim, dim), nn.Dropout(0.1))
        self.res_conv = nn.Conv2d(
            _HEADS, _HEADS, (_VALUE_KERNEL, 1), padding=(_VALUE_KERNEL // 2, 0), groups=_HEADS, bias=False
        )

    def forward(self, x_NC: Tensor) -> Tensor:
        """Attend with every token: (N, C) → (N, C)."""
        q, k, v, q_landmarks, k_landmarks = self._operands(x_NC)
        from_keys = F.scaled_dot_product_attention(q_landmarks, k, v)
        out = F.scaled_dot_product_attention(q, k_landmarks, self._between(q_landmarks, k_landmarks) @ from_keys)
        out = out + self.res_conv(v)
        rows: Tensor = self.to_out(out[0].transpose(0, 1).flatten(1))
        return rows[len(rows) - len(x_NC) :]

    def carried(self, x_NC: Tensor, row_N: Tensor) -> Tensor:
        """Multiply a row over the outputs by each head's attention matrix: (N, C), (N,) → (H, N).

        The matrix is the product of the three factors, without the convolution of the values, and is not formed.
        Weights of the padding are dropped.
        """
        q, k, _, q_landmarks, k_landmarks = self._operands(x_NC)
        between, scale = self._between(q_landmarks, k_landmarks)[0], q.shape[-1] ** -0.5
        padded_N = F.pad(row_N, (q.shape[2] - len(row_N), 0))
        queries = padded_N.nonzero()[:, 0]
        rows = []
        for h in range(_HEADS):
            first = (scale * q[0, h, queries] @ k_landmarks[0, h].T).softmax(dim=-1)  # [queries, m]
            last = (scale * q_landmarks[0, h] @ k[0, h].T).softmax(dim=-1)  # [m, N]
            rows.append(padded_N[queries] @ first @ between[h] @ last)
        return torch.stack(rows)[:, q.shape[2] - len(row_N) :]

    def _operands(self, x_NC: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Return q, k, v (1, H, N, D) of the padded sequence, and the landmarks of q and k (1, H, m, D)."""
        m = self.landmarks
        x_NC = F.pad(x_NC, (0, 0, -len(x_NC) % m, 0))
        q, k, v = self.to_qkv(x_NC).unflatten(1, (3, _HEADS, -1)).permute(1, 2, 0, 3)[:, None]
        q_landmarks, k_landmarks = (x.unflatten(2, (m, -1)).mean(dim=3) for x in (q, k))
        return q, k, v, q_landmarks, k_landmarks

    def _between(self, q_landmarks: Tensor, k_landmarks: Tensor) -> Tensor:
        """Return the pseudo-inverse (1, H, m, m) of the attention weights between landmarks."""
        scale = q_landmarks.shape[-1] ** -0.5
        return _pseudo_inverse((scale * q_landmarks @ k_landmarks.transpose(2, 3)).softmax(dim=-1))


def _pseudo_inverse(x: Tensor) -> Tensor:
    """Approximate the Moore–Penrose inverse by Razavi's iteration, whose start is scaled by maxima over all heads."""
    eye = torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)
    z = x.transpose(-1, -2) / (x.abs().sum(dim=-1).max() * x.abs().sum(dim=-2).max())
    for _ in range(_PINV_STEPS):
        xz = x @ z
        z = 0.25 * z @ (13 * eye - xz @ (15 * eye - xz @ (7 * eye - xz)))
    return z


class NystromLayer(nn.Module):
    """A residual layer of pre-norm Nyström attention, x + attention(norm(x))."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.attn = NystromAttention(dim)

    def forward(self, x_NC: Tensor) -> Tensor:
        """Compute the layer's output: (N, C) → (N, C)."""
        return x_NC + cast(Tensor, self.attn(self.norm(x_NC)))

    def carried(self, x_NC: Tensor, row_N: Tensor) -> Tensor:
        """Multiply a row by each head's attention matrix, as :meth:`NystromAttention.carried` does."""
        return self.attn.carried(self.norm(x_NC), row_N)


def _class_token_row(x_NC: Tensor) -> Tensor:
    """Return the row (N,) that is 1 at the class token and 0 elsewhere."""
    row_N = x_NC.new_zeros(len(x_NC))
    row_N[0] = 1
    return row_N


class SquareConvolutions(nn.Module):
    """Depthwise convolutions over the tokens after the class token, arranged row by row in a square."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(dim, dim, 7, padding=3, groups=dim)
        self.proj1 = nn.Conv2d(dim, dim, 5, padding=2, groups=dim)
        self.proj2 = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)

    def forward(self, x_NC: Tensor, side: int) -> Tensor:
        """Convolve the square of tokens and keep the class token: (1 + side², C) → (1 + side², C)."""
        image = x_NC[1:].T.unflatten(1, (side, side))[None]
        image = image + self.proj(image) + self.proj1(image) + self.proj2(image)
        return torch.cat([x_NC[:1], image[0].flatten(1).T])


class TransMILHead(SlideHead):
    """TransMIL, whose logits depend on the order of the tiles but not on their positions.

    Args:
        in_dim: C of the embeddings.
        num_classes: K.
        dim: C of the tokens.

    Raises:
        ValueError: ``dim`` is no multiple of 16.
    """

    kind: ClassVar[str] = "transmil"
    has_layers = True

    def __init__(self, in_dim: int, num_classes: int, dim: int = 512) -> None:
        super().__init__(in_dim, num_classes)
        if dim % (2 * _HEADS):
            raise ValueError(f"TransMIL must have {_HEADS} heads of even width, got dim={dim}; take a multiple of 16")
        self.dim = dim
        self.pos_layer = SquareConvolutions(dim)
        self._fc1 = nn.Sequential(nn.Linear(in_dim, dim), nn.ReLU())
        self.cls_token = nn.Parameter(torch.randn(1, 1, dim))
        self.layer1 = NystromLayer(dim)
        self.layer2 = NystromLayer(dim)
        self.norm = nn.LayerNorm(dim)
        self._fc2 = nn.Linear(dim, num_classes)

    def arguments(self) -> dict[str, Any]:  # noqa: D102 (documented in SlideHead)
        return {"in_dim": self.in_dim, "num_classes": self.num_classes, "dim": self.dim}

    def logits(  # noqa: D102 (documented in SlideHead)
        self, embeddings_TC: Tensor, coords_um_T2: Tensor | None, grid: TileGrid | None
    ) -> Tensor:
        x, side = self._tokens(embeddings_TC)
        x = self._run(self.layer1, x)
        x = self._run(self.layer2, self._run(self.pos_layer, x, side))
        logits: Tensor = self._fc2(self.norm(x[0]))
        return logits

    def attention(  # noqa: D102 (documented in SlideHead)
        self, embeddings_TC: Tensor, coords_um_T2: Tensor | None = None, grid: TileGrid | None = None
    ) -> Tensor:
        x, side = self._tokens(embeddings_TC)
        x = self.pos_layer(self.layer1(x), side)
        return self._of_tiles(self.layer2.carried(x, _class_token_row(x)), len(embeddings_TC))

    def rollout(  # noqa: D102 (documented in SlideHead)
        self, embeddings_TC: Tensor, coords_um_T2: Tensor | None = None, grid: TileGrid | None = None
    ) -> Tensor:
        before_first, side = self._tokens(embeddings_TC)
        before_second = self.pos_layer(self.layer1(before_first), side)
        row_N = _class_token_row(before_first)
        for layer, x_NC in ((self.layer2, before_second), (self.layer1, before_first)):
            row_N = (row_N + layer.carried(x_NC, row_N).mean(dim=0)) / 2
        return self._of_tiles(row_N[None], len(embeddings_TC))[0]

    def _tokens(self, embeddings_TC: Tensor) -> tuple[Tensor, int]:
        """Return the class token, the tiles and the repeats that fill the square, and the square's side."""
        rows = self._fc1(embeddings_TC)
        side = math.isqrt(len(rows) - 1) + 1
        return torch.cat([self.cls_token[0], rows, rows[: side * side - len(rows)]]), side

    @staticmethod
    def _of_tiles(rows_AN: Tensor, tiles: int) -> Tensor:
        """Convert rows over tokens to rows over tiles by adding each repeat's weight to its tile's."""
        rows_AT, repeats = rows_AN[:, 1 : 1 + tiles].clone(), rows_AN[:, 1 + tiles :]
        rows_AT[:, : repeats.shape[1]] += repeats
        return rows_AT

    def _run(self, layer: nn.Module, x_NC: Tensor, *more: int) -> Tensor:
        if len(x_NC) > _RECOMPUTE_ABOVE and torch.is_grad_enabled():
            return cast(Tensor, checkpoint(layer, x_NC, *more, use_reentrant=False))
        return cast(Tensor, layer(x_NC, *more))
