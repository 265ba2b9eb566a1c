"""Tiles of the attention kernels for float32 as three products of TensorFloat-32 on tensor cores.

Each operand takes twice the registers. There are rows only where a tile of at least 16 by 32 scores spills nothing at
any head width that it serves, with and without a key bias and a gather, and none for ALiBi and dropout; elsewhere
float32 products have IEEE precision. No row has been measured on a GPU; they were chosen with triton 3.7.1 as in
``attention.py``.
"""

from __future__ import annotations

from dataclasses import replace

from maskattn.kernels.tables.config import LIKE, Config, Pass, Target, read_table

__all__ = ["TF32X3", "tf32x3_config"]

_TABLE = read_table("""
target  precision  pass            16          32          64
sm80    single     forward         128x64/8/2  128x32/8/2  64x16/8/1+s
sm80    single     query_gradient  128x32/8/2  64x32/8/2   none
sm80    single     key_gradient    32x64/8/2   32x64/8/2   none
sm86    single     forward         128x64/8/2  128x32/8/2  none
sm86    single     query_gradient  128x32/8/2  none        none
sm86    single     key_gradient    32x64/8/2   none        none
sm90    single     forward         128x64/8/2  128x64/8/2  128x32/8/2+s
sm90    single     query_gradient  128x32/8/2  128x32/8/2  128x32/8/2+s
sm90    single     key_gradient    32x128/8/2  32x128/8/2  16x128/8/2+s
""")

TF32X3: dict[tuple[Target, Pass, int], Config] = {
    (target, pass_, width): replace(config, precision="tf32x3")
    for (target, _), rows in _TABLE.items()
    for pass_, of_pass in rows.items()
    for width, config in of_pass.items()
}


def tf32x3_config(pass_: Pass, target: Target, padded_width: int) -> Config | None:
    """Return the configuration of a pass; None where float32 products have IEEE precision."""
    return TF32X3.get((LIKE.get(target, target), pass_, padded_width))
