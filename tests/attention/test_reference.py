"""The specification itself: against torch's own attention, by gradcheck, and its promises at the edges."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from maskattn import Packing, pack
from maskattn.attention import reference
from maskattn.dropout import dropout_factors
from maskattn.options import Options

NAN = float("nan")


def double(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def test_masked_attention_is_torchs_with_a_bool_mask():
    q, k, v = (double(2, 3, 7, 16) for _ in range(3))
    keep = torch.rand(2, 7) > 0.4
    keep[:, 0] = True
    out, lse = reference.masked_attention(q, k, v, keep, False, Options(0.25))
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v, attn_mask=keep[:, None, None, :]))
    scores = (q @ k.transpose(-1, -2) / 4).masked_fill(~keep[:, None, None, :], float("-inf"))
    torch.testing.assert_close(lse, scores.logsumexp(-1))
    skipped, _ = reference.masked_attention(q, k, v, keep, True, Options(0.25))
    torch.testing.assert_close(skipped, out * keep[:, None, :, None])


def test_an_all_true_mask_is_plain_attention_bit_for_bit():
    q, k, v = (torch.randn(2, 3, 7, 16) for _ in range(3))
    out, _ = reference.masked_attention(q, k, v, torch.ones(2, 7, dtype=torch.bool), True, Options(0.25))
    scores = 0.25 * (q @ k.transpose(-1, -2))
    assert torch.equal(out, scores.softmax(-1) @ v)


def test_packed_attention_is_masked_attention_on_the_packed_rows():
    q, k, v = (double(3, 2, 6, 8) for _ in range(3))
    bias, keep, positions = double(3, 2, 6), torch.rand(3, 6) > 0.4, torch.rand(3, 6, 2)
    positions[0, 1] = NAN
    packing, seed = Packing.from_keep(keep), torch.tensor([7])
    dense_options = Options(0.3, bias, double(2), positions, positions, 0.4, seed)
    dense, dense_lse = reference.masked_attention(q, k, v, keep, True, dense_options)
    rows = (pack(x.transpose(1, 2), packing) for x in (q, k, v))
    lengths = packing.cu_seqlens, packing.cu_seqlens
    positions = pack(positions, packing)
    options = Options(0.3, pack(bias.transpose(1, 2), packing), dense_options.slopes, positions, positions, 0.4, seed)
    out, lse = reference.packed_attention(*rows, *lengths, options)
    torch.testing.assert_close(out, pack(dense.transpose(1, 2), packing))
    torch.testing.assert_close(lse.T, pack(dense_lse.transpose(1, 2), packing))


def test_readout_rows_are_the_softmax_weights_that_make_the_output():
    q, k, v, bias = double(2, 3, 2, 8), double(9, 2, 8), double(9, 2, 8), double(9, 2)
    cu_seqlens = torch.tensor([0, 4, 9], dtype=torch.int32)
    out, lse, rows = reference.readout(q, k, v, cu_seqlens, Options(0.3, bias))
    assert (out.shape, lse.shape, rows.shape) == ((2, 3, 2, 8), (2, 3, 2), (3, 2, 9))
    for b, keys in enumerate((slice(0, 4), slice(4, 9))):
        torch.testing.assert_close(rows[:, :, keys].sum(-1), torch.ones(3, 2, dtype=torch.float64))
        torch.testing.assert_close(torch.einsum("rht,thd->rhd", rows[:, :, keys], v[keys]), out[b])


def test_alibi_takes_slope_times_distance_from_the_scores_and_spares_tokens_without_a_position():
    q, k, v = double(3, 1, 8), double(4, 1, 8), double(4, 1, 8)
    positions_q, positions_k = (
        torch.tensor([[NAN, NAN], [0, 0], [3, 4]]),
        torch.tensor([[0.0, 0], [6, 8], [NAN, 1], [3, 4]]),
    )
    distance = torch.tensor([[0.0, 0, 0, 0], [0, 10, 0, 5], [5, 5, 0, 0]], dtype=torch.float64)
    starts = torch.tensor([0, 3]), torch.tensor([0, 4])
    out, _ = reference.packed_attention(
        q, k, v, *starts, Options(0.5, None, torch.tensor([0.7]), positions_q, positions_k)
    )
    by_hand = F.scaled_dot_product_attention(q[:, 0], k[:, 0], v[:, 0], attn_mask=-0.7 * distance, scale=0.5)
    torch.testing.assert_close(out[:, 0], by_hand, rtol=1e-6, atol=1e-6)  # 0.7 is a float32


def test_dropout_words_are_philoxs():
    """Known answers of the generator's authors for counters and keys of all zeros and all ones."""
    first = [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    place, keys = torch.zeros(1, dtype=torch.int64), torch.arange(4)

    def dropped(word: int, p: float) -> bool:
        return bool(dropout_factors(torch.tensor([0]), p, place, keys, place, place)[word] == 0)

    for word, value in enumerate(first):
        assert dropped(word, (value + 1) / 2**32)
        assert not dropped(word, value / 2**32)


def test_dropout_drops_its_share_and_keeps_the_mean():
    heads, queries, keys = (torch.arange(n) for n in (3, 200, 301))
    place = queries[None, :, None], keys[None, None, :], heads[:, None, None], torch.tensor(1)
    factors = dropout_factors(torch.tensor([42]), 0.3, *place)
    assert set(factors.unique().tolist()) == {0.0, 1 / 0.7}
    # Five standard errors of a share of 180,600 draws.
    assert abs((factors == 0).double().mean() - 0.3) < 5 * (0.3 * 0.7 / factors.numel()) ** 0.5
    other = dropout_factors(torch.tensor([43]), 0.3, *place)
    assert abs(((factors == 0) == (other == 0)).double().mean() - 0.58) < 0.01


def test_chunks_of_sequences_drop_the_weights_that_whole_sequences_drop():
    q, k, v = (double(16, 2, 8) for _ in range(3))
    starts, chunks = (0, 7), ((0, 2, 2, 7), (0, 5, 8, 9))
    whole = Options(0.3, dropout_p=0.5, dropout_seed=torch.tensor([11]))
    cu_seqlens = torch.tensor([0, 7, 16])
    out, lse = reference.packed_attention(q, k, v, cu_seqlens, cu_seqlens, whole)

    def chunk(number: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The rows of a chunk of both sequences, its cu_seqlens, and its positions in the whole sequences."""
        ends = [(start + cuts[number], start + cuts[number + 1]) for start, cuts in zip(starts, chunks, strict=True)]
        lengths = torch.tensor([end - begin for begin, end in ends])
        offsets = torch.tensor([cuts[number] for cuts in chunks], dtype=torch.int32)
        return torch.cat([torch.arange(*each) for each in ends]), F.pad(lengths.cumsum(0), (1, 0)), offsets

    for rows, starts_q, offsets_q in map(chunk, range(3)):
        total = torch.zeros_like(out[rows])
        for keys, starts_k, offsets_k in map(chunk, range(3)):
            options = replace(whole, query_offsets=offsets_q, key_offsets=offsets_k)
            part, of_part = reference.packed_attention(q[rows], k[keys], v[keys], starts_q, starts_k, options)
            total = total + (of_part - lse[:, rows]).exp().T[..., None] * part
        torch.testing.assert_close(total, out[rows])


def options_of(
    key_bias: torch.Tensor, slopes: torch.Tensor, positions_q: torch.Tensor, positions_k: torch.Tensor
) -> Options:
    return Options(0.7, key_bias, slopes, positions_q, positions_k, 0.3, torch.tensor([5]))


@pytest.mark.parametrize("per_head", [False, True])
def test_packed_attention_has_exact_gradients(per_head):
    q, k, v, bias = double(5, 2, 3), double(7, 2, 3), double(7, 2, 3), double(7, 2) if per_head else double(7)
    starts = torch.tensor([0, 2, 2, 5]), torch.tensor([0, 3, 4, 7])
    positions_q, positions_k = torch.rand(5, 2), torch.rand(7, 2)
    positions_k[2] = NAN

    def attend(q, k, v, bias, slopes):
        return reference.packed_attention(q, k, v, *starts, options_of(bias, slopes, positions_q, positions_k))

    assert torch.autograd.gradcheck(attend, (q, k, v, bias, double(2)))


@pytest.mark.parametrize("skip_queries", [False, True])
def test_masked_attention_has_exact_gradients(skip_queries):
    q, k, v, bias = double(2, 2, 4, 3), double(2, 2, 4, 3), double(2, 2, 4, 3), double(2, 4)
    keep = torch.tensor([[True, False, True, True], [False, True, False, False]])
    positions = torch.rand(2, 4, 2)
    positions[0, 1] = NAN

    def attend(q, k, v, bias, slopes):
        options = options_of(bias, slopes, positions, positions)
        out, lse = reference.masked_attention(q, k, v, keep, skip_queries, options)
        return out, lse.masked_fill(lse.isinf(), 0)

    assert torch.autograd.gradcheck(attend, (q, k, v, bias, double(2)))


def test_keys_with_a_bias_of_minus_infinity_take_no_part():
    q, k, v, starts = double(3, 2, 4), double(5, 2, 4), double(5, 2, 4), torch.tensor([0, 3])
    bias = torch.tensor([0, -float("inf"), 0.5, -float("inf"), 0], dtype=torch.float64, requires_grad=True)
    out, lse = reference.packed_attention(q, k, v, starts, torch.tensor([0, 5]), Options(0.5, bias))
    present = bias.isfinite()
    fewer = Options(0.5, bias[present])
    expected, _ = reference.packed_attention(q, k[present], v[present], starts, torch.tensor([0, 3]), fewer)
    torch.testing.assert_close(out, expected)
    assert (torch.autograd.grad(out.sum() + lse.sum(), bias)[0][~present] == 0).all()
    nothing = Options(0.5, torch.full((5,), -float("inf"), dtype=torch.float64))
    out, lse = reference.packed_attention(q, k, v, starts, torch.tensor([0, 5]), nothing)
    assert (out == 0).all()
    assert (lse == -float("inf")).all()


def test_token_relevance_is_the_derivative_along_each_token():
    """k and v affine in the tokens: scale token t by 1 + ε and watch the classes' scores."""
    heads, width, tokens, classes = 2, 4, 9, 3
    x = double(tokens, 5)
    wk, wv, bk, bv = double(5, heads, width), double(5, heads, width), double(heads, width), double(heads, width)
    q, weights = double(2, 2, heads, width), double(classes, 2, 2, heads, width)
    starts, positions = torch.tensor([0, 4, 9]), torch.rand(tokens, 2)
    options = Options(0.6, double(tokens), double(heads), torch.rand(2, 2, 2), positions)

    def scores(factor):
        moved = factor[:, None] * x
        k, v = (torch.einsum("tc,chd->thd", moved, w) + b for w, b in ((wk, bk), (wv, bv)))
        out, _, _ = reference.readout(q, k, v, starts, options)
        return (weights * out).sum((1, 2, 3, 4))

    expected = torch.autograd.functional.jacobian(scores, torch.ones(tokens, dtype=torch.float64))
    k, v = (torch.einsum("tc,chd->thd", x, w) + b for w, b in ((wk, bk), (wv, bv)))
    got = reference.token_relevance(q, k, v, weights, bk, bv, starts, options)
    torch.testing.assert_close(got, expected)
    each = reference.token_relevance(q, k, v, weights, bk.expand_as(k), bv.expand_as(v), starts, options)
    torch.testing.assert_close(each, expected)
