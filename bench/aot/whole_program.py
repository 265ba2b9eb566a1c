"""What a whole program issues at a given number of keys: set-up, main loop, tail and end, from its machine code.

    python -m bench.aot.whole_program                       into bench/results/aot_short_<triton version>.csv (minutes)
    python -m bench.aot.whole_program --keys 577            another length, printed
    python -m bench.aot.whole_program --only forward,sm90   only such cases, printed

For long sequences only the main loop counts (``report.py``); for the tiles of a ViT, of 197 or 256 tokens, what comes
before it and after it is as long. Counted are instructions of one warp, the one that does most: where a branch passes
something over (the making of a descriptor, which one warp does for all), the longer way. Not counted is time: a
descriptor made in a kernel is written to global memory and then fenced, which we assume, and have not measured, to take
some 500 to 1,000 clocks in addition to its instructions.
"""

from __future__ import annotations

import argparse
import csv
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import cast

import triton

from bench.aot.bounds import CHIPS, resident_programs
from bench.aot.cases import KERNELS, Case, compile_case, shipped_config
from bench.aot.machine_code import nvidia_assembly, read
from maskattn.kernels.tables.config import Config, Pass, Target

__all__ = [
    "Issued",
    "Program",
    "Way",
    "all_ways",
    "best_of",
    "cases",
    "count_issued",
    "main",
    "measure_way",
    "read_program",
    "read_ways",
    "table_path",
]

# Tokens of the tiles of ViTs of 224 pixels with patches of 16, with a class token, and of 256 pixels without.
KEYS = (197, 256)
WIDTHS = (32, 64, 80, 128, 256)
TARGETS: tuple[Target, ...] = ("sm90", "sm100")

PRODUCT = re.compile(r"HGMMA|HMMA|UTC\w*MMA")


@dataclass(frozen=True)
class Instruction:
    """An instruction: its operation, whether it has a predicate, and the index that it may jump to."""

    operation: str
    predicated: bool
    target: int | None

    @property
    def is_product(self) -> bool:
        """Whether it is a product of the tensor cores."""
        return PRODUCT.match(self.operation) is not None


@dataclass(frozen=True)
class Issued:
    """The instructions that a warp issues, by their place in the program.

    Attributes:
        before: up to the main loop: positions, loads of the own tile, descriptors, the first stages of the pipeline.
        iteration: one iteration of the main loop.
        iterations: iterations of the main loop.
        tail: from the main loop's end to that of the tail's, whether or not there is a tail.
        after: from there to the program's end.
    """

    before: int
    iteration: int
    iterations: int
    tail: int
    after: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.before + self.iteration * self.iterations + self.tail + self.after


@dataclass(frozen=True)
class Program:
    """A kernel's instructions up to its last EXIT, with the first and last index of its main loop and its tail's."""

    instructions: tuple[Instruction, ...]
    main: tuple[int, int]
    tail: tuple[int, int]

    def tiles_before(self, first: int, loop: tuple[int, int]) -> int:
        """Return the number of whole tiles whose products come before a loop and after the instruction ``first``."""
        outside = sum(x.is_product for x in self.instructions[first : loop[0]])
        return outside // sum(x.is_product for x in self.instructions[loop[0] : loop[1] + 1])


def read_program(assembly: str) -> Program:
    """Read what ``nvdisasm`` prints of an attention kernel.

    Raises:
        ValueError: it does not have two loops with products, one after the other.
    """
    labels: dict[str, int] = {}
    found: list[tuple[str, bool, str]] = []
    for line in assembly.splitlines():
        if label := re.match(r"\s*\.(L_x_\d+):", line):
            labels[label.group(1)] = len(found)
        elif match := re.search(r"/\*[0-9a-f]{4,}\*/\s+(@!?U?P\w+\s+)?([A-Z][\w.]*)(.*)", line):
            found.append((match.group(2), match.group(1) is not None, match.group(3)))
    # Waiting for a barrier that is not ready yet goes on after the last EXIT, and so do traps.
    last = max(index for index, (operation, _, _) in enumerate(found) if operation == "EXIT")
    instructions = []
    for operation, predicated, operands in found[: last + 1]:
        jump = re.search(r"\.(L_x_\d+)", operands) if re.match("BRA|BRX|JMP", operation) else None
        # BRA.U has its predicate among the operands.
        conditional = predicated or "UP" in operands.partition("`")[0]
        instructions.append(Instruction(operation, conditional, labels[jump.group(1)] if jump else None))
    loops = [
        (x.target, index)
        for index, x in enumerate(instructions)
        if x.target is not None
        and x.target <= index
        and any(each.is_product for each in instructions[x.target : index + 1])
    ]
    if len(loops) != 2 or loops[0][1] >= loops[1][0]:
        raise ValueError(f"expected a main loop and a tail's, got loops with products at {loops}")
    return Program(tuple(instructions), *loops)


