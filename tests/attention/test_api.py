"""What callers are told, and which implementation runs."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from maskattn import Packing, masked_attention, packed_attention, readout, token_relevance
from maskattn.attention.ops import flat_options
from maskattn.options import Options

STARTS = torch.tensor([0, 2, 5], dtype=torch.int32)


def rows(T: int = 5, H: int = 2, D: int = 16, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(T, H, D).to(dtype)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"k": rows(5, 3)}, ValueError, r"k\.shape=\(5, 3, 16\)"),
        ({"q": rows()[0]}, ValueError, r"q\.shape=\(2, 16\)"),
        ({"v": rows(dtype=torch.float64)}, TypeError, "must share a dtype"),
        ({"q": rows().long(), "k": rows().long(), "v": rows().long()}, TypeError, r"q\.dtype=torch\.int64"),
        ({"cu_seqlens_q": STARTS.long()}, TypeError, "cu_seqlens_q must be int32"),
        ({"cu_seqlens_k": STARTS[None]}, ValueError, r"cu_seqlens_k\.shape=\(1, 3\)"),
        ({"cu_seqlens_k": STARTS[:2]}, ValueError, "the same number of sequences, got 2 and 1"),
        ({"key_bias": torch.randn(4)}, ValueError, r"key_bias\.shape=\(4,\)"),
        ({"key_bias": torch.ones(5, dtype=torch.long)}, TypeError, "key_bias must be floating point"),
        ({"impl": "cuda"}, ValueError, "impl must be one of triton, gluon, cpu, torch, reference"),
        ({"k": rows().to("meta"), "v": rows().to("meta")}, ValueError, "must share a device"),
        ({"cu_seqlens_q": STARTS.to("meta")}, ValueError, "must be on q's device"),
        ({"coords": torch.rand(5, 2)}, ValueError, "got coords without slopes"),
        ({"slopes": torch.rand(2)}, ValueError, "got slopes without coords"),
        ({"coords": torch.rand(5, 2), "slopes": torch.rand(3)}, ValueError, r"slopes\.shape=\(3,\)"),
        ({"coords": torch.rand(5, 3), "slopes": torch.rand(2)}, ValueError, r"coords\.shape=\(5, 3\)"),
        ({"coords": torch.ones(5, 2, dtype=torch.int64), "slopes": torch.rand(2)}, TypeError, r"coords\.float\(\)"),
        ({"coords": [torch.rand(5, 2)] * 3, "slopes": torch.rand(2)}, ValueError, "got 3 tensors"),
        ({"dropout_p": 1.0}, ValueError, r"in \[0, 1\), got dropout_p=1\.0"),
        ({"dropout_p": -0.1}, ValueError, r"dropout_p=-0\.1"),
    ],
)
def test_wrong_arguments_of_packed_attention_are_named(change, error, message):
    call = {"q": rows(), "k": rows(), "v": rows(), "cu_seqlens_q": STARTS, "cu_seqlens_k": STARTS}
    with pytest.raises(error, match=message):
        packed_attention(**{**call, "max_seqlen_q": 3, "max_seqlen_k": 3, **change})


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"keep": torch.ones(2, 4)}, TypeError, r"keep\.dtype=torch\.float32"),
        ({"keep": torch.ones(2, 5, dtype=torch.bool)}, ValueError, r"= \(2, 4\), got keep\.shape=\(2, 5\)"),
        ({"q": torch.randn(2, 3, 6, 8)}, ValueError, "skip_queries=False for cross-attention"),
        ({"k": torch.randn(2, 2, 4, 8)}, ValueError, r"k\.shape=\(2, 2, 4, 8\)"),
        ({"key_bias": torch.randn(2, 5)}, ValueError, r"key_bias\.shape=\(2, 5\)"),
    ],
)
def test_wrong_arguments_of_masked_attention_are_named(change, error, message):
    x = torch.randn(2, 3, 4, 8)
    with pytest.raises(error, match=message):
        masked_attention(**{"q": x, "k": x, "v": x, "keep": torch.ones(2, 4, dtype=torch.bool), **change})


def test_wrong_arguments_of_readout_are_named():
    with pytest.raises(ValueError, match="1 ≤ R ≤ 16"):
        readout(torch.randn(2, 17, 2, 16), rows(), rows(), STARTS, 3)
    with pytest.raises(ValueError, match=r"B \+ 1 = 4 entries"):
        readout(torch.randn(3, 1, 2, 16), rows(), rows(), STARTS, 3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"grad_out": torch.randn(2, 1, 2, 16)}, r"grad_out\[None\]"),
        ({"lse": torch.randn(2, 2, 1)}, r"lse\.shape=\(2, 2, 1\)"),
        ({"out": torch.randn(2, 1, 16)}, r"out\.shape=\(2, 1, 16\)"),
        ({"key_origin": torch.randn(16)}, r"key_origin\.shape=\(16,\)"),
        ({"cu_seqlens": STARTS[:2]}, r"B \+ 1 = 3 entries"),
    ],
)
def test_wrong_arguments_of_token_relevance_are_named(change, message):
    q = torch.randn(2, 1, 2, 16)
    call = {"q": q, "k": rows(), "v": rows(), "out": q, "lse": q[..., 0], "grad_out": q[None]}
    with pytest.raises(ValueError, match=message):
        token_relevance(**{**call, "cu_seqlens": STARTS, "max_seqlen": 3, **change})


def test_queries_and_keys_that_differ_need_positions_of_their_own():
    starts = torch.tensor([0, 2, 4], dtype=torch.int32)
    call = rows(), rows(4), rows(4), STARTS, starts, 3, 2
    with pytest.raises(ValueError, match="coords must be a pair"):
        packed_attention(*call, coords=torch.rand(5, 2), slopes=torch.rand(2))
    out = packed_attention(*call, coords=(torch.rand(5, 2), torch.rand(4, 2)), slopes=torch.rand(2))
    assert out.shape == (5, 2, 16)


def test_positions_of_dense_tokens_may_be_shared_by_the_batch():
    x, keep, positions = torch.randn(2, 3, 4, 8), torch.rand(2, 4) > 0.3, torch.rand(4, 2)
    shared, each = (
        masked_attention(x, x, x, keep, coords=c, slopes=torch.ones(3)) for c in (positions, positions.expand(2, 4, 2))
    )
    assert torch.equal(shared, each)


def test_cross_attention_needs_no_query_mask():
    q, k = torch.randn(2, 3, 6, 8), torch.randn(2, 3, 4, 8)
    assert masked_attention(q, k, k, torch.ones(2, 4, dtype=torch.bool), skip_queries=False).shape == q.shape


def test_triton_named_on_a_cpu_never_falls_back():
    pytest.importorskip("triton")
    with pytest.raises(ValueError, match=r"impl='triton' .*impl=None"):
        packed_attention(rows(), rows(), rows(), STARTS, STARTS, 3, 3, impl="triton")


def test_triton_named_where_it_is_absent_says_so():
    program = """
