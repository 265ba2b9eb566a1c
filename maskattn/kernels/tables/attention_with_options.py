"""Tile sizes of kernels with two-dimensional ALiBi or dropout, by target, pass and padded head width.

Random words and distances take registers that the tiles of ``attention.py`` need. Each row is, as there, the first of a
list of candidates that spills nothing, here with all options and a gather.
"""

from __future__ import annotations

from maskattn.kernels.tables.attention import INTERPRETER
from maskattn.kernels.tables.config import Family, read_exceptions, read_table

__all__ = ["ATTENTION_WITH_OPTIONS", "TABLE_WITH_OPTIONS"]

TABLE_WITH_OPTIONS = read_table("""
target  precision  pass            64              128             256
sm80    half       forward         128x32/8/3+s    128x16/8/3+s    64x16/8/2
sm80    half       query_gradient  128x32/8/2+s    128x16/8/2+s    64x16/8/2+s
sm80    half       key_gradient    16x64/8/2+s     16x64/8/1+s     16x32/8/2
sm80    single     forward         32x16/8/1+s     16x16/8/1+s     16x16/4/1
sm80    single     query_gradient  32x32/8/1+s     16x16/8/1+s     32x16/16/1+s
sm80    single     key_gradient    16x32/8/1+s     16x32/16/1+s    16x32/16/1+s
sm86    half       forward         128x32/8/3+s    128x16/8/3+s    64x16/8/2
sm86    half       query_gradient  128x32/8/2+s    128x16/8/1+s    64x16/8/1
sm86    half       key_gradient    16x64/8/2+s     16x64/8/2       16x16/8/1
sm86    single     forward         32x16/8/1+s     16x16/8/1+s     16x16/4/1
sm86    single     query_gradient  32x16/8/1+s     16x16/4/1+s     32x16/16/1
sm86    single     key_gradient    16x32/8/1+s     16x16/4/1+s     16x32/16/1+s
sm90    half       forward         128x64/8/3+s+d  128x32/8/3+s+d  64x32/8/2+s+d
sm90    half       query_gradient  128x64/8/3+s+d  128x32/8/3+s+d  128x16/8/2+s+d
sm90    half       key_gradient    32x128/8/3+s+d  16x128/8/2+s+d  32x32/8/2+d
sm90    single     forward         64x16/8/1+s     32x16/8/1+s     32x16/16/1
sm90    single     query_gradient  64x32/8/1+s     32x16/16/1+s    32x16/16/1
sm90    single     key_gradient    16x32/8/1+s     16x16/8/1+s     16x16/8/1
sm100   half       forward         128x32/8/3+d    128x32/8/3+d    128x16/8/2+s+d
sm100   half       query_gradient  128x32/8/2+s+d  128x32/8/2+s+d  64x16/8/1+s+d
sm100   half       key_gradient    32x128/8/2+d    32x128/8/2+s+d  16x64/8/1+s+d
sm100   single     forward         64x16/8/1+s     32x16/8/1+s     32x16/8/1+s
sm100   single     query_gradient  64x32/8/1+s     32x16/8/1+s     32x16/16/1+s
sm100   single     key_gradient    16x32/8/1+s     16x32/8/1+s     16x16/8/1+s
gfx942  half       forward         128x32/8/2      128x16/8/1      64x16/8/2+s
gfx942  half       query_gradient  128x16/8/1      64x16/8/2+s     64x16/8/1+s
gfx942  half       key_gradient    16x128/8/1      16x64/8/2+s     16x32/8/2
gfx942  single     forward         64x32/8/1+s     64x16/8/1+s     32x16/8/1+s
gfx942  single     query_gradient  64x16/8/1+s     32x16/8/1+s     16x16/4/1+s
gfx942  single     key_gradient    16x64/8/1+s     16x32/8/1+s     16x16/4/1+s
""")

# By head width, where the configuration of its padded width spills.
EXCEPTIONS = read_exceptions("""
target  precision  pass            head_widths  tile
sm80    half       key_gradient    88,96        16x64/8/1
sm80    single     forward         136-256      16x16/4/1+r
sm80    single     query_gradient  48           32x32/8/1+s+r
sm86    half       query_gradient  40-56        128x16/8/2+s
sm86    single     forward         16           32x16/8/1+s+r
sm86    single     forward         112          16x16/8/1+s+r
sm120   half       forward         40           128x32/8/3
sm120   half       query_gradient  112,256      32x32/4/2
sm120   half       key_gradient    40           16x64/4/1+s
sm120   half       key_gradient    136-248      16x16/4/2
sm120   single     forward         72-128       16x16/4/1+s
sm120   single     query_gradient  40           32x16/8/1+s+r
sm120   single     key_gradient    136-192      16x16/8/1+s+r
sm120   single     key_gradient    200-256      32x16/8/1+r
sm90    half       query_gradient  40,56        128x32/8/3+s+d
sm90    single     forward         24-48        32x16/8/1+s
sm90    single     forward         104-120      32x16/16/1+s
sm90    single     query_gradient  24,32        64x32/8/1+s+r
sm90    single     query_gradient  96           16x16/8/1+s
sm90    single     key_gradient    48           16x32/8/1+s+r
sm90    single     key_gradient    104,120      16x16/8/1+s+r
sm100   single     forward         168,184      16x16/4/1+s
sm100   single     key_gradient    104,120      16x16/4/1+s
sm100   single     key_gradient    168,184      16x16/8/1+s+r
""")

ATTENTION_WITH_OPTIONS = Family(TABLE_WITH_OPTIONS, INTERPRETER, narrowest=64, exceptions=EXCEPTIONS)
