"""Every head width in every pass, dtype and target, plain and with options: resources and spills.

    python -m bench.aot.widths                   all cases, into bench/results/aot_widths_<triton version>.csv
    python -m bench.aot.widths --missing         only classes of which the table has nothing; its rows are believed
    SHARD=3/16 python -m bench.aot.widths        every 16th class from index 3 on; shards may run at the same time
    python -m bench.aot.widths --only sm90,72    cases with these words in their keys

``python -m bench.aot.report --all-widths`` does the same. The signatures are those of real calls (``launches.py``): if
strides are not multiples of 16, as at the widths 72 and 88, the compiler knows less about them. Of a class
(``width_cases.py``) one head width is compiled, which the column ``compiled`` names; its resources stand in the rows of
the others too. A row is valid as long as the intermediate code of the compiled kernel and the class of its own launch
are unchanged; only changed kernels are compiled again, and rows are saved as they become known, so that an interrupted
run continues where it stopped.
"""

from __future__ import annotations

import argparse
import csv
import fcntl
import os
import sys
import time
from collections.abc import Iterable
from dataclasses import asdict, astuple, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
import triton

from bench.aot.bounds import SHARED_LIMITS, TENSOR_MEMORY_COLUMNS
from bench.aot.intermediate import fingerprint, fingerprint_of_code
from bench.aot.launches import Launch
from bench.aot.machine_code import registers_and_spills, tensor_instruction_of
from bench.aot.targets import ALL_TARGETS
from bench.aot.width_cases import WidthCase, class_of, launch_of, width_cases

__all__ = [
    "WidthRow",
    "compile_width",
    "current_code",
    "faults",
    "measure_width",
    "read_widths",
    "table_path",
]

# Rows are saved when so many are new.
AT_ONCE = 16


@dataclass(frozen=True)
class WidthRow:
    """The resources of a case.

    Attributes:
        case: the case.
        tile: its tile, warps and stages.
        compiled: the head width that was compiled; the case's own, or another of its class.
        launch: the class of the case.
        code: the fingerprint of the intermediate code that was compiled.
        registers: registers of a thread.
        spilled_bytes: bytes that a thread spills.
        shared_bytes: shared memory of a program.
        tensor_memory: columns of tensor memory of a program.
        tensor_instruction: the instruction of the tensor cores, or "none".
    """

    case: WidthCase
    tile: str
    compiled: int
    launch: str
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


def _tile_of(launch: Launch) -> str:
    """Return the launch's tile, warps and stages in the notation of the tables of configurations."""
    names = launch.constants_by_name
    sizes = "x".join(str(names[name]) for name in ("BLOCK_M", "BLOCK_N", "BLOCK_C") if name in names)
    flags = "+d" * bool(names.get("DESCRIBED")) + "+t" * bool(names.get("TAIL_STAGES"))
    flags += "+r" * (launch.max_registers is not None)
    return f"{sizes}/{launch.num_warps}/{launch.num_stages}{flags}"


def current_code(case: WidthCase) -> str:
    """Return the fingerprint of the kernel's current intermediate code."""
    launch = launch_of(case)
    return fingerprint(launch.source, ALL_TARGETS[case.target], launch.options)


def compile_width(case: WidthCase) -> Any:
    """Compile the kernel of a case."""
    launch = launch_of(case)
    return triton.compile(launch.source, target=ALL_TARGETS[case.target], options=launch.options)


def measure_width(case: WidthCase) -> WidthRow:
    """Compile one case and return its resources."""
    launch, compiled = launch_of(case), compile_width(case)
    metadata = compiled.metadata
    return WidthRow(
        case, _tile_of(launch), case.head_width, class_of(case),
        fingerprint_of_code(compiled.asm["ttir"], launch.options), *registers_and_spills(compiled), metadata.shared,
        getattr(metadata, "tmem_size", None) or 0, tensor_instruction_of(compiled),
    )  # fmt: skip


def faults(row: WidthRow) -> list[str]:
    """Describe what prevents a kernel from running, or from running well."""
    limit = SHARED_LIMITS[row.case.target]
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
            numbers = {n: int(own[n]) for n in own if n.endswith(("compiled", "registers", "bytes", "memory"))}
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


def _is_valid(row: WidthRow) -> bool:
    """Return whether a compiled row's kernel is unchanged."""
    return row.code == current_code(row.case)


def _concluded(cases: Iterable[WidthCase], compiled: list[WidthRow]) -> list[WidthRow]:
    """Return the rows of the cases of a class of which some, at least one, are compiled."""
    own = {row.case: row for row in compiled}
    return [own.get(case, replace(compiled[0], case=case)) for case in cases]


def main(arguments: list[str] | None = None) -> int:
    """Compile the changed cases; the exit status is 1 if anything spills or does not fit, 3 if cases are left."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="words that a case must have in its key, separated by commas")
    parser.add_argument("--missing", action="store_true", help="believe the table's rows and add those that it lacks")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="start no class after this many seconds")
    parser.add_argument("--table", type=Path, default=table_path(), help="the table to continue")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)  # Tensors of a few numbers: threads would only wait for each other.
    words = {word for word in given.only.split(",") if word}
    classes: dict[str, list[WidthCase]] = {}
    for case in width_cases():
        if words <= set(map(str, astuple(case))):
            classes.setdefault(class_of(case), []).append(case)
    first, step = (int(x) for x in os.environ.get("SHARD", "0/1").split("/"))
    until, known = time.time() + given.seconds, read_widths(given.table)
    own: dict[str, list[WidthRow]] = {}
    for row in known.values():
        if row.compiled == row.case.head_width:
            own.setdefault(row.launch, []).append(row)
    found: list[WidthRow] = []
    unsaved: list[WidthRow] = []
    left, compiled = 0, 0
    for name, cases in list(classes.items())[first::step]:
        if time.time() > until:
            left += sum(case not in known for case in cases)
            continue
        members = own.get(name, [])
        if not members or not (given.missing or _is_valid(members[0])):
            members, compiled = [measure_width(cases[0])], compiled + 1
        rows = _concluded(cases, members)
        found += rows
        unsaved += [row for row in rows if known.get(row.case) != row]
        if len(unsaved) >= AT_ONCE:
            _keep(unsaved, given.table)
            unsaved = []
        for row in rows:
            if wrong := faults(row):
                print(f"{' '.join(map(str, astuple(row.case)))} in {row.tile}: {'; '.join(wrong)}", flush=True)
    _keep(unsaved, given.table)
    wrong = sum(bool(faults(row)) for row in found)
    print(f"{len(found)} kernels, {compiled} classes compiled anew, {wrong} spill or do not fit, {left} are left")
    return 1 if wrong else 3 if left else 0


if __name__ == "__main__":
    sys.exit(main())
