"""Guarantees of our layer that torch's does not give: keys that are not read, queries without a key."""

from __future__ import annotations

import pytest
import torch
from layer_pair import B, E, H, S, padding, pair

WAYS = {
    "fused": {"need_weights": False},
    "mask": {"need_weights": False, "attn_mask": torch.zeros(S, S, dtype=torch.bool)},
    "mask of heads": {"need_weights": False, "attn_mask": torch.zeros(B * H, S, S, dtype=torch.bool)},
    "weights": {},
    "weights of heads": {"average_attn_weights": False},
    "weights, mask": {"attn_mask": torch.zeros(S, S, dtype=torch.bool)},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", [torch.bool, torch.float64])
@pytest.mark.parametrize("appended", [False, True])
def test_a_query_without_a_key_gives_the_bias_alone_and_no_nan(way, kind, appended):
    _, ours = pair(add_zero_attn=appended)
    x = torch.randn(B, S, E, dtype=torch.float64, requires_grad=True)
    mask = torch.ones(B, S, dtype=torch.bool)
    mask[1, 3] = False
    options = dict(WAYS[way])
    if kind == torch.float64:
        mask = torch.zeros(B, S, dtype=torch.float64).masked_fill(mask, float("-inf"))
        if "attn_mask" in options:
            options["attn_mask"] = options["attn_mask"].double()
    out, weights = ours(x, x, x, key_padding_mask=mask, **options)
    torch.testing.assert_close(out[0], ours.out_proj.bias.expand(S, E))
    if weights is not None:
        assert (weights[0, ..., :S] == 0).all()
        torch.testing.assert_close(weights[0].sum(-1), torch.full_like(weights[0, ..., 0], float(appended)))
    grads = torch.autograd.grad(out.sum() + (0 if weights is None else weights.sum()), [x, *ours.parameters()])
    assert all(grad.isfinite().all() for grad in grads)


@pytest.mark.parametrize("need_weights", [True, False])
def test_a_row_that_the_dense_mask_empties_gives_the_bias_alone(need_weights):
    theirs, ours = pair()
    x = torch.randn(B, S, E, dtype=torch.float64)
    attn_mask, keys = torch.rand(S, S) > 0.7, padding()
    attn_mask[:, 0] = False
    attn_mask[4] = True
    expected = theirs(x, x, x, keys, attn_mask=attn_mask.logical_and(torch.arange(S)[:, None] != 4))[0]
    out, weights = ours(x, x, x, keys, attn_mask=attn_mask, need_weights=need_weights)
    expected[:, 4] = ours.out_proj.bias
    torch.testing.assert_close(out, expected)
    assert weights is None or (weights[:, 4] == 0).all()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("skip_queries", [False, True])
def test_masked_keys_are_not_read_and_skipped_queries_give_zero(way, skip_queries):
    theirs, ours = pair()
    ours.skip_queries = skip_queries
    clean, mask = torch.randn(B, S, E, dtype=torch.float64), padding()
    options = dict(WAYS[way])
    if "attn_mask" in options:
        options["attn_mask"] = torch.rand(options["attn_mask"].shape) > 0.6
        options["attn_mask"][..., 0] = False
    expected, expected_weights = theirs(clean, clean, clean, key_padding_mask=mask, **options)
    poisoned = clean.masked_fill(mask[..., None], float("nan")).requires_grad_()
    query = poisoned if skip_queries else clean
    out, weights = ours(query, poisoned, poisoned, key_padding_mask=mask, **options)
    if skip_queries:
        expected = expected.masked_fill(mask[..., None], 0)
        if expected_weights is not None:
            rows = mask[..., None] if expected_weights.ndim == 3 else mask[:, None, :, None]
            expected_weights = expected_weights.masked_fill(rows, 0)
    torch.testing.assert_close(out, expected)
    if weights is not None:
        torch.testing.assert_close(weights, expected_weights)
    loss = out.sin().sum() + (0 if weights is None else weights.sin().sum())
    dx, *others = torch.autograd.grad(loss, [poisoned, *ours.parameters()])
    assert (dx[mask] == 0).all()
    assert all(grad.isfinite().all() for grad in (dx, *others))


def test_the_lowest_finite_value_of_a_float_mask_ignores_a_key_too():
    theirs, ours = pair()
    clean, ignored = torch.randn(B, S, E, dtype=torch.float64), padding()
    lowest = torch.zeros(B, S, dtype=torch.float64).masked_fill(ignored, torch.finfo(torch.float64).min)
    poisoned = clean.masked_fill(ignored[..., None], float("nan"))
    expected = theirs(clean, clean, clean, key_padding_mask=lowest, need_weights=False)[0]
    torch.testing.assert_close(ours(clean, poisoned, poisoned, lowest, need_weights=False)[0], expected)


def test_a_mask_of_zeros_and_infinities_costs_no_key_bias(monkeypatch):
    from maskattn.nn import multihead

    # A bias of zeros gives the same result, and costs what a bias costs.
    biases = []
    attend = multihead.packed_attention

    def seen(*arguments, key_bias, **options):
        biases.append(key_bias)
        return attend(*arguments, key_bias=key_bias, **options)

    monkeypatch.setattr(multihead, "packed_attention", seen)
    _, ours = pair()
    x, mask = torch.randn(B, S, E, dtype=torch.float64), torch.zeros(B, S).masked_fill(padding(), float("-inf"))
    ours(x, x, x, mask, need_weights=False)
    ours(x, x, x, mask.requires_grad_(), need_weights=False)
    assert [bias is None for bias in biases] == [True, False]


def test_a_mask_of_keys_alone_is_packed_away_before_the_projection(monkeypatch):
    _, ours = pair()
    ours.skip_queries = True
    rows = []
    linear = torch.nn.functional.linear

    def counted(x, *rest):
        rows.append(x.shape[0])
        return linear(x, *rest)

    monkeypatch.setattr(torch.nn.functional, "linear", counted)
    x, mask = torch.randn(B, S, E, dtype=torch.float64), padding()
    ours(x, x, x, mask, need_weights=False)
    assert rows == [int((~mask).sum())] * 2  # one product into q, k and v, one out
