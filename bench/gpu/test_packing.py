"""Packing, from a mask to packed rows and back, compared with FlexAttention's preparation.

pytest bench/gpu/test_packing.py
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from bench.gpu.peers import flex_mask
from bench.gpu.points import Case, Point, Problem
from maskattn import Packing, pack, unpack

STEPS = {
    "prepare": ("maskattn, Packing.from_keep", "flex, create_block_mask"),
    "pack": ("maskattn, pack", "boolean index"),
    "unpack": ("maskattn, unpack", "boolean assignment"),
}


def points_of(grid: str, device: str) -> list[Point]:
    """Return the tokens of a slide and of a batch of tiles, with C = H·D channels."""
    if grid == "smoke":
        return [Point(2, 64, 0.5, 2, 32, "fp32")]
    if device == "cpu":
        return [Point(1, 16384, 0.3, 6, 64, "fp32"), Point(16, 256, 0.3, 6, 64, "fp32")]
    return [Point(1, 65536, 0.3, 12, 64, "bf16"), Point(512, 256, 0.5, 6, 64, "bf16")]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    config = metafunc.config
    points = points_of(config.getoption("--bench-grid"), config.getoption("--bench-device"))
    pairs = [
        (Case("packing", "forward", point, 2.2 + 4 * place, step), contender)
        for place, point in enumerate(points)
        for step, contenders in STEPS.items()
        for contender in contenders
    ]
    metafunc.parametrize(("case", "contender"), pairs, ids=[f"{case}; {contender}" for case, contender in pairs])


def test_packing(measure, case: Case, contender: str, problem: Problem):
    p = problem.point
    row_bytes = p.heads * p.width * problem.dtype.itemsize
    kept, everything = sum(problem.lengths), p.batch * p.tokens
    # Bytes read and written; unpacking also writes zeros everywhere.
    moved = {"prepare": everything, "pack": 2 * kept * row_bytes, "unpack": (2 * kept + everything) * row_bytes}
    measure(lambda: step(contender, problem), bytes_moved=moved[case.variant])


def step(contender: str, problem: Problem) -> Callable[[], object]:
    """Return one step of packing as a call."""
    p, keep = problem.point, problem.keep
    if contender == "maskattn, Packing.from_keep":
        return lambda: Packing.from_keep(keep)
    if contender == "flex, create_block_mask":
        return flex_mask(problem)
    packing = problem.packing
    dense = problem.normal((p.batch, p.tokens, p.heads * p.width), 5).to(problem.dtype)
    rows = pack(dense, packing)
    if contender == "maskattn, pack":
        return lambda: pack(dense, packing)
    if contender == "maskattn, unpack":
        return lambda: unpack(rows, packing)
    if contender == "boolean index":
        return lambda: dense[keep]

    def assign() -> Tensor:
        out = torch.zeros_like(dense)
        out[keep] = rows
        return out

    return assign