def count_issued(program: Program, tiles: int, has_tail: bool) -> Issued:
    """Count what a warp issues for so many whole tiles, at least one, and, if there is one, a tail."""
    (begin, end), (tail_begin, tail_end) = program.main, program.tail
    length = len(program.instructions)
    first_of_all = program.tiles_before(0, program.main)
    of_tail = program.tiles_before(end + 1, program.tail)
    before, at = _way(program, 0, range(begin, begin + 1), max)
    assert at == begin
    iteration, _ = _way(program, begin, range(end, end + 1), max)
    through_tail = int(has_tail) - of_tail > 0
    passed = () if through_tail else range(tail_begin, tail_end + 1)
    # Without a tail everything that can be passed over is.
    tail, at = _way(program, end + 1, range(tail_end + 1, length), max if has_tail else min, passed)
    after, _ = _way(program, at, range(length - 1, length), max)
    return Issued(before, iteration + 1, tiles - first_of_all, tail, after + 1)


def _way(
    program: Program,
    start: int,
    stop: range,
    choose: Callable[[Iterable[tuple[int, int]]], tuple[int, int]],
    passed: Iterable[int] = (),
) -> tuple[int, int]:
    """Return the number of instructions from ``start`` to the first of ``stop``, which does not count, and its index.

    Args:
        program: the program.
        start: the first instruction.
        stop: instructions that end the way.
        choose: ``max`` for the longest way, ``min`` for the shortest.
        passed: instructions that the way must not contain.
    """
    forbidden = set(passed)
    ways: dict[int, tuple[int, int] | None] = {}
    for index in range(stop[-1], start - 1, -1):
        if index in stop:
            ways[index] = (0, index)
        elif index in forbidden:
            ways[index] = None
        else:
            onward = [way for each in _successors(program, index) if (way := ways.get(each)) is not None]
            ways[index] = None if not onward else (lambda way: (way[0] + 1, way[1]))(choose(onward))
    way = ways[start]
    if way is None:
        raise ValueError(f"no way leads from instruction {start} to {stop}")
    return way


def _successors(program: Program, index: int) -> Iterator[int]:
    """Yield the instructions that may follow, those of later iterations excepted."""
    instruction = program.instructions[index]
    jumps = instruction.target is not None
    if jumps and instruction.target > index:
        yield instruction.target
    # Calls are of traps, from which nothing returns.
    ends = instruction.operation.startswith(("EXIT", "CALL", "RET"))
    if not (jumps or ends) or instruction.predicated:
        yield index + 1


@dataclass(frozen=True)
class Way:
    """A way to read the tiles of a pass, and what it takes.

    Attributes:
        pass_, target, head_width: the case: bfloat16, no options, packed sequences of unequal lengths.
        descriptors: whether the copy engine reads the tiles.
        plain_tail: whether the tail has no pipeline.
        registers, spilled_bytes: of a thread.
        resident: programs that a multiprocessor holds.
        issued: what a warp issues, by the number of keys (of the key gradient, queries).
    """

    pass_: Pass
    target: Target
    head_width: int
    descriptors: bool
    plain_tail: bool
    registers: int
    spilled_bytes: int
    resident: int
    issued: tuple[tuple[int, Issued], ...]

    @property
    def case(self) -> Case:
        """The case."""
        return Case(self.pass_, self.target, self.head_width, "bf16")

    def columns(self) -> dict[str, object]:
        """Return the columns of the table."""
        found: dict[str, object] = {field.name: getattr(self, field.name) for field in fields(self)[:-1]}
        for keys, issued in self.issued:
            found |= {f"{name}_{keys}": value for name, value in asdict(issued).items()}
            found[f"total_{keys}"] = issued.total
        return found


