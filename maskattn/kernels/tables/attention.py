"""Tile sizes of every kernel, by target, pass and padded head width.

No row has been measured on a GPU. Candidates were ordered by what is published for the fastest kernels on an H100 and
compiled for each target with triton 3.7.1; each row is the first candidate that, with and without a key bias and a
gather, spills no register and fits in the chip's shared and tensor memory. Two chunks and descriptors are used where
they raise the bounds of ``bench/aot``. ``python -m bench.aot.report`` writes the cost of each row.
"""

from __future__ import annotations

from maskattn.kernels.tables.attention_short import SHORT
from maskattn.kernels.tables.config import Config, Family, Pass, read_exceptions, read_table

__all__ = ["ATTENTION", "INTERPRETER", "TABLE"]

TABLE = read_table("""
target  precision  pass            16          32            64                128               256
sm80    half       forward         128x64/4/3  128x64/4/3    128x64/8/3+s      128x32/8/3+s      64x64/8/2
sm80    half       query_gradient  64x64/4/3   64x64/4/3     128x32/8/2+s      128x32/8/2+s      64x32/8/2+s
sm80    half       key_gradient    64x128/8/2  64x128/8/2    32x64/4/2+s       64x64/8/2         32x32/8/1
sm80    single     forward         32x32/4/1   64x32/4/1     32x32/4/1+s       32x16/4/1+s       64x16/8/1
sm80    single     query_gradient  64x32/8/1   32x32/4/1     32x32/4/1+s       16x32/4/1+s       32x32/16/1
sm80    single     key_gradient    32x64/8/1   32x64/8/1     32x32/8/1+s       16x32/8/1+s       32x32/16/1+s
sm86    half       forward         128x64/4/3  128x64/4/3    128x64/8/3+s      128x32/8/3+s      64x32/8/2
sm86    half       query_gradient  64x64/4/3   64x64/4/3     128x64/8/2+s      128x32/8/2+s      64x32/8/1
sm86    half       key_gradient    64x128/8/2  64x128/8/2    32x64/4/2+s       64x64/8/2         32x32/8/1
sm86    single     forward         32x32/4/1   64x32/4/1     64x32/8/1+s       32x16/8/1+s       16x16/4/1+s
sm86    single     query_gradient  64x32/8/1   32x32/4/1     32x32/4/1+s       16x32/4/1+s+r     32x16/8/1
sm86    single     key_gradient    32x64/8/1   32x64/8/1     32x32/8/1+s       16x16/4/1+s+r     16x16/8/1+s+r
sm90    half       forward         128x64/4/3  128x64/4/3+d  128x64/4/3+s+d    128x64/8/3+s+d    64x64/8/2+s+d
sm90    half       query_gradient  128x64/8/3  128x64/8/3+d  128x64/8/3+s+d+t  128x64/8/3+s+d+t  128x32/8/2+s
sm90    half       key_gradient    64x128/8/3  64x128/8/3+d  64x128/8/3+s+d    64x128/8/2+s+d    32x32/8/2+d
sm90    single     forward         32x32/4/1   64x32/4/1     64x32/8/1+s       32x16/8/1+s       32x16/8/1
sm90    single     query_gradient  64x32/8/1   32x32/4/1     64x32/8/1+s       32x32/8/1+s       16x32/8/1
sm90    single     key_gradient    32x64/8/1   32x64/8/1     32x32/8/1+s       16x32/8/1+s       16x16/8/1
sm100   half       forward         128x64/8/3  128x64/8/3    128x32/4/3+d      128x64/8/3+d      128x32/8/2+s
sm100   half       query_gradient  128x64/4/2  128x64/8/2+d  128x64/4/2+s+d    128x64/8/2+s      128x32/8/1+s
sm100   half       key_gradient    64x128/8/2  64x128/8/2+d  64x128/8/2+d      64x128/8/2+s+d    32x64/8/2+s+r
sm100   single     forward         64x32/4/1   64x32/4/1     64x32/8/1+s       32x16/8/1+s       32x16/8/1+s
sm100   single     query_gradient  64x32/8/1   64x32/8/1     64x32/8/1+s       32x32/8/1+s       32x32/16/1+s
sm100   single     key_gradient    32x64/8/1   32x64/8/1     16x32/4/1+s       16x32/4/1+s       16x16/8/1+s
gfx942  half       forward         128x64/4/1  128x64/4/1    128x64/4/2        128x64/4/1        64x32/4/1+s
gfx942  half       query_gradient  128x64/4/1  128x64/4/1    128x64/4/1        64x64/4/1+s       64x32/4/1+s
gfx942  half       key_gradient    64x128/4/1  64x128/4/1    32x128/4/1        32x64/4/1+s       16x64/8/1
gfx942  single     forward         64x32/4/1   64x32/4/1     64x32/4/1+s       64x32/4/1+s       64x16/4/1+s
gfx942  single     query_gradient  64x32/4/1   64x32/4/1     64x32/4/1+s       32x32/4/1+s       16x16/4/1+s
gfx942  single     key_gradient    32x64/4/1   32x64/4/1     32x64/4/1+s       16x32/4/1+s       16x16/4/1+s
""")

# By head width, where the configuration of its padded width spills, or on a chip of AMD's costs a resident program.
EXCEPTIONS = read_exceptions("""
target  precision  pass            head_widths  tile
sm80    half       query_gradient  152,168-192  64x16/8/2+s
sm80    single     forward         72           16x16/4/1+s
sm80    single     forward         136-248      32x32/8/1
sm80    single     query_gradient  80           16x32/4/1+s+r
sm80    single     key_gradient    16           32x64/8/1+r
sm80    single     key_gradient    152-192      16x32/8/1+s+r
sm86    half       key_gradient    56           16x64/4/2+s
sm86    single     forward         40           64x32/8/1+s+r
sm86    single     forward         96           32x16/8/1+s+r
sm86    single     query_gradient  56,64        32x32/4/1+s+r
sm120   half       key_gradient    40,64        16x64/4/2+s
sm90    half       key_gradient    112          64x64/8/2+s+d
sm90    single     forward         24           64x32/4/1+r
sm90    single     forward         40           64x32/8/1+s+r
sm90    single     forward         88           32x16/8/1
sm100   half       query_gradient  136          128x32/8/1+s+r
sm100   single     key_gradient    88,96        16x32/8/1+s
sm100   single     key_gradient    160,192      16x16/8/1+s+r
gfx90a  half       forward         40-64        128x64/4/1
""")

# Few and large tiles: the interpreter pays for every operation, not for its size.
INTERPRETER: dict[Pass, Config] = {
    "forward": Config(64, 32, 4, 1),
    "query_gradient": Config(64, 32, 4, 1),
    "key_gradient": Config(32, 64, 4, 1),
}

ATTENTION = Family(TABLE, INTERPRETER, exceptions=EXCEPTIONS, short=SHORT)
