"""A choice of calls that covers everything by itself and in pairs, for runs that cannot afford the full product.

A call has an operation, a target, a dtype, a head width, a set of options and a kind of shapes; all combinations of
these are almost 100,000. Here every operation comes once with every head width, and the remaining properties go
round at rates of their own, so that

- any two properties of any kind meet: every head width has every operation, target, dtype, set of options and kind of
  shapes,
- every operation has all pairs of the properties besides the head width.

``tests/kernels_aot/test_covering.py`` counts that.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from bench.aot.every_call import Shape

__all__ = [
    "DTYPES",
    "KINDS",
    "OPTION_SETS",
    "TARGETS",
    "WIDTHS",
    "Case",
    "covering",
    "in_gluon",
    "in_tf32x3",
    "random_shapes",
]

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
WIDTHS = range(16, 257, 8)
TARGETS = ("sm90", "sm80", "sm86", "sm100", "sm120")

# The fields of a shape by the options' name.
OPTION_SETS: dict[str, dict[str, object]] = {
    "": {},
    "every option": {"options": True},
    "key bias": {"options": True, "without": ("coords", "slopes", "dropout_p")},
    "every option, a bias shared by the heads": {"options": True, "shared_bias": True},
    "ALiBi": {"options": True, "without": ("key_bias", "dropout_p")},
    "dropout": {"options": True, "without": ("key_bias", "coords", "slopes")},
}

Draw = Callable[[int, int], int]

# Lengths and queries by the kind of a shape, from a function of two bounds that draws a number between them, and from
# the largest number of sequences. The launcher compiles anew where a number is 1 or a multiple of 16, and there is a
# schedule where sequences differ, so that shapes of one kind share their compiled kernels.
KINDS: dict[str, Callable[[Draw, int], tuple[Sequence[int], int]]] = {
    "one sequence": lambda draw, most: ([draw(2, 70)], draw(1, 16)),
    "one of everything": lambda draw, most: ([1], 1),
    "multiples of sixteen": lambda draw, most: ([16 * draw(1, 5)], 16),
    "equal sequences": lambda draw, most: ([draw(1, 40)] * draw(2, most), draw(2, 16)),
    "several sequences": lambda draw, most: ([*(draw(0, 70) for _ in range(draw(1, most))), 1], draw(1, 16)),
}


@dataclass(frozen=True)
class Case:
    """One call of an operation on a target.

    Attributes:
        operation: a name in ``every_call``.
        target: one of :data:`TARGETS`.
        kind: the kind of its shapes, one of :data:`KINDS`.
        like: a shape of the call, whose lengths and queries are replaced.
        name: its properties in words, without the target.
    """

    operation: str
    target: str
    kind: str
    like: Shape
    name: str


def covering(operations: Sequence[str], every: int = 1) -> Iterator[Case]:
    """Yield the calls of these operations, with every head width or every second, third and so on."""
    for own, operation in enumerate(operations):
        for at, width in enumerate(WIDTHS[::every]):
            turn = own + at
            options = list(OPTION_SETS)[turn % 6]
            kind = list(KINDS)[(turn // 6 + 2 * own) % 5]
            dtype = list(DTYPES)[(2 * turn + turn // 6) % 3]
            yield _case(operation, TARGETS[turn % 5], dtype, width, options, kind, {})


def in_gluon(operations: Sequence[str]) -> Iterator[Case]:
    """Yield the calls of the operations that exist for compute capability 9.0 in half precision alone.

    All allow sums in any order, so that backward is in one pass where there is one, and in two otherwise.
    """
    for own, operation in enumerate(operations):
        for at, width in enumerate(WIDTHS):
            turn = own + at
            options = list(OPTION_SETS)[turn % 6]
            kind = list(KINDS)[turn // 2 % 5]
            dtype = list(DTYPES)[(turn + turn // 6) % 2]
            yield _case(operation, "sm90", dtype, width, options, kind, {"deterministic": False})


def in_tf32x3(operations: Sequence[str]) -> Iterator[Case]:
    """Yield calls that allow three products of TensorFloat-32, on the targets that have tiles for them."""
    for own, operation in enumerate(operations):
        for at, width in enumerate(range(16, 65, 8)):
            turn = 2 * own + at
            options, target = ("", "key bias")[(turn + turn // 4) % 2], ("sm90", "sm80", "sm86", "sm120")[turn % 4]
            kind = list(KINDS)[turn // 2 % 5]
            yield _case(operation, target, "fp32", width, options, kind, {"precision": "tf32x3"})


def _case(
    operation: str, target: str, dtype: str, width: int, options: str, kind: str, allowed: dict[str, object]
) -> Case:
    fields = {**OPTION_SETS[options], "head_width": width, "dtype": DTYPES[dtype], **allowed}
    words = (operation, dtype, f"width {width}", options, kind, str(allowed.get("precision", "")))
    return Case(operation, target, kind, Shape((50,), **fields), ", ".join(word for word in words if word))


def random_shapes(kind: str, like: Shape, count: int, seed: str, most: int = 16) -> Iterator[Shape]:
    """Yield shapes of a kind, each with at most ``most`` + 1 sequences, else like the given one."""
    generator = torch.Generator().manual_seed(zlib.crc32(seed.encode()))

    def draw(least: int, greatest: int) -> int:
        return int(torch.randint(least, greatest + 1, (), generator=generator))

    for _ in range(count):
        lengths, queries = KINDS[kind](draw, most)
        yield replace(like, lengths=tuple(lengths), queries=queries)
