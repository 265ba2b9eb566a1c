"""Attention, forward, backward and both, compared with users' alternatives.

pytest bench/gpu/test_attention.py
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from bench.gpu.peers import IMPLS, attention_of, contenders
from bench.gpu.points import Case, Problem, grid_of

# In multiples of a forward, which computes two products; the backward computes five.
WORK = {"forward": 1.0, "backward": 2.5, "both": 3.5}

FLEX_POINTS = 3


def impls_of(config: pytest.Config) -> tuple[str, ...]:
    """Return our implementations that are measured."""
    given = config.getoption("--bench-impls")
    return tuple(given.split(",")) if given else IMPLS[config.getoption("--bench-device")]


def cases(grid: str, device: str) -> list[Case]:
    """Return forward and backward of one point after the other, and both together at the end, if time is left."""
    points = grid_of(grid, device)
    alone = [
        Case("attention", direction, point, rank + part)
        for rank, point in enumerate(points)
        for direction, part in (("forward", 0.0), ("backward", 0.4))
    ]
    if (grid, device) == ("quick", "cpu"):
        return alone
    return alone + [Case("attention", "both", point, len(points) + rank) for rank, point in enumerate(points)]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    config = metafunc.config
    all_cases = cases(config.getoption("--bench-grid"), config.getoption("--bench-device"))
    grid, names = config.getoption("--bench-grid"), contenders(impls_of(config))
    pairs = [(case, name) for case in all_cases for name in names if is_worth_its_time(name, case.rank, grid)]
    metafunc.parametrize(("case", "contender"), pairs, ids=[f"{case}; {contender}" for case, contender in pairs])


def is_worth_its_time(contender: str, rank: float, grid: str) -> bool:
    """Limit FlexAttention, which compiles for each size, to the first points of the quick grid, and none of smoke."""
    return not contender.startswith("flex") or grid == "full" or (grid == "quick" and rank < FLEX_POINTS)


def test_attention(measure, case: Case, contender: str, problem: Problem):
    def prepare() -> Callable[[], object]:
        attend, inputs = attention_of(contender, problem)
        return step_of(case.direction, attend, inputs)

    measure(prepare, flop=WORK[case.direction] * problem.forward_flop)


def step_of(direction: str, attend: Callable[..., torch.Tensor], inputs: list[torch.Tensor]) -> Callable[[], object]:
    """Return the function to time: the call, the gradients of all its inputs from a kept graph, or both."""
    if direction == "forward":

        def forward() -> object:
            with torch.no_grad():
                return attend(*inputs)

        return forward
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = attend(*leaves)
    out = out[0] if isinstance(out, tuple) else out
    grad_out = torch.randn_like(out)
    if direction == "backward":
        return lambda: torch.autograd.grad(out, leaves, grad_out, retain_graph=True)
    del out

    def both() -> object:
        result = attend(*leaves)
        return torch.autograd.grad(result[0] if isinstance(result, tuple) else result, leaves, grad_out)

    return both
