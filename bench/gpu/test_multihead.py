"""The complete layer, with projections and output, compared with torch's: ``pytest bench/gpu/test_multihead.py``.

Both have the same ``key_padding_mask`` and weights; torch's layer takes its fast path in eval mode.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from bench.gpu.points import Case, Point, Problem
from maskattn.nn import MultiheadAttention

CONTENDERS = ("maskattn, skip_queries", "maskattn", "torch nn.MultiheadAttention")
WAYS = ("evaluation", "training", "evaluation, weights")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    config = metafunc.config
    smoke, dtype = config.getoption("--bench-grid") == "smoke", {"cpu": "fp32", "cuda": "bf16"}
    sizes = [(2, 80)] if smoke else [(8, 197), (8, 1024)]
    points = [
        Point(batch, tokens, kept, 6, 64, dtype[config.getoption("--bench-device")])
        for batch, tokens in sizes
        for kept in ((0.3,) if smoke else (0.3, 1.0))
    ]
    directions = {"training": "forward and backward"}
    cases = [Case("multihead", directions.get(way, "forward"), point, 3.0, way) for way in WAYS for point in points]
    pairs = [(case, contender) for case in cases for contender in CONTENDERS]
    metafunc.parametrize(("case", "contender"), pairs, ids=[f"{case}-{contender}" for case, contender in pairs])


def test_multihead(measure, case: Case, contender: str, problem: Problem, device: str):
    def prepare() -> Callable[[], object]:
        p = case.point
        channels = p.heads * p.width
        torch.manual_seed(0)
        if contender.startswith("maskattn"):
            layer = MultiheadAttention(channels, p.heads, batch_first=True, skip_queries="skip" in contender)
        else:
            layer = nn.MultiheadAttention(channels, p.heads, batch_first=True)
        layer = layer.to(device, problem.dtype).train(case.variant == "training")
        x = problem.normal((p.batch, p.tokens, channels), 5).to(problem.dtype)
        mask, weights = None if p.kept == 1 else ~problem.keep, "weights" in case.variant

        def evaluate() -> object:
            with torch.inference_mode():
                return layer(x, x, x, mask, need_weights=weights)

        leaf = x.clone().requires_grad_()
        grad = torch.randn_like(x)

        def train() -> object:
            out, _ = layer(leaf, leaf, leaf, mask, need_weights=False)
            return torch.autograd.grad(out, [leaf, *layer.parameters()], grad)

        return train if case.variant == "training" else evaluate

    measure(prepare)
