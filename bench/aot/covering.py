"""A choice of calls that covers everything by itself and in pairs, for runs that cannot afford the full product.

A call has an operation, a target, a dtype, a head width, a set of options and a kind of lengths; all combinations of
these are almost 100,000. Here every operation comes once with every head width, and the remaining properties go
round at rates of their own, so that

- any two properties of any kind meet: every head width has every operation, target, dtype, set of options and kind of
  lengths,
- every operation has all pairs of the properties besides the head width.

``tests/kernels_aot/test_covering.py`` counts that.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from bench.aot.every_call import Shape

__all__ = [
    "CORNERS",
    "DTYPES",
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

# The launcher compiles anew where a number is 1 or a multiple of 16: B, T, R and what follows from them.
CORNERS: dict[str, dict[str, object]] = {
    "one sequence": {"lengths": (50,)},
    "one of everything": {"lengths": (1,)},
    "multiples of sixteen": {"lengths": (48,), "queries": 16},
    "equal sequences": {"lengths": (16,) * 16, "queries": 3},
}


@dataclass(frozen=True)
class Case:
    """One call of an operation on a target.

    Attributes:
        operation: a name in ``every_call``.
        target: one of :data:`TARGETS`.
        shape: the shape of the call, with one of :data:`CORNERS`.
        name: its properties in words, without the target.
    """

    operation: str
    target: str
    shape: Shape
    name: str


def covering(operations: Sequence[str], every: int = 1) -> Iterator[Case]:
    """Yield the calls of these operations, with every head width or every second, third and so on."""
    for own, operation in enumerate(operations):
        for at, width in enumerate(WIDTHS[::every]):
            turn = own + at
            options = list(OPTION_SETS)[turn % 6]
            corner = list(CORNERS)[turn // 2 % 4]
            dtype = list(DTYPES)[(2 * turn + turn // 6) % 3]
            yield _case(operation, TARGETS[turn % 5], dtype, width, options, corner, {})


def in_gluon(operations: Sequence[str]) -> Iterator[Case]:
    """Yield the calls of the operations that exist for compute capability 9.0 in half precision alone.

    All allow sums in any order, so that backward is in one pass where there is one, and in two otherwise.
    """
    for own, operation in enumerate(operations):
        for at, width in enumerate(WIDTHS):
            turn = own + at
            options = list(OPTION_SETS)[turn % 6]
            corner = list(CORNERS)[turn // 2 % 4]
            dtype = list(DTYPES)[(turn + turn // 6) % 2]
            yield _case(operation, "sm90", dtype, width, options, corner, {"deterministic": False})


def in_tf32x3(operations: Sequence[str]) -> Iterator[Case]:
    """Yield calls that allow three products of TensorFloat-32, on the targets and head widths that take them."""
    for own, operation in enumerate(operations):
        for at, width in enumerate(range(16, 65, 8)):
            turn = 2 * own + at
            options, target = ("", "key bias")[(turn + turn // 4) % 2], ("sm90", "sm80", "sm86", "sm120")[turn % 4]
            corner = list(CORNERS)[turn // 2 % 4]
            yield _case(operation, target, "fp32", width, options, corner, {"precision": "tf32x3"})


def _case(
    operation: str, target: str, dtype: str, width: int, options: str, corner: str, allowed: dict[str, object]
) -> Case:
    fields = {**CORNERS[corner], **OPTION_SETS[options], "head_width": width, "dtype": DTYPES[dtype], **allowed}
    words = (operation, dtype, f"width {width}", options, corner, str(allowed.get("precision", "")))
    return Case(operation, target, Shape(**fields), ", ".join(word for word in words if word))


def random_shapes(shape: Shape, count: int, seed: int, most: int = 16) -> Iterator[Shape]:
    """Yield shapes like this one with up to ``most`` + 1 sequences of other lengths, some empty, and other queries."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        batch, queries = (int(torch.randint(1, up_to + 1, (), generator=generator)) for up_to in (most, 16))
        lengths = torch.randint(0, 70, (batch,), generator=generator).tolist()
        yield replace(shape, lengths=(*lengths, 1), queries=queries)
