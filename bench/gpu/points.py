"""The sizes that are measured, most important first, and the tensors of each.

Dimension key: B sequences, N tokens of each, T kept tokens of all, H heads, D head width.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
from torch import Tensor

from maskattn import Packing

__all__ = ["DTYPES", "Case", "Point", "Problem", "grid_of", "problem_of"]

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Point:
    """A size: B sequences of N tokens, of which about the share ``kept`` takes part."""

    batch: int
    tokens: int
    kept: float
    heads: int
    width: int
    dtype: str

    def __str__(self) -> str:
        return f"{self.batch}x{self.tokens} f{self.kept:g} H{self.heads} D{self.width} {self.dtype}"


@dataclass(frozen=True)
class Case:
    """The measurement of a row, for any contender; rows of lower rank are measured first."""

    family: str
    direction: str
    point: Point
    rank: float
    variant: str = ""

    def __str__(self) -> str:
        return "; ".join(filter(None, (self.family, self.direction, self.variant, str(self.point))))


# Slide encoders have few long sequences, tile encoders many short ones; numbers of heads are those of such models.
SLIDES = [(1, 16384, 12), (1, 65536, 12), (1, 4096, 12), (1, 131072, 12), (1, 32768, 12), (4, 8192, 12), (8, 1024, 12)]
TILES = [(512, 256, 6), (128, 1024, 6)]
OTHER_WIDTHS = [(128, 8), (48, 16), (32, 6), (80, 16)]


def grid_of(grid: str, device: str) -> list[Point]:
    """Return the points of "smoke", "quick" or "full" on "cpu" or "cuda", most important first."""
    if grid == "smoke":
        return [Point(3, 80, 0.5, 2, 32, "fp32")]
    return _cpu_points(grid) if device == "cpu" else _gpu_points(grid)


def _cpu_points(grid: str) -> list[Point]:
    lengths = [(1, 4096), (16, 256), (1, 1024)] + ([(1, 16384)] if grid == "full" else [])
    shares = (0.3, 1.0, 0.06) + ((0.5,) if grid == "full" else ())
    points = [Point(batch, tokens, kept, 6, 64, "fp32") for batch, tokens in lengths for kept in shares]
    points += [Point(1, 4096, 0.3, 6, 64, "bf16"), Point(1, 4096, 1.0, 6, 64, "bf16")]
    widths = [width for width, _ in OTHER_WIDTHS] if grid == "full" else [32, 128]
    return points + [Point(1, 4096, 0.3, 4, width, "fp32") for width in widths]


def _gpu_points(grid: str) -> list[Point]:
    if grid == "quick":
        first = [(*SLIDES[0], 0.3), (*SLIDES[0], 1.0), (*TILES[0], 0.5), (*SLIDES[1], 0.3), (*SLIDES[2], 0.3)]
        then = [(*SLIDES[2], 1.0), (*SLIDES[0], 0.06), (*TILES[0], 1.0), (*SLIDES[0], 0.5), (*SLIDES[6], 0.3)]
        points = [Point(batch, tokens, kept, heads, 64, "bf16") for batch, tokens, heads, kept in first + then]
        wide = [Point(1, 16384, kept, heads, width, "bf16") for width, heads in OTHER_WIDTHS for kept in (0.3, 1.0)]
        # The published figures of the fastest kernels are for width 128.
        return [*points[:3], *wide[:2], *points[3:], *wide[2:], Point(1, 131072, 0.3, 12, 64, "bf16")]
    points = [
        Point(batch, tokens, kept, heads, 64, "bf16")
        for batch, tokens, heads in [SLIDES[0], TILES[0], *SLIDES[1:], *TILES[1:]]
        for kept in (0.3, 1.0, 0.06, 0.5)
    ]
    points += [
        Point(1, tokens, kept, heads, width, "bf16")
        for tokens in (16384, 4096, 65536)
        for width, heads in OTHER_WIDTHS
        for kept in (0.3, 1.0)
    ]
    return [*points, Point(1, 16384, 0.3, 12, 64, "fp16"), Point(1, 4096, 0.3, 12, 64, "fp32")]


@dataclass(frozen=True, eq=False)
class Problem:
    """Seeded tensors of a point, dense and packed, with all work done that a model does once."""

    point: Point
    device: str

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of queries, keys and values."""
        return DTYPES[self.point.dtype]

    @cached_property
    def keep(self) -> Tensor:
        """(B, N) bool; the first token, as a class token, always takes part."""
        keep = torch.rand(self.point.batch, self.point.tokens, generator=self._generator(1)).to(self.device)
        keep = keep < self.point.kept
        keep[:, 0] = True
        return keep

    @cached_property
    def packing(self) -> Packing:
        """The packing of ``keep``."""
        return Packing.from_keep(self.keep)

    @cached_property
    def lengths(self) -> list[int]:
        """The number of kept tokens of each sequence."""
        return self.keep.sum(1).tolist()

    @property
    def bounds(self) -> tuple[Tensor, Tensor, int, int]:
        """cu_seqlens and max_seqlen of queries and keys, in the order of the packed operations' arguments."""
        packing = self.packing
        return packing.cu_seqlens, packing.cu_seqlens, packing.max_seqlen, packing.max_seqlen

    @cached_property
    def dense(self) -> list[Tensor]:
        """q, k, v (B, H, N, D), as views of (B, N, H, D), the layout of a projection's output."""
        p = self.point
        shape = (p.batch, p.tokens, p.heads, p.width)
        return [self.normal(shape, seed).to(self.dtype).transpose(1, 2) for seed in (2, 3, 4)]

    @cached_property
    def rows(self) -> list[Tensor]:
        """q, k, v (T, H, D), the kept tokens of ``dense``."""
        return [self.kept_rows(x) for x in self.dense]

    @property
    def pairs(self) -> int:
        """Σ n² over the sequences' kept tokens: the scores of one head that have to be computed."""
        return sum(n * n for n in self.lengths)

    @property
    def forward_flop(self) -> float:
        """4·Σn²·H·D; the backward counts 2.5 times as much."""
        return 4.0 * self.pairs * self.point.heads * self.point.width

    def kept_rows(self, dense: Tensor) -> Tensor:
        """Return a copy of the kept rows: (B, H, N, D) → (T, H, D)."""
        return dense.transpose(1, 2).flatten(0, 1)[self.packing.indices]

    def normal(self, shape: tuple[int, ...], seed: int) -> Tensor:
        """Return seeded normal float32 numbers, made on the device."""
        generator = torch.Generator(self.device).manual_seed(seed)
        return torch.randn(shape, generator=generator, device=self.device)

    def _generator(self, seed: int) -> torch.Generator:
        return torch.Generator().manual_seed(seed)


@lru_cache(maxsize=1)
def problem_of(point: Point, device: str) -> Problem:
    """Return the tensors of a point; those of the previous point are freed."""
    return Problem(point, device)
