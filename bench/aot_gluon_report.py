"""Compile the Hopper kernel in Gluon without a GPU; write down what its machine code costs beside the Triton kernel's.

    python bench/aot_gluon_report.py           writes bench/results/aot_gluon_<triton version>.csv and .md (minutes)

Columns are those of ``aot_report.py``. ``tests/kernels_aot/test_gluon_gate.py`` compiles a part of these cases and
fails where one got worse than its row.
"""

from __future__ import annotations

from aot.gluon_report import write_gluon_table

if __name__ == "__main__":
    write_gluon_table()
