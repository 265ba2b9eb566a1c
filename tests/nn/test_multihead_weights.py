"""Attention weights: in blocks of queries, of a few queries alone, and with dropout."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from layer_pair import B, E, H, S, assert_alike, inputs_of, padding, pair
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from maskattn.nn import MultiheadAttention, padded_attention


class LargestTensors(TorchDispatchMode):
    """Counts the tensors made of at least so many elements."""

    def __init__(self, elements: int) -> None:
        super().__init__()
        self.elements = elements
        self.made = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        views = func.is_view or func in (torch.ops.aten.detach.default, torch.ops.aten._unsafe_view.default)
        if isinstance(result, torch.Tensor) and result.numel() >= self.elements and not views:
            self.made += 1
        return result


def use_blocks_of(scores: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Block sizes as for far more tokens, judged by torch's layer in float64, which could not hold so many scores."""
    monkeypatch.setattr(padded_attention, "_SCORES_IN_CACHE", scores)
    monkeypatch.setattr(padded_attention, "_SCORES_HELD", 0)


@pytest.mark.parametrize("average", [True, False])
@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("dense", [True, False])
@pytest.mark.parametrize("scores", [1, 200, 400])
def test_blocks_of_queries_join_without_a_seam(average, masked, dense, scores, monkeypatch):
    use_blocks_of(scores, monkeypatch)
    theirs, ours = pair(add_zero_attn=True)
    masks = {"key_padding_mask": padding() if masked else None}
    masks["attn_mask"] = torch.randn(B * H, S, S, dtype=torch.float64) if dense and not masked else None
    if dense and masked:
        masks["attn_mask"] = (torch.rand(S, S) > 0.8).logical_and(torch.arange(S) > 0)
    inputs = inputs_of(theirs, queries=S)
    assert_alike(theirs, ours, inputs, **masks, average_attn_weights=average)
    with torch.no_grad():
        for expected, got in zip(*(layer(*inputs, **masks) for layer in (theirs, ours)), strict=True):
            torch.testing.assert_close(got, expected)


def test_without_a_graph_the_weights_are_the_only_tensor_of_their_size(monkeypatch):
    use_blocks_of(1 << 12, monkeypatch)
    layer, N = MultiheadAttention(E, H, batch_first=True), 256
    x = torch.randn(1, N, E)
    with torch.no_grad(), LargestTensors(N * N) as seen:
        layer(x, x, x)
    assert seen.made == 1


def test_a_graph_holds_no_block_of_scores(monkeypatch):
    use_blocks_of(1 << 12, monkeypatch)
    layer, N = MultiheadAttention(E, H, batch_first=True), 256
    x = torch.randn(1, N, E, requires_grad=True)
    saved = []

    def save(tensor):
        saved.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
        layer(x, x, x)
    assert sum(saved) < N * N  # the scores of one head


@pytest.mark.parametrize("arguments", [{}, {"batch_first": False}, {"add_bias_kv": True, "add_zero_attn": True}])
@pytest.mark.parametrize("average", [True, False])
@pytest.mark.parametrize("kind", ["none", "bool", "float"])
@pytest.mark.parametrize("queries", [1, 5])
def test_a_readout_equals_the_first_rows_of_the_full_weights(arguments, average, kind, queries):
    theirs, ours = pair(**arguments)
    ours.skip_queries = True
    x = inputs_of(theirs)[1]
    mask = {"none": None, "bool": padding(), "float": torch.randn(B, S, dtype=torch.float64)}[kind]
    expected, weights = theirs(x, x, x, mask, average_attn_weights=average)
    first = x[:, :queries] if ours.batch_first else x[:queries]
    out, rows = ours.readout(first, x, x, mask, average_attn_weights=average)
    torch.testing.assert_close(out, expected[:, :queries] if ours.batch_first else expected[:queries])
    torch.testing.assert_close(rows, weights[..., :queries, :])


def test_a_readout_of_unbatched_inputs_has_no_batch_and_differentiates():
    theirs, ours = pair()
    x = torch.randn(S, E, dtype=torch.float64, requires_grad=True)
    expected = theirs(x, x, x)
    results = ours.readout(x[:1], x, x)
    for got, whole in zip(results, expected, strict=True):
        torch.testing.assert_close(got, whole[:1])
    (dx,), (expected_dx,) = (
        torch.autograd.grad(sum(y[:1].sin().sum() for y in each), x) for each in (results, expected)
    )
    torch.testing.assert_close(dx, expected_dx)


def test_a_readout_of_too_many_queries_is_refused():
    layer = MultiheadAttention(E, H)
    x = torch.randn(17, E)
    with pytest.raises(ValueError, match="1 ≤ R ≤ 16"):
        layer.readout(x, x, x)


