"""On the meta device every operation gives results without numbers, and gradients."""

from __future__ import annotations

import pytest
import torch

from maskattn import Packing, masked_attention, pack, packed_attention, readout, token_relevance, unpack

META = torch.device("meta")


def leaf(*shape: int) -> torch.Tensor:
    return torch.empty(*shape, device=META, requires_grad=True)


def starts(sequences: int) -> torch.Tensor:
    return torch.empty(sequences + 1, dtype=torch.int32, device=META)


@pytest.mark.parametrize("impl", [None, "torch", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_operations_give_shapes_dtypes_and_gradients(impl, dtype):
    q, k, v, few = leaf(9, 2, 16), leaf(9, 2, 16), leaf(9, 2, 16), leaf(3, 1, 2, 16)
    bias, slopes, positions = leaf(9, 2), leaf(2), leaf(9, 2)
    given = {"key_bias": bias, "coords": positions, "slopes": slopes, "return_lse": True, "impl": impl}
    rows = [x.to(dtype) for x in (q, k, v)]
    out, lse = packed_attention(*rows, starts(3), starts(3), 5, 5, **given)
    assert (out.shape, out.dtype, out.device, lse.shape) == (q.shape, dtype, META, (2, 9))
    assert all(g.shape == x.shape for g, x in zip(torch.autograd.grad(out.sum(), (q, bias)), (q, bias), strict=True))
    given["coords"] = leaf(3, 1, 2), positions
    read, weights, read_lse = readout(few.to(dtype), *rows[1:], starts(3), 5, return_rows=True, **given)
    assert (read.shape, weights.shape, read_lse.shape) == (few.shape, (1, 2, 9), (3, 1, 2))
    assert torch.autograd.grad(weights.sum(), k)[0].shape == k.shape
    relevance = token_relevance(few.to(dtype), *rows[1:], read, read_lse, leaf(4, 3, 1, 2, 16), starts(3), 5, impl=impl)
    assert (relevance.shape, relevance.device) == ((4, 9), META)


@pytest.mark.parametrize("impl", [None, "torch", "reference"])
def test_masked_attention_and_packing_give_shapes(impl):
    x, keep = leaf(2, 3, 7, 16), torch.empty(2, 7, dtype=torch.bool, device=META)
    out = masked_attention(x, x, x, keep, dropout_p=0.1, impl=impl)
    assert torch.autograd.grad(out.sum(), x)[0].shape == x.shape
    packing = Packing.from_keep(torch.rand(2, 7) > 0.4).to(META)
    tokens = leaf(2, 7, 5)
    rows = pack(tokens, packing)
    assert (rows.shape, unpack(rows, packing).shape) == ((packing.total, 5), tokens.shape)
    assert torch.autograd.grad(rows.sum(), tokens)[0].shape == tokens.shape


def test_a_mask_without_numbers_cannot_be_packed_and_the_error_says_why():
    with pytest.raises(ValueError, match=r"needs to read the mask.*got keep\.device=meta"):
        Packing.from_keep(torch.empty(2, 7, dtype=torch.bool, device=META))


def test_autocast_of_other_devices_is_no_matter_here():
    with torch.autocast("cpu", torch.bfloat16):
        assert masked_attention(leaf(1, 1, 2, 8), *[leaf(1, 1, 2, 8)] * 2, leaf(1, 2) > 0).dtype == torch.float32
