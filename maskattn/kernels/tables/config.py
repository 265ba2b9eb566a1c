"""The fields of a kernel's configuration, for each family of kernels."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any, Generic, Literal, TypeVar

__all__ = [
    "Config",
    "Family",
    "Pass",
    "Precision",
    "ReadoutConfig",
    "ReadoutPass",
    "Rows",
    "Table",
    "Target",
    "read_table",
]

Pass = Literal["forward", "query_gradient", "key_gradient"]
ReadoutPass = Literal["readout", "readout_gradient", "relevance"]
Target = Literal["sm80", "sm86", "sm90", "sm100", "gfx942", "interpreter"]
Precision = Literal["half", "single"]


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
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    split: bool = False
    descriptors: bool = False
    plain_tail: bool = False
    precision: str = "ieee"


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
    """

    table: Table[PassT, ConfigT]
    interpreter: dict[PassT, ConfigT]
    narrowest: int = 16
    exceptions: Table[PassT, ConfigT] = field(default_factory=dict)

    def config(self, target: Target, precision: Precision, pass_: PassT, head_width: int, padded: int) -> ConfigT:
        """Return the configuration of a head width, whose next power of two is ``padded``.

        Raises:
            KeyError: the table has none.
        """
        exceptions = self.exceptions.get((target, precision), {}).get(pass_, {})
        return exceptions.get(head_width) or self.table[target, precision][pass_][max(self.narrowest, padded)]


def read_table(text: str) -> Table[Pass, Config]:
    """Parse the table of attention kernels.

    Its header names the (padded) head widths. Every other line has a target, a precision, a pass and, for each width,
    queries ``x`` keys ``/`` warps ``/`` stages, followed by ``+s`` if heads are split, ``+d`` for descriptors and
    ``+t`` for a plain tail; or ``none``.
    """
    (_, _, _, *widths), *lines = (line.split() for line in text.strip().splitlines())
    table: dict[Any, Any] = {}
    for target, precision, pass_, *cells in lines:
        by_width = dict(zip(map(int, widths), cells, strict=True))
        configs = {width: _config(cell) for width, cell in by_width.items() if cell != "none"}
        table.setdefault((target, precision), {})[pass_] = configs
    return table


def _config(cell: str) -> Config:
    sizes, *flags = cell.split("+")
    block_m, block_n, warps, stages = map(int, re.split("[x/]", sizes))
    return Config(block_m, block_n, warps, stages, "s" in flags, "d" in flags, "t" in flags)
