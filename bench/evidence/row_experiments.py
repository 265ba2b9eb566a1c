"""Experiments that decompose the last attention row of a prediction.

Let a be the class token's attention, x its scores q·(k − b_k)/√D, v the values, o = Σ a v the attention output and g
the score's gradient at o. CDAM of a token is a·[(v − b_v)·g + ((v − o)·g)·x], summed over heads: a value term and a key
term.

Dimension key: T tokens of one image, P prefix tokens first, H heads, D head width, C channels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from maskattn.explain import METHODS
from maskattn.explain.attention_row import AttentionRow
from maskattn.explain.explainer import TokenExplainer
from maskattn.explain.last_block import input_of_attention, output_from
from maskattn.nn import VisionTransformer
from maskattn.nn.blocks import PackedTokens

__all__ = ["Reading", "experiments", "facts"]

Target = Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Reading:
    """One image's prediction at its last attention.

    Attributes:
        model: a model whose prediction reads only the class token.
        tokens: the last block's input for one image.
        target: a function of the output that returns one score for each row.
    """

    model: VisionTransformer
    tokens: PackedTokens
    target: Target

    @cached_property
    def row(self) -> AttentionRow:
        """The class token's attention row."""
        return AttentionRow.of(self.model, self.tokens, self.target)

    @cached_property
    def parts(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Attention a (T, H), scores x (T, H), v − b_v (T, H, D), (v − o)·g (T, H) and g (H, D)."""
        read = self.row.read
        a = self.row.weights_HT.T
        k = read.k_THD if read.key_origin is None else read.k_THD - read.key_origin
        v = read.v_THD if read.value_origin is None else read.v_THD - read.value_origin
        x = torch.einsum("thd,hd->th", k, read.q_B1HD[0, 0]) * k.shape[-1] ** -0.5
        g = self.row.gradients(read.out_B1HD)[0, 0, 0]
        return a, x, v, torch.einsum("thd,hd->th", read.v_THD - read.out_B1HD[0, 0], g), g

    def by(self, name: str, target: Target | None = None) -> Tensor:
        """Compute a method's scores (T,)."""
        explainer = METHODS[name](self.model)
        assert isinstance(explainer, TokenExplainer)
        return explainer.relevance(self.model, self.tokens, target or self.target)[0]

    @torch.no_grad()
    def dropped(self) -> Tensor:
        """Compute the loss of score (T,) when a token is dropped: the other weights grow by 1 / (1 − a)."""
        a, read = self.parts[0][..., None], self.row.read
        without = (read.out_B1HD[0] - a * read.v_THD) / (1 - a)
        return (self.row.scores(read.out_B1HD) - self.row.scores(without[None]))[0, :, 0]

    def gradient_at(self, scale: float) -> Tensor:
        """Compute ∂f/∂T (T, C) at a multiple of T."""
        normed = (scale * input_of_attention(self.model, self.tokens)).detach().requires_grad_()
        with torch.enable_grad():
            score = self.target(output_from(self.model, self.tokens, normed)).sum()
        return torch.autograd.grad(score, normed)[0]

    def norm_path(self, steps: int) -> tuple[Tensor, Tensor]:
        """Compute the value part and the key part (T,) of the integral over α·T."""
        read, attn = self.row.read, self.model.last_block.attn
        bias = attn.qkv.bias.chunk(3)[0].view(read.q_B1HD.shape[2:]) if attn.qkv.bias is not None else 0
        _, _, v, _, _ = self.parts
        k = read.k_THD if read.key_origin is None else read.k_THD - read.key_origin
        offset = 0 if read.value_origin is None else read.value_origin
        own = read.q_B1HD[0, 0] - bias
        value, key = v.new_zeros(len(v)), v.new_zeros(len(v))
        at, weights = np.polynomial.legendre.leggauss(steps)
        for alpha, weight in zip((at + 1) / 2, weights / 2, strict=True):
            x = torch.einsum("thd,hd->th", k, alpha * own + bias) * k.shape[-1] ** -0.5
            a = (alpha * x).softmax(dim=0)
            values = alpha * v + offset
            out = torch.einsum("th,thd->hd", a, values)
            g = self.row.gradients(out[None, None])[0, 0, 0]
            value += float(weight) * (a * torch.einsum("thd,hd->th", v, g)).sum(dim=1)
            key += float(weight) * (a * x * torch.einsum("thd,hd->th", values - out, g)).sum(dim=1)
        return value, key


def experiments(reading: Reading, others: dict[str, Target]) -> dict[str, Tensor]:
    """Compute maps (N,) over grid tokens by the name of the change; ``others`` are targets to try instead."""
    a, x, v, vg, g = reading.parts
    P, T = reading.tokens.num_prefix, len(a)
    value, key = (a * torch.einsum("thd,hd->th", v, g)).sum(dim=1), (a * x * vg).sum(dim=1)
    cdam = value + key
    maps = {"CDAM": cdam, "its value term alone": value, "its key term alone": key}
    for name, zero in (("their mean over the grid", x[P:].mean(dim=0)), ("their least", x.min(dim=0).values)):
        maps[f"scores counted from {name}"] = value + (a * (x - zero) * vg).sum(dim=1)
    maps["dropped from the row, first order"] = (a / (1 - a) * vg).sum(dim=1)
    maps["dropped from the row, exactly"] = reading.dropped()
    maps["path of values"] = reading.by("integrated-value")
    for scale in (0.1, 0.25, 0.5, 0.75):
        normed = input_of_attention(reading.model, reading.tokens)
        maps[f"CDAM's gradient at {scale} T"] = (normed * reading.gradient_at(scale)).sum(dim=1).detach()
    of_values, of_keys = reading.norm_path(8)
    maps |= {"path of T (norm)": of_values + of_keys, "its value part": of_values, "its key part": of_keys}
    maps["path of T, told in weights"] = reading.by("integrated-weights")
    for name, target in others.items():
        maps[f"CDAM of the {name}"] = reading.by("cdam", target)
    sizes = reading.tokens.rows_TC.norm(dim=1)
    for name, size in (("most attended", a.mean(dim=1)), ("longest", sizes)):
        rest = cdam.clone()
        rest[P:][size[P:].topk(5).indices] = 0
        maps[f"CDAM without the 5 {name} tokens"] = rest
    normed, gradient = input_of_attention(reading.model, reading.tokens).detach(), reading.gradient_at(1.0)
    maps["gradient · (T − the norm's bias)"] = ((normed - reading.model.last_block.norm1.bias) * gradient).sum(dim=1)
    maps["gradient · (T − the mean token)"] = ((normed - normed[P:].mean(dim=0)) * gradient).sum(dim=1)
    maps["CDAM per unit of the token's length"] = cdam / normed.norm(dim=1)
    grid = a[P:] / a[P:].sum(dim=0)
    read = reading.row.read
    out = torch.einsum("th,thd->hd", grid, read.v_THD[P:])
    g_grid = reading.row.gradients(out[None, None])[0, 0, 0]
    inner = torch.einsum("thd,hd->th", read.v_THD[P:] - out, g_grid)
    without = grid * (torch.einsum("thd,hd->th", v[P:], g_grid) + inner * x[P:])
    maps["CDAM with prefix tokens out of the row"] = torch.cat([value.new_zeros(P), without.sum(dim=1)])
    maps["attention"] = a.mean(dim=1)
    assert all(len(m) == T for m in maps.values())
    return {name: m.detach()[P:] for name, m in maps.items()}


def facts(reading: Reading) -> dict[str, float]:
    """Compute numbers that describe the row."""
    a, x, v, vg, g = reading.parts
    P = reading.tokens.num_prefix
    value, key = (a * torch.einsum("thd,hd->th", v, g)).sum(dim=1)[P:], (a * x * vg).sum(dim=1)[P:]
    dropped, attended = (a / (1 - a) * vg).sum(dim=1)[P:], a.mean(dim=1)[P:]
    sizes = reading.tokens.rows_TC.norm(dim=1)[P:]
    top = attended.topk(5).indices
    return {
        "mean score x of grid tokens": float(x[P:].mean()),
        "share of them below 0": float((x[P:] < 0).double().mean()),
        "score x of the class token": float(x[0].mean()),
        "attention to the class token": float(a[0].mean()),
        "share of the 5 most attended tokens in attention": float(attended[top].sum() / attended.sum()),
        "their share in the size of CDAM": float((value + key).abs()[top].sum() / (value + key).abs().sum()),
        "length of the 5 longest tokens over the median": float(sizes.topk(5).values.mean() / sizes.median()),
        "size of the key term over the value term": float(key.abs().sum() / value.abs().sum()),
        "correlation of the key term with dropping": float(np.corrcoef(key, dropped)[0, 1]),
        "correlation of the value term with dropping": float(np.corrcoef(value, dropped)[0, 1]),
    }
