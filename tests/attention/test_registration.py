"""torch.library: schemas, fake kernels, autograd, torch.compile; and how memory grows."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from maskattn import Packing, masked_attention, pack, packed_attention, readout, token_relevance, unpack
from maskattn.attention.ops import flat_options
from maskattn.options import Options
from maskattn.registration import untraced

IMPLS = ["torch", "reference", *(["cpu"] if importlib.util.find_spec("maskattn._native") else [])]


def leaf(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, requires_grad=True)


def options(
    heads: int, positions_q: tuple[int, ...], positions_k: tuple[int, ...], bias: tuple[int, ...], **change
) -> tuple:
    """Every option, as the ops take them; named ones are left out when None."""
    everything = Options(
        0.25, leaf(*bias), leaf(heads), torch.rand(*positions_q, 2), torch.rand(*positions_k, 2), 0.2, torch.tensor([3])
    )
    return flat_options(replace(everything, **change))


NO_ALIBI = {"slopes": None, "coords_q": None, "coords_k": None}
NO_DROPOUT = {"dropout_p": 0.0, "dropout_seed": None}
OF_CHUNKS = {name: torch.tensor([5, 30], dtype=torch.int32) for name in ("query_offsets", "key_offsets")}
LEFT_OUT = [{}, {**NO_ALIBI, **NO_DROPOUT, "key_bias": None}, NO_ALIBI, NO_DROPOUT]
# The C++ kernels have no dropout and refuse it.
RUNS = [(impl, left) for impl in IMPLS for left in LEFT_OUT if impl != "cpu" or "dropout_p" in left]


@pytest.mark.parametrize(("impl", "left_out"), [*RUNS, ("torch", OF_CHUNKS)])
@pytest.mark.parametrize("need_lse", [True, False])
def test_packed_op_passes_opcheck(impl, need_lse, left_out):
    starts = torch.tensor([0, 4, 9], dtype=torch.int32)
    given = options(2, (9,), (9,), (9, 2), **left_out)
    arguments = (leaf(9, 2, 16), leaf(9, 2, 16), leaf(9, 2, 16), starts, starts, 5, 5, *given, need_lse, impl)
    torch.library.opcheck(torch.ops.maskattn.packed_attention.default, arguments)


@pytest.mark.parametrize(("impl", "left_out"), RUNS)
@pytest.mark.parametrize("skip_queries", [True, False])
def test_masked_op_passes_opcheck(impl, skip_queries, left_out):
    keep = torch.rand(2, 7) > 0.4
    given = options(3, (2, 7), (2, 7), (2, 3, 7), **left_out)
    q, k, v = leaf(2, 3, 7, 16), leaf(2, 3, 7, 16), leaf(2, 3, 7, 16)
    arguments = (q, k, v, keep, skip_queries, *given, True, impl)
    torch.library.opcheck(torch.ops.maskattn.masked_attention.default, arguments)


@pytest.mark.parametrize(("impl", "left_out"), [run for run in RUNS if run[1] in LEFT_OUT[:2]])
@pytest.mark.parametrize("asked", [(True, True), (True, False), (False, False)])
def test_readout_op_passes_opcheck(impl, asked, left_out):
    starts = torch.tensor([0, 4, 9], dtype=torch.int32)
    given = options(2, (2, 3), (9,), (9,), **left_out)
    arguments = (leaf(2, 3, 2, 16), leaf(9, 2, 16), leaf(9, 2, 16), starts, 5, *given, *asked, impl)
    torch.library.opcheck(torch.ops.maskattn.readout.default, arguments)


@pytest.mark.parametrize("impl", IMPLS)
def test_relevance_op_passes_opcheck(impl):
    starts, read = torch.tensor([0, 4, 9], dtype=torch.int32), torch.randn(2, 3, 2, 16)
    tensors = read, *torch.randn(2, 9, 2, 16), read, read[..., 0], torch.randn(4, 2, 3, 2, 16), torch.randn(2, 16), None
    given = [x.detach() if isinstance(x, torch.Tensor) else x for x in options(2, (2, 3), (9,), (9,), **NO_DROPOUT)]
    torch.library.opcheck(torch.ops.maskattn.token_relevance.default, (*tensors, starts, 5, *given, impl))


class EveryOperation(nn.Module):
    """A module that uses each public operation, with a bias and slopes that learn."""

    def __init__(self, dropout_p: float = 0.0) -> None:
        super().__init__()
        self.qkv = nn.Linear(32, 96)
        self.bias = nn.Parameter(torch.randn(2, 20))
        self.slopes = nn.Parameter(torch.rand(2))
        self.dropout_p = dropout_p

    def forward(self, x_BNC: torch.Tensor, keep: torch.Tensor, packing: Packing) -> torch.Tensor:
        q, k, v = self.qkv(x_BNC).unflatten(-1, (3, 2, 16)).unbind(2)
        positions = x_BNC[..., :2]
        given = {"slopes": self.slopes, "dropout_p": self.dropout_p}
        heads_first = (t.transpose(1, 2) for t in (q, k, v))
        dense = masked_attention(*heads_first, keep, key_bias=self.bias, coords=positions, **given)
        rows = [pack(t, packing) for t in (q, k, v)]
        positions = pack(positions, packing)
        lengths = packing.cu_seqlens, packing.cu_seqlens, packing.max_seqlen, packing.max_seqlen
        out, lse = packed_attention(*rows, *lengths, return_lse=True, coords=positions, **given)
        read, weights, read_lse = readout(
            q[:, :1], *rows[1:], packing.cu_seqlens, packing.max_seqlen, return_rows=True, return_lse=True
        )
        relevance = token_relevance(
            q[:, :1], *rows[1:], read, read_lse, read[None], packing.cu_seqlens, packing.max_seqlen
        )
        spread = unpack(out, packing)
        parts = dense, spread.square(), lse, read, weights.square(), relevance
        return torch.stack([part.float().sum() for part in parts]).sum()


def module_and_inputs() -> tuple[EveryOperation, torch.Tensor, torch.Tensor, Packing]:
    keep = torch.rand(2, 20) > 0.4
    return EveryOperation(), torch.randn(2, 20, 32), keep, Packing.from_keep(keep)


def test_compiles_whole_and_gives_the_eager_result_and_gradients():
    torch._dynamo.reset()
    module, *inputs = module_and_inputs()
    eager = module(*inputs)
    expected = torch.autograd.grad(eager, list(module.parameters()))
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")(*inputs)
    torch.testing.assert_close(compiled, eager)
    for ours, theirs in zip(torch.autograd.grad(compiled, list(module.parameters())), expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_compiles_whole_with_dropout():
    torch._dynamo.reset()
    _, *inputs = module_and_inputs()
    module = EveryOperation(dropout_p=0.5)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    first, second = compiled(*inputs), compiled(*inputs)
    assert first.isfinite()
    assert first != second
    first.backward()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_casts_as_it_does_torchs_attention_and_trains(dtype):
    module, *inputs = module_and_inputs()
    with torch.autocast("cpu", dtype):
        x = torch.randn(5, 2, 16)
        starts = torch.tensor([0, 5], dtype=torch.int32)
        out, lse = packed_attention(x, x.to(dtype), x, starts, starts, 5, 5, return_lse=True)
        total = module(*inputs)
    assert (out.dtype, lse.dtype) == (dtype, torch.float32)
    lower, _ = packed_attention(*[x.to(dtype)] * 3, starts, starts, 5, 5, return_lse=True)
    assert torch.equal(out, lower)
    total.backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in module.parameters())


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_draws_the_same_dropout_again(reentrant):
    module, (_, x, keep, packing) = EveryOperation(dropout_p=0.5), module_and_inputs()
    x.requires_grad_()
    grads = []
    for checkpointed in (False, True):
        torch.manual_seed(1)
        arguments = x, keep, packing
        out = checkpoint(module, *arguments, use_reentrant=reentrant) if checkpointed else module(*arguments)
        module.zero_grad()
        out.backward()
        grads.append([p.grad.clone() for p in module.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("operation", ["packed_attention", "masked_attention", "readout"])
def test_second_derivatives_are_refused_by_name(operation):
    q, starts = leaf(4, 2, 16), torch.tensor([0, 4], dtype=torch.int32)
    if operation == "packed_attention":
        out = packed_attention(q, q, q, starts, starts, 4, 4)
    elif operation == "masked_attention":
        out = masked_attention(q[None], q[None], q[None], torch.ones(1, 2, dtype=torch.bool))
    else:
        out = readout(q[None, :1], q, q, starts, 4)
    (first,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match=f"{operation} has no second derivative"):
        torch.autograd.grad(first.sum(), q)


_ONE_TRAINING_STEP = """
import sys, torch
from maskattn import Packing, pack, packed_attention, unpack
packing = Packing.from_keep(torch.tensor([[True, False, True]]))
x = pack(torch.randn(1, 3, 2, 16, requires_grad=True), packing)
out = packed_attention(x, x, x, packing.cu_seqlens, packing.cu_seqlens, packing.max_seqlen, packing.max_seqlen)
unpack(out, packing).sum().backward()
assert "torch._dynamo" not in sys.modules
"""


def test_a_training_step_does_not_import_the_compiler():
    subprocess.run([sys.executable, "-c", _ONE_TRAINING_STEP], check=True, timeout=120)


def test_a_kernel_is_not_traced_by_a_compiled_caller():
    def body(x: torch.Tensor) -> torch.Tensor:
        return x.sin().cos()

    torch._dynamo.reset()
    traced: list[torch.fx.GraphModule] = []

    def record(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> torch.fx.GraphModule:
        traced.append(graph)
        return graph

    kernel, x = untraced(body), torch.randn(4)
    found = torch.compile(lambda x: kernel(x + 1) * 2, backend=record)(x)
    assert torch.equal(found, body(x + 1) * 2)
    assert traced
    assert not any(node.target in ("sin", "cos") for graph in traced for node in graph.graph.nodes)


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
