"""Compilation of every head width in every pass, dtype and target, plain and with options: resources and spills.

    python -m bench.aot.widths                   all cases, into bench/results/aot_widths_<triton version>.csv
    SHARD=3/16 python -m bench.aot.widths        every 16th case from index 3 on; shards may run at the same time
    python -m bench.aot.widths --only sm90,72    cases with these words in their keys

``python -m bench.aot.report --all-widths`` does the same. The signatures are those of real calls (``launches.py``): if
strides are not multiples of 16, as at the widths 72 and 88, the compiler knows less about them. A row is valid as long
as the intermediate code of its kernel is unchanged; only changed kernels are compiled again, and each row is saved as
soon as it is known, so that an interrupted run continues where it stopped.
"""

from __future__ import annotations

import argparse
import csv
import fcntl
import functools
import os
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, astuple, dataclass, fields, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget

import maskattn
from bench.aot.bounds import SHARED_LIMITS, TENSOR_MEMORY_COLUMNS
from bench.aot.cases import DTYPES, precision_of
from bench.aot.intermediate import fingerprint
from bench.aot.launches import Launch, recorded_launches
from bench.aot.machine_code import registers_and_spills, tensor_instruction_of
from bench.aot.targets import GPU_TARGETS, SIBLINGS
from maskattn.kernels.launch.support import HEAD_WIDTHS
from maskattn.kernels.readout import call
from maskattn.kernels.tables.config import Target
from maskattn.kernels.tables.lookup import look_up

__all__ = [
    "REPRESENTATIVE",
    "WidthCase",
    "WidthRow",
    "compile_width",
    "current_code",
    "faults",
    "measure_width",
    "read_widths",
    "table_path",
    "width_cases",
]

HEADS, SPLITS, LENGTHS = 6, 8, (50, 21)
QUERIES, CLASSES = 3, 40

# Head widths between powers of two, with and without a second chunk, which the committed table must have.
REPRESENTATIVE = (72, 104, 200)

# The kernels of each operation and set of options; "bias" has the tiles of "plain" but needs more registers.
KERNELS = {
    ("attention", "plain"): ("forward_kernel", "query_gradient_kernel", "key_gradient_kernel"),
    ("attention", "bias"): ("forward_kernel", "query_gradient_kernel", "key_gradient_kernel"),
    ("attention", "every"): ("forward_kernel", "query_gradient_kernel", "key_gradient_kernel"),
    ("readout", "plain"): ("readout_kernel", "readout_gradient_kernel"),
    ("readout", "every"): ("readout_kernel", "row_gradient_kernel", "readout_gradient_kernel"),
    ("relevance", "plain"): ("relevance_kernel",),
    ("relevance", "every"): ("relevance_kernel",),
}

# Each chip, and the target of the tables whose tiles it is launched with.
TARGETS: dict[str, GPUTarget] = {**GPU_TARGETS, **{name: target for name, (_, target) in SIBLINGS.items()}}
ROWS: dict[str, Target] = {name: name for name in GPU_TARGETS} | {name: row for name, (row, _) in SIBLINGS.items()}


@dataclass(frozen=True)
class WidthCase:
    """One kernel of one operation; float16 compiles to the same code as bfloat16, except for conversions."""

    kernel: str
    target: str
    head_width: int
    dtype: str
    options: str

    @property
    def operation(self) -> str:
        """The operation that launches the kernel."""
        return next(name for (name, options), kernels in KERNELS.items() if self.kernel in kernels)


@dataclass(frozen=True)
class WidthRow:
    """The resources of a compiled case."""

    case: WidthCase
    tile: str
    code: str
    registers: int
    spilled_bytes: int
    shared_bytes: int
    tensor_memory: int
    tensor_instruction: str

    def columns(self) -> dict[str, str]:
        """Return the row by the table's columns."""
        own = {field.name: str(getattr(self, field.name)) for field in fields(self)[1:]}
        return {name: str(value) for name, value in asdict(self.case).items()} | own


def width_cases() -> Iterator[WidthCase]:
    """Yield every case, the most common first: half precision before single, compute capability 9.0 before others."""
    for dtype in ("bf16", "tf32x3", "fp32"):
        for operation in ("attention", "readout", "relevance"):
            for target in ("sm90", "sm80", "sm100", "sm86", "sm120", "gfx942", "gfx90a", "gfx950"):
                for width in HEAD_WIDTHS:
                    for options in ("plain", "every", "bias"):
                        for kernel in KERNELS.get((operation, options), ()):
                            case = WidthCase(kernel, target, width, dtype, options)
                            if dtype != "tf32x3" or _takes_three_products(case):
                                yield case


def _takes_three_products(case: WidthCase) -> bool:
    """Return whether the tables have a tile with three TF32 products; otherwise the case equals that of float32."""
    pass_: Any = case.kernel.removesuffix("_kernel")
    if case.operation != "attention":
        return False
    config = look_up(pass_, ROWS[case.target], case.head_width, torch.float32, case.options == "every", "tf32x3")
    return config.precision == "tf32x3"


