"""The fields of a kernel's configuration, for each family of kernels."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any, Generic, Literal, TypeVar

__all__ = [
    "LIKE",
    "Config",
    "Family",
    "Pass",
    "Precision",
    "ReadoutConfig",
    "ReadoutPass",
    "Rows",
    "Table",
    "Target",
    "read_exceptions",
    "read_table",
]

Pass = Literal["forward", "query_gradient", "key_gradient"]
ReadoutPass = Literal["readout", "readout_gradient", "relevance"]
Target = Literal["sm80", "sm86", "sm90", "sm100", "sm120", "gfx90a", "gfx942", "gfx950", "interpreter"]
Precision = Literal["half", "single"]

# Targets that have the tiles of another except where a table has rows of their own.
LIKE: dict[Target, Target] = {"sm120": "sm86", "gfx90a": "gfx942", "gfx950": "gfx942"}


@dataclass(frozen=True)
class Config:
    """The configuration of an attention kernel.

    Attributes:
        block_m, block_n: queries and keys of a tile.
        num_warps: warps of a program.
        num_stages: stages of the software pipeline.
        split: whether a head width between two powers of two is split into two chunks instead of padded.
        descriptors: whether the copy engine reads the streamed tiles, if the tensors allow it.
        plain_tail: whether the last tile of a sequence, if it is not full, has no pipeline. It is a loop of its own, in
            which a pipeline costs instructions before the first product and has nothing to overlap.
        precision: how float32 tiles are multiplied, the ``input_precision`` of ``tl.dot``.
        all_registers: whether the assembler is told that a program may have a multiprocessor's registers to itself,
            where it would rather spill some than have fewer programs resident.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    split: bool = False
    descriptors: bool = False
    plain_tail: bool = False
    precision: str = "ieee"
    all_registers: bool = False

    @property
    def max_registers(self) -> int | None:
        """The most registers that the assembler may give a thread; None if it decides."""
        return min(255, 2**16 // (32 * self.num_warps)) if self.all_registers else None


@dataclass(frozen=True)
class ReadoutConfig:
    """The configuration of a readout kernel.

    Attributes:
        block_n: keys of a tile.
        num_warps: warps of a program.
        num_stages: stages of the software pipeline.
        programs: programs that fit on a multiprocessor.
    """

    block_n: int
    num_warps: int
    num_stages: int
    programs: int


PassT = TypeVar("PassT")
ConfigT = TypeVar("ConfigT")
# Pass -> padded head width -> configuration.
Rows = dict[PassT, dict[int, ConfigT]]
Table = dict[tuple[Target, Precision], Rows[PassT, ConfigT]]


@dataclass(frozen=True)
class Family(Generic[PassT, ConfigT]):
    """A family of kernels.

    Attributes:
        table: the configurations by padded head width.
        interpreter: the interpreter's configurations.
        narrowest: the narrowest padded head width in the table.
        exceptions: configurations of single head widths, with whose strides the table's configuration spills registers.
        short: configurations for short sequences, where they differ, by head width or by padded head width.
    """

    table: Table[PassT, ConfigT]
    interpreter: dict[PassT, ConfigT]
    narrowest: int = 16
    exceptions: Table[PassT, ConfigT] = field(default_factory=dict)
    short: Table[PassT, ConfigT] = field(default_factory=dict)

    def config(
        self, target: Target, precision: Precision, pass_: PassT, head_width: int, padded: int, short: bool = False
    ) -> ConfigT:
        """Return the configuration of a head width, whose next power of two is ``padded``.

        Raises:
            KeyError: the table has none.
        """
        width = max(self.narrowest, padded)
        for each in (target, LIKE[target]) if target in LIKE else (target,):
            short_ones = _of(self.short, each, precision, pass_) if short else {}
            if found := short_ones.get(head_width) or short_ones.get(width):
                return found
            if found := _of(self.exceptions, each, precision, pass_).get(head_width):
                return found
            if found := _of(self.table, each, precision, pass_).get(width):
                return found
        raise KeyError((target, precision, pass_, width))


def _of(table: Table[PassT, ConfigT], target: Target, precision: Precision, pass_: PassT) -> dict[int, ConfigT]:
    """Return the configurations of a pass, none if there is no row."""
    return table.get((target, precision), {}).get(pass_, {})


def read_table(text: str) -> Table[Pass, Config]:
    """Parse the table of attention kernels.

    Its header names the (padded) head widths. Every other line has a target, a precision, a pass and, for each width,
    queries ``x`` keys ``/`` warps ``/`` stages, followed by ``+s`` if heads are split, ``+d`` for descriptors, ``+t``
    for a plain tail and ``+r`` for all registers; or ``none``.
    """
    (_, _, _, *widths), *lines = (line.split() for line in text.strip().splitlines())
    table: dict[Any, Any] = {}
    for target, precision, pass_, *cells in lines:
        by_width = dict(zip(map(int, widths), cells, strict=True))
        configs = {width: _config(cell) for width, cell in by_width.items() if cell != "none"}
        table.setdefault((target, precision), {})[pass_] = configs
    return table


def read_exceptions(text: str) -> Table[Pass, Config]:
    """Parse the configurations of single head widths.

    Each line has a target, a precision, a pass, head widths and a configuration as in ``read_table``. Head widths are
    separated by commas; ``168-192`` stands for 168, 176, 184 and 192.
    """
    table: dict[Any, Any] = {}
    for target, precision, pass_, widths, cell in (line.split() for line in text.strip().splitlines()[1:]):
        of_pass = table.setdefault((target, precision), {}).setdefault(pass_, {})
        for each in widths.split(","):
            first, _, last = each.partition("-")
            of_pass |= dict.fromkeys(range(int(first), int(last or first) + 1, 8), _config(cell))
    return table


def _config(cell: str) -> Config:
    sizes, *flags = cell.split("+")
    block_m, block_n, warps, stages = map(int, re.split("[x/]", sizes))
    return Config(
        block_m, block_n, warps, stages, split="s" in flags, descriptors="d" in flags, plain_tail="t" in flags,
        all_registers="r" in flags,
    )  # fmt: skip