import sys
sys.modules["triton"] = None
import torch, maskattn
x, starts = torch.randn(5, 2, 16), torch.tensor([0, 2, 5], dtype=torch.int32)
try:
    maskattn.packed_attention(x, x, x, starts, starts, 3, 3, impl="triton")
except ValueError as error:
    print(error)
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert result.stdout.startswith("impl='triton' needs the package triton, which is not installed"), result.stderr


def test_a_named_implementation_is_the_one_that_runs():
    """Only impl "torch" leaves out an lse that was not asked for, only the specification computes in float16."""
    x = rows(dtype=torch.float16)
    options = flat_options(Options(0.25))
    for impl, elements, dtype in (("torch", 0, torch.float32), ("reference", 10, torch.float16)):
        out, lse, _ = torch.ops.maskattn.packed_attention(x, x, x, STARTS, STARTS, 3, 3, *options, False, impl)
        assert (out.dtype, lse.numel(), lse.dtype) == (torch.float16, elements, dtype)


def test_a_packing_stands_for_the_four_lengths():
    of_queries, of_keys = Packing.from_keep(torch.rand(2, 6) > 0.3), Packing.from_keep(torch.rand(2, 9) > 0.3)
    q, k = rows(of_queries.total), rows(of_keys.total)
    lengths = of_queries.cu_seqlens, of_keys.cu_seqlens, of_queries.max_seqlen, of_keys.max_seqlen
    assert torch.equal(packed_attention(q, k, k, (of_queries, of_keys)), packed_attention(q, k, k, *lengths))
    own = of_queries.cu_seqlens, of_queries.cu_seqlens, of_queries.max_seqlen, of_queries.max_seqlen
    assert torch.equal(packed_attention(q, q, q, of_queries), packed_attention(q, q, q, *own))
    with pytest.raises(ValueError, match="pass only the Packing"):
        packed_attention(q, q, q, of_queries, of_queries.cu_seqlens)
    with pytest.raises(TypeError, match="got no max_seqlen_q, max_seqlen_k; pass the Packing"):
        packed_attention(q, q, q, STARTS, STARTS)


