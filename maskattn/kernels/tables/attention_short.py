"""Tile sizes of the attention kernels for short sequences, where they differ from those of ``attention.py``.

A program of few keys spends as much before and after its main loop as within. Pointers in place of descriptors shorten
the former and lengthen the latter; so does a tail without a pipeline. Each row is the way to read a tile that issues
the fewest instructions at 197 keys (``python -m bench.aot.whole_program``) of those that spill nothing and leave as
many programs resident on a multiprocessor; ``none`` is the tile of ``attention.py``. That making descriptors also takes
time, for writes to global memory and a fence, is assumed and not measured. No row has been measured on a GPU.
"""

from __future__ import annotations

from maskattn.kernels.tables.config import read_table

__all__ = ["SHORT", "SHORT_BELOW"]

# Keys, or queries of the key gradient, from which on sequences are not short. About there the longer main loop costs
# what is saved around it.
SHORT_BELOW = 512

# By head width, or by padded head width.
SHORT = read_table("""
target  precision  pass            32              64              80                128               256
sm90    half       forward         128x64/4/3      128x64/4/3+s+t  128x64/8/3+s      128x64/8/3+s+t    none
sm90    half       query_gradient  128x64/8/3+t    128x64/8/3+s    128x64/8/3+s+d+t  128x64/8/3+s+t    none
sm90    half       key_gradient    none            64x128/8/3+s+t  64x128/8/2+s+t    none              32x32/8/2+t
sm100   half       forward         128x64/8/3+t    128x32/4/3+d+t  128x64/8/3+t      128x64/8/3+t      none
sm100   half       query_gradient  128x64/8/2+t    128x64/4/2+s+t  128x64/8/2+s+t    128x64/8/2+s+d+t  none
sm100   half       key_gradient    64x128/8/2      64x128/8/2      64x128/8/2+s+t    64x128/8/2+s      none
""")
