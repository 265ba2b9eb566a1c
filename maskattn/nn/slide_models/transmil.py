"""TransMIL (Shao et al., NeurIPS 2021): two layers of Nyström attention, and convolutions over a squared grid between.

h = ReLU(W z + b); tiles are repeated from the first on until they fill a square of side ⌈√T⌉; a class token goes
before them; x ← x + Nyström(LayerNorm(x)); of the square's tokens, in the order of the tiles, x ← x + conv7(x) +
conv5(x) + conv3(x), depthwise; the second layer; logits = W (LayerNorm(class token)) + b.

Nyström attention (Xiong et al., AAAI 2021) with m landmarks, means of consecutive tokens: zeros are put before the
sequence until m divides it, and  S(q k̃ᵀ) · pinv(S(q̃ k̃ᵀ)) · S(q̃ kᵀ) v + conv33(v),  S the softmax over rows and pinv six
steps of Razavi's iteration. Both outer factors are attention of few queries or over few keys: nothing of size N × N
exists, and they are never written down. The class token's row of that product, below 0 in places since a pseudo-inverse
is, is the second layer's attention; rollout passes the convolutions over, as it does MLPs.

Parameters are named as TransMIL's, and STAMP's version of it.

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
# Above this many tokens, a layer is run again in the backward pass instead of keeping what it computed.
_RECOMPUTE_ABOVE = 8192


class NystromAttention(nn.Module):
    """Attention of all tokens through the means of m groups of them.

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
        """(N, C) → (N, C)."""
        q, k, v, q_of_groups, k_of_groups = self._operands(x_NC)
        read = F.scaled_dot_product_attention(q_of_groups, k, v)
        out = F.scaled_dot_product_attention(q, k_of_groups, self._between(q_of_groups, k_of_groups) @ read)
        out = out + self.res_conv(v)
        rows: Tensor = self.to_out(out[0].transpose(0, 1).flatten(1))
        return rows[len(rows) - len(x_NC) :]

    def carried(self, x_NC: Tensor, row_N: Tensor) -> Tensor:
        """(N, C), (N,) → (H, N): a row over the outputs through each head's weights, of which m rows exist at a time.

        The weights are those of the product of three; the convolution of the values is no part of them, and what falls
        on the zeros before the sequence is left out.
        """
        q, k, _, q_of_groups, k_of_groups = self._operands(x_NC)
        between, scale = self._between(q_of_groups, k_of_groups)[0], q.shape[-1] ** -0.5
        padded_N = F.pad(row_N, (q.shape[2] - len(row_N), 0))
        some = padded_N.nonzero()[:, 0]
        rows = []
        for h in range(_HEADS):
            first = (scale * q[0, h, some] @ k_of_groups[0, h].T).softmax(dim=-1)  # [queries, m]
            last = (scale * q_of_groups[0, h] @ k[0, h].T).softmax(dim=-1)  # [m, N]
            rows.append(padded_N[some] @ first @ between[h] @ last)
        return torch.stack(rows)[:, q.shape[2] - len(row_N) :]

    def _operands(self, x_NC: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """q, k, v (1, H, N, D), with zeros before the sequence, and the landmarks of q and k (1, H, m, D)."""
        m = self.landmarks
        x_NC = F.pad(x_NC, (0, 0, -len(x_NC) % m, 0))
        q, k, v = self.to_qkv(x_NC).unflatten(1, (3, _HEADS, -1)).permute(1, 2, 0, 3)[:, None]
        q_of_groups, k_of_groups = (x.unflatten(2, (m, -1)).mean(dim=3) for x in (q, k))
        return q, k, v, q_of_groups, k_of_groups

    def _between(self, q_of_groups: Tensor, k_of_groups: Tensor) -> Tensor:
        """The pseudo-inverse (1, H, m, m) of the landmarks' weights."""
        scale = q_of_groups.shape[-1] ** -0.5
        return _pseudo_inverse((scale * q_of_groups @ k_of_groups.transpose(2, 3)).softmax(dim=-1))


def _pseudo_inverse(x: Tensor) -> Tensor:
    """Six steps of Razavi's iteration towards the Moore–Penrose inverse; the start is scaled over all heads at once."""
    unit = torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)
    z = x.transpose(-1, -2) / (x.abs().sum(dim=-1).max() * x.abs().sum(dim=-2).max())
    for _ in range(_PINV_STEPS):
        xz = x @ z
        z = 0.25 * z @ (13 * unit - xz @ (15 * unit - xz @ (7 * unit - xz)))
    return z


class NystromLayer(nn.Module):
    """x + attention(norm(x))."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.attn = NystromAttention(dim)

    def forward(self, x_NC: Tensor) -> Tensor:
        """(N, C) → (N, C)."""
        return x_NC + cast(Tensor, self.attn(self.norm(x_NC)))

    def carried(self, x_NC: Tensor, row_N: Tensor) -> Tensor:
        """A row (N,) through the attention's weights: :meth:`NystromAttention.carried`."""
        return self.attn.carried(self.norm(x_NC), row_N)


