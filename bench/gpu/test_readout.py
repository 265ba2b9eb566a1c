"""A few queries over many keys, and the relevance of every token.

    pytest bench/gpu/test_readout.py

Both are bound by reading K and V once; rows carry GB/s of that.

Dimension key: B sequences, T kept tokens, H heads, D head width, R readout queries, K classes.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench.gpu.peers import UnsupportedError
from bench.gpu.points import Case, Point, Problem
from bench.gpu.test_attention import impls_of, step_of
from maskattn import readout, token_relevance

READOUTS = ("R=1", "R=1 with rows", "R=4", "R=4 with rows")
CLASSES = ("K=1", "K=10")


def points_of(grid: str, device: str) -> list[Point]:
    """Return slides and, on a GPU or in the full grid, a batch of tiles."""
    if grid == "smoke":
        return [Point(2, 64, 0.5, 2, 32, "fp32")]
    if device == "cpu":
        points = [Point(1, 16384, 0.3, 6, 64, "fp32"), Point(16, 256, 0.5, 6, 64, "fp32")]
        return points + ([Point(1, 131072, 0.3, 6, 64, "fp32")] if grid == "full" else [])
    points = [Point(1, 131072, 1.0, 12, 64, "bf16"), Point(512, 256, 0.5, 6, 64, "bf16")]
    return points + ([Point(1, 16384, 0.3, 12, 64, "bf16")] if grid == "full" else [])


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    config = metafunc.config
    impls = [f"maskattn, {impl}" for impl in impls_of(config)]
    points = points_of(config.getoption("--bench-grid"), config.getoption("--bench-device"))
    if metafunc.function is test_readout:
        peers = ("sdpa bool mask", "varlen_attn", "eager")
        cases = [
            Case("readout", direction, point, 1.1 + 4 * place + 0.01 * number, variant)
            for place, point in enumerate(points)
            for number, variant in enumerate(READOUTS)
            for direction in ("forward", *(["both"] if "rows" not in variant else []))
        ]
    else:
        peers = ("autograd, one backward for each class",)
        cases = [
            Case("token_relevance", "forward", point, 1.3 + 4 * place + 0.01 * number, variant)
            for place, point in enumerate(points)
            for number, variant in enumerate(CLASSES)
        ]
    pairs = [(case, contender) for case in cases for contender in (*impls, *peers)]
    metafunc.parametrize(("case", "contender"), pairs, ids=[f"{case}; {contender}" for case, contender in pairs])


def bytes_of(problem: Problem) -> float:
    """Return the bytes of K and V, read once."""
    return 2.0 * sum(problem.lengths) * problem.point.heads * problem.point.width * problem.dtype.itemsize


def queries_of(problem: Problem, count: int) -> Tensor:
    """Return queries (B, R, H, D)."""
    p = problem.point
    return problem.normal((p.batch, count, p.heads, p.width), 6).to(problem.dtype)


def test_readout(measure, case: Case, contender: str, problem: Problem):
    count, rows = int(case.variant.split()[0][2:]), "rows" in case.variant

    def prepare() -> Callable[[], object]:
        q = queries_of(problem, count)
        if contender.startswith("maskattn"):
            impl, packing = contender.rsplit(" ", 1)[1], problem.packing

            def ours(q: Tensor, k: Tensor, v: Tensor) -> object:
                return readout(q, k, v, packing.cu_seqlens, packing.max_seqlen, return_rows=rows, impl=impl)

            return step_of(case.direction, ours, [q, *problem.rows[1:]])
        return step_of(case.direction, *readout_peer(contender, problem, q, rows))

    passes = {"forward": 1, "both": 3}[case.direction]
    work = 2.0 * count * bytes_of(problem) / problem.dtype.itemsize
    measure(prepare, flop=work if passes == 1 else 3.5 * work, bytes_moved=passes * bytes_of(problem))


def readout_peer(contender: str, problem: Problem, q: Tensor, rows: bool) -> tuple[Callable[..., object], list[Tensor]]:
    """Return torch's alternatives for a few queries, of which only the eager one gives attention rows."""
    if rows and contender != "eager":
        raise UnsupportedError("gives no attention rows")
    if contender == "varlen_attn":
        if problem.device != "cuda":
            raise UnsupportedError("runs on CUDA alone")
        from torch.nn.attention.varlen import varlen_attn

        count, packing = q.shape[1], problem.packing
        starts = torch.arange(0, q.shape[0] * count + 1, count, dtype=torch.int32, device=problem.device)
        spans = starts, packing.cu_seqlens, count, packing.max_seqlen
        return lambda q, k, v: varlen_attn(q, k, v, *spans), [q.flatten(0, 1), *problem.rows[1:]]
    mask, dense = problem.keep[:, None, None, :], [q.transpose(1, 2), *problem.dense[1:]]
    if contender == "sdpa bool mask":
        return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, mask), dense

    def eager(q: Tensor, k: Tensor, v: Tensor) -> object:
        scores = (q @ k.transpose(-1, -2)) * q.shape[-1] ** -0.5
        weights = scores.masked_fill(~mask, float("-inf")).softmax(-1)
        return (weights @ v, weights) if rows else weights @ v

    return eager, dense


def test_token_relevance(measure, case: Case, contender: str, problem: Problem):
    classes = int(case.variant[2:])

    def prepare() -> Callable[[], object]:
        p, q = problem.point, queries_of(problem, 1)
        grad_out = problem.normal((classes, *q.shape), 7).to(problem.dtype)
        origins = [problem.normal((p.heads, p.width), seed).to(problem.dtype) for seed in (8, 9)]
        if contender.startswith("maskattn"):
            return fused(contender.rsplit(" ", 1)[1], problem, q, grad_out, origins)
        return backwards(problem, q, grad_out, origins)

    measure(prepare, bytes_moved=bytes_of(problem))


def fused(impl: str, problem: Problem, q: Tensor, grad_out: Tensor, origins: list[Tensor]) -> Callable[[], object]:
    """Return ``token_relevance``, given the output and log-sum-exp of a readout that ran before."""
    spans = problem.packing.cu_seqlens, problem.packing.max_seqlen
    k, v = problem.rows[1:]
    out, lse = readout(q, k, v, *spans, return_lse=True, impl=impl)
    key_origin, value_origin = origins

    def call() -> Tensor:
        with torch.no_grad():
            return token_relevance(
                q, k, v, out, lse, grad_out, *spans, key_origin=key_origin, value_origin=value_origin, impl=impl
            )

    return call


def backwards(problem: Problem, q: Tensor, grad_out: Tensor, origins: list[Tensor]) -> Callable[[], object]:
    """Return the derivative along k and v by autograd through the readout, class by class."""
    mask = problem.keep[:, None, None, :]
    k, v = (x.detach().requires_grad_() for x in problem.dense[1:])
    key_origin, value_origin = (origin[None, :, None, :] for origin in origins)
    out = F.scaled_dot_product_attention(q.transpose(1, 2), k, v, mask)

    def call() -> Tensor:
        relevance = []
        for grad_BRHD in grad_out:
            dk, dv = torch.autograd.grad(out, (k, v), grad_BRHD.transpose(1, 2), retain_graph=True)
            with torch.no_grad():
                relevance.append(((k - key_origin) * dk + (v - value_origin) * dv).sum((1, 3)))
        return torch.stack(relevance).flatten(1)[:, problem.packing.indices]

    return call