@pytest.mark.parametrize("impl", ["cpu", "torch", "reference"])
def test_what_multiplies_float32_as_it_is_takes_an_allowance_not_to(impl):
    if impl == "cpu":
        pytest.importorskip("maskattn._native")
    q, keep = torch.randn(5, 2, 16), torch.tensor([[True, True, False, True, True]])
    packing = Packing.from_keep(torch.ones(1, 5, dtype=torch.bool))
    dense = q.transpose(0, 1)[None]
    for precision in ("ieee", "tf32x3"):
        packed = packed_attention(q, q, q, packing, precision=precision, impl=impl)
        assert torch.equal(packed, packed_attention(q, q, q, packing, impl=impl))
        masked = masked_attention(dense, dense, dense, keep, precision=precision, impl=impl)
        assert torch.equal(masked, masked_attention(dense, dense, dense, keep, impl=impl))


@pytest.mark.parametrize("impl", ["cpu", "torch", "reference"])
def test_what_is_deterministic_in_any_case_takes_an_allowance_not_to_be(impl):
    if impl == "cpu":
        pytest.importorskip("maskattn._native")
    q, keep = torch.randn(5, 2, 16, requires_grad=True), torch.tensor([[True, True, False, True, True]])
    packing = Packing.from_keep(torch.ones(1, 5, dtype=torch.bool))
    dense = q.transpose(0, 1)[None]

    def results(**given):
        packed = packed_attention(q, q, q, packing, impl=impl, **given)
        masked = masked_attention(dense, dense, dense, keep, impl=impl, **given)
        return packed, masked, torch.autograd.grad(packed.sum() + masked.square().sum(), q)[0]

    pairs = zip(results(), results(deterministic=False), strict=True)
    assert all(torch.equal(usual, allowed) for usual, allowed in pairs)


def test_a_readout_is_deterministic_and_is_not_asked():
    given = flat_options(Options(0.25, deterministic=False))
    q, starts = torch.randn(1, 2, 2, 16), torch.tensor([0, 5], dtype=torch.int32)
    with pytest.raises(ValueError, match=r"readout has no deterministic, got deterministic=False; leave it out"):
        torch.ops.maskattn.readout(q, *torch.randn(2, 5, 2, 16), starts, 5, *given, True, False, "reference")


def test_a_precision_that_is_none_is_named():
    q, packing = torch.randn(3, 2, 16), Packing.from_keep(torch.ones(1, 3, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"precision must be 'ieee' or 'tf32x3', got precision='tf32'"):
        packed_attention(q, q, q, packing, precision="tf32")


def test_operations_bound_by_memory_have_no_precision():
    given = flat_options(Options(0.25, precision="tf32x3"))
    q, starts = torch.randn(1, 2, 2, 16), torch.tensor([0, 5], dtype=torch.int32)
    with pytest.raises(ValueError, match=r"readout has no precision, got precision=tf32x3; leave it out"):
        torch.ops.maskattn.readout(q, *torch.randn(2, 5, 2, 16), starts, 5, *given, True, False, "reference")
