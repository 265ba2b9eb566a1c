"""The table of what every shipped configuration costs, and its rows for reading."""

from __future__ import annotations

import argparse
import csv
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import triton

from aot.cases import DTYPES, GPU_TARGETS, Case, all_cases, compile_case
from aot.machine_code import CLASSES, MachineCode, read
from maskattn.kernels.configs import Config, look_up

# What of the machine code goes to the table as it is.
RESOURCES = ("registers", "spilled_bytes", "shared_bytes", "tensor_memory", "tensor_instruction")


@dataclass(frozen=True)
class Row:
    """What one case costs in one configuration."""

    case: Case
    config: Config
    code: MachineCode

    def columns(self) -> dict[str, object]:
        """The row as the table has it; instruction counts are per score and lane."""
        return {
            **asdict(self.case),
            **asdict(self.config),
            **{name: getattr(self.code, name) for name in RESOURCES},
            **self.code.instructions_per_score(self.config.block_m * self.config.block_n, self.config.num_warps),
        }


def measure(case: Case, config: Config | None = None) -> Row:
    """Compile one case, in its shipped configuration or another, and read its machine code."""
    config = config or look_up(case.pass_, case.target, case.head_width, DTYPES[case.dtype])
    return Row(case, config, read(compile_case(case, config), GPU_TARGETS[case.target].warp_size))


def table_path() -> Path:
    """The committed table of the installed triton."""
    return Path(__file__).parents[1] / "results" / f"aot_{triton.__version__}.csv"


def read_table(path: Path) -> dict[tuple[str, ...], dict[str, str]]:
    """Rows of a table by their case."""
    with path.open(newline="") as file:
        return {tuple(row[field.name] for field in fields(Case)): row for row in csv.DictReader(file)}


def write_table(rows: list[Row], path: Path) -> None:
    """Write every row as CSV."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0].columns()), lineterminator="\n")
        writer.writeheader()
        writer.writerows(row.columns() for row in rows)


def write_summary(rows: list[Row], path: Path) -> None:
    """The rows that matter most, for reading."""
    lines = [
        f"# What the kernels compile to: triton {triton.__version__}, no GPU involved",
        "",
        "bfloat16, no options, no gather. Instructions of the main loop per score and lane; `aot_*.csv` has all.",
        "",
        "| pass | target | D | tile M×N | warps | stages | registers | shared KiB | products | per score "
        "| tensor | MUFU | FP32 | convert | integer | load | shuffle | control |",
        "|---|---|" + "---:|" * 6 + "---|" + "---:|" * 9,
    ]
    for row in rows:
        case, config, code = row.case, row.config, row.code
        if case == Case(case.pass_, case.target, case.head_width, "bf16") and case.head_width in (32, 64, 80, 128):
            columns = row.columns()
            counts = " | ".join(f"{columns[name]:.2f}" for name in ("per_score", *CLASSES))
            lines.append(
                f"| {case.pass_} | {case.target} | {case.head_width} | {config.block_m}×{config.block_n} "
                f"| {config.num_warps} | {config.num_stages} | {code.registers} | {code.shared_bytes / 1024:.0f} "
                f"| {code.tensor_instruction} | {counts} |"
            )
    path.write_text("\n".join(lines) + "\n")


def main(description: str | None = None) -> None:
    """Compile all cases and write the table."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--jobs", type=int, default=2, help="compilations side by side")
    arguments = parser.parse_args()
    with ProcessPoolExecutor(arguments.jobs) as pool:
        rows = list(pool.map(measure, all_cases()))
    write_table(rows, table_path())
    write_summary(rows, table_path().with_suffix(".md"))
    spilled = [row for row in rows if row.code.spilled_bytes]
    print(f"{len(rows)} kernels compiled, {len(spilled)} spill; table in {table_path()}")
    sys.exit(bool(spilled))
