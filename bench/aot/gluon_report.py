"""Compile the Hopper kernel in Gluon without a GPU, and compare the cost of its machine code with the Triton kernel's.

    python -m bench.aot.gluon_report           writes bench/results/aot_gluon_<triton version>.csv and .md (minutes)

The columns are those of ``report.py``. ``tests/kernels_aot/test_gluon_gate.py`` compiles some of these cases and fails
if one is worse than its row.
"""

from __future__ import annotations

import csv
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
import triton

import maskattn
from bench.aot.bounds import CHIPS, PRODUCTS, Bound, Cycles, pipe_cycles, resident_programs
from bench.aot.cases import Case
from bench.aot.launches import recorded_launches
from bench.aot.machine_code import CLASSES, MachineCode, nvidia_tool, read
from bench.aot.report import measure
from maskattn.kernels.gluon.configs import GluonConfig, choose
from maskattn.kernels.gluon.kernel import BLOCK_M
from maskattn.options import Options

__all__ = ["GluonCase", "GluonRow", "all_gluon_cases", "gluon_table_path", "measure_gluon", "read_gluon_table"]

CONSUMERS, WARPS_OF_A_CONSUMER, ALL_WARPS = 2, 4, 12
HEADS, TOKENS = 2, 50


@dataclass(frozen=True)
class GluonCase:
    """One compilation for compute capability 9.0."""

    head_width: int
    dtype: str = "bf16"
    bias: bool = False
    alibi: bool = False

    @property
    def key(self) -> tuple[str, ...]:
        """The values that identify the case's row in the table."""
        return tuple(str(value) for value in asdict(self).values())

    @property
    def as_triton(self) -> Case:
        """The case of the Triton kernel with the same features."""
        return Case("forward", "sm90", self.head_width, self.dtype, bias=self.bias, alibi=self.alibi)


def all_gluon_cases() -> Iterator[GluonCase]:
    """Yield every tile width, plain and with each option, and float16 for two widths."""
    for width in (32, 64, 80, 128, 256):
        for bias in (False, True):
            for alibi in (False, True):
                yield GluonCase(width, "bf16", bias, alibi)
    yield GluonCase(64, "fp16")
    yield GluonCase(128, "fp16")


@dataclass(frozen=True)
class GluonRow:
    """The result of compiling one case.

    Attributes:
        loop_registers: registers that the warps of a consumer and of the producer request with setmaxnreg.
        remarks: codes of ptxas's warnings on lost performance, such as serialised products.
    """

    case: GluonCase
    config: GluonConfig
    code: MachineCode
    loop_registers: tuple[int, int]
    tma_copies: int
    remarks: str

    @property
    def bound(self) -> Bound:
        """The bound by the chip's pipes, for both consumers on one block of keys."""
        chip, width = CHIPS["sm90"], self.case.head_width
        consumers = CONSUMERS * WARPS_OF_A_CONSUMER
        of_loop = pipe_cycles(self.code.loop, consumers, chip)
        cycles = Cycles(*(value / self.config.unroll for value in asdict(of_loop).values()))
        flop = 2.0 * PRODUCTS["forward"] * BLOCK_M * self.config.block_n * width
        return Bound(
            cycles=cycles,
            slowest=max(cycles.of_pipes, key=lambda pipe: cycles.of_pipes[pipe]),
            overlapped_tflops=chip.tflops(flop / cycles.overlapped),
            series_tflops=chip.tflops(flop / cycles.series),
            resident_programs=resident_programs(self.code, ALL_WARPS, chip),
        )

    def columns(self) -> dict[str, object]:
        """Return the table's columns."""
        scores = BLOCK_M * self.config.block_n * self.config.unroll
        code = self.code
        return {
            **asdict(self.case),
            **asdict(self.config),
            "registers": code.registers,
            "consumer_setmaxnreg": self.loop_registers[0],
            "producer_setmaxnreg": self.loop_registers[1],
            "spilled_bytes": code.spilled_bytes,
            "shared_bytes": code.shared_bytes,
            "tensor_memory": code.tensor_memory,
            "tensor_instruction": code.tensor_instruction,
            "tma_copies": self.tma_copies,
            "ptxas_remarks": self.remarks,
            **code.instructions_per_score(scores, CONSUMERS * WARPS_OF_A_CONSUMER),
            **self.bound.columns(),
        }


def compile_gluon(case: GluonCase) -> Any:
    """Compile the kernel that a call of ``packed_attention`` launches."""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[case.dtype]
    q = torch.zeros(TOKENS, HEADS, case.head_width, dtype=dtype)
    ends = torch.tensor([0, 20, TOKENS], dtype=torch.int32)
    options: dict[str, Any] = {"key_bias": torch.zeros(TOKENS)} if case.bias else {}
    if case.alibi:
        options |= {"coords": torch.zeros(TOKENS, 2), "slopes": torch.ones(HEADS)}
    with recorded_launches("sm90") as launches:
        maskattn.packed_attention(q, q, q, ends, ends, 30, 30, impl="gluon", **options)
    (launch,) = (each for each in launches if each.kernel.is_gluon())
    return launch.compile()


