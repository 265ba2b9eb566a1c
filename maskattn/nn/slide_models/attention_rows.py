"""Rows of attention weights carried down through layers, some queries at a time: nothing of size N × N is held.

A row r over a layer's outputs becomes r·A over its inputs, A the layer's weights. From the class token's unit row this
is its row of the layer; carried through all layers as r ← ½ (r + r·A), A the mean over heads, it is attention rollout
(Abnar and Zuidema, arXiv 2005.00928), in time linear in layers and quadratic in tokens.

Dimension key: N tokens, H heads, D head width, C channels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from maskattn.nn.blocks import Block
from maskattn.nn.packed_tokens import PackedTokens
from maskattn.nn.positions import alibi_slopes
from maskattn.nn.vit import VisionTransformer
from maskattn.shapes import Float

__all__ = ["carry_down", "read_down", "rolled_out"]

_NUMBERS_AT_ONCE = 2**24


def carry_down(
    row_N: Float[Tensor, "N"],
    q_HND: Float[Tensor, "H N D"],
    k_HND: Float[Tensor, "H N D"],
    coords_N2: Float[Tensor, "N 2"] | None = None,
) -> Float[Tensor, "N"]:
    """r·A, A the mean over heads of softmax(q·k/√D).

    Args:
        row_N: r; queries where it is 0 cost nothing.
        q_HND, k_HND: of all tokens, unscaled.
        coords_N2: places for 2-D ALiBi, NaN where a token has none; None without ALiBi.
    """
    H, N, D = k_HND.shape
    result_N = torch.zeros_like(row_N)
    for some in row_N.nonzero()[:, 0].split(max(1, _NUMBERS_AT_ONCE // (H * N))):
        scores_HQN = q_HND[:, some] @ k_HND.mT * D**-0.5
        if coords_N2 is not None:
            distance_QN = torch.cdist(coords_N2[some], coords_N2, compute_mode="donot_use_mm_for_euclid_dist")
            slopes_H = alibi_slopes(H, coords_N2)
            scores_HQN -= (slopes_H[:, None, None] * distance_QN.nan_to_num()).to(scores_HQN)
        result_N += torch.einsum("q,hqn->n", row_N[some], scores_HQN.softmax(dim=-1)) / H
    return result_N


def read_down(row_N: Float[Tensor, "N"], block: Block, tokens: PackedTokens) -> Float[Tensor, "N"]:
    """r·A for a block of the packed transformer.

    Args:
        row_N: over the tokens of the one sequence.
        block: whose attention it is.
        tokens: its input.
    """
    q_NHD, k_NHD, _ = block.attn.queries_keys_and_values(block.norm1(tokens.rows_TC), tokens)
    return carry_down(row_N, q_NHD.transpose(0, 1), k_NHD.transpose(0, 1), tokens.coords_T2)


def rolled_out(
    vit: VisionTransformer, tokens: PackedTokens, row_N: Float[Tensor, "N"], depth: int | None = None
) -> Float[Tensor, "N"]:
    """Rollout from a row over the transformer's last outputs to its first tokens.

    Args:
        vit: the transformer.
        tokens: one sequence, with which the first block starts.
        row_N: over what the last of the blocks gives.
        depth: blocks that are passed; None for all.
    """
    inputs = []
    for number in range(len(vit.blocks) if depth is None else depth):
        inputs.append(tokens)
        tokens = vit.run_blocks(tokens, slice(number, number + 1))
    for number in reversed(range(len(inputs))):
        block = vit.blocks[number]
        assert isinstance(block, Block), "a transformer is made of blocks"
        row_N = (row_N + read_down(row_N, block, inputs[number])) / 2
    return row_N
