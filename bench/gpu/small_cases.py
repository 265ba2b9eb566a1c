"""Every operation with every option once, on small inputs, for compute-sanitizer.

    compute-sanitizer --tool memcheck python -m bench.gpu.small_cases
    python -m bench.gpu.small_cases --device cpu --impl torch

Exits with 1 if a result is not finite; whether results are right is for tests/kernels.
"""

from __future__ import annotations

import argparse
import sys

import torch
from torch import Tensor

from bench.gpu.points import DTYPES, Point, Problem
from bench.gpu.test_options import VARIANTS, masked, packed
from bench.gpu.test_readout import fused, queries_of
from maskattn import readout


def tensors_of(result: object) -> list[Tensor]:
    """Return a result's tensors as a list."""
    return [result] if isinstance(result, Tensor) else list(result)


def attention(problem: Problem, impl: str, variant: str) -> list[Tensor]:
    """Compute outputs and gradients of the packed and the masked operation."""
    results = []
    for attend in (packed, masked):
        function, inputs = attend(variant, problem, impl)
        leaves = [x.detach().requires_grad_() for x in inputs]
        outputs = tensors_of(function(*leaves))
        # Background queries have lse −inf.
        outputs = [x.masked_fill(x.isinf(), 0) for x in outputs]
        results += [*outputs, *torch.autograd.grad([x.float().sum() for x in outputs], leaves)]
    return results


def few_queries(problem: Problem, impl: str) -> list[Tensor]:
    """Compute readout with rows and gradients, and the relevance of three classes."""
    packing = problem.packing
    leaves = [x.detach().requires_grad_() for x in (queries_of(problem, 2), *problem.rows[1:])]
    outputs = readout(*leaves, packing.cu_seqlens, packing.max_seqlen, return_rows=True, return_lse=True, impl=impl)
    grads = torch.autograd.grad([x.float().sum() for x in outputs], leaves)
    q = queries_of(problem, 1)
    grad_out = problem.normal((3, *q.shape), 7).to(problem.dtype)
    origins = [problem.normal(q.shape[2:], seed).to(problem.dtype) for seed in (8, 9)]
    return [*outputs, *grads, fused(impl, problem, q, grad_out, origins)()]


def main() -> None:
    """Run all cases, and report errors and results that are not finite."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--impl", default="triton")
    parser.add_argument("--widths", type=int, nargs="+", default=[64, 80])
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    arguments = parser.parse_args()
    failures = done = 0
    for width in arguments.widths:
        for dtype in arguments.dtypes:
            problem = Problem(Point(3, 150, 0.5, 2, width, dtype), arguments.device)
            calls = {variant: lambda p, impl, v=variant: attention(p, impl, v) for variant in VARIANTS}
            for name, call in {**calls, "readout, relevance": few_queries}.items():
                done += 1
                try:
                    bad = sum(int((~x.isfinite()).sum()) for x in call(problem, arguments.impl))
                    problem_found = f"{bad} values are not finite" if bad else ""
                except Exception as error:  # the remaining cases are informative too
                    problem_found = f"{type(error).__name__}: {error}"
                if problem_found:
                    failures += 1
                    print(f"FAILED {name}, D={width}, {dtype}: {problem_found}")
    print(f"{done - failures} of {done} small cases ran on {arguments.device} with impl {arguments.impl}")
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