def measure_gluon(case: GluonCase) -> GluonRow:
    """Compile one case and read its machine code."""
    compiled = compile_gluon(case)
    options = Options(1.0, torch.zeros(1) if case.bias else None, torch.zeros(1) if case.alibi else None)
    ptx = compiled.asm["ptx"]
    registers = [int(x) for x in re.findall(r"setmaxnreg\.\w+\.sync\.aligned\.u32\s+(\d+)", ptx)]
    config = choose(case.head_width, options)
    asked = (config.consumer_registers, config.producer_registers)
    return GluonRow(
        case,
        config,
        read(compiled, 32),
        tuple(x if x in registers else 0 for x in asked),
        ptx.count("cp.async.bulk.tensor"),
        _remarks(ptx),
    )


def _remarks(ptx: str) -> str:
    """Return the codes of ptxas's warnings on lost performance."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx)
        command = [nvidia_tool("ptxas"), "-v", "--gpu-name", "sm_90a", source, "-o", Path(folder) / "kernel.cubin"]
        messages = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    return " ".join(sorted(set(re.findall(r"\((C\d+)\) Potential Performance Loss", messages))))


def gluon_table_path() -> Path:
    """Return the path of the committed table for the installed triton."""
    return Path(__file__).parents[1] / "results" / f"aot_gluon_{triton.__version__}.csv"


def read_gluon_table(path: Path) -> dict[tuple[str, ...], dict[str, str]]:
    """Read the rows of a table by their case."""
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    return {tuple(row[field.name] for field in fields(GluonCase)): row for row in rows}


def write_gluon_table() -> None:
    """Compile all cases, and write the table and its summary."""
    rows = [measure_gluon(case) for case in all_gluon_cases()]
    with gluon_table_path().open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0].columns()), lineterminator="\n")
        writer.writeheader()
        writer.writerows(row.columns() for row in rows)
    gluon_table_path().with_suffix(".md").write_text("\n".join([*_summary(rows), ""]))
    print(f"{len(rows)} kernels compiled; table in {gluon_table_path()}")


def _summary(rows: list[GluonRow]) -> list[str]:
    chip = CHIPS["sm90"]
    lines = [
        f"# The Hopper kernel in Gluon beside the Triton kernel: triton {triton.__version__}, no GPU involved",
        "",
        "Forward, compute capability 9.0, bfloat16. Instructions of the main loop per score and lane, by class; clocks "
        "of one SM for a tile of 128 queries and as many keys as the column says; the TFLOP/s that the pipes allow if "
        "all overlap, and if the products and the slowest of the rest take turns. Ceilings from counted instructions, "
        f"not measurements: no GPU has run the Gluon kernel. Assumed: {chip.name}, {chip.sms} SMs at {chip.clock_ghz} "
        "GHz; rates per clock as in `bench/aot/bounds.py`. Of the Gluon kernel, registers are those of a consumer's "
        "thread after setmaxnreg.",
        "",
        "| D | options | kernel | tile M×N | stages | registers | spilled | shared KiB | per score "
        "| " + " | ".join(CLASSES) + " | tensor clocks | MUFU clocks | issue clocks | slowest | overlapped | in turn |",
        "|---:|---|---|---|" + "---:|" * (5 + len(CLASSES) + 3) + "---|" + "---:|" * 2,
    ]
    for row in rows:
        if row.case.dtype == "bf16":
            lines += [_line(row.case, "Gluon", *_of_gluon(row)), _line(row.case, "Triton", *_of_triton(row.case))]
    return lines


def _of_gluon(row: GluonRow) -> tuple[str, dict[str, object], Bound]:
    shape = f"{BLOCK_M}×{row.config.block_n} | {row.config.stages} | {row.config.consumer_registers}"
    return shape, row.columns(), row.bound


def _of_triton(case: GluonCase) -> tuple[str, dict[str, object], Bound]:
    row = measure(case.as_triton)
    config, bound = row.config, row.bound
    assert bound is not None
    shape = f"{config.block_m}×{config.block_n} | {config.num_stages} | {row.code.registers}"
    return shape, row.columns(), bound


def _line(case: GluonCase, kernel: str, shape: str, columns: dict[str, Any], bound: Bound) -> str:
    options = ", ".join(name for name in ("bias", "alibi") if getattr(case, name)) or "none"
    counts = " | ".join(f"{columns[name]:.2f}" for name in ("per_score", *CLASSES))
    cycles = bound.cycles
    return (
        f"| {case.head_width} | {options} | {kernel} | {shape} | {columns['spilled_bytes']} "
        f"| {columns['shared_bytes'] / 1024:.0f} | {counts} | {cycles.tensor:.0f} | {cycles.mufu:.0f} "
        f"| {cycles.issue:.0f} | {bound.slowest} | {bound.overlapped_tflops:.0f} | {bound.series_tflops:.0f} |"
    )


if __name__ == "__main__":
    write_gluon_table()
