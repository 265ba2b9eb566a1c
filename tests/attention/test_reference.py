"""The specification itself: against torch's own attention, by gradcheck, and its promises at the edges."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from maskattn import Packing, pack
from maskattn.attention import reference


def double(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def test_masked_attention_is_torchs_with_a_bool_mask():
    q, k, v = (double(2, 3, 7, 16) for _ in range(3))
    keep = torch.rand(2, 7) > 0.4
    keep[:, 0] = True
    out, lse = reference.masked_attention(q, k, v, keep, skip_queries=False)
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v, attn_mask=keep[:, None, None, :]))
    scores = (q @ k.transpose(-1, -2) / 4).masked_fill(~keep[:, None, None, :], float("-inf"))
    torch.testing.assert_close(lse, scores.logsumexp(-1))
    skipped, _ = reference.masked_attention(q, k, v, keep)
    torch.testing.assert_close(skipped, out * keep[:, None, :, None])


def test_an_all_true_mask_is_plain_attention_bit_for_bit():
    q, k, v = (torch.randn(2, 3, 7, 16) for _ in range(3))
    out, _ = reference.masked_attention(q, k, v, torch.ones(2, 7, dtype=torch.bool))
    scores = 0.25 * (q @ k.transpose(-1, -2))
    assert torch.equal(out, (scores - scores.logsumexp(-1, keepdim=True)).exp() @ v)


def test_packed_attention_is_masked_attention_on_the_packed_rows():
    q, k, v = (double(3, 2, 6, 8) for _ in range(3))
    bias, keep = double(3, 2, 6), torch.rand(3, 6) > 0.4
    packing = Packing.from_keep(keep)
    dense, dense_lse = reference.masked_attention(q, k, v, keep, key_bias=bias)
    rows = (pack(x.transpose(1, 2), packing) for x in (q, k, v))
    lengths = packing.cu_seqlens, packing.cu_seqlens
    out, lse = reference.packed_attention(*rows, *lengths, key_bias=pack(bias.transpose(1, 2), packing))
    torch.testing.assert_close(out, pack(dense.transpose(1, 2), packing))
    torch.testing.assert_close(lse.T, pack(dense_lse.transpose(1, 2), packing))


def test_readout_rows_are_the_softmax_weights_that_make_the_output():
    q, k, v, bias = double(2, 3, 2, 8), double(9, 2, 8), double(9, 2, 8), double(9, 2)
    cu_seqlens = torch.tensor([0, 4, 9], dtype=torch.int32)
    out, lse, rows = reference.readout(q, k, v, cu_seqlens, key_bias=bias)
    assert (out.shape, lse.shape, rows.shape) == ((2, 3, 2, 8), (2, 3, 2), (3, 2, 9))
    for b, keys in enumerate((slice(0, 4), slice(4, 9))):
        torch.testing.assert_close(rows[:, :, keys].sum(-1), torch.ones(3, 2, dtype=torch.float64))
        torch.testing.assert_close(torch.einsum("rht,thd->rhd", rows[:, :, keys], v[keys]), out[b])


@pytest.mark.parametrize("per_head", [False, True])
def test_packed_attention_has_exact_gradients(per_head):
    q, k, v, bias = double(5, 2, 3), double(7, 2, 3), double(7, 2, 3), double(7, 2) if per_head else double(7)
    starts = torch.tensor([0, 2, 2, 5]), torch.tensor([0, 3, 4, 7])

    def attend(q, k, v, bias):
        return reference.packed_attention(q, k, v, *starts, key_bias=bias, scale=0.7)

    assert torch.autograd.gradcheck(attend, (q, k, v, bias))


@pytest.mark.parametrize("skip_queries", [False, True])
def test_masked_attention_has_exact_gradients(skip_queries):
    q, k, v, bias = double(2, 2, 4, 3), double(2, 2, 4, 3), double(2, 2, 4, 3), double(2, 4)
    keep = torch.tensor([[True, False, True, True], [False, True, False, False]])

    def attend(q, k, v, bias):
        out, lse = reference.masked_attention(q, k, v, keep, key_bias=bias, skip_queries=skip_queries)
        return out, lse.masked_fill(lse.isinf(), 0)

    assert torch.autograd.gradcheck(attend, (q, k, v, bias))
