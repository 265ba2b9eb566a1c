"""Compilations of the readout's kernels, and the cost of one key in each.

The launchers run and their launches are recorded, so that the signatures are those of a real call (``launches.py``).
All of these kernels are bound by memory; their instructions and bytes are counted per key and head, not per score.

Dimension key: B sequences, T packed keys, R readout queries, H heads, D head width, K classes.
"""

from __future__ import annotations

import csv
import re
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from unittest import mock

import torch
import triton

from bench.aot.cases import DTYPES
from bench.aot.launches import Launch, recorded_launches
from bench.aot.machine_code import MachineCode, read
from bench.aot.targets import GPU_TARGETS
from maskattn.kernels.readout import call, forward, gradient, relevance
from maskattn.kernels.tables.config import Target
from maskattn.operands import QKV, KeySequences
from maskattn.options import Options
from maskattn.results import Outputs, ReadoutGradients

KERNELS = ("readout_kernel", "row_gradient_kernel", "readout_gradient_kernel", "relevance_kernel")

# A call of a slide's size; keys and values are interleaved with the queries, as in the output of a qkv projection.
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
    """The cost of one case."""

    case: ReadoutCase
    keys: int
    num_warps: int
    fingerprint: str
    code: MachineCode

    @property
    def load_bits(self) -> int:
        """Bits of one thread's widest load in the main loop (on NVIDIA's chips; 0 on others)."""
        widths = [0]
        for instruction in self.code.loop:
            if match := re.match(r"LDG\S*?\.(64|128)\b|LDGSTS\S*?\.(64|128)\b", instruction):
                widths.append(int(match.group(1) or match.group(2)))
        return max(widths)

    @property
    def bytes_per_key(self) -> int:
        """Memory traffic of one key in bytes: K and V, the gradient's dk and dv, attention rows and relevance."""
        case, size = self.case, DTYPES[self.case.dtype].itemsize
        tensors = {"readout_kernel": 2, "row_gradient_kernel": 1, "readout_gradient_kernel": 4, "relevance_kernel": 2}
        rows = case.queries * 4 * (case.kernel == "row_gradient_kernel" or case.options)
        return tensors[case.kernel] * case.head_width * size + rows

    def columns(self) -> dict[str, object]:
        """Return the table's columns; instructions are those of one warp."""
        return {
            **asdict(self.case),
            "keys": self.keys,
            "num_warps": self.num_warps,
            "code": self.fingerprint,
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
    """Yield every shipped configuration: with one query and no option, and with several queries and every option."""
    for target in GPU_TARGETS:
        for kernel in KERNELS:
            for dtype, width in (("bf16", 32), ("bf16", 64), ("bf16", 80), ("bf16", 256), ("fp32", 64), ("fp32", 256)):
                yield ReadoutCase(kernel, target, width, dtype)
                yield ReadoutCase(kernel, target, width, dtype, queries=5, options=True)
                if kernel == "relevance_kernel":
                    yield ReadoutCase(kernel, target, width, dtype, classes=40)
                    yield ReadoutCase(kernel, target, width, dtype, queries=5, classes=40, options=True)


def measure_readout(case: ReadoutCase) -> ReadoutRow:
    """Compile one case in its shipped configuration and read its machine code."""
    launch = launch_of(case)
    code = read(launch.compile(), GPU_TARGETS[case.target].warp_size)
    return ReadoutRow(case, launch.constants_by_name["BLOCK_N"], launch.num_warps, launch.fingerprint(), code)


def launch_of(case: ReadoutCase) -> Launch:
    """Return the launch of the case's kernel."""
    with (
        recorded_launches(case.target) as launches,
        mock.patch.object(call, "number_of_splits", return_value=SPLITS),
    ):
        _call(case)
    return next(launch for launch in launches if launch.name == case.kernel)


def _call(case: ReadoutCase) -> None:
    """Call the launcher on tensors to which nothing is written."""
    dtype, R, D = DTYPES[case.dtype], case.queries, case.head_width

    def tensor(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(*shape, dtype=dtype)

    q, qkv = tensor(BATCH, R, HEADS, D, dtype=dtype), tensor(TOKENS, 3, HEADS, D, dtype=dtype)
    k, v, lse = qkv[:, 1], qkv[:, 2], tensor(BATCH, R, HEADS)
    options, rows, origin = Options(0.1), None, tensor(HEADS, D, dtype=dtype)
    if case.options:
        positions = tensor(BATCH, R, 2), tensor(TOKENS, 2)
        seed = tensor(1, dtype=torch.int64)
        options = Options(0.1, tensor(TOKENS, HEADS), tensor(HEADS), *positions, 0.1, seed)
        rows, origin = tensor(R, HEADS, TOKENS), tensor(TOKENS, HEADS, D, dtype=dtype)
    if case.kernel == "row_gradient_kernel":
        rows = tensor(R, HEADS, TOKENS)
    lengths = tensor(BATCH + 1, dtype=torch.int32), LONGEST
    if case.kernel == "readout_kernel":
        forward.readout_forward(q, k, v, *lengths, options, case.options)
    elif case.kernel == "relevance_kernel":
        grad = tensor(case.classes, *q.shape, dtype=dtype)
        relevance.token_relevance(q, k, v, q, lse, grad, origin, origin, *lengths, options)
    else:
        outputs = Outputs(q, lse, lse if case.options else lse[:0].flatten())
        given = ReadoutGradients(q, lse, rows), QKV(q, k, v), outputs, KeySequences(*lengths)
        gradient.readout_backward(*given, options)


def readout_table_path() -> Path:
    """Return the path of the committed table for the installed triton."""
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
