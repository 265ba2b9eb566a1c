"""Compile the Hopper kernels in Gluon without a GPU, and compare their machine code's cost with the Triton kernels'.

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
from dataclasses import asdict, dataclass, fields, replace
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
from maskattn.kernels.gluon.configs import GluonConfig, GradientConfig, choose, choose_gradient
from maskattn.kernels.gluon.gradient_kernel import BLOCK_N
from maskattn.kernels.gluon.kernel import BLOCK_M
from maskattn.options import Options

__all__ = [
    "GluonCase",
    "GluonRow",
    "all_gluon_cases",
    "config_columns",
    "gluon_table_path",
    "measure_gluon",
    "read_gluon_table",
]

CONSUMERS, WARPS_OF_A_CONSUMER, ALL_WARPS = 2, 4, 12
HEADS, TOKENS = 2, 50
# Products of backward in one pass, and in the two passes of the Triton kernels.
ONE_PASS = 5
TWO_PASSES = ("query_gradient", "key_gradient")


@dataclass(frozen=True)
class GluonCase:
    """One compilation for compute capability 9.0."""

    head_width: int
    dtype: str = "bf16"
    bias: bool = False
    alibi: bool = False
    pass_: str = "forward"

    @property
    def options(self) -> Options:
        """Options of the case's kind, to choose a configuration by."""
        return Options(1.0, torch.zeros(1) if self.bias else None, torch.zeros(1) if self.alibi else None)

    @property
    def config(self) -> GluonConfig | GradientConfig:
        """The configuration of the case."""
        if self.pass_ == "forward":
            return choose(self.head_width, self.options)
        config = choose_gradient(self.head_width, self.options)
        assert config is not None
        return config

    @property
    def products(self) -> int:
        """The number of matrix products of a tile."""
        return PRODUCTS["forward"] if self.pass_ == "forward" else ONE_PASS

    @property
    def tile(self) -> tuple[int, int]:
        """The queries and keys of an iteration of the main loop."""
        config = self.config
        if isinstance(config, GluonConfig):
            return BLOCK_M, config.block_n * config.unroll
        return 64 * config.blocks, BLOCK_N

    @property
    def key(self) -> tuple[str, ...]:
        """The values that identify the case's row in the table."""
        return tuple(str(value) for value in asdict(self).values())

    @property
    def as_triton(self) -> tuple[Case, ...]:
        """The cases of the Triton kernels that do the same."""
        passes = TWO_PASSES if self.pass_ == "backward" else ("forward",)
        return tuple(Case(x, "sm90", self.head_width, self.dtype, bias=self.bias, alibi=self.alibi) for x in passes)


def all_gluon_cases() -> Iterator[GluonCase]:
    """Yield every tile width and pass, plain and with each option that it takes, and float16 for two widths."""
    for width in (32, 64, 80, 128, 256):
        for bias in (False, True):
            for alibi in (False, True):
                yield GluonCase(width, "bf16", bias, alibi)
    yield GluonCase(64, "fp16")
    yield GluonCase(128, "fp16")
    for width in (16, 32, 64, 80, 128):
        for bias in (False, True):
            yield GluonCase(width, "bf16", bias, pass_="backward")
    yield GluonCase(64, "fp16", pass_="backward")
    yield GluonCase(128, "fp16", pass_="backward")


@dataclass(frozen=True)
class GluonRow:
    """The result of compiling one case.

    Attributes:
        loop_registers: registers that the warps of a consumer and of the producer request with setmaxnreg.
        remarks: codes of ptxas's warnings on lost performance, such as serialised products.
    """

    case: GluonCase
    config: GluonConfig | GradientConfig
    code: MachineCode
    loop_registers: tuple[int, int]
    tma_copies: int
    tma_additions: int
    remarks: str

    @property
    def bound(self) -> Bound:
        """The bound by the chip's pipes, for both consumers on one block of keys or step of queries."""
        chip, width = CHIPS["sm90"], self.case.head_width
        consumers = CONSUMERS * WARPS_OF_A_CONSUMER
        of_loop = pipe_cycles(self.code.loop, consumers, chip)
        unroll = getattr(self.config, "unroll", 1)
        cycles = Cycles(*(value / unroll for value in asdict(of_loop).values()))
        queries, keys = self.case.tile
        flop = 2.0 * self.case.products * queries * keys / unroll * width
        return Bound(
            cycles=cycles,
            slowest=max(cycles.of_pipes, key=lambda pipe: cycles.of_pipes[pipe]),
            overlapped_tflops=chip.tflops(flop / cycles.overlapped),
            series_tflops=chip.tflops(flop / cycles.series),
            resident_programs=resident_programs(self.code, ALL_WARPS, chip),
        )

    def columns(self) -> dict[str, object]:
        """Return the table's columns."""
        queries, keys = self.case.tile
        scores, code = queries * keys, self.code
        return {
            **asdict(self.case),
            **config_columns(self.config),
            "registers": code.registers,
            "consumer_setmaxnreg": self.loop_registers[0],
            "producer_setmaxnreg": self.loop_registers[1],
            "spilled_bytes": code.spilled_bytes,
            "shared_bytes": code.shared_bytes,
            "tensor_memory": code.tensor_memory,
            "tensor_instruction": code.tensor_instruction,
            "tma_copies": self.tma_copies,
            "tma_additions": self.tma_additions,
            "ptxas_remarks": self.remarks,
            **code.instructions_per_score(scores, CONSUMERS * WARPS_OF_A_CONSUMER),
            **self.bound.columns(),
        }


def config_columns(config: GluonConfig | GradientConfig) -> dict[str, object]:
    """Return the table's columns of a configuration; those that only the other pass has are empty."""
    names = [x.name for kind in (GluonConfig, GradientConfig) for x in fields(kind)]
    return {name: getattr(config, name, "") for name in dict.fromkeys(names)}


