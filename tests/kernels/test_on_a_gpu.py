"""What only a device can show: graphs, streams, torch.compile, autocast, and a million tokens without N×N memory."""

from __future__ import annotations

import pytest
import torch
from oracles import cu_seqlens

from maskattn import Packing, masked_attention, pack, packed_attention, readout, token_relevance, unpack

pytestmark = pytest.mark.gpu


def operands(tokens: int, dtype: torch.dtype = torch.bfloat16, heads: int = 2) -> list[torch.Tensor]:
    return [torch.randn(tokens, heads, 64, dtype=dtype, device="cuda") for _ in range(3)]


def test_forward_is_captured_in_a_graph_and_replayed_on_new_values():
    lengths = [300, 0, 41]
    q, k, v = operands(sum(lengths))
    keep = (torch.rand(3, 300) < 0.4).cuda()
    dense = torch.randn(3, 2, 300, 64, dtype=torch.bfloat16, device="cuda")
    starts = cu_seqlens(lengths).cuda()
    packing = Packing.from_keep(keep.cpu()).to("cuda")
    places, slopes = torch.rand(len(q), 2, device="cuda"), torch.rand(2, device="cuda")

    def forward() -> list[torch.Tensor]:
        out, lse = packed_attention(
            q, k, v, starts, starts, 300, 300, coords=places, slopes=slopes, return_lse=True, impl="triton"
        )
        masked = masked_attention(dense, dense, dense, keep, impl="triton")
        read, rows = readout(q[:3, None], k, v, starts, 300, return_rows=True, impl="triton")
        spread = unpack(pack(dense.transpose(1, 2), packing), packing)
        return [out, lse, masked, read, rows, spread]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream), torch.no_grad():
        forward()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        captured = forward()
    for x in (q, k, v, dense):
        x.normal_()
    graph.replay()
    with torch.no_grad():
        assert all(torch.equal(a, b) for a, b in zip(captured, forward(), strict=True))


def test_dropout_in_a_graph_is_drawn_anew_at_each_replay():
    q, k, v = operands(100)
    starts = cu_seqlens([100]).cuda()

    def forward() -> torch.Tensor:
        return packed_attention(q, k, v, starts, starts, 100, 100, dropout_p=0.5, impl="triton")

    forward()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = forward()
    graph.replay()
    first = out.clone()
    graph.replay()
    assert not torch.equal(first, out)


def test_two_streams_do_not_disturb_each_other():
    starts = cu_seqlens([2000]).cuda()
    inputs = [operands(2000) for _ in range(2)]
    alone = [packed_attention(*x, starts, starts, 2000, 2000, impl="triton") for x in inputs]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in inputs]
    together = []
    for stream, x in zip(streams, inputs, strict=True):
        with torch.cuda.stream(stream):
            together.append([packed_attention(*x, starts, starts, 2000, 2000, impl="triton") for _ in range(20)])
    torch.cuda.synchronize()
    for expected, results in zip(alone, together, strict=True):
        assert all(torch.equal(expected, out) for out in results)


def test_torch_compile_gives_the_eager_result_and_gradients():
    torch._dynamo.reset()
    starts = cu_seqlens([300, 41]).cuda()
    leaves = [x.requires_grad_() for x in operands(341, torch.float32)]

    def loss(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        out, lse = packed_attention(q.sin(), k, v, starts, starts, 300, 300, return_lse=True)
        read, read_lse = readout(q[:2, None], k, v, starts, 300, return_lse=True)
        relevance = token_relevance(q[:2, None], k, v, read, read_lse, read[None], starts, 300)
        return out.square().sum() + lse.sum() + read.sum() + relevance.sum()

    eager, compiled = loss(*leaves), torch.compile(loss, fullgraph=True)(*leaves)
    torch.testing.assert_close(compiled, eager)
    for ours, theirs in zip(torch.autograd.grad(compiled, leaves), torch.autograd.grad(eager, leaves), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_autocast_runs_the_kernels_in_its_dtype():
    starts = cu_seqlens([300]).cuda()
    q, k, v = (x.requires_grad_() for x in operands(300, torch.float32))
    with torch.autocast("cuda", torch.bfloat16):
        out = packed_attention(q, k, v, starts, starts, 300, 300)
    assert out.dtype == torch.bfloat16
    assert torch.autograd.grad(out.float().sum(), q)[0].dtype == torch.float32


def test_packing_a_cpu_mask_does_not_synchronise():
    keep = torch.rand(4, 500) < 0.3
    x = torch.randn(4, 500, 32, device="cuda", requires_grad=True)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        packing = Packing.from_keep(keep).to("cuda")
        rows = pack(x, packing)
        q = rows.unflatten(-1, (2, 16))
        out = packed_attention(
            q, q, q, packing.cu_seqlens, packing.cu_seqlens, packing.max_seqlen, packing.max_seqlen, impl="triton"
        )
        unpack(out, packing).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_million_tokens_forward_and_backward_without_quadratic_memory():
    tokens = 1_000_000
    q, k, v = (x.requires_grad_() for x in operands(tokens, heads=1))
    starts = cu_seqlens([tokens]).cuda()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    packed_attention(q, k, v, starts, starts, tokens, tokens, impl="triton").sum().backward()
    torch.cuda.synchronize()
    # Ten tensors of the size of q are plenty; one row block of 128 scores for every key would be twice that.
    assert torch.cuda.max_memory_allocated() - before < 10 * q.numel() * 4
    assert all(x.grad is not None and x.grad.isfinite().all() for x in (q, k, v))
