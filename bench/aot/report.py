"""Compile every shipped kernel configuration without a GPU, and report the cost of its machine code.

    python -m bench.aot.report                 writes bench/results/aot_<triton version>.csv and .md (some minutes)
    python -m bench.aot.report --all-widths    what every head width takes and spills (hours; goes on where it was)

A row has the registers, spilled bytes and shared memory of a kernel, and the instructions of its main loop *per score*:
per lane and per element of the BLOCK_M × BLOCK_N tile of scores, so that tile sizes can be compared. For NVIDIA it also
has the clocks that each pipe of an SM needs for a tile, the TFLOP/s that these allow, and the number of programs that
an SM holds: ceilings, not times. ``tests/kernels_aot`` compiles some of these cases and fails if one is worse than its
row.
"""

from __future__ import annotations

import argparse
import csv
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import triton

from bench.aot import widths
from bench.aot.bounds import CHIPS, PRODUCTS, Bound, Cycles, bound_of
from bench.aot.cases import Case, all_cases, compile_case, fingerprint_of, shipped_config
from bench.aot.machine_code import CLASSES, MachineCode, read
from bench.aot.targets import GPU_TARGETS
from maskattn.kernels.tables.config import Config
from maskattn.kernels.tables.lookup import split_width

# Attributes of the machine code that are columns of the table.
RESOURCES = ("registers", "spilled_bytes", "shared_bytes", "tensor_memory", "tensor_instruction")

BOUNDS = (
    *(f"{pipe.name}_cycles" for pipe in fields(Cycles)),
    "slowest",
    "overlapped_tflops",
    "series_tflops",
    "resident_programs",
)


@dataclass(frozen=True)
class Row:
    """The cost of one case in one configuration."""

    case: Case
    config: Config
    code: MachineCode

    @property
    def bound(self) -> Bound | None:
        """The bound by the chip's pipes; None for AMD, whose pipes are not counted, and for passes without tiles."""
        case = self.case
        if case.target not in CHIPS or case.pass_ not in PRODUCTS:
            return None
        tile_width = sum(split_width(case.head_width, self.config))
        return bound_of(self.code, self.config, case.pass_, case.target, case.head_width, tile_width)

    def columns(self) -> dict[str, object]:
        """Return the table's columns; instruction counts are per score and lane, cycles per tile and SM."""
        bound = self.bound
        return {
            **asdict(self.case),
            **asdict(self.config),
            "code": fingerprint_of(self.case, self.config),
            **{name: getattr(self.code, name) for name in RESOURCES},
            **self.code.instructions_per_score(self.config.block_m * self.config.block_n, self.config.num_warps),
            **(dict.fromkeys(BOUNDS) if bound is None else bound.columns()),
        }


def measure(case: Case, config: Config | None = None) -> Row:
    """Compile one case, in its shipped configuration or another, and read its machine code."""
    config = config or shipped_config(case)
    return Row(case, config, read(compile_case(case, config), GPU_TARGETS[case.target].warp_size))


def table_path() -> Path:
    """Return the path of the committed table for the installed triton."""
    return Path(__file__).parents[1] / "results" / f"aot_{triton.__version__}.csv"


def read_table(path: Path) -> dict[tuple[str, ...], dict[str, str]]:
    """Read the rows of a table by their case; an option that an older table lacks was off."""
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    return {tuple(row.get(field.name, str(field.default)) for field in fields(Case)): row for row in rows}


def regressions(columns: dict[str, object], before: dict[str, str]) -> list[str]:
    """Return the respects in which a row is worse than the table's row of the same case."""
    # A few registers more or less do not matter until they spill or cost a resident program.
    slack = {"spilled_bytes": 0, "shared_bytes": 0, "tensor_memory": 0, "per_score": 0, "registers": 8}
    worse = [name for name, more in slack.items() if columns[name] > float(before[name]) + more]
    if columns["slowest"] is not None:
        better_higher = ("overlapped_tflops", "series_tflops", "resident_programs")
        worse += [name for name in better_higher if columns[name] < float(before[name])]
    if columns["tensor_instruction"] != before["tensor_instruction"]:
        worse.append("tensor_instruction")
    return [f"{name} {columns[name]}, was {before[name]}" for name in worse]


