"""What callers are told, and which implementation runs."""

from __future__ import annotations

import pytest
import torch

from maskattn import masked_attention, packed_attention, readout

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
        ({"cu_seqlens_k": STARTS[:2]}, ValueError, "as many sequences, got 2 and 1"),
        ({"key_bias": torch.randn(4)}, ValueError, r"key_bias\.shape=\(4,\)"),
        ({"key_bias": torch.ones(5, dtype=torch.long)}, TypeError, "key_bias must be floating point"),
        ({"impl": "cuda"}, ValueError, "impl must be one of triton, torch, reference"),
        ({"k": rows().to("meta"), "v": rows().to("meta")}, ValueError, "must share a device"),
        ({"cu_seqlens_q": STARTS.to("meta")}, ValueError, "must lie on q's device"),
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


def test_cross_attention_needs_no_query_mask():
    q, k = torch.randn(2, 3, 6, 8), torch.randn(2, 3, 4, 8)
    assert masked_attention(q, k, k, torch.ones(2, 4, dtype=torch.bool), skip_queries=False).shape == q.shape


def test_triton_named_on_a_cpu_never_falls_back():
    pytest.importorskip("triton")
    with pytest.raises(ValueError, match=r"impl='triton' .*impl=None"):
        packed_attention(rows(), rows(), rows(), STARTS, STARTS, 3, 3, impl="triton")


def test_triton_named_where_it_is_absent_says_so(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="needs the package triton"):
        packed_attention(rows(), rows(), rows(), STARTS, STARTS, 3, 3, impl="triton")


@pytest.mark.parametrize("impl", ["torch", "reference"])
def test_a_named_implementation_is_the_one_that_runs(impl, monkeypatch):
    from maskattn.attention import ops

    ran = []
    for name, module in (("torch", ops.torch_sdpa), ("reference", ops.reference)):
        function = "packed_forward" if name == "torch" else "packed_attention"
        original = getattr(module, function)
        monkeypatch.setattr(module, function, lambda *a, n=name, f=original, **k: (ran.append(n), f(*a, **k))[1])
    packed_attention(rows(), rows(), rows(), STARTS, STARTS, 3, 3, impl=impl)
    assert ran == [impl]


def test_the_default_on_a_cpu_is_torchs_attention(monkeypatch):
    from maskattn.attention import ops

    monkeypatch.setattr(ops.torch_sdpa, "packed_forward", lambda q, *_: (torch.full_like(q, 7.0), q.new_empty(2, 0)))
    assert (packed_attention(rows(), rows(), rows(), STARTS, STARTS, 3, 3) == 7).all()
