"""A vision transformer over packed tokens: background tokens skip attention, MLPs and norms.

Argument names are timm's, and state-dict keys are those of timm, DINO and HIPT, so their weights load unchanged. Kept
patches are gathered before the patch embedding, so background pixels are never read, even if they are NaN. The output
equals that of a dense ViT with a softmax over the kept keys, and that of a plain ViT whose background tokens are
dropped after the position embedding (Grisi et al., arXiv 2404.18152).

Dimension key: B images, N = H·W grid tokens of each, P prefix tokens (class token, registers), T packed tokens
(prefix tokens included), K classes, C channels.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from maskattn.leaves import leaf_module
from maskattn.nn.blocks import AttentionOptions, Block, BlockOptions, PatchEmbedding, is_as_built
from maskattn.nn.kept_tokens import packing_of
from maskattn.nn.mlps import ACTIVATIONS, MLPS
from maskattn.nn.packed_tokens import PackedTokens, rows_and_columns
from maskattn.nn.pools import mean_of_grid, pool_of
from maskattn.nn.positions import (
    CONVENTIONS,
    RotaryGrid,
    resample_position_embedding,
    rotary_angles,
    sine_positions,
)
from maskattn.nn.timm_interface import TimmInterface
from maskattn.packing import Packing, pack, unpack
from maskattn.shapes import Bool, Float

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["VisionTransformer"]

POOLS = ("token", "avg", "map", "coca", "token_avg", "")
POSITIONS = ("learn", "none", "sine", "rotary", "learn_rotary", "alibi")


class VisionTransformer(TimmInterface):
    """A vision transformer in which background tokens cost nothing and have no effect.

    Arguments that ``timm.models.VisionTransformer`` has too have the same name and meaning.

    Args:
        img_size: the side of the images that the position embedding is sized for, in px, or (height, width).
        patch_size: the side of a token, in px.
        in_chans: the number of image channels.
        num_classes: the number of the head's outputs; 0: no head, and pooled features are returned.
        global_pool: "token" (class token), "avg" (mean of the kept grid tokens), "map" (attention pooling of the kept
            grid tokens), "coca" (attention pooling of prefix and kept grid tokens by a query of its own width, as in
            CoCa and CONCH), "token_avg" (class token and mean, side by side) or "" (every token, (B, P + N, ...)).
        embed_dim, depth, num_heads, mlp_ratio, qkv_bias, qk_norm, proj_bias: as in timm's
            ``VisionTransformer``.
        scale_attn_norm, scale_mlp_norm: whether there is a norm before the attention's projection, and before the MLP's
            second layer.
        init_values: the initial value of LayerScale; None: no LayerScale.
        class_token: whether there is a class token; needed for global_pool="token" and "token_avg".
        no_embed_class: the position embedding has entries for grid tokens only.
        reg_tokens: the number of register tokens.
        pre_norm: normalise before the blocks; the patch embedding then has no bias.
        final_norm: whether there is a norm after the blocks.
        fc_norm: normalise after pooling instead of before it; None: if global_pool is "avg", as in timm.
        pos_embed: "learn", "none", "sine" (absolute 2-D sines), "rotary", "learn_rotary" (both) or "alibi" (2-D ALiBi).
        pos_embed_resample: the convention for other grids: "timm", "dino" or "transformers"
            (:mod:`maskattn.nn.positions`).
        rope_theta: the base of the rotary frequencies.
        rope_grid: rotary positions in units of tokens (:class:`maskattn.nn.positions.RotaryGrid`); None: DINOv3's.
        dynamic_img_size: accept images of any size; False: only of img_size.
        drop_rate, pos_drop_rate, proj_drop_rate, attn_drop_rate: the dropout rates before the head, after the
            positions, after projections, and of attention weights.
        drop_path_rate: the rate of stochastic depth in the last block, growing linearly from 0 in the first.
        act_layer: "gelu", "gelu_tanh", "quick_gelu", "relu" or "silu".
        mlp_layer: "mlp", "swiglu_packed" (timm's SwiGLUPacked; mlp_ratio counts both halves) or "swiglu".
        norm_eps: ε of every norm but those of a "coca" pool.
        pool_dim, pool_heads: the width of a "coca" pool's output (None: embed_dim), and its heads.
        embed_act: the activation after the patch embedding, as in encoders of embeddings; None: none.
        impl: the implementation of attention; None takes the best.

    Attributes:
        arguments: the constructor's arguments, by name.

    Raises:
        ValueError: an argument has a value that is not supported.
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
        qk_norm: bool = False,
        scale_attn_norm: bool = False,
        scale_mlp_norm: bool = False,
        proj_bias: bool = True,
        init_values: float | None = None,
        class_token: bool = True,
        pos_embed: str = "learn",
        no_embed_class: bool = False,
        reg_tokens: int = 0,
        pre_norm: bool = False,
        final_norm: bool = True,
        fc_norm: bool | None = None,
        pos_embed_resample: str = "timm",
        rope_theta: float = 100.0,
        rope_grid: RotaryGrid | None = None,
        dynamic_img_size: bool = True,
        drop_rate: float = 0.0,
        pos_drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        act_layer: str = "gelu",
        mlp_layer: str = "mlp",
        norm_eps: float = 1e-6,
        embed_act: str | None = None,
        pool_dim: int | None = None,
        pool_heads: int = 8,
        impl: str | None = None,
    ) -> None:
        arguments = {name: value for name, value in locals().items() if name not in ("self", "__class__")}
        super().__init__()
        self.arguments = arguments
        _check_choice("global_pool", global_pool, POOLS)
        _check_choice("pos_embed", pos_embed, POSITIONS)
        _check_choice("pos_embed_resample", pos_embed_resample, CONVENTIONS)
        _check_choice("act_layer", act_layer, tuple(ACTIVATIONS))
        _check_choice("mlp_layer", mlp_layer, tuple(MLPS))
        if global_pool in ("token", "token_avg") and not class_token:
            raise ValueError(
                f"global_pool={global_pool!r} reads the class token, got class_token=False; use global_pool='avg'"
            )
        _check_width(embed_dim, num_heads, pos_embed)
        grid_HW = _grid_of(img_size, patch_size, depth)
        self.global_pool = global_pool
        self.num_classes = num_classes
        self.embed_dim = embed_dim
        self.pool_dim = pool_dim or embed_dim
        self.num_heads = num_heads
        self.no_embed_class = no_embed_class
        self.position_kind = pos_embed
        self.pos_embed_resample = pos_embed_resample
        self.rope_theta = rope_theta
        self.rope_grid = rope_grid
        self.dynamic_img_size = dynamic_img_size
        self.grid_HW = grid_HW
        self.num_prefix_tokens = int(class_token) + reg_tokens
        self.grad_checkpointing = False
        attention = AttentionOptions(
            qkv_bias=qkv_bias,
            proj_bias=proj_bias,
            qk_norm=qk_norm,
            scale_attn_norm=scale_attn_norm,
            norm_eps=norm_eps,
            attn_drop_rate=attn_drop_rate,
            proj_drop_rate=proj_drop_rate,
            impl=impl,
        )
        options = BlockOptions(attention, mlp_ratio, mlp_layer, act_layer, scale_mlp_norm, init_values)

        self.patch_embed = PatchEmbedding(patch_size, in_chans, embed_dim, bias=not pre_norm, act=embed_act)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim)) if class_token else None
        self.reg_token = nn.Parameter(torch.zeros(1, reg_tokens, embed_dim)) if reg_tokens else None
        positions = grid_HW[0] * grid_HW[1] + (0 if no_embed_class else self.num_prefix_tokens)
        learnt = pos_embed in ("learn", "learn_rotary")
        self.pos_embed = nn.Parameter(torch.zeros(1, positions, embed_dim)) if learnt else None
        self.pos_drop = nn.Dropout(pos_drop_rate)
        self.norm_pre = nn.LayerNorm(embed_dim, eps=norm_eps) if pre_norm else nn.Identity()
        drop_paths = torch.linspace(0, drop_path_rate, depth, device="cpu").tolist()
        self.blocks = nn.ModuleList(Block(embed_dim, num_heads, options, share) for share in drop_paths)
        after_pool = global_pool == "avg" if fc_norm is None else fc_norm
        self.norm = nn.LayerNorm(embed_dim, eps=norm_eps) if final_norm and not after_pool else nn.Identity()
        self.attn_pool = pool_of(global_pool, embed_dim, num_heads, self.pool_dim, pool_heads, options)
        pooled = self.head_hidden_size
        self.fc_norm = nn.LayerNorm(pooled, eps=norm_eps) if final_norm and after_pool else nn.Identity()
        self.head_drop = nn.Dropout(drop_rate)
        self.head = nn.Linear(pooled, num_classes) if num_classes else nn.Identity()
        if not self.patch_embed.proj.weight.is_meta:  # torch would import its compiler for a normal distribution there
            self._initialise()

    def forward(
        self, x: Float[Tensor, "B I X Y"] | PackedTokens, keep: Bool[Tensor, "..."] | None = None
    ) -> Float[Tensor, "B K"]:
        """Compute logits, or pooled features.

        Args:
            x: (B, in_chans, X, Y) images, whose rows and columns past the last complete patch are dropped; or the
                packed tokens that :meth:`embed` or :meth:`embed_patches` returned, without ``keep``.
            keep: (B, H·W) or (B, H, W) bool over grid tokens, True = the token takes part; None keeps all.

        Returns:
            (B, num_classes) logits, or (B, C) pooled features if num_classes = 0.

        Raises:
            TypeError, ValueError: x or keep have the wrong shape or dtype.
        """
        if isinstance(x, torch.fx.Proxy):
            return leaf_module(self, x, keep)
        tokens = x if isinstance(x, PackedTokens) else self.embed(x, keep)
        return self.predict(self.before_last_block(tokens))

    def forward_features(
        self, x: Float[Tensor, "B I X Y"], keep: Bool[Tensor, "..."] | None = None
    ) -> Float[Tensor, "B M C"]:
        """Return all tokens after the last norm, (B, P + N, C), 0 at background tokens. Arguments as in forward."""
        tokens = self._run(self.last_block, self.before_last_block(self.embed(x, keep)))
        return unpack(self.norm(tokens.rows_TC), tokens.packing)

    def embed(self, x: Float[Tensor, "B I X Y"], keep: Bool[Tensor, "..."] | None = None) -> PackedTokens:
        """Embed images as packed tokens with positions. Arguments as in forward."""
        grid_HW = self.patch_embed.grid_of(x)
        if not self.dynamic_img_size and grid_HW != self.grid_HW:
            raise ValueError(
                f"this model has dynamic_img_size=False and takes grids of {self.grid_HW} tokens, got {grid_HW}; "
                "resize the images or build it with dynamic_img_size=True"
            )
        packing = packing_of(keep, x.shape[0], grid_HW, x.device)
        return self.embed_patches(self.patch_embed.cut(x, packing), packing, grid_HW)

    def embed_patches(
        self,
        patches_TK: Float[Tensor, "T K"],
        packing: Packing,
        grid_HW: tuple[int, int],
        group: ProcessGroup | None = None,
    ) -> PackedTokens:
        """Embed kept patches as packed tokens with positions.

        Args:
            patches_TK: (T, in_chans·p·p), the kept patches, image by image, row-major.
            packing: the patches' packing in (B, H·W).
            grid_HW: the rows and columns of the token grid.
            group: the process group whose processes hold some of the patches each, and all call the model; None if
                this process has all patches. Prefix tokens are rows of its process 0. Without pooling, the output has
                this process's tokens, and 0 at those of others.

        Raises:
            GroupError: the processes of the group disagree, or one of them has ended.
            ValueError: an image has no patch in any of them.
        """
        rows_TC = self.patch_embed(patches_TK)
        prefix_1PC, positions_1NC = self._positions(grid_HW)
        if positions_1NC is not None:
            # Expanded and packed, because the backward of indexing adds with atomics.
            rows_TC = rows_TC + pack(positions_1NC.expand(packing.batch_size, -1, -1), packing).to(rows_TC.dtype)
        elif self.position_kind == "sine":
            sines_TC = sine_positions(*rows_and_columns(packing, grid_HW), grid_HW, self.embed_dim)
            rows_TC = rows_TC + sines_TC.to(rows_TC.dtype)
        coords_T2, rotation = self._places(packing, grid_HW, rows_TC.dtype)
        tokens = PackedTokens(rows_TC, packing, grid_HW, 0, coords_T2, rotation)
        if prefix_1PC is not None:
            tokens = tokens.after_prefix(prefix_1PC, group)
        tokens = tokens.with_rows(self.norm_pre(self.pos_drop(tokens.rows_TC)))
        return tokens if group is None else tokens.divided(group)

    def before_last_block(self, tokens: PackedTokens) -> PackedTokens:
        """Run all blocks but the last, which explanations need only once."""
        return self.run_blocks(tokens, slice(0, -1))

    def run_blocks(self, tokens: PackedTokens, which: slice = slice(None)) -> PackedTokens:
        """Run all blocks, or those of a slice."""
        for block in self.blocks[which]:
            tokens = self._run(block, tokens)
        return tokens

    @property
    def last_block(self) -> Block:
        """The block whose attention explanations read."""
        return cast(Block, self.blocks[-1])

    def predict(self, tokens: PackedTokens) -> Float[Tensor, "B K"]:
        """Run the last block, norm, pooling and head; with "token" pooling the block computes one attention row."""
        if self.global_pool == "token" and is_as_built(self.last_block):
            return self.predict_from_class_token(self.last_block.read(tokens))
        return self.pool(self._run(self.last_block, tokens))

    def pool(self, tokens: PackedTokens) -> Float[Tensor, "B K"]:
        """Apply norm, pooling and head to the last block's output at every token."""
        if self.global_pool == "token":
            return self.predict_from_class_token(tokens.first())
        return self.pool_normed(tokens.with_rows(self.norm(tokens.rows_TC)))

    def pool_normed(self, tokens: PackedTokens, pre_logits: bool = False) -> Float[Tensor, "B K"]:
        """Apply pooling and head to tokens after the last norm; with ``pre_logits``, return the head's input."""
        if self.global_pool == "":
            return unpack(self.classify(tokens.rows_TC, pre_logits), tokens.packing)
        if self.attn_pool is not None:
            return self.classify(self.attn_pool(tokens), pre_logits)
        pooled = [] if self.global_pool == "avg" else [tokens.first()[:, 0]]
        pooled += [] if self.global_pool == "token" else [mean_of_grid(tokens)]
        return self.classify(torch.cat(pooled, dim=1) if len(pooled) > 1 else pooled[0], pre_logits)

    def predict_from_class_token(self, token_B1C: Float[Tensor, "B 1 C"]) -> Float[Tensor, "B K"]:
        """Apply norm and head to the last block's output at the class token."""
        return self.classify(self.norm(token_B1C[:, 0]))

    def classify(self, pooled: Tensor, pre_logits: bool = False) -> Tensor:
        """Apply the layers after pooling: the norm, if the model has one there, and the head unless ``pre_logits``."""
        features = self.head_drop(self.fc_norm(pooled))
        return features if pre_logits else self.head(features)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Turn activation checkpointing on or off: with it, backward runs each block again instead of storing it."""
        self.grad_checkpointing = enable

    def no_weight_decay(self) -> set[str]:
        """Return the parameters that take no weight decay, for timm's optimizer factories."""
        return {"pos_embed", "cls_token", "reg_token"}

    def group_matcher(self, coarse: bool = False) -> dict[str, object]:
        """Return the patterns that assign parameters to layers, for timm's layer-wise decay."""
        return {
            "stem": r"^cls_token|reg_token|pos_embed|patch_embed|norm_pre",
            "blocks": [(r"^blocks\.(\d+)", None), (r"^norm", (99999,))],
        }

    def _run(self, block: nn.Module, tokens: PackedTokens) -> PackedTokens:
        if self.grad_checkpointing and torch.is_grad_enabled():
            return tokens.with_rows(checkpoint(block, tokens.rows_TC, tokens, use_reentrant=False))
        return tokens.with_rows(block(tokens.rows_TC, tokens))

    def _places(
        self, packing: Packing, grid_HW: tuple[int, int], dtype: torch.dtype
    ) -> tuple[Tensor | None, tuple[Tensor, Tensor] | None]:
        """Return the grid tokens' ALiBi coordinates (T, 2) and rotary cosines and sines (T, D/2), None if unused."""
        if self.position_kind not in ("alibi", "rotary", "learn_rotary"):
            return None, None
        row_T, column_T = rows_and_columns(packing, grid_HW)
        dtype = torch.promote_types(dtype, torch.float32)
        if self.position_kind == "alibi":
            return torch.stack([row_T, column_T], dim=1).to(dtype), None
        width = self.embed_dim // self.num_heads
        angles = rotary_angles(row_T, column_T, grid_HW, width, self.rope_theta, self.rope_grid).to(dtype)
        return None, (angles.cos(), angles.sin())

    def _positions(self, grid_HW: tuple[int, int]) -> tuple[Tensor | None, Tensor | None]:
        """Return prefix tokens with positions (1, P, C) and the grid's positions (1, N, C), None if there are none."""
        tokens: list[Tensor] = [token for token in (self.cls_token, self.reg_token) if token is not None]
        prefix = torch.cat(tokens, dim=1) if tokens else None
        if self.pos_embed is None:
            return prefix, None
        P = 0 if self.no_embed_class else self.num_prefix_tokens
        if prefix is not None and P:
            prefix = prefix + self.pos_embed[:, :P]
        return prefix, resample_position_embedding(
            self.pos_embed[:, P:], self.grid_HW, grid_HW, self.pos_embed_resample
        )

    def _initialise(self) -> None:
        """Initialise as timm does: truncated normals of standard deviation 0.02, biases 0, prefix tokens near 0."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        if self.pos_embed is not None:
            nn.init.trunc_normal_(self.pos_embed, std=0.02)
        for token in (token for token in (self.cls_token, self.reg_token) if token is not None):
            nn.init.normal_(token, std=1e-6)


def _check_width(embed_dim: int, num_heads: int, pos_embed: str) -> None:
    if embed_dim % num_heads:
        raise ValueError(f"num_heads must divide embed_dim, got embed_dim={embed_dim}, num_heads={num_heads}")
    if (
        pos_embed in ("sine", "rotary", "learn_rotary")
        and (embed_dim if pos_embed == "sine" else embed_dim // num_heads) % 4
    ):
        raise ValueError(
            f"pos_embed={pos_embed!r} needs a width that is a multiple of 4 (embed_dim for sines, the head's for "
            f"rotations), got embed_dim={embed_dim}, num_heads={num_heads}"
        )


def _grid_of(img_size: int | tuple[int, int], patch_size: int, depth: int) -> tuple[int, int]:
    height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
    if depth < 1 or min(height, width) < patch_size:
        raise ValueError(
            "depth must be at least 1 and img_size no smaller than patch_size, got "
            f"depth={depth}, img_size={img_size}, patch_size={patch_size}"
        )
    return height // patch_size, width // patch_size


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {name}={value!r}")
