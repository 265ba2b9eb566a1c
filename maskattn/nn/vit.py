"""A thin vision transformer that stays packed: background tokens skip attention, MLPs and norms alike.

Argument names are timm's, state-dict keys are those of timm, DINO and HIPT, so their weights load as they are. Kept
patches are gathered before the patch embedding; background pixels are never read, not even when they hold NaN. What
comes out equals a dense ViT with a softmax over the kept keys, and a plain ViT from which the background tokens were
dropped after the position embedding (Grisi et al., arXiv 2404.18152).

Dimension key: B images, N = H·W grid tokens of each, P prefix tokens (class token, registers), T packed tokens
(prefix tokens among them), K classes, C channels.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from maskattn.nn.blocks import Block, PackedTokens, PatchEmbedding
from maskattn.nn.positions import CONVENTIONS, resample_position_embedding
from maskattn.packing import Packing, pack, unpack
from maskattn.shapes import Bool, Float

__all__ = ["VisionTransformer"]


class VisionTransformer(nn.Module):
    """A vision transformer in which background tokens cost nothing and count for nothing.

    Arguments are named as in ``timm.models.VisionTransformer`` and mean the same, where both have them.

    Args:
        img_size: side of the images for which the position embedding is sized, in px, or (height, width).
        patch_size: side of a token, in px.
        in_chans: channels of the images.
        num_classes: outputs of the head; 0: no head, pooled features come out.
        global_pool: "token" (class token) or "avg" (mean of the kept grid tokens).
        embed_dim, depth, num_heads, mlp_ratio, qkv_bias: as ever.
        init_values: start of LayerScale; None: no LayerScale.
        class_token: whether there is one; needed for global_pool="token".
        no_embed_class: the position embedding has entries for grid tokens only.
        reg_tokens: number of register tokens.
        fc_norm: normalise after pooling instead of before it; None: where global_pool is "avg", as timm does.
        pos_embed: "learn" or "none".
        pos_embed_resample: convention for other grids: "timm" or "dino" (see :mod:`maskattn.nn.positions`).
        impl: implementation of the attention; None takes the best.

    Raises:
        ValueError: an argument has a value that the model does not know.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        num_classes: int = 0,
        global_pool: str = "token",
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        init_values: float | None = None,
        class_token: bool = True,
        no_embed_class: bool = False,
        reg_tokens: int = 0,
        fc_norm: bool | None = None,
        pos_embed: str = "learn",
        pos_embed_resample: str = "timm",
        impl: str | None = None,
    ) -> None:
        super().__init__()
        _check_choice("global_pool", global_pool, ("token", "avg"))
        _check_choice("pos_embed", pos_embed, ("learn", "none"))
        _check_choice("pos_embed_resample", pos_embed_resample, CONVENTIONS)
        if global_pool == "token" and not class_token:
            raise ValueError("global_pool='token' reads the class token, got class_token=False; use global_pool='avg'")
        if embed_dim % num_heads:
            raise ValueError(f"num_heads must divide embed_dim, got embed_dim={embed_dim}, num_heads={num_heads}")
        height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
        if depth < 1 or height % patch_size or width % patch_size or min(height, width) < patch_size:
            raise ValueError(
                "depth must be at least 1 and img_size a multiple of patch_size, got "
                f"depth={depth}, img_size={img_size}, patch_size={patch_size}"
            )
        self.global_pool = global_pool
        self.num_classes = num_classes
        self.no_embed_class = no_embed_class
        self.pos_embed_resample = pos_embed_resample
        self.grid_HW = (height // patch_size, width // patch_size)
        self.num_prefix_tokens = int(class_token) + reg_tokens

        self.patch_embed = PatchEmbedding(patch_size, in_chans, embed_dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim)) if class_token else None
        self.reg_token = nn.Parameter(torch.zeros(1, reg_tokens, embed_dim)) if reg_tokens else None
        positions = self.grid_HW[0] * self.grid_HW[1] + (0 if no_embed_class else self.num_prefix_tokens)
        self.pos_embed = nn.Parameter(torch.zeros(1, positions, embed_dim)) if pos_embed == "learn" else None
        self.blocks = nn.ModuleList(
            Block(embed_dim, num_heads, mlp_ratio, qkv_bias, init_values, impl) for _ in range(depth)
        )
        norm_after_pool = global_pool == "avg" if fc_norm is None else fc_norm
        self.norm = nn.Identity() if norm_after_pool else nn.LayerNorm(embed_dim, eps=1e-6)
        self.fc_norm = nn.LayerNorm(embed_dim, eps=1e-6) if norm_after_pool else nn.Identity()
        self.head = nn.Linear(embed_dim, num_classes) if num_classes else nn.Identity()
        self._initialise()

    def forward(self, x: Float[Tensor, "B I X Y"], keep: Bool[Tensor, "..."] | None = None) -> Float[Tensor, "B K"]:
        """Predict.

        Args:
            x: (B, in_chans, H·p, W·p) images; any multiple of the patch size p.
            keep: (B, H·W) or (B, H, W) bool over grid tokens, True = the token takes part; None keeps all.

        Returns:
            (B, num_classes) logits, or (B, C) pooled features if num_classes = 0.

        Raises:
            TypeError, ValueError: x or keep have the wrong shape or dtype.
        """
        return self.predict(self.before_last_block(self.embed(x, keep)))

    def forward_features(
        self, x: Float[Tensor, "B I X Y"], keep: Bool[Tensor, "..."] | None = None
    ) -> Float[Tensor, "B M C"]:
        """All tokens after the last norm, (B, P + N, C); rows of background tokens are 0. Arguments as in forward."""
        tokens = self.embed(x, keep)
        for block in self.blocks:
            tokens = block(tokens)
        return unpack(self.norm(tokens.rows_TC), tokens.packing)

    def embed(self, x: Float[Tensor, "B I X Y"], keep: Bool[Tensor, "..."] | None = None) -> PackedTokens:
        """Images to packed tokens with positions. Arguments as in forward."""
        grid_HW = self.patch_embed.grid_of(x)
        packing = Packing.from_keep(keep_per_token(keep, x.shape[0], grid_HW, x.device))
        return self.embed_patches(self.patch_embed.cut(x, packing), packing, grid_HW)

    def embed_patches(
        self, patches_TK: Float[Tensor, "T K"], packing: Packing, grid_HW: tuple[int, int]
    ) -> PackedTokens:
        """Kept patches alone to packed tokens with positions.

        Args:
            patches_TK: (T, in_chans·p·p), the kept patches, image by image, row-major.
            packing: where they lie in (B, H·W).
            grid_HW: rows and columns of the token grid.
        """
        rows_TC = self.patch_embed(patches_TK)
        prefix_1PC, positions_1NC = self._positions(grid_HW)
        if positions_1NC is not None:
            # Expanded and packed, not indexed: an indexing's backward adds with atomics, this one does not.
            rows_TC = rows_TC + pack(positions_1NC.expand(packing.batch_size, -1, -1), packing).to(rows_TC.dtype)
        P = self.num_prefix_tokens
        if P == 0:
            return PackedTokens(rows_TC, packing, grid_HW, 0)
        prefix = prefix_1PC.to(rows_TC.dtype).expand(packing.batch_size, P, -1).flatten(0, 1)
        packing, rows_of_prefix, rows_of_grid = _with_prefix(packing, P)
        rows = rows_TC.new_empty((packing.total, rows_TC.shape[1]))
        rows = rows.index_copy(0, rows_of_grid, rows_TC).index_copy(0, rows_of_prefix, prefix)
        return PackedTokens(rows, packing, grid_HW, P)

    def before_last_block(self, tokens: PackedTokens) -> PackedTokens:
        """Through all blocks but the last: the backbone that explanations run once."""
        for block in self.blocks[:-1]:
            tokens = block(tokens)
        return tokens

    @property
    def last_block(self) -> Block:
        """The block whose attention explanations read."""
        return cast(Block, self.blocks[-1])

    def predict(self, tokens: PackedTokens) -> Float[Tensor, "B K"]:
        """Last block, norm, pooling and head; a class-token model computes one attention row of the last block."""
        if self.global_pool == "token":
            return self.predict_from_class_token(self.last_block.read(tokens))
        return self.pool(self.last_block(tokens))

    def pool(self, tokens: PackedTokens) -> Float[Tensor, "B K"]:
        """Norm, pooling and head, from the last block's output at every token."""
        if self.global_pool == "token":
            return self.predict_from_class_token(tokens.first())
        sums = unpack(self.norm(tokens.rows_TC), tokens.packing)[:, tokens.num_prefix :].sum(dim=1)
        counts = (tokens.packing.cu_seqlens.diff() - tokens.num_prefix).clamp(min=1)  # an empty image pools to 0
        return self.head(self.fc_norm(sums / counts[:, None]))

    def predict_from_class_token(self, token_B1C: Float[Tensor, "B 1 C"]) -> Float[Tensor, "B K"]:
        """Norm and head, from the last block's output at the class token."""
        return self.head(self.fc_norm(self.norm(token_B1C[:, 0])))

    def _positions(self, grid_HW: tuple[int, int]) -> tuple[Tensor, Tensor | None]:
        """Prefix tokens with their positions (1, P, C), and the grid's positions (1, N, C)."""
        parts: list[Tensor] = [token for token in (self.cls_token, self.reg_token) if token is not None]
        prefix = torch.cat(parts, dim=1) if parts else self.patch_embed.proj.weight.new_empty(1, 0, 0)
        if self.pos_embed is None:
            return prefix, None
        P = 0 if self.no_embed_class else self.num_prefix_tokens
        if P:
            prefix = prefix + self.pos_embed[:, :P]
        return prefix, resample_position_embedding(
            self.pos_embed[:, P:], self.grid_HW, grid_HW, self.pos_embed_resample
        )

    def _initialise(self) -> None:
        """timm's scheme: truncated normals of standard deviation 0.02, biases 0, tokens near 0."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        if self.pos_embed is not None:
            nn.init.trunc_normal_(self.pos_embed, std=0.02)
        for token in (self.cls_token, self.reg_token):
            if token is not None:
                nn.init.normal_(token, std=1e-6)


def keep_per_token(
    keep: Tensor | None, batch_size: int, grid_HW: tuple[int, int], device: torch.device
) -> Bool[Tensor, "B N"]:
    """A caller's ``keep``, (B, N), (B, H, W) or None for all, as (B, N) on ``device``.

    Raises:
        TypeError, ValueError: it is not boolean, or has another shape.
    """
    flat = (batch_size, grid_HW[0] * grid_HW[1])
    if keep is None:
        return torch.ones(flat, dtype=torch.bool, device=device)
    if keep.dtype != torch.bool:
        raise TypeError(
            f"keep must be a bool mask (True = the token takes part), got keep.dtype={keep.dtype}; "
            "compare it with its threshold first, e.g. keep = fraction > 0"
        )
    if tuple(keep.shape) not in (flat, (batch_size, *grid_HW)):
        raise ValueError(
            f"keep must have shape (B, N) = {flat} or (B, H, W) = {(batch_size, *grid_HW)} over grid tokens, prefix "
            f"tokens not counted, got keep.shape={tuple(keep.shape)}"
        )
    return keep.to(device).reshape(flat)


def _with_prefix(packing: Packing, P: int) -> tuple[Packing, Tensor, Tensor]:
    """The packing of (B, P + N) that keeps each sequence's P first tokens; its rows of prefix and of grid tokens.

    Without a wait for the device.
    """
    B, N, device = packing.batch_size, packing.num_tokens, packing.indices.device
    sequence = packing.sequence_of_token
    starts = packing.cu_seqlens + P * torch.arange(B + 1, device=device, dtype=torch.int32)
    rows_of_prefix = (starts[:-1, None] + torch.arange(P, device=device)).flatten()
    rows_of_grid = torch.arange(packing.total, device=device) + P * (sequence + 1)
    indices = packing.indices.new_empty(packing.total + B * P)
    indices[rows_of_grid] = packing.indices + P * (sequence + 1)
    indices[rows_of_prefix] = (
        torch.arange(B, device=device)[:, None] * (P + N) + torch.arange(P, device=device)
    ).flatten()
    return Packing(indices, starts, packing.max_seqlen + P, B, P + N), rows_of_prefix, rows_of_grid


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {name}={value!r}")
