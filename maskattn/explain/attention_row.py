"""What a score loses when a token is dropped from the class token's last attention row.

With a_hi head h's weight of token i, v its values and o = Σ_i a_hi v_hi what the class token reads, the row without
some tokens is the row of those that stay, divided by their sum: exactly what the softmax gives. So a set of tokens S,
beside the prefix tokens, which always stay, reads o_S = Σ_{i ∈ S} a_i v_i / Σ_{i ∈ S} a_i, and scores f(o_S), f being
the tail (projection, MLP, norm and head of one token). No keys, no queries and no backbone are computed again.

Dimension key: B images, R variants of a row, L = P + N tokens, P prefix tokens, N grid tokens, T packed tokens, M maps,
H heads, D head width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maskattn.attention.api import readout
from maskattn.explain.explainer import TokenExplainer
from maskattn.explain.last_block import reads_class_token_alone
from maskattn.explain.norm_path import scores_of_reads
from maskattn.explain.targets import Target
from maskattn.explain.token_scores import gradients_of_reads
from maskattn.explain.token_subsets import batches
from maskattn.nn.blocks import ClassTokenAttention, PackedTokens
from maskattn.nn.vit import VisionTransformer
from maskattn.packing import pack, unpack
from maskattn.shapes import Float

__all__ = ["AttentionRowAblation"]


@dataclass(frozen=True, eq=False)
class AttentionRow:
    """The class tokens' last attention row.

    Attributes:
        model, tokens, target: of which it is.
        read: queries, keys, values and what was read.
        weights_HT: (H, T), the softmax weight of each token.
    """

    model: VisionTransformer
    tokens: PackedTokens
    target: Target
    read: ClassTokenAttention
    weights_HT: Float[Tensor, "H T"]

    @classmethod
    @torch.no_grad()
    def of(cls, model: VisionTransformer, tokens: PackedTokens, target: Target) -> AttentionRow:
        """The row of a model's class tokens. Arguments as in :meth:`TokenExplainer.relevance`.

        Raises:
            ValueError: the prediction reads more than this row.
        """
        if not reads_class_token_alone(model):
            raise ValueError(
                "this method reads the class token's last attention row, so the prediction must read nothing else, got "
                f"global_pool={model.global_pool!r} or a last block with hooks or adapters; use IntegratedCDAM"
            )
        read = model.last_block.read_attention(tokens)
        packing, impl = tokens.packing, model.last_block.attn.impl
        lengths = packing.cu_seqlens, packing.max_seqlen
        _, rows = readout(read.q_B1HD, read.k_THD, read.v_THD, *lengths, return_rows=True, impl=impl)
        return cls(model, tokens, target, read, rows[0])

    def packed(self, of_grid_BNM: Float[Tensor, "B N M"]) -> Float[Tensor, "M T"]:
        """Values of grid tokens as rows of all packed tokens; 0 at prefix tokens."""
        return pack(F.pad(of_grid_BNM, (0, 0, self.tokens.num_prefix, 0)), self.tokens.packing).T

    def dense(self, of_tokens: Float[Tensor, "T ..."]) -> Float[Tensor, "B L ..."]:
        """Values of packed tokens in their places, 0 where there is none."""
        return unpack(of_tokens, self.tokens.packing)

    def scores(self, out_BRHD: Float[Tensor, "B R H D"]) -> Float[Tensor, "B R M"]:
        """The scores of rows that read this."""
        scores = scores_of_reads(self.model, self.tokens, out_BRHD, self.target)
        return scores.unflatten(0, (out_BRHD.shape[1], len(out_BRHD))).transpose(0, 1)

    def gradients(self, out_BRHD: Float[Tensor, "B R H D"]) -> Float[Tensor, "M B R H D"]:
        """The gradient of each score of each row at what it reads."""
        out = out_BRHD.detach().requires_grad_()
        with torch.enable_grad():
            scores = scores_of_reads(self.model, self.tokens, out, self.target)
        return gradients_of_reads(scores, out, self.target)


class AttentionRowAblation(TokenExplainer):
    """What a score loses when a token is dropped from the last block: f(o) − f(o without i), exactly.

    o without i is (o − a_i v_i)/(1 − a_i), head by head; its tail is computed for every token, in batches, for all
    targets at once. Without a token the rest of the last block is as if it had never been there; the blocks before have
    seen it.

    Args:
        model: as for every :class:`maskattn.explain.explainer.Explainer`; its prediction reads the class token alone.
        first_order: take f to first order at o instead: Σ_h a_hi/(1 − a_hi) (v_hi − o_h) · ∂f/∂o_h.
        internal_batch_size: rows in the tail at a time.
    """

    multiplies_by_inputs = False

    def __init__(self, model: nn.Module, *, first_order: bool = False, internal_batch_size: int = 4096) -> None:
        super().__init__(model)
        self.first_order = first_order
        self.internal_batch_size = internal_batch_size

    @torch.no_grad()
    def relevance(  # noqa: D102 (as of TokenExplainer)
        self, model: VisionTransformer, tokens: PackedTokens, target: Target, generator: torch.Generator | None = None
    ) -> Tensor:
        row, P = AttentionRow.of(model, tokens, target), tokens.num_prefix
        out, B = row.read.out_B1HD, tokens.packing.batch_size
        weights, values = (row.dense(x)[:, P:] for x in (row.weights_HT.T, row.read.v_THD))
        if self.first_order:
            gradients = row.gradients(out)[:, :, 0]
            share = weights / (1 - weights).clamp(min=torch.finfo(weights.dtype).eps)
            along = torch.einsum("blhd,mbhd->mblh", values - out, gradients)
            return row.packed(torch.einsum("mblh,blh->blm", along, share))
        whole, parts = row.scores(out), []
        largest, without_largest = self._without_largest(row)
        for part in batches(weights.shape[1], max(1, self.internal_batch_size // max(B, 1))):
            a, v = weights[:, part, :, None], values[:, part]
            without = (out - a * v) / (1 - a)
            # Where a token has most of a head's weight, the difference would cancel: the row is read again.
            places = torch.arange(part.start, part.stop, device=a.device) + P
            is_largest = (largest[:, None] == places[:, None])[..., None]
            without = torch.where(is_largest & (a > 0.5), without_largest, without)
            parts.append(whole - row.scores(without))
        return row.packed(torch.cat(parts, dim=1))

    @staticmethod
    def _without_largest(row: AttentionRow) -> tuple[Tensor, Tensor]:
        """Where each head's heaviest token lies, (B, H), and what the head reads without it, (B, 1, H, D)."""
        tokens, read = row.tokens, row.read
        largest = row.dense(row.weights_HT.T).argmax(dim=1)  # [B, H]
        place = tokens.packing.indices % tokens.packing.num_tokens
        gone_TH = place[:, None] == largest[tokens.packing.sequence_of_token]
        out = readout(
            read.q_B1HD,
            read.k_THD,
            read.v_THD,
            tokens.packing.cu_seqlens,
            tokens.packing.max_seqlen,
            key_bias=torch.zeros_like(gone_TH, dtype=read.q_B1HD.dtype).masked_fill(gone_TH, -torch.inf),
            impl=row.model.last_block.attn.impl,
        )
        assert isinstance(out, Tensor)
        return largest, out
