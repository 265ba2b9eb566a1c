"""The interface of timm's vision transformers: features of inner blocks, replaceable heads, the pretrained config.

Dimension key: B images, N = H·W grid tokens of each, P prefix tokens (class token, registers), T packed tokens,
C channels, K classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from maskattn.nn.kept_tokens import packing_of
from maskattn.nn.packed_tokens import PackedTokens, insert_prefix
from maskattn.packing import pack, unpack
from maskattn.shapes import Bool, Float

__all__ = ["TimmInterface"]


class TimmInterface(nn.Module):
    """A mixin with timm's methods, for a vision transformer that has the attributes annotated here.

    Attributes:
        pretrained_cfg: timm's configuration of a model converted from timm: mean, std, input size and more.
    """

    embed_dim: int
    pool_dim: int
    num_prefix_tokens: int
    global_pool: str
    num_classes: int
    blocks: nn.ModuleList
    norm: nn.Module
    head: nn.Module
    attn_pool: nn.Module | None

    def __init__(self) -> None:
        super().__init__()
        self.pretrained_cfg: dict[str, Any] = {}

    @property
    def default_cfg(self) -> dict[str, Any]:
        """An alias of ``pretrained_cfg``, timm's older name."""
        return self.pretrained_cfg

    @property
    def num_features(self) -> int:
        """C, the number of channels of a token."""
        return self.embed_dim

    @property
    def head_hidden_size(self) -> int:
        """The number of channels that the head reads: C, 2·C for global_pool="token_avg", pool_dim for "coca"."""
        return self._width_pooled_by(self.global_pool)

    def _width_pooled_by(self, pool: str) -> int:
        return {"token_avg": 2 * self.embed_dim, "coca": self.pool_dim}.get(pool, self.embed_dim)

    def get_classifier(self) -> nn.Module:
        """Return the head."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the head with a newly initialised one, on the device and in the dtype of the model.

        Args:
            num_classes: the number of the head's outputs; 0 removes the head.
            global_pool: the new pool; None keeps the present one. Norms stay where they are, as in timm.

        Raises:
            ValueError: the model lacks what the pool needs, or the norm after the pool has another width.
        """
        pool = self.global_pool if global_pool is None else global_pool
        if pool not in ("token", "avg", "map", "coca", "token_avg", ""):
            raise ValueError(
                f"global_pool must be 'token', 'avg', 'map', 'coca', 'token_avg' or '', got global_pool={pool!r}"
            )
        if pool in ("token", "token_avg") and getattr(self, "cls_token", None) is None:
            raise ValueError(f"global_pool={pool!r} reads the class token, and this model has none; use 'avg'")
        if pool in ("map", "coca") and (pool != self.global_pool or self.attn_pool is None):
            raise ValueError(
                f"global_pool={pool!r} needs an attention pool of its kind, and this model has none; build it with one"
            )
        fc_norm = getattr(self, "fc_norm", None)
        if isinstance(fc_norm, nn.LayerNorm) and fc_norm.normalized_shape[0] != self._width_pooled_by(pool):
            raise ValueError(
                f"the norm after the pool has {fc_norm.normalized_shape[0]} channels, and global_pool={pool!r} gives "
                "another number; build the model with that pool"
            )
        if pool not in ("map", "coca"):
            self.attn_pool = None
        self.global_pool, self.num_classes = pool, num_classes
        like = next(self.blocks.parameters())
        head = nn.Linear(self.head_hidden_size, num_classes) if num_classes else nn.Identity()
        if isinstance(head, nn.Linear):
            nn.init.trunc_normal_(head.weight, std=0.02)
            nn.init.zeros_(head.bias)
        self.head = head.to(device=like.device, dtype=like.dtype).train(self.training)

    def forward_head(
        self, x: Float[Tensor, "B M C"], pre_logits: bool = False, keep: Bool[Tensor, "..."] | None = None
    ) -> Float[Tensor, "..."]:
        """Apply pooling and head to the output of ``forward_features``.

        Args:
            x: (B, P + N, C), all tokens after the last norm.
            pre_logits: return the head's input (B, C) instead of its logits (B, K).
            keep: the mask that ``forward_features`` was called with.

        Raises:
            TypeError, ValueError: the mask does not fit the tokens.
        """
        grid_HW = (1, x.shape[1] - self.num_prefix_tokens)
        flat = None if keep is None else keep.flatten(1)
        packing = packing_of(flat, x.shape[0], grid_HW, x.device)
        if self.num_prefix_tokens:
            packing = insert_prefix(packing, self.num_prefix_tokens)[0]
        tokens = PackedTokens(pack(x, packing), packing, grid_HW, self.num_prefix_tokens)
        return self.pool_normed(tokens, pre_logits)  # type: ignore[operator]

    def forward_intermediates(
        self,
        x: Float[Tensor, "B I X Y"],
        indices: int | Sequence[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        output_dict: bool = False,
        *,
        keep: Bool[Tensor, "..."] | None = None,
    ) -> Any:
        """Return the features of inner blocks, 0 at background tokens. Arguments and results are timm's.

        Args:
            x: (B, in_chans, X, Y) images.
            indices: the number of last blocks to take, or the blocks' indices, negative from the end; None takes all.
            return_prefix_tokens: return tuples of grid tokens and prefix tokens (B, P, C) instead of grid tokens alone.
            norm: apply the last norm to the features.
            stop_early: run no block after the last one that is taken.
            output_fmt: "NCHW", grid tokens (B, C, H, W), or "NLC", (B, N, C).
            intermediates_only: return the list of features alone, instead of (final features (B, P + N, C), list).
            output_dict: return a dict with ``image_features``, ``image_intermediates``, ``image_intermediates_prefix``.
            keep: (B, N) or (B, H, W) bool over grid tokens, True = the token takes part; None keeps all.

        Raises:
            TypeError, ValueError: a block or the format does not exist, or images or keep do not fit.
        """
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f"output_fmt must be 'NCHW' or 'NLC', got output_fmt={output_fmt!r}")
        wanted = _indices(indices, len(self.blocks))
        tokens: PackedTokens = self.embed(x, keep)  # type: ignore[operator]
        P, (H, W) = self.num_prefix_tokens, tokens.grid_HW
        grids, prefixes = [], []
        for i, block in enumerate(self.blocks[: max(wanted) + 1] if stop_early else self.blocks):
            tokens = self._run(block, tokens)  # type: ignore[operator]
            if i in wanted:
                dense = unpack(self.norm(tokens.rows_TC) if norm else tokens.rows_TC, tokens.packing)
                grid = dense[:, P:]
                grids.append(grid.mT.unflatten(2, (H, W)).contiguous() if output_fmt == "NCHW" else grid)
                prefixes.append(dense[:, :P])
        with_prefix = return_prefix_tokens and P > 0
        if output_dict:
            result: dict[str, Any] = {"image_intermediates": grids}
            if with_prefix:
                result["image_intermediates_prefix"] = prefixes
            if not intermediates_only:
                result["image_features"] = unpack(self.norm(tokens.rows_TC), tokens.packing)
            return result
        features = list(zip(grids, prefixes, strict=True)) if with_prefix else grids
        return features if intermediates_only else (unpack(self.norm(tokens.rows_TC), tokens.packing), features)

    def get_intermediate_layers(
        self,
        x: Float[Tensor, "B I X Y"],
        n: int | Sequence[int] = 1,
        reshape: bool = False,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        *,
        keep: Bool[Tensor, "..."] | None = None,
    ) -> list[Any]:
        """Return the features of inner blocks, as DINO's method of this name does.

        Args:
            x, return_prefix_tokens, norm, keep: as in :meth:`forward_intermediates`.
            n: the number of last blocks to take, or the blocks' indices.
            reshape: return (B, C, H, W) instead of (B, N, C).
        """
        form = "NCHW" if reshape else "NLC"
        features: list[Any] = self.forward_intermediates(
            x, n, return_prefix_tokens, norm, output_fmt=form, intermediates_only=True, keep=keep
        )
        return features


def _indices(indices: int | Sequence[int] | None, depth: int) -> list[int]:
    if indices is None:
        return list(range(depth))
    chosen = list(range(depth - indices, depth)) if isinstance(indices, int) else [i % depth for i in indices]
    in_range = isinstance(indices, int) or all(-depth <= i < depth for i in indices)
    if not chosen or min(chosen) < 0 or not in_range:
        raise ValueError(f"indices must name some of the {depth} blocks, got indices={indices!r}")
    return chosen
