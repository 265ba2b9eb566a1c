"""The cost of each option of our attention, compared with users' alternatives.

pytest bench/gpu/test_options.py
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.gpu.peers import Attention, UnsupportedError, needs_scores, ours
from bench.gpu.points import Case, Point, Problem
from bench.gpu.test_attention import WORK, impls_of, step_of
from maskattn import masked_attention, packed_attention

VARIANTS = ("plain", "key_bias shared", "key_bias per head", "coords", "dropout", "lse", "all")
DROPOUT = 0.1
# Slope per token of distance; the cost does not depend on it.
SLOPE = 0.01

PEERS = {
    "key_bias shared": ("sdpa float mask",),
    "key_bias per head": ("sdpa float mask",),
    "coords": ("sdpa with an N×N bias",),
    "dropout": ("sdpa per sequence, flash", "sdpa per sequence, math"),
}


def points_of(grid: str, device: str) -> list[Point]:
    """Return a slide and, on a GPU or in the full grid, a batch of tiles."""
    if grid == "smoke":
        return [Point(2, 64, 0.5, 2, 32, "fp32")]
    if device == "cpu":
        return [Point(1, 2048, 0.3, 6, 64, "fp32")] + ([Point(16, 256, 0.5, 6, 64, "fp32")] if grid == "full" else [])
    return [Point(1, 16384, 0.3, 12, 64, "bf16"), Point(512, 256, 0.5, 6, 64, "bf16")]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    config = metafunc.config
    names = [*ours("packed", impls_of(config)), *ours("masked", impls_of(config))]
    points = points_of(config.getoption("--bench-grid"), config.getoption("--bench-device"))
    pairs = [
        # After the first point of the plain attention, then between its later ones.
        (Case("options", direction, point, 1.5 + 3 * position + 0.1 * number, variant), contender)
        for position, point in enumerate(points)
        for direction in ("forward", "both")
        for number, variant in enumerate(VARIANTS)
        for contender in (*names, *PEERS.get(variant, ()))
    ]
    metafunc.parametrize(("case", "contender"), pairs, ids=[f"{case}; {contender}" for case, contender in pairs])


def test_option(measure, case: Case, contender: str, problem: Problem):
    def prepare() -> Callable[[], object]:
        if not contender.startswith("maskattn"):
            return step_of(case.direction, *peer(contender, case.variant, problem))
        kind, impl = contender.removeprefix("maskattn ").split(", ")
        attend = {"packed": packed, "masked": masked}[kind](case.variant, problem, impl)
        return step_of(case.direction, *attend)

    measure(prepare, flop=WORK[case.direction] * problem.forward_flop)


def bias_of(variant: str, problem: Problem) -> Tensor | None:
    """Return a bias (B, N) or (B, H, N) in float32, or None."""
    p = problem.point
    if variant == "key_bias shared":
        return problem.normal((p.batch, p.tokens), 5)
    return problem.normal((p.batch, p.heads, p.tokens), 5) if variant in ("key_bias per head", "all") else None


def coords_of(variant: str, problem: Problem) -> Tensor | None:
    """Return coordinates (B, N, 2) of a square grid in float32, or None."""
    if variant not in ("coords", "all"):
        return None
    p = problem.point
    position = torch.arange(p.tokens, device=problem.device)
    side = math.isqrt(p.tokens - 1) + 1
    return torch.stack([position // side, position % side], -1).float().expand(p.batch, -1, -1)


def slopes_of(problem: Problem) -> Tensor:
    """Return slopes (H,) in float32."""
    return torch.full((problem.point.heads,), SLOPE, device=problem.device)


def _flags(variant: str) -> dict[str, object]:
    return {"dropout_p": DROPOUT if variant in ("dropout", "all") else 0.0, "return_lse": variant in ("lse", "all")}


def packed(variant: str, problem: Problem, impl: str) -> Attention:
    """Return ``packed_attention`` with the options of a variant; a bias gets a gradient too."""
    bias, coords = bias_of(variant, problem), coords_of(variant, problem)
    indices, bounds = problem.packing.indices, problem.bounds
    located = {}
    if coords is not None:
        located = {"coords": coords.flatten(0, 1)[indices], "slopes": slopes_of(problem)}
    inputs = list(problem.rows)
    if bias is not None:
        inputs.append((bias if bias.ndim == 2 else bias.transpose(1, 2)).flatten(0, 1)[indices])

    def attend(q: Tensor, k: Tensor, v: Tensor, key_bias: Tensor | None = None) -> object:
        return packed_attention(q, k, v, *bounds, key_bias=key_bias, impl=impl, **located, **_flags(variant))

    return attend, inputs


def masked(variant: str, problem: Problem, impl: str) -> Attention:
    """Return ``masked_attention`` with the options of a variant."""
    bias, coords, keep = bias_of(variant, problem), coords_of(variant, problem), problem.keep
    located = {} if coords is None else {"coords": coords, "slopes": slopes_of(problem)}

    def attend(q: Tensor, k: Tensor, v: Tensor, key_bias: Tensor | None = None) -> object:
        return masked_attention(q, k, v, keep, key_bias=key_bias, impl=impl, **located, **_flags(variant))

    return attend, [*problem.dense, *(() if bias is None else (bias,))]


def peer(contender: str, variant: str, problem: Problem) -> Attention:
    """Return the same with torch's ``scaled_dot_product_attention``, whose mask gets no gradient."""
    if contender.startswith("sdpa per sequence"):
        return _dropout_per_sequence(contender.rsplit(" ", 1)[1], problem)
    keep_B11N = problem.keep[:, None, None, :]
    if contender == "sdpa float mask":
        bias = bias_of(variant, problem)
        bias_BHQN = (bias if bias.ndim == 3 else bias[:, None, :])[:, :, None, :].to(problem.dtype)
        mask = bias_BHQN.masked_fill(~keep_B11N, -math.inf)
    else:
        needs_scores(problem, copies=4)
        coords, slopes = coords_of(variant, problem), slopes_of(problem)
        mask = -slopes[:, None, None] * torch.cdist(coords[:1], coords[:1])[:, None]
        mask = mask.to(problem.dtype).masked_fill(~keep_B11N, -math.inf)
    return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, mask), problem.dense


def _dropout_per_sequence(backend: str, problem: Problem) -> Attention:
    if problem.device == "cpu" and backend == "flash":
        raise UnsupportedError("no dropout in this backend on a CPU")
    if len(problem.lengths) > 8:
        raise UnsupportedError("one call for each sequence, of which there are many")
    kind = {"flash": SDPBackend.FLASH_ATTENTION, "math": SDPBackend.MATH}[backend]
    if backend == "math":
        needs_scores(problem, copies=3)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        outs = []
        with sdpa_kernel(kind):
            for piece in zip(*(x.split(problem.lengths) for x in (q, k, v)), strict=True):
                one = (x.transpose(0, 1)[None] for x in piece)
                outs.append(F.scaled_dot_product_attention(*one, dropout_p=DROPOUT)[0].transpose(0, 1))
        return torch.cat(outs)

    return attend, problem.rows
