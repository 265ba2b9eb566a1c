"""Compilations of the readout's kernels, and what one key costs in each.

The launchers run on tensors without memory and their launches are recorded, so that the signatures are a real call's:
which strides are 1, which pointers and numbers are multiples of 16, which arguments are absent. All of these kernels
are bound by memory; their instructions and bytes are counted per key and head, not per score.

Dimension key: B sequences, T packed keys, R readout queries, H heads, D head width, K classes.
"""

from __future__ import annotations

import contextlib
import csv
import re
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from triton.compiler import ASTSource

from aot.cases import DTYPES, GPU_TARGETS
from aot.machine_code import MachineCode, read
from maskattn.kernels import readout, readout_call, readout_configs, readout_gradient, relevance
from maskattn.kernels.configs import Target
from maskattn.options import Options

# Kernel -> the module whose launcher launches it.
KERNELS: dict[str, Any] = {
    "readout_kernel": readout,
    "combine_kernel": readout,
    "row_gradient_kernel": readout_gradient,
    "readout_gradient_kernel": readout_gradient,
    "relevance_kernel": relevance,
}

POINTERS = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int32: "*i32",
    torch.int64: "*i64",
}

# A call of a slide's size: keys and values are two of three tensors interleaved, as a qkv projection leaves them.
BATCH, TOKENS, LONGEST, HEADS, SPLITS = 3, 10007, 4097, 6, 8


@dataclass(frozen=True)
class ReadoutCase:
    """One compilation; ``options``: key bias, ALiBi, dropout, attention rows, and origins by token."""

    kernel: str
    target: Target
    head_width: int
    dtype: str
    queries: int = 1
    classes: int = 1
    options: bool = False


@dataclass(frozen=True)
class ReadoutRow:
    """What one case costs."""

    case: ReadoutCase
    keys: int
    num_warps: int
    code: MachineCode

    @property
    def load_bits(self) -> int:
        """Of the widest load of one thread in the main loop (on NVIDIA's chips; 0 on others)."""
        widths = [0]
        for instruction in self.code.loop:
            if match := re.match(r"LDG\S*?\.(64|128)\b|LDGSTS\S*?\.(64|128)\b", instruction):
                widths.append(int(match.group(1) or match.group(2)))
        return max(widths)

    @property
    def bytes_per_key(self) -> int:
        """That a key costs in memory: K and V, the gradient's dk and dv, attention rows and relevance."""
        case, size = self.case, DTYPES[self.case.dtype].itemsize
        tensors = {"readout_kernel": 2, "row_gradient_kernel": 1, "readout_gradient_kernel": 4, "relevance_kernel": 2}
        rows = case.queries * 4 * (case.kernel == "row_gradient_kernel" or case.options)
        return tensors[case.kernel] * case.head_width * size + rows

    def columns(self) -> dict[str, object]:
        """The row as the table has it; instructions are of one warp."""
        return {
            **asdict(self.case),
            "keys": self.keys,
            "num_warps": self.num_warps,
            "registers": self.code.registers,
            "spilled_bytes": self.code.spilled_bytes,
            "shared_bytes": self.code.shared_bytes,
            "tensor_instruction": self.code.tensor_instruction,
            "instructions_per_key": round(len(self.code.loop) * self.num_warps / self.keys, 1),
            "barriers": sum(re.match(r"BAR|s_barrier", each) is not None for each in self.code.loop),
            "bytes_per_key": self.bytes_per_key,
            "load_bits": self.load_bits,
        }


def readout_cases() -> Iterator[ReadoutCase]:
    """Every shipped configuration, plain and with every option, of one query and of several."""
    for target in GPU_TARGETS:
        for kernel in KERNELS:
            if kernel == "combine_kernel":
                continue
            for dtype, width in (("bf16", 32), ("bf16", 64), ("bf16", 80), ("bf16", 256), ("fp32", 64), ("fp32", 256)):
                yield ReadoutCase(kernel, target, width, dtype)
                yield ReadoutCase(kernel, target, width, dtype, queries=5, options=True)
                if kernel == "relevance_kernel":
                    yield ReadoutCase(kernel, target, width, dtype, classes=40)
                    yield ReadoutCase(kernel, target, width, dtype, queries=5, classes=40, options=True)


def measure_readout(case: ReadoutCase) -> ReadoutRow:
    """Compile one case in its shipped configuration and read its machine code."""
    arguments, keywords = _launch(case)
    kernel = getattr(KERNELS[case.kernel], case.kernel)
    code = read(_compile(kernel, arguments, keywords, case.target), GPU_TARGETS[case.target].warp_size)
    return ReadoutRow(case, keywords["BLOCK_N"], keywords["num_warps"], code)


