"""What a configuration of a kernel is, for each family of kernels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, Literal, TypeVar

__all__ = ["Config", "Family", "Pass", "Precision", "ReadoutConfig", "ReadoutPass", "Rows", "Table", "Target"]

Pass = Literal["forward", "query_gradient", "key_gradient"]
ReadoutPass = Literal["readout", "readout_gradient", "relevance"]
Target = Literal["sm80", "sm86", "sm90", "sm100", "gfx942", "interpreter"]
Precision = Literal["half", "single"]


@dataclass(frozen=True)
class Config:
    """Queries and keys of a tile, warps of a program, stages of the software pipeline.

    ``split``: a head width between two powers of two is taken in two chunks instead of being padded to the next.
    ``descriptors``: the copy engine reads the tiles that pass by, where the tensors allow it.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    split: bool = False
    descriptors: bool = False


@dataclass(frozen=True)
class ReadoutConfig:
    """Keys of a tile, warps of a program, stages of the software pipeline, programs that fit on a multiprocessor."""

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
    """A family of kernels: its table, what the interpreter gets, and the narrowest head width with a row."""

    table: Table[PassT, ConfigT]
    interpreter: dict[PassT, ConfigT]
    narrowest: int = 16
