"""A ViT-S/16 with and without background, and the cost of a map.

pytest bench/gpu/test_vit.py
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from bench.gpu.points import Case, Point, Problem
from maskattn.explain import CDAM
from maskattn.nn import VisionTransformer

SIDE = 14


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    config = metafunc.config
    device, smoke = config.getoption("--bench-device"), config.getoption("--bench-grid") == "smoke"
    batch, dtype = {"cpu": (1 if smoke else 8, "fp32"), "cuda": (256, "bf16")}[device]
    points = [Point(batch, SIDE * SIDE, kept, 6, 64, dtype) for kept in ((0.3,) if smoke else (0.06, 0.3, 1.0))]
    cases = [Case("ViT-S/16", "forward", point, 3.2, "prediction") for point in points]
    cases += [
        Case("ViT-S/16", "forward", points[-1 if smoke else 1], 3.3, f"CDAM of {classes}")
        for classes in ("one class", "ten classes")
    ]
    pairs = [(case, "maskattn") for case in cases]
    metafunc.parametrize(("case", "contender"), pairs, ids=[str(case) for case in cases])


@pytest.fixture(scope="module")
def vit_small(device: str, request: pytest.FixtureRequest) -> VisionTransformer:
    torch.manual_seed(0)
    depth = 2 if request.config.getoption("--bench-grid") == "smoke" else 12
    return VisionTransformer(embed_dim=384, depth=depth, num_heads=6, num_classes=10).eval().to(device)


def test_vit(measure, case: Case, contender: str, problem: Problem, vit_small: VisionTransformer):
    def prepare() -> Callable[[], object]:
        vit = vit_small.to(problem.dtype)
        x = problem.normal((case.point.batch, 3, 224, 224), 5).to(problem.dtype)
        keep = problem.keep.unflatten(1, (SIDE, SIDE))
        if case.variant == "prediction":

            def predict() -> object:
                with torch.inference_mode():
                    return vit(x, keep)

            return predict
        target = 0 if case.variant == "CDAM of one class" else "all"
        return lambda: CDAM(vit).attribute(x, target, keep)

    measure(prepare)
