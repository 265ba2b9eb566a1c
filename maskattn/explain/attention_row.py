"""Row ablation: the loss of score when a token is dropped from the class token's last attention row.

Let a_hi be head h's weight of token i, v_hi the token's value and o_h = Σ_i a_hi v_hi the class token's attention
output. Dropping tokens renormalises the remaining weights of the row, exactly as the softmax would. A set S of tokens
(the prefix tokens always stay) therefore gives o_S = Σ_{i ∈ S} a_i v_i / Σ_{i ∈ S} a_i and the score f(o_S), where f is
the tail: projection, MLP, norm and head of one token. Keys, queries and the backbone are not computed again.

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
        model, tokens, target: the arguments of :meth:`of`.
        read: queries, keys, values and the attention output.
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
        """Compute the row of a model's class tokens. Arguments as in :meth:`TokenExplainer.relevance`.

        Raises:
            ValueError: the prediction depends on more than this row.
        """
        if tokens.shards is not None:
            raise ValueError(
                "row ablation needs all tokens, got tokens divided among processes; give every process all tiles, or "
                "use IntegratedCDAM"
            )
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
        """Return values of grid tokens as values of all packed tokens; 0 at prefix tokens."""
        return pack(F.pad(of_grid_BNM, (0, 0, self.tokens.num_prefix, 0)), self.tokens.packing).T

    def dense(self, of_tokens: Float[Tensor, "T ..."]) -> Float[Tensor, "B L ..."]:
        """Return values of packed tokens at their positions in the sequence; 0 where a token was dropped."""
        return unpack(of_tokens, self.tokens.packing)

    def scores(self, out_BRHD: Float[Tensor, "B R H D"]) -> Float[Tensor, "B R M"]:
        """Return the scores for R variants of the attention output."""
        scores = scores_of_reads(self.model, self.tokens, out_BRHD, self.target)
        return scores.unflatten(0, (out_BRHD.shape[1], len(out_BRHD))).transpose(0, 1)

    def gradients(self, out_BRHD: Float[Tensor, "B R H D"]) -> Float[Tensor, "M B R H D"]:
        """Return the gradient of each score with respect to each variant of the attention output."""
        out = out_BRHD.detach().requires_grad_()
        with torch.enable_grad():
            scores = scores_of_reads(self.model, self.tokens, out, self.target)
        return gradients_of_reads(scores, out, self.target)


class AttentionRowAblation(TokenExplainer):
    """The exact loss of score when a token is dropped from the last block: f(o) − f(o without i).

    o without i is (o − a_i v_i)/(1 − a_i), head by head. The tail is computed for every token, in batches, for all
    targets at once. The last block then behaves as if the token had never been there; earlier blocks have seen it.

    Args:
        model: as for every :class:`maskattn.explain.explainer.Explainer`; its prediction must read only the class
            token.
        first_order: use the first-order expansion of f at o instead: Σ_h a_hi/(1 − a_hi) (v_hi − o_h) · ∂f/∂o_h.
        internal_batch_size: rows that go through the tail at a time.
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
        full_score, losses = row.scores(out), []
        largest, without_largest = self._without_largest(row)
        for chunk in batches(weights.shape[1], max(1, self.internal_batch_size // max(B, 1))):
            a, v = weights[:, chunk, :, None], values[:, chunk]
            without = (out - a * v) / (1 - a)
            # The difference cancels if a token holds most of a head's weight, so that output is computed anew.
            positions = torch.arange(chunk.start, chunk.stop, device=a.device) + P
            is_largest = (largest[:, None] == positions[:, None])[..., None]
            without = torch.where(is_largest & (a > 0.5), without_largest, without)
            losses.append(full_score - row.scores(without))
        return row.packed(torch.cat(losses, dim=1))

    @staticmethod
    def _without_largest(row: AttentionRow) -> tuple[Tensor, Tensor]:
        """Return the position of each head's heaviest token, (B, H), and the output without it, (B, 1, H, D)."""
        tokens, read = row.tokens, row.read
        largest = row.dense(row.weights_HT.T).argmax(dim=1)  # [B, H]
        position = tokens.packing.indices % tokens.packing.num_tokens
        gone_TH = position[:, None] == largest[tokens.packing.sequence_of_token]
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
