"""Compile every shipped kernel configuration without a GPU and write down what the machine code costs.

    python bench/aot_report.py                 writes bench/results/aot_<triton version>.csv and .md (some minutes)

A row has the registers, spilled bytes and shared memory of a kernel, and the instructions of its main loop *per score*:
per lane and per element of the BLOCK_M × BLOCK_N tile of scores, so that tile sizes compare. For NVIDIA it
also has the clocks that each pipe of an SM needs for a tile, the TFLOP/s that these allow, and how many programs an SM
holds: ceilings, not time. ``tests/kernels_aot`` compiles a part of these cases and fails where one got worse than its
row.
"""

from __future__ import annotations

from aot.report import main

if __name__ == "__main__":
    main(__doc__)