def write_table(rows: list[Row], path: Path) -> None:
    """Write every row as CSV."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0].columns()), lineterminator="\n")
        writer.writeheader()
        writer.writerows(row.columns() for row in rows)


def write_summary(rows: list[Row], path: Path) -> None:
    """Write the most important rows as a page."""
    plain = [row for row in rows if _is_plain(row.case)]
    path.write_text("\n".join([*_instruction_table(plain), "", *_bound_table(plain), "", *_backward_table(plain), ""]))


def _is_plain(case: Case) -> bool:
    return case == Case(case.pass_, case.target, case.head_width, "bf16") and case.head_width in (32, 64, 80, 128)


def _instruction_table(rows: list[Row]) -> list[str]:
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
        config, code, columns = row.config, row.code, row.columns()
        counts = " | ".join(f"{columns[name]:.2f}" for name in ("per_score", *CLASSES))
        lines.append(
            f"| {row.case.pass_} | {row.case.target} | {row.case.head_width} | {config.block_m}×{config.block_n} "
            f"| {config.num_warps} | {config.num_stages} | {code.registers} | {code.shared_bytes / 1024:.0f} "
            f"| {code.tensor_instruction} | {counts} |"
        )
    return lines


def _bound_table(rows: list[Row]) -> list[str]:
    chips = "; ".join(
        f"{target} as {chip.name}, {chip.sms} SMs at {chip.clock_ghz} GHz, {chip.dense_tflops:.0f} dense"
        for target, chip in CHIPS.items()
    )
    lines = [
        "## What the pipes allow",
        "",
        "Clocks of one SM for one tile on each pipe; the TFLOP/s of the pass's own products if all pipes overlap (the "
        "slowest alone) and if the products and the slowest of the rest take turns; programs that an SM holds. Shared "
        "memory serves two columns: operands that wgmma reads there itself, and loads, stores and shuffles. "
        f"Ceilings from counted instructions, not measurements. Assumed: {chips}; rates per clock as in "
        "`bench/aot/bounds.py`.",
        "",
        "| pass | target | D | tensor | operands | MUFU | FP32 | integer | load, store | issue "
        "| slowest | overlapped | in turn | resident |",
        "|---|---|" + "---:|" * 8 + "---|" + "---:|" * 3,
    ]
    for row in rows:
        if bound := row.bound:
            cycles = " | ".join(f"{value:.0f}" for value in asdict(bound.cycles).values())
            lines.append(
                f"| {row.case.pass_} | {row.case.target} | {row.case.head_width} | {cycles} | {bound.slowest} "
                f"| {bound.overlapped_tflops:.0f} | {bound.series_tflops:.0f} | {bound.resident_programs} |"
            )
    return lines


def _backward_table(rows: list[Row]) -> list[str]:
    """Return a table of both passes of the backward together, at the usual count of 2.5 times forward."""
    lines = [
        "## The backward as benchmarks count it",
        "",
        "The passes do seven products where five are counted (10·N²·H·D); TFLOP/s that the two together allow.",
        "",
        "| target | D | overlapped | in turn |",
        "|---|---:|---:|---:|",
    ]
    passes = {(row.case.target, row.case.head_width, row.case.pass_): row for row in rows}
    for target, chip in CHIPS.items():
        for width in sorted({row.case.head_width for row in rows}):
            pair = [passes.get((target, width, pass_)) for pass_ in ("query_gradient", "key_gradient")]
            overlapped = series = 0.0
            for row in pair:
                if row is not None and row.bound is not None:
                    scores = row.config.block_m * row.config.block_n
                    overlapped += row.bound.cycles.overlapped / scores
                    series += row.bound.cycles.series / scores
            if None not in pair:
                figures = " | ".join(f"{chip.tflops(10 * width / each):.0f}" for each in (overlapped, series))
                lines.append(f"| {target} | {width} | {figures} |")
    return lines


def main() -> None:
    """Compile all cases and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=2, help="number of parallel compilations")
    parser.add_argument("--all-widths", action="store_true", help="every head width instead; see bench/aot/widths.py")
    arguments = parser.parse_args()
    if arguments.all_widths:
        sys.exit(widths.main([]))
    with ProcessPoolExecutor(arguments.jobs) as pool:
        rows = list(pool.map(measure, all_cases()))
    before = read_table(table_path()) if table_path().exists() else {}
    write_table(rows, table_path())
    write_summary(rows, table_path().with_suffix(".md"))
    for row in rows:
        if worse := regressions(row.columns(), before[row.case.key]) if row.case.key in before else []:
            print(f"worse than in the previous table: {' '.join(row.case.key)}: {'; '.join(worse)}")
    spilled = [row for row in rows if row.code.spilled_bytes]
    print(f"{len(rows)} kernels compiled, {len(spilled)} spill; table in {table_path()}")
    sys.exit(bool(spilled))


if __name__ == "__main__":
    main()
