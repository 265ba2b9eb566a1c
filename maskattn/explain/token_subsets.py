"""Variants of a batch's tokens as one packed batch: copies, and subsets of the grid tokens.

The prediction from a subset is exactly that of an image whose other tokens are dropped after the position embedding,
so a set of perturbed inputs is one call without padding.

Dimension key: B images, S sequences made of them, P prefix tokens, N grid tokens, T packed tokens, C channels.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from maskattn.explain.targets import Target, select_scores
from maskattn.nn.blocks import PackedTokens
from maskattn.nn.vit import VisionTransformer
from maskattn.packing import Packing
from maskattn.shapes import Bool, Float, Int

__all__ = [
    "batches",
    "copies_at_once",
    "predict_subsets",
    "repeat_tokens",
    "take_subsets",
    "target_of",
    "target_of_copies",
]

_TOKENS_AT_ONCE = 8_192
_CLASS_TOKENS_AT_ONCE = 64  # one for each copy, and so many gradients for each class


def take_subsets(
    tokens: PackedTokens, source_S: Int[Tensor, "S"], keep_SN: Bool[Tensor, "S N"] | None = None
) -> PackedTokens:
    """Return S sequences, each with a subset of one image's tokens.

    Args:
        tokens: the tokens of B images.
        source_S: (S,) int64, the image of each sequence.
        keep_SN: (S, N) bool over grid tokens; tokens that the image itself lacks stay out. None takes all its tokens.

    Raises:
        ValueError: ``keep_SN`` is given for tokens that are divided among processes.
    """
    if tokens.shards is not None and keep_SN is not None:
        raise ValueError(
            "subsets of tokens need them all, got tokens divided among processes; give every process all tiles"
        )
    width = tokens.packing.num_tokens
    row_S = tokens.packing.row_of_token.view(-1, width)[source_S]  # type: ignore[union-attr]  # made by Packing itself
    present = row_S >= 0
    if keep_SN is not None:
        present = present & torch.cat([keep_SN.new_ones(len(keep_SN), tokens.num_prefix), keep_SN], dim=1)
    packing = Packing.from_keep(present)
    rows = row_S.flatten().index_select(0, packing.indices).long()

    def pick(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.index_select(0, rows)

    rotation = tokens.rotation
    return PackedTokens(
        tokens.rows_TC.index_select(0, rows),
        packing,
        tokens.grid_HW,
        tokens.num_prefix,
        pick(tokens.coords_T2),
        None if rotation is None else (rotation[0].index_select(0, rows), rotation[1].index_select(0, rows)),
        None if tokens.shards is None else tokens.shards.taking(source_S.tolist()),
    )


def copies_at_once(tokens: PackedTokens, internal_batch_size: int | None, *, class_tokens: bool = False) -> int:
    """Return how many copies of a batch go through the tail at a time, at least one.

    Args:
        tokens: the batch's tokens.
        internal_batch_size: the number of copies of images; None takes as many as have 8,192 tokens together.
        class_tokens: whether only the class tokens go through, of which None takes 64.
    """
    packing = tokens.packing
    if internal_batch_size is not None:
        return max(1, internal_batch_size // max(packing.batch_size, 1))
    if class_tokens:
        return max(1, _CLASS_TOKENS_AT_ONCE // max(packing.batch_size, 1))
    # Processes among which tokens are divided have different numbers of them, and must divide the copies alike.
    of_a_copy = packing.total if tokens.shards is None else packing.batch_size * packing.num_tokens
    return max(1, _TOKENS_AT_ONCE // max(of_a_copy, 1))


def repeat_tokens(tokens: PackedTokens, copies: int) -> PackedTokens:
    """Return the batch repeated ``copies`` times, one copy after the other."""
    B = tokens.packing.batch_size
    return take_subsets(tokens, torch.arange(B, device=tokens.rows_TC.device).repeat(copies))


@torch.no_grad()
def predict_subsets(
    model: VisionTransformer,
    tokens: PackedTokens,
    target: Target,
    source_S: Int[Tensor, "S"],
    keep_SN: Bool[Tensor, "S N"],
    internal_batch_size: int = 64,
) -> Float[Tensor, "S M"]:
    """Predict the target's scores (S, M) from subsets of the tokens.

    Args:
        model: the vision transformer.
        tokens: the output of ``model.embed``.
        target: see :func:`maskattn.explain.targets.select_scores`; a function must treat each row independently.
        source_S, keep_SN: see :func:`take_subsets`.
        internal_batch_size: sequences that go through the model at a time.
    """
    scores = []
    for chunk in batches(len(source_S), internal_batch_size):
        subset = take_subsets(tokens, source_S[chunk], keep_SN[chunk])
        output = model.predict(model.before_last_block(subset))
        scores.append(select_scores(output, target_of(target, source_S[chunk])))
    return torch.cat(scores)


def target_of(target: Target, source_S: Int[Tensor, "S"]) -> Target:
    """Return the target of sequences made from the images ``source_S``; a class given per image follows its image."""
    return target.to(source_S.device)[source_S] if isinstance(target, Tensor) and target.ndim else target


def target_of_copies(target: Target, batch_size: int) -> Target:
    """Return the target of a batch that is repeated, one copy after the other."""

    def scores(output: Tensor) -> Tensor:
        return torch.cat([select_scores(copy, target) for copy in output.split(batch_size)])

    return scores


def batches(total: int, size: int) -> Iterator[slice]:
    """Split 0 … total into slices of at most ``size``."""
    return (slice(start, min(start + size, total)) for start in range(0, total, size))
