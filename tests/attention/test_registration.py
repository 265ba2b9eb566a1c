"""torch.library: schemas, fake kernels, autograd, torch.compile; and how memory grows."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import nn

from maskattn import Packing, masked_attention, packed_attention, readout

IMPLS = ["torch", "reference"]


def leaf(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, requires_grad=True)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("need_lse", [True, False])
@pytest.mark.parametrize("bias", [None, (9,), (9, 2)])
def test_packed_op_passes_opcheck(impl, need_lse, bias):
    starts = torch.tensor([0, 4, 9], dtype=torch.int32)
    key_bias = None if bias is None else leaf(*bias)
    arguments = (leaf(9, 2, 16), leaf(9, 2, 16), leaf(9, 2, 16), starts, starts, 5, 5, key_bias, 0.25, need_lse, impl)
    torch.library.opcheck(torch.ops.maskattn.packed_attention.default, arguments)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("skip_queries", [True, False])
@pytest.mark.parametrize("bias", [None, (2, 7), (2, 3, 7)])
def test_masked_op_passes_opcheck(impl, skip_queries, bias):
    keep = torch.rand(2, 7) > 0.4
    key_bias = None if bias is None else leaf(*bias)
    q, k, v = leaf(2, 3, 7, 16), leaf(2, 3, 7, 16), leaf(2, 3, 7, 16)
    arguments = (q, k, v, keep, key_bias, 0.25, skip_queries, True, impl)
    torch.library.opcheck(torch.ops.maskattn.masked_attention.default, arguments)


class ThreeOperations(nn.Module):
    """A module that uses each public operation, with a bias that learns."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(32, 96)
        self.bias = nn.Parameter(torch.randn(2, 20))

    def forward(self, x_BNC: torch.Tensor, keep: torch.Tensor, packing: Packing) -> torch.Tensor:
        q, k, v = self.qkv(x_BNC).unflatten(-1, (3, 2, 16)).unbind(2)
        dense = masked_attention(*(t.transpose(1, 2) for t in (q, k, v)), keep, key_bias=self.bias)
        rows = [t.flatten(0, 1)[packing.indices] for t in (q, k, v)]
        lengths = packing.cu_seqlens, packing.cu_seqlens, packing.max_seqlen, packing.max_seqlen
        out, lse = packed_attention(*rows, *lengths, return_lse=True)
        read, weights = readout(q[:, :1], *rows[1:], packing.cu_seqlens, packing.max_seqlen, return_rows=True)
        return dense.sum() + out.square().sum() + lse.sum() + read.sum() + weights.square().sum()


def test_compiles_whole_and_gives_the_eager_result_and_gradients():
    torch._dynamo.reset()
    module, x, keep = ThreeOperations(), torch.randn(2, 20, 32), torch.rand(2, 20) > 0.4
    packing = Packing.from_keep(keep)
    eager = module(x, keep, packing)
    expected = torch.autograd.grad(eager, list(module.parameters()))
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")(x, keep, packing)
    torch.testing.assert_close(compiled, eager)
    for ours, theirs in zip(torch.autograd.grad(compiled, list(module.parameters())), expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_second_derivatives_are_refused_not_wrong():
    q, starts = leaf(4, 2, 16), torch.tensor([0, 4], dtype=torch.int32)
    out = packed_attention(q, q, q, starts, starts, 4, 4)
    (first,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="autograd"):
        torch.autograd.grad(first.sum(), q)


_PEAK_OF_FORWARD_AND_BACKWARD = """
import resource, sys, torch
from maskattn import packed_attention
tokens, option = int(sys.argv[1]), sys.argv[2]
q, k, v = (torch.randn(tokens, 2, 32, requires_grad=True) for _ in range(3))
bias = torch.randn(tokens, requires_grad=True) if option == "bias" else None
def run(n):
    starts = torch.tensor([0, n], dtype=torch.int32)
    key_bias = None if bias is None else bias[:n]
    arguments = q[:n], k[:n], v[:n], starts, starts, n, n
    out = packed_attention(*arguments, key_bias=key_bias, return_lse=option == "lse", impl="torch")
    (out[0].sum() + out[1].sum() if option == "lse" else out.sum()).backward()
run(64)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
run(tokens)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


@pytest.mark.parametrize(("option", "tokens"), [("plain", 16_384), ("bias", 16_384), ("lse", 8_192)])
def test_peak_memory_of_forward_and_backward_grows_linearly(option, tokens):
    """One N×N matrix of float32 for 2 heads would be 2,048 MiB at 16,384 tokens and 512 MiB at 8,192."""

    def peak_mib(tokens: int) -> float:
        command = [sys.executable, "-c", _PEAK_OF_FORWARD_AND_BACKWARD, str(tokens), option]
        return float(subprocess.run(command, capture_output=True, text=True, check=True, timeout=300).stdout)

    half, whole = peak_mib(tokens // 2), peak_mib(tokens)
    print(f"{option}: {half:.0f} MiB at {tokens // 2} tokens, {whole:.0f} MiB at {tokens}")
    assert whole < 3 * half + 32
    assert whole < tokens**2 * 2 * 4 / 2**20 / 3
