"""Propagation of attention rows through layers, a chunk of queries at a time, so that nothing of size N × N is held.

A row r over a layer's outputs becomes r·A over its inputs, where A is the layer's attention matrix. The unit row of the
class token thus gives the class token's attention row. Repeated through all layers as r ← ½ (r + r·A), with A averaged
over heads, it gives attention rollout (Abnar and Zuidema, arXiv 2005.00928), in time linear in the number of layers and
quadratic in the number of tokens.

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

_MAX_SCORES = 2**24  # held at a time


def carry_down(
    row_N: Float[Tensor, "N"],
    q_HND: Float[Tensor, "H N D"],
    k_HND: Float[Tensor, "H N D"],
    coords_N2: Float[Tensor, "N 2"] | None = None,
) -> Float[Tensor, "N"]:
    """Compute r·A, where A is the mean over heads of softmax(q·k/√D).

    Args:
        row_N: r; queries whose entry is 0 are skipped.
        q_HND, k_HND: queries and keys of all tokens, unscaled.
        coords_N2: positions for 2-D ALiBi, NaN for a token without one; None without ALiBi.
    """
    H, N, D = k_HND.shape
    result_N = torch.zeros_like(row_N)
    for queries in row_N.nonzero()[:, 0].split(max(1, _MAX_SCORES // (H * N))):
        scores_HQN = q_HND[:, queries] @ k_HND.mT * D**-0.5
        if coords_N2 is not None:
            distance_QN = torch.cdist(coords_N2[queries], coords_N2, compute_mode="donot_use_mm_for_euclid_dist")
            slopes_H = alibi_slopes(H, coords_N2)
            scores_HQN -= (slopes_H[:, None, None] * distance_QN.nan_to_num()).to(scores_HQN)
        result_N += torch.einsum("q,hqn->n", row_N[queries], scores_HQN.softmax(dim=-1)) / H
    return result_N


def read_down(row_N: Float[Tensor, "N"], block: Block, tokens: PackedTokens) -> Float[Tensor, "N"]:
    """Compute r·A for a block of the packed transformer.

    Args:
        row_N: r, over the tokens of a single sequence.
        block: the block whose attention is A.
        tokens: the block's input.
    """
    q_NHD, k_NHD, _ = block.attn.queries_keys_and_values(block.norm1(tokens.rows_TC), tokens)
    return carry_down(row_N, q_NHD.transpose(0, 1), k_NHD.transpose(0, 1), tokens.coords_T2)


def rolled_out(
    vit: VisionTransformer, tokens: PackedTokens, row_N: Float[Tensor, "N"], depth: int | None = None
) -> Float[Tensor, "N"]:
    """Compute attention rollout from a row over a transformer's outputs to its input tokens.

    Args:
        vit: the transformer.
        tokens: input of the first block, a single sequence.
        row_N: row over the outputs of the last block that counts.
        depth: number of blocks that count, from the first; None for all.

    Raises:
        ValueError: the tokens are divided among processes.
    """
    if tokens.shards is not None:
        raise ValueError(
            "rollout multiplies the attention of all tiles, got tiles divided among processes; give every process all "
            "tiles, or take the last layer's attention"
        )
    inputs = []
    for number in range(len(vit.blocks) if depth is None else depth):
        inputs.append(tokens)
        tokens = vit.run_blocks(tokens, slice(number, number + 1))
    for number in reversed(range(len(inputs))):
        block = vit.blocks[number]
        assert isinstance(block, Block), "a transformer is made of blocks"
        row_N = (row_N + read_down(row_N, block, inputs[number])) / 2
    return row_N