def _launch(case: ReadoutCase) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments with which the launcher launches the case's kernel."""
    launches: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {}
    with contextlib.ExitStack() as patches:
        for name, module in KERNELS.items():
            patches.enter_context(mock.patch.object(module, name, _Recorder(name, launches)))
            patches.enter_context(mock.patch.object(module, "clear_tail"))
        patches.enter_context(mock.patch.object(readout_configs, "target_of", return_value=case.target))
        patches.enter_context(mock.patch.object(readout_call, "number_of_splits", return_value=SPLITS))
        _call(case)
    return launches[case.kernel]


def _call(case: ReadoutCase) -> None:
    """Call the launcher on tensors without memory."""
    dtype, R, D = DTYPES[case.dtype], case.queries, case.head_width

    def tensor(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    q, qkv = tensor(BATCH, R, HEADS, D, dtype=dtype), tensor(TOKENS, 3, HEADS, D, dtype=dtype)
    k, v, lse = qkv[:, 1], qkv[:, 2], tensor(BATCH, R, HEADS)
    options, rows, origin = Options(0.1), None, tensor(HEADS, D, dtype=dtype)
    if case.options:
        places = tensor(BATCH, R, 2), tensor(TOKENS, 2)
        seed = tensor(1, dtype=torch.int64)
        options = Options(0.1, tensor(TOKENS, HEADS), tensor(HEADS), *places, 0.1, seed)
        rows, origin = tensor(R, HEADS, TOKENS), tensor(TOKENS, HEADS, D, dtype=dtype)
    if case.kernel == "row_gradient_kernel":
        rows = tensor(R, HEADS, TOKENS)
    sides = tensor(BATCH + 1, dtype=torch.int32), LONGEST
    if case.kernel in ("readout_kernel", "combine_kernel"):
        readout.readout_forward(q, k, v, *sides, options, case.options)
    elif case.kernel == "relevance_kernel":
        grad = tensor(case.classes, *q.shape, dtype=dtype)
        relevance.token_relevance(q, k, v, q, lse, grad, origin, origin, *sides, options)
    else:
        readout_gradient.readout_backward(
            q, lse, rows, q, k, v, q, lse, lse if case.options else lse[:0].flatten(), *sides, options
        )


class _Recorder:
    """Stands where a kernel stands and keeps what it is launched with."""

    def __init__(self, name: str, launches: dict[str, Any]) -> None:
        self.name, self.launches = name, launches

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*arguments: Any, **keywords: Any) -> None:
            self.launches[self.name] = arguments, keywords

        return launch


def _compile(kernel: Any, arguments: tuple[Any, ...], keywords: dict[str, Any], target: Target) -> Any:
    """Compile a kernel for what a launch was given."""
    names = kernel.arg_names
    given = dict(zip(names, arguments, strict=False)) | {name: x for name, x in keywords.items() if name in names}
    constant_names = {parameter.name for parameter in kernel.params if parameter.is_constexpr}
    signature: dict[str, Any] = {}
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], list[list[object]]] = {}

    def type_of(x: Any, path: tuple[int, ...], constant: bool) -> str:
        if constant or x is None or (isinstance(x, int) and x == 1):
            constants[path] = x
            return "constexpr"
        if isinstance(x, float):
            return "fp32"
        aligned = x.storage_offset() * x.element_size() if isinstance(x, torch.Tensor) else x
        if aligned % 16 == 0:
            attributes[path] = [["tt.divisibility", 16]]
        return POINTERS[x.dtype] if isinstance(x, torch.Tensor) else "i32"

    for position, name in enumerate(names):
        x = given[name]
        if isinstance(x, tuple) and name not in constant_names:
            signature[name] = type(x)(*(type_of(leaf, (position, index), False) for index, leaf in enumerate(x)))
        else:
            signature[name] = type_of(x, (position,), name in constant_names)
    source = ASTSource(kernel, signature, constants, attributes)
    options = {name: x for name, x in keywords.items() if name not in names}
    return triton.compile(source, target=GPU_TARGETS[target], options=options)


def readout_table_path() -> Path:
    """The committed table of the installed triton."""
    return Path(__file__).parents[1] / "results" / f"aot_readout_{triton.__version__}.csv"


def main() -> None:
    """Compile all cases and write the table."""
    with ProcessPoolExecutor(2) as pool:
        rows = [row.columns() for row in pool.map(measure_readout, readout_cases(), chunksize=8)]
    with readout_table_path().open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    spilled = sum(bool(row["spilled_bytes"]) for row in rows)
    print(f"{len(rows)} kernels compiled, {spilled} spill; table in {readout_table_path()}")
    sys.exit(bool(spilled))


if __name__ == "__main__":
    main()