_CAUSAL = {"need_weights": False, "attn_mask": torch.ones(S, S).triu(1).bool()}
WAYS: dict[str, dict[str, Any]] = {
    "fused": {"need_weights": False},
    "fused, packed": {"need_weights": False},
    "weights": {"need_weights": True},
    "mask": {**_CAUSAL, "is_causal": False},
    "causal": {**_CAUSAL, "is_causal": True},
}


@pytest.mark.parametrize("way", WAYS)
def test_dropping_every_weight_gives_what_torch_gives(way):
    theirs, ours = pair(dropout=1.0)
    options = WAYS[way]
    ours.impl = "torch" if way == "fused, packed" else None
    assert_alike(theirs, ours, inputs_of(theirs, queries=S), **options)


@pytest.mark.parametrize("way", WAYS)
def test_dropout_acts_in_training_alone(way):
    theirs, ours = pair(dropout=0.5)
    options = WAYS[way]
    ours.impl = "torch" if way == "fused, packed" else None
    x = torch.randn(B, S, E, dtype=torch.float64)
    assert not torch.equal(ours(x, x, x, **options)[0], ours(x, x, x, **options)[0])
    assert_alike(theirs.eval(), ours.eval(), [x, x, x], **options)


@pytest.mark.parametrize("blocks", [True, False])
def test_the_returned_weights_are_the_dropped_ones_that_made_the_output(blocks, monkeypatch):
    if blocks:
        use_blocks_of(100, monkeypatch)
    _, ours = pair(dropout=0.25)
    x, mask = torch.randn(B, S, E, dtype=torch.float64, requires_grad=True), padding()
    out, weights = ours(x, x, x, mask, average_attn_weights=False)
    undropped = ours.eval()(x, x, x, mask, average_attn_weights=False)[1]
    kept = weights != 0
    torch.testing.assert_close(weights[kept], undropped[kept] / 0.75)
    value = nn.functional.linear(x, ours.in_proj_weight[2 * E :], ours.in_proj_bias[2 * E :]).masked_fill(
        mask[..., None], 0
    )
    expected = ours.out_proj((weights @ value.unflatten(-1, (H, -1)).transpose(1, 2)).transpose(1, 2).flatten(2))
    torch.testing.assert_close(out, expected)
    # The blocks are computed again in backward and must drop what they dropped.
    factors = (kept / 0.75).double()
    want = torch.autograd.grad(_attend_with(ours, x, mask, factors).sin().sum(), x, retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(out.sin().sum(), x), want)


def _attend_with(layer: MultiheadAttention, x: torch.Tensor, mask: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    projected = nn.functional.linear(x, layer.in_proj_weight, layer.in_proj_bias)
    q, k, v = projected.unflatten(-1, (3, H, -1)).permute(2, 0, 3, 1, 4)
    scores = (q @ k.mT * (E // H) ** -0.5).masked_fill(mask[:, None, None], float("-inf"))
    return layer.out_proj((scores.softmax(-1) * factors @ v).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("way", WAYS)
def test_dropped_outputs_scatter_as_torchs_around_the_undropped_one(way):
    theirs, ours = pair(dropout=0.3)
    options = WAYS[way]
    ours.impl = "torch" if way == "fused, packed" else None
    many = 4000
    x = torch.randn(1, S, E, dtype=torch.float64).expand(many, S, E)
    with torch.no_grad():
        moments = []
        for layer in (theirs, ours):
            out = layer(x, x, x, **options)[0]
            moments.append((out.mean(0), out.std(0)))
        exact = ours.eval()(x[:1], x[:1], x[:1], **options)[0][0]
    (_, spread), (mean, own_spread) = moments
    # A mean of `many` draws lies within 6 of its standard errors, a standard deviation within 20 %.
    assert ((mean - exact).abs() <= 6 * spread / many**0.5 + 1e-12).all()
    assert ((own_spread - spread).abs() <= 0.2 * spread + 1e-12).all()


@pytest.mark.parametrize("scores", [0, 1 << 26])
def test_masked_keys_are_not_read_under_dropout_either(scores, monkeypatch):
    monkeypatch.setattr(padded_attention, "_SCORES_DROPPED", scores)
    _, ours = pair(dropout=0.3)
    clean, mask = torch.randn(B, S, E, dtype=torch.float64), padding()
    mask[1] = True
    poisoned = clean.masked_fill(mask[..., None], float("nan")).requires_grad_()
    out, _ = ours(clean, poisoned, poisoned, mask, need_weights=False)
    torch.testing.assert_close(out[1], ours.out_proj.bias.expand(S, E))
    grads = torch.autograd.grad(out.sin().sum(), [poisoned, *ours.parameters()])
    assert all(grad.isfinite().all() for grad in grads)