def _unit(x_NC: Tensor) -> Tensor:
    """Return the row (N,) that is 1 at the class token and 0 elsewhere."""
    row_N = x_NC.new_zeros(len(x_NC))
    row_N[0] = 1
    return row_N


class SquareConvolutions(nn.Module):
    """Depthwise convolutions over the square that the tokens after the class token fill, row by row."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(dim, dim, 7, padding=3, groups=dim)
        self.proj1 = nn.Conv2d(dim, dim, 5, padding=2, groups=dim)
        self.proj2 = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)

    def forward(self, x_NC: Tensor, side: int) -> Tensor:
        """(1 + side², C) → (1 + side², C)."""
        image = x_NC[1:].T.unflatten(1, (side, side))[None]
        image = image + self.proj(image) + self.proj1(image) + self.proj2(image)
        return torch.cat([x_NC[:1], image[0].flatten(1).T])


class TransMILHead(SlideHead):
    """TransMIL. It reads the order of the tiles, and nothing else of their places.

    Args:
        in_dim: C of the embeddings.
        num_classes: K.
        dim: width of the tokens.
    """

    kind: ClassVar[str] = "transmil"
    has_layers = True

    def __init__(self, in_dim: int, num_classes: int, dim: int = 512) -> None:
        super().__init__(in_dim, num_classes)
        if dim % (2 * _HEADS):
            raise ValueError(f"TransMIL has {_HEADS} heads of even width, got dim={dim}; take a multiple of 16")
        self.dim = dim
        self.pos_layer = SquareConvolutions(dim)
        self._fc1 = nn.Sequential(nn.Linear(in_dim, dim), nn.ReLU())
        self.cls_token = nn.Parameter(torch.randn(1, 1, dim))
        self.layer1 = NystromLayer(dim)
        self.layer2 = NystromLayer(dim)
        self.norm = nn.LayerNorm(dim)
        self._fc2 = nn.Linear(dim, num_classes)

    def arguments(self) -> dict[str, Any]:  # noqa: D102 (as of SlideHead)
        return {"in_dim": self.in_dim, "num_classes": self.num_classes, "dim": self.dim}

    def logits(  # noqa: D102 (as of SlideHead)
        self, embeddings_TC: Tensor, coords_um_T2: Tensor | None, grid: TileGrid | None
    ) -> Tensor:
        x, side = self._tokens(embeddings_TC)
        x = self._run(self.layer1, x)
        x = self._run(self.layer2, self._run(self.pos_layer, x, side))
        logits: Tensor = self._fc2(self.norm(x[0]))
        return logits

    def attention(  # noqa: D102 (as of SlideHead)
        self, embeddings_TC: Tensor, coords_um_T2: Tensor | None = None, grid: TileGrid | None = None
    ) -> Tensor:
        x, side = self._tokens(embeddings_TC)
        x = self.pos_layer(self.layer1(x), side)
        return self._of_tiles(self.layer2.carried(x, _unit(x)), len(embeddings_TC))

    def rollout(  # noqa: D102 (as of SlideHead)
        self, embeddings_TC: Tensor, coords_um_T2: Tensor | None = None, grid: TileGrid | None = None
    ) -> Tensor:
        before_first, side = self._tokens(embeddings_TC)
        before_second = self.pos_layer(self.layer1(before_first), side)
        row_N = _unit(before_first)
        for layer, x_NC in ((self.layer2, before_second), (self.layer1, before_first)):
            row_N = (row_N + layer.carried(x_NC, row_N).mean(dim=0)) / 2
        return self._of_tiles(row_N[None], len(embeddings_TC))[0]

    def _tokens(self, embeddings_TC: Tensor) -> tuple[Tensor, int]:
        """The class token, the tiles and the repeats that fill the square; and its side."""
        rows = self._fc1(embeddings_TC)
        side = math.isqrt(len(rows) - 1) + 1
        return torch.cat([self.cls_token[0], rows, rows[: side * side - len(rows)]]), side

    @staticmethod
    def _of_tiles(rows_AN: Tensor, tiles: int) -> Tensor:
        """Rows over tokens as rows over tiles: a repeat counts for its tile."""
        of_tiles, repeats = rows_AN[:, 1 : 1 + tiles].clone(), rows_AN[:, 1 + tiles :]
        of_tiles[:, : repeats.shape[1]] += repeats
        return of_tiles

    def _run(self, layer: nn.Module, x_NC: Tensor, *more: int) -> Tensor:
        if len(x_NC) > _RECOMPUTE_ABOVE and torch.is_grad_enabled():
            return cast(Tensor, checkpoint(layer, x_NC, *more, use_reentrant=False))
        return cast(Tensor, layer(x_NC, *more))