@functools.lru_cache(maxsize=8)
def _launches(operation: str, target: str, head_width: int, dtype: str, options: str) -> tuple[Launch, ...]:
    """Return the launches of one call of an operation and its backward."""
    with (
        recorded_launches(ROWS[target]) as launches,
        mock.patch.object(call, "number_of_splits", return_value=SPLITS),
    ):
        {"attention": _attend, "readout": _read, "relevance": _relate}[operation](head_width, dtype, options)
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


def _launch_of(case: WidthCase) -> Launch:
    given = case.operation, case.target, case.head_width, case.dtype, case.options
    return next(launch for launch in _launches(*given) if launch.name == case.kernel)


def _tile_of(launch: Launch) -> str:
    """Return the launch's tile, warps and stages in the notation of the tables of configurations."""
    names = launch.constants_by_name
    sizes = "x".join(str(names[name]) for name in ("BLOCK_M", "BLOCK_N", "BLOCK_C") if name in names)
    flags = "+d" * bool(names.get("DESCRIBED")) + "+t" * bool(names.get("TAIL_STAGES"))
    return f"{sizes}/{launch.num_warps}/{launch.num_stages}{flags}"


def current_code(case: WidthCase) -> str:
    """Return the fingerprint of the kernel's current intermediate code."""
    launch = _launch_of(case)
    return fingerprint(launch.source, TARGETS[case.target], launch.options)


def compile_width(case: WidthCase) -> Any:
    """Compile the kernel of a case."""
    launch = _launch_of(case)
    return triton.compile(launch.source, target=TARGETS[case.target], options=launch.options)


def measure_width(case: WidthCase) -> WidthRow:
    """Compile one case and return its resources."""
    launch, compiled = _launch_of(case), compile_width(case)
    metadata = compiled.metadata
    return WidthRow(
        case, _tile_of(launch), current_code(case), *registers_and_spills(compiled), metadata.shared,
        getattr(metadata, "tmem_size", None) or 0, tensor_instruction_of(compiled),
    )  # fmt: skip


def faults(row: WidthRow) -> list[str]:
    """Describe what prevents a kernel from running, or from running well."""
    limit = SHARED_LIMITS[ROWS[row.case.target]]
    found = [f"spills {row.spilled_bytes} bytes"] if row.spilled_bytes else []
    found += [f"takes {row.shared_bytes} bytes of shared memory of {limit}"] if row.shared_bytes > limit else []
    columns = row.tensor_memory
    return found + ([f"takes {columns} columns of tensor memory"] if columns > TENSOR_MEMORY_COLUMNS else [])


def table_path() -> Path:
    """Return the path of the committed table for the installed triton."""
    return Path(__file__).parents[1] / "results" / f"aot_widths_{triton.__version__}.csv"


def read_widths(path: Path) -> dict[WidthCase, WidthRow]:
    """Return the rows of the table by their cases."""
    if not path.exists():
        return {}
    rows = {}
    with path.open(newline="") as file:
        for columns in csv.DictReader(file):
            case = WidthCase(**{f.name: columns[f.name] for f in fields(WidthCase)})
            case = replace(case, head_width=int(case.head_width))
            own = {f.name: columns[f.name] for f in fields(WidthRow)[1:]}
            numbers = {name: int(own[name]) for name in own if name.endswith(("registers", "bytes", "memory"))}
            rows[case] = WidthRow(case, **(own | numbers))
    return rows


def _keep(rows: Iterable[WidthRow], path: Path) -> None:
    """Add rows to the table in its order, and keep those that other shards have added."""
    with open(f"{path}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        table = read_widths(path) | {row.case: row for row in rows}
        partial = path.with_suffix(".partial")
        with partial.open("w", newline="") as file:
            ordered = sorted(table.values(), key=lambda row: astuple(row.case))
            writer = csv.DictWriter(file, list(ordered[0].columns()), lineterminator="\n")
            writer.writeheader()
            writer.writerows(row.columns() for row in ordered)
        partial.replace(path)


def main(arguments: list[str] | None = None) -> int:
    """Compile the changed cases; the exit status is 1 if anything spills or does not fit, 3 if cases are left."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="words that a case must have in its key, separated by commas")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="start no case after this many seconds")
    parser.add_argument("--table", type=Path, default=table_path(), help="the table to continue")
    given = parser.parse_args(arguments)
    words = {word for word in given.only.split(",") if word}
    first, step = (int(x) for x in os.environ.get("SHARD", "0/1").split("/"))
    cases = [case for case in width_cases() if words <= set(map(str, astuple(case)))][first::step]
    until, known = time.time() + given.seconds, read_widths(given.table)
    found, left, compiled = [], 0, 0
    for case in cases:
        row = known.get(case)
        if time.time() > until:
            left += row is None
            continue
        if row is None or row.code != current_code(case):
            row, compiled = measure_width(case), compiled + 1
            _keep([row], given.table)
        found.append(row)
        if wrong := faults(row):
            print(f"{' '.join(map(str, astuple(case)))} in {row.tile}: {'; '.join(wrong)}", flush=True)
    wrong = sum(bool(faults(row)) for row in found)
    print(f"{len(found)} kernels, {compiled} of them compiled anew, {wrong} spill or do not fit, {left} are left")
    return 1 if wrong else 3 if left else 0


if __name__ == "__main__":
    sys.exit(main())