def measure_way(case: Case, config: Config, keys: Iterable[int] = KEYS) -> Way:
    """Compile a case in a configuration and count what it issues."""
    compiled = compile_case(case, config)
    code, program = read(compiled, 32), read_program(nvidia_assembly(compiled))
    block = config.block_m if case.pass_ == "key_gradient" else config.block_n
    issued = tuple((each, count_issued(program, each // block, each % block > 0)) for each in keys)
    return Way(
        case.pass_, case.target, case.head_width, config.descriptors, config.plain_tail, code.registers,
        code.spilled_bytes, resident_programs(code, config.num_warps, CHIPS[case.target]), issued,
    )  # fmt: skip


def best_of(ways: Iterable[Way]) -> Way:
    """Return the way with the fewest instructions of those that spill nothing and leave as many programs resident.

    As many as the first, which is the way of long sequences; instructions are those at the first number of keys, where
    there is a tail, as nearly always where tokens are masked or added.
    """
    first, *others = ways
    fit = [way for way in others if way.spilled_bytes == 0 and way.resident >= first.resident]
    return min([first, *fit], key=lambda way: way.issued[0][1].total)


def all_ways(case: Case) -> Iterator[Config]:
    """Yield the configuration of long sequences, then the other ways to read the same tile."""
    long = shipped_config(case)
    yield long
    for descriptors in (True, False):
        for plain_tail in (False, True):
            if (descriptors, plain_tail) != (long.descriptors, long.plain_tail):
                yield replace(long, descriptors=descriptors, plain_tail=plain_tail)


def cases() -> Iterator[Case]:
    """Yield the cases of the table."""
    for target in TARGETS:
        for pass_ in KERNELS:
            for width in WIDTHS:
                yield Case(pass_, target, width, "bf16")


def table_path() -> Path:
    """Return the path of the committed table for the installed triton."""
    return Path(__file__).parents[1] / "results" / f"aot_short_{triton.__version__}.csv"


def read_ways(path: Path) -> dict[Case, list[Way]]:
    """Return the rows of a table by their case, the way of long sequences first."""
    ways: dict[Case, list[Way]] = {}
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            of_keys = [int(name.removeprefix("total_")) for name in row if name.startswith("total_")]
            issued = tuple(
                (keys, Issued(*(int(row[f"{field.name}_{keys}"]) for field in fields(Issued)))) for keys in of_keys
            )
            numbers = (int(row[name]) for name in ("registers", "spilled_bytes", "resident"))
            flags = (row[name] == "True" for name in ("descriptors", "plain_tail"))
            case = Case(cast("Pass", row["pass_"]), cast("Target", row["target"]), int(row["head_width"]), "bf16")
            ways.setdefault(case, []).append(Way(case.pass_, case.target, case.head_width, *flags, *numbers, issued))
    return ways


def main(arguments: list[str] | None = None) -> None:
    """Write the table, and print each case's best way."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keys", default="", help="numbers of keys, separated by commas; then nothing is written")
    parser.add_argument("--only", default="", help="words that a case must have, separated by commas; then likewise")
    given = parser.parse_args(arguments)
    keys = tuple(int(each) for each in given.keys.split(",")) if given.keys else KEYS
    words = {word for word in given.only.split(",") if word}
    rows: list[Way] = []
    for case in cases():
        if not words <= {*case.key}:
            continue
        ways = [measure_way(case, config, keys) for config in all_ways(case)]
        rows += ways
        best = best_of(ways)
        for way in ways:
            totals = ", ".join(f"{issued.total} at {each}" for each, issued in way.issued)
            print(
                f"{'*' if way is best else ' '} {case.pass_} {case.target} {case.head_width}: "
                f"{'descriptors' if way.descriptors else 'pointers'}{', plain tail' * way.plain_tail}: {totals}; "
                f"{way.registers} registers, {way.spilled_bytes} bytes spilled, {way.resident} resident",
                flush=True,
            )
    if not (given.keys or words):
        with table_path().open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0].columns()), lineterminator="\n")
            writer.writeheader()
            writer.writerows(row.columns() for row in rows)


if __name__ == "__main__":
    main()