def compile_gluon(case: GluonCase) -> Any:
    """Compile the kernel that a call of ``packed_attention``, or its backward, launches."""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[case.dtype]
    q = torch.zeros(TOKENS, HEADS, case.head_width, dtype=dtype, requires_grad=case.pass_ == "backward")
    ends = torch.tensor([0, 20, TOKENS], dtype=torch.int32)
    options: dict[str, Any] = {"key_bias": torch.zeros(TOKENS)} if case.bias else {}
    if case.alibi:
        options |= {"coords": torch.zeros(TOKENS, 2), "slopes": torch.ones(HEADS)}
    with recorded_launches("sm90") as launches:
        out = maskattn.packed_attention(q, q, q, ends, ends, 30, 30, impl="gluon", deterministic=False, **options)
        if case.pass_ == "backward":
            out.backward(torch.zeros_like(out))
    name = {"forward": "gluon_forward_kernel", "backward": "gluon_gradient_kernel"}[case.pass_]
    (launch,) = (each for each in launches if each.name == name)
    return launch.compile()


def measure_gluon(case: GluonCase) -> GluonRow:
    """Compile one case and read its machine code."""
    compiled = compile_gluon(case)
    ptx = compiled.asm["ptx"]
    registers = [int(x) for x in re.findall(r"setmaxnreg\.\w+\.sync\.aligned\.u32\s+(\d+)", ptx)]
    config = case.config
    asked = (config.consumer_registers, config.producer_registers)
    return GluonRow(
        case,
        config,
        read(compiled, 32),
        tuple(x if x in registers else 0 for x in asked),
        ptx.count("cp.async.bulk.tensor"),
        ptx.count("cp.reduce.async.bulk.tensor"),
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
        f"# The Hopper kernels in Gluon beside the Triton kernels: triton {triton.__version__}, no GPU involved",
        "",
        "Compute capability 9.0, bfloat16. Instructions of the main loop per score and lane, by class; clocks of one "
        "SM for a tile of as many queries and keys as the column says; the TFLOP/s that the pipes allow if all "
        "overlap, and if the products and the slowest of the rest take turns. Ceilings from counted instructions, "
        f"not measurements: no GPU has run the Gluon kernels. Assumed: {chip.name}, {chip.sms} SMs at {chip.clock_ghz} "
        "GHz; rates per clock as in `bench/aot/bounds.py`. Of the Gluon kernel, registers are those of a consumer's "
        "thread after setmaxnreg.",
        "",
        "Backward in Gluon is one pass of 5 products for each pair of tiles, 10·D FLOP for each score; the Triton "
        "kernels' two passes have 3 and 4 products, and their own rows. TFLOP/s of backward count 10·D for both, and "
        "those of the two passes together, the time of one after the other, are in the last of their rows. The "
        "additions of dQ to memory, 4·D bytes for each query and 128 keys, are not in the model.",
        "",
        "| pass | D | options | kernel | tile M×N | stages | registers | spilled | shared KiB | per score "
        "| " + " | ".join(CLASSES) + " | tensor clocks | MUFU clocks | issue clocks | slowest | overlapped | in turn |",
        "|---|---:|---|---|---|" + "---:|" * (5 + len(CLASSES) + 3) + "---|" + "---:|" * 2,
    ]
    for row in rows:
        if row.case.dtype == "bf16":
            lines += [_line(row.case, "Gluon", *_of_gluon(row)), *_of_triton(row.case)]
    return lines


def _of_gluon(row: GluonRow) -> tuple[str, dict[str, object], Bound]:
    queries, keys = row.case.tile
    keys //= getattr(row.config, "unroll", 1)
    shape = f"{queries}×{keys} | {row.config.stages} | {row.config.consumer_registers}"
    return shape, row.columns(), row.bound


def _of_triton(case: GluonCase) -> Iterator[str]:
    """Yield the line of each Triton kernel; the bound of the last of two passes is that of both."""
    seconds_overlapped = seconds_series = 0.0
    for each in case.as_triton:
        row = measure(each)
        config, bound = row.config, row.bound
        assert bound is not None
        # Per FLOP of backward's five products: a pass with more or fewer takes that much longer or shorter.
        share = PRODUCTS[each.pass_] / case.products
        seconds_overlapped += share / bound.overlapped_tflops
        seconds_series += share / bound.series_tflops
        last = replace(bound, overlapped_tflops=1 / seconds_overlapped, series_tflops=1 / seconds_series)
        kernel = "Triton" if case.pass_ == "forward" else f"Triton, {each.pass_.replace('_', ' ')}"
        shape = f"{config.block_m}×{config.block_n} | {config.num_stages} | {row.code.registers}"
        yield _line(case, kernel, shape, row.columns(), last if each == case.as_triton[-1] else bound)


def _line(case: GluonCase, kernel: str, shape: str, columns: dict[str, Any], bound: Bound) -> str:
    options = ", ".join(name for name in ("bias", "alibi") if getattr(case, name)) or "none"
    counts = " | ".join(f"{columns[name]:.2f}" for name in ("per_score", *CLASSES))
    cycles = bound.cycles
    return (
        f"| {case.pass_} | {case.head_width} | {options} | {kernel} | {shape} | {columns['spilled_bytes']} "
        f"| {columns['shared_bytes'] / 1024:.0f} | {counts} | {cycles.tensor:.0f} | {cycles.mufu:.0f} "
        f"| {cycles.issue:.0f} | {bound.slowest} | {bound.overlapped_tflops:.0f} | {bound.series_tflops:.0f} |"
    )


if __name__ == "__main__":
    write_gluon_table()
