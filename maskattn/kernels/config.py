"""What a configuration of a kernel is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["Config", "Pass", "Precision", "Table", "Target"]

Pass = Literal["forward", "query_gradient", "key_gradient"]
Target = Literal["sm80", "sm86", "sm90", "sm100", "gfx942", "interpreter"]
Precision = Literal["half", "single"]


@dataclass(frozen=True)
class Config:
    """Queries and keys of a tile, warps of a program, stages of the software pipeline.

    ``split``: a head width between two powers of two is taken in two parts instead of being padded to the next.
    ``descriptors``: the copy engine reads the tiles that pass by, where the tensors allow it.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    split: bool = False
    descriptors: bool = False


# pass -> padded head width -> configuration
Table = dict[Pass, dict[int, Config]]
