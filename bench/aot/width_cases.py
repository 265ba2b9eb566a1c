"""The cases of the widths' gate: each kernel at each head width, and the launch that a real call makes of it.

Launches that differ only in the head width, and in it only so that the same number of elements is aligned and columns
are masked either in both or in neither, are of one *class*: their intermediate code is the same but for the numbers
that a column's index is compared with. One of a class is compiled, and what it takes is concluded for the others.
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch

import maskattn
from bench.aot.cases import DTYPES, precision_of
from bench.aot.launches import Launch, recorded_launches
from maskattn.kernels.launch.support import HEAD_WIDTHS
from maskattn.kernels.readout import call
from maskattn.kernels.tables import lookup
from maskattn.kernels.tables.config import Target
from maskattn.kernels.tables.lookup import look_up

__all__ = ["WidthCase", "class_of", "launch_of", "width_cases"]

HEADS, SPLITS, LENGTHS = 6, 8, (50, 21)
QUERIES, CLASSES = 3, 40

# The kernels of each operation and set of options; "bias" has the tiles of "plain" but needs more registers. "short" is
# "plain", and "short bias" "bias", with the tiles of short sequences.
KERNELS = {
    ("attention", "plain"): ("forward_kernel", "query_gradient_kernel", "key_gradient_kernel"),
    ("attention", "bias"): ("forward_kernel", "query_gradient_kernel", "key_gradient_kernel"),
    ("attention", "short"): ("forward_kernel", "query_gradient_kernel", "key_gradient_kernel"),
    ("attention", "short bias"): ("forward_kernel", "query_gradient_kernel", "key_gradient_kernel"),
    ("attention", "every"): ("forward_kernel", "query_gradient_kernel", "key_gradient_kernel"),
    ("readout", "plain"): ("readout_kernel", "readout_gradient_kernel"),
    ("readout", "every"): ("readout_kernel", "row_gradient_kernel", "readout_gradient_kernel"),
    ("relevance", "plain"): ("relevance_kernel",),
    ("relevance", "every"): ("relevance_kernel",),
}


@dataclass(frozen=True)
class WidthCase:
    """One kernel of one operation; float16 compiles to the same code as bfloat16, except for conversions."""

    kernel: str
    target: Target
    head_width: int
    dtype: str
    options: str

    @property
    def operation(self) -> str:
        """The operation that launches the kernel."""
        return next(name for (name, options), kernels in KERNELS.items() if self.kernel in kernels)


def width_cases() -> Iterator[WidthCase]:
    """Yield every case, the most common first: half precision before single, compute capability 9.0 before others."""
    targets: tuple[Target, ...] = ("sm90", "sm80", "sm100", "sm86", "sm120", "gfx942", "gfx90a", "gfx950")
    for dtype in ("bf16", "tf32x3", "fp32"):
        for operation in ("attention", "readout", "relevance"):
            for target in targets:
                for width in HEAD_WIDTHS:
                    for options in ("plain", "every", "bias", "short", "short bias"):
                        for kernel in KERNELS.get((operation, options), ()):
                            case = WidthCase(kernel, target, width, dtype, options)
                            if _is_other(case):
                                yield case


def _is_other(case: WidthCase) -> bool:
    """Return whether the tables have tiles for three TF32 products, or for short sequences, if the case is of these."""
    if case.dtype != "tf32x3" and not case.options.startswith("short"):
        return True
    if case.operation != "attention":
        return False
    pass_: Any = case.kernel.removesuffix("_kernel")
    given = pass_, case.target, case.head_width, DTYPES[case.dtype], case.options == "every", precision_of(case.dtype)
    if case.options.startswith("short"):
        return look_up(*given, short=True) != look_up(*given)
    return look_up(*given).precision == "tf32x3"


@functools.lru_cache(maxsize=8)
def _launches(operation: str, target: Target, head_width: int, dtype: str, options: str) -> tuple[Launch, ...]:
    """Return the launches of one call of an operation and its backward."""
    # The sequences are short, so that recording is quick, even where the tiles are those of long ones.
    short_below = lookup.SHORT_BELOW if options.startswith("short") else 0
    with (
        recorded_launches(target) as launches,
        mock.patch.object(call, "number_of_splits", return_value=SPLITS),
        mock.patch.object(lookup, "SHORT_BELOW", short_below),
    ):
        of_call = {"short": "plain", "short bias": "bias"}.get(options, options)
        {"attention": _attend, "readout": _read, "relevance": _relate}[operation](head_width, dtype, of_call)
    return tuple(launches)


def _given(options: str, *shape: int) -> dict[str, Any]:
    """Return the options of a call by name: a key bias of this shape and, for "every", ALiBi and dropout too."""
    bias = {"key_bias": torch.zeros(shape, requires_grad=True)}
    slopes = torch.zeros(HEADS, requires_grad=True)
    return {"plain": {}, "bias": bias, "every": {**bias, "slopes": slopes, "dropout_p": 0.1}}[options]


def _leaves(count: int, dtype: str, *shape: int) -> list[torch.Tensor]:
    return [torch.zeros(shape, dtype=DTYPES[dtype], requires_grad=True) for _ in range(count)]


def _starts() -> torch.Tensor:
    return torch.tensor([0, *torch.tensor(LENGTHS).cumsum(0)], dtype=torch.int32)


def _attend(width: int, dtype: str, options: str) -> None:
    """Attend to packed tensors without options, for descriptors; with options, to kept tokens of dense tensors."""
    batch, longest = len(LENGTHS), max(LENGTHS)
    given = {**_given(options, batch, HEADS, longest), "precision": precision_of(dtype)}
    if options == "plain":
        qkv, where = _leaves(3, dtype, sum(LENGTHS), HEADS, width), (_starts(),) * 2 + (longest,) * 2
        maskattn.packed_attention(*qkv, *where, precision=precision_of(dtype), impl="triton").sum().backward()
        return
    if options == "every":
        given["coords"] = torch.zeros(batch, longest, 2)
    keep = torch.arange(longest) < torch.tensor(LENGTHS)[:, None]
    qkv = _leaves(3, dtype, batch, HEADS, longest, width)
    maskattn.masked_attention(*qkv, keep, **given, impl="triton").sum().backward()


def _read(width: int, dtype: str, options: str) -> None:
    batch, tokens, queries = len(LENGTHS), sum(LENGTHS), 1 if options == "plain" else QUERIES
    given = _given(options, tokens, HEADS)
    if options == "every":
        given |= {"coords": (torch.zeros(batch, queries, 2), torch.zeros(tokens, 2)), "return_rows": True}
    (q,), (k, v) = _leaves(1, dtype, batch, queries, HEADS, width), _leaves(2, dtype, tokens, HEADS, width)
    found = maskattn.readout(q, k, v, _starts(), max(LENGTHS), **given, impl="triton")
    out, *rows = found if isinstance(found, tuple) else (found,)
    (out.float().sum() + sum((x * x.detach()).sum() for x in rows)).backward()


def _relate(width: int, dtype: str, options: str) -> None:
    batch, tokens = len(LENGTHS), sum(LENGTHS)
    queries, classes, given = (1, 1, {}) if options == "plain" else (QUERIES, CLASSES, _given(options, tokens, HEADS))
    if options == "every":
        del given["dropout_p"]
        given["coords"] = (torch.zeros(batch, queries, 2), torch.zeros(tokens, 2))
    q, (k, v) = (
        torch.zeros(batch, queries, HEADS, width, dtype=DTYPES[dtype]),
        torch.zeros(2, tokens, HEADS, width, dtype=DTYPES[dtype]),
    )
    origin = torch.zeros(HEADS, width) if options == "plain" else torch.zeros(tokens, HEADS, width)
    lse, grad = torch.zeros(batch, queries, HEADS), torch.zeros(classes, *q.shape, dtype=q.dtype)
    maskattn.token_relevance(
        q, k, v, q, lse, grad, _starts(), max(LENGTHS), key_origin=origin, value_origin=origin, **given, impl="triton"
    )  # fmt: skip


def launch_of(case: WidthCase) -> Launch:
    given = case.operation, case.target, case.head_width, case.dtype, case.options
    return next(launch for launch in _launches(*given) if launch.name == case.kernel)


def class_of(case: WidthCase) -> str:
    """Return a hash, of twelve hexadecimal digits, of all that the case's machine code depends on but the head width.

    In place of the head width it has whether columns are masked and the alignment of rows, up to 16 elements.
    """
    launch = launch_of(case)
    tiles = launch.constants_by_name
    where, chunks = ("WIDTH", None) if "WIDTH" in launch.kernel.arg_names else ("HEAD_WIDTH", tiles.get("BLOCK_D"))
    position = launch.kernel.arg_names.index(where)
    path = (position, 0) if where == "WIDTH" else (position,)
    constants = {each: str(getattr(x, "value", x)) for each, x in launch.constants.items()}
    columns = chunks or int(constants[position, 1]) + int(constants[position, 2])
    head_width = int(constants.pop(path))
    described = (
        case.kernel, case.target, launch.signature, sorted(launch.attributes.items()), sorted(constants.items()),
        sorted(launch.options.items()), head_width < columns, math.gcd(head_width, 16),
    )  # fmt: skip
    return hashlib.sha256(repr(described).encode()).hexdigest()[:12]
