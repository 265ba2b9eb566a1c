"""Tiles of the readout's kernels, by target, padded head width, dtype and pass.

No row has been measured on a GPU. The passes are bound by memory, so that a tile only needs to be large enough for the
loads in flight to cover the memory's latency: 8 KiB of K and of V, less where a tile would spill registers with all
options and several queries (triton 3.7.1, compiled ahead of time; ``bench/aot/readout_cases.py`` has the cases).
"""

from __future__ import annotations

from typing import get_args

from maskattn.kernels.tables.config import Family, ReadoutConfig, ReadoutPass, Rows, Table

__all__ = ["READOUT", "READOUT_TABLE"]

_WIDTHS = (16, 32, 64, 128, 256)


def _by_width(*configs: tuple[int, int, int, int]) -> dict[int, ReadoutConfig]:
    """Return the configurations by padded head width: keys of a tile, warps, stages, programs on a multiprocessor."""
    return {width: ReadoutConfig(*config) for width, config in zip(_WIDTHS, configs, strict=True)}


NVIDIA_HALF: Rows[ReadoutPass, ReadoutConfig] = {
    "readout": _by_width((128, 4, 2, 4), (128, 4, 2, 4), (64, 4, 2, 4), (32, 4, 2, 4), (16, 4, 2, 4)),
    "readout_gradient": _by_width((64, 8, 2, 2), (64, 8, 2, 2), (64, 8, 2, 2), (32, 8, 2, 2), (16, 8, 2, 2)),
    "relevance": _by_width((64, 8, 2, 2), (64, 8, 2, 2), (32, 8, 2, 2), (32, 8, 2, 2), (16, 8, 1, 2)),
}
NVIDIA_SINGLE: Rows[ReadoutPass, ReadoutConfig] = {
    "readout": _by_width((64, 8, 2, 2), (64, 8, 2, 2), (32, 8, 2, 2), (16, 8, 2, 2), (16, 8, 2, 2)),
    "readout_gradient": _by_width((32, 8, 2, 2), (32, 8, 1, 2), (32, 8, 2, 2), (16, 8, 2, 2), (16, 8, 1, 1)),
    "relevance": _by_width((16, 8, 1, 2), (16, 8, 1, 2), (32, 8, 1, 2), (16, 8, 1, 2), (8, 8, 1, 1)),
}
AMD_HALF: Rows[ReadoutPass, ReadoutConfig] = {
    pass_: _by_width((128, 4, 1, 4), (128, 4, 1, 4), (64, 4, 1, 4), (32, 4, 1, 4), (16, 4, 1, 4))
    for pass_ in ("readout", "readout_gradient", "relevance")
}
AMD_SINGLE: Rows[ReadoutPass, ReadoutConfig] = {
    pass_: _by_width((64, 4, 1, 4), (64, 4, 1, 4), (32, 4, 1, 4), (16, 4, 1, 4), (16, 4, 1, 4))
    for pass_ in ("readout", "readout_gradient", "relevance")
}
# Several queries with every option, or many classes, spill in the tiles above.
SM86_HALF: Rows[ReadoutPass, ReadoutConfig] = {
    **NVIDIA_HALF,
    "relevance": {**NVIDIA_HALF["relevance"], 64: ReadoutConfig(32, 8, 2, 2)},
}
SM120_HALF: Rows[ReadoutPass, ReadoutConfig] = {
    **SM86_HALF,
    "readout_gradient": {**NVIDIA_HALF["readout_gradient"], 64: ReadoutConfig(32, 8, 2, 2)},
    "relevance": {**NVIDIA_HALF["relevance"], 64: ReadoutConfig(32, 4, 2, 2)},
}
SM100_HALF: Rows[ReadoutPass, ReadoutConfig] = {
    **NVIDIA_HALF,
    "readout": {**NVIDIA_HALF["readout"], 16: ReadoutConfig(64, 4, 2, 4)},
    "relevance": {**NVIDIA_HALF["relevance"], 256: ReadoutConfig(16, 4, 1, 2)},
}
SM86_SINGLE: Rows[ReadoutPass, ReadoutConfig] = {
    **NVIDIA_SINGLE,
    "readout_gradient": {
        **NVIDIA_SINGLE["readout_gradient"],
        64: ReadoutConfig(32, 8, 1, 2),
        128: ReadoutConfig(16, 8, 1, 2),
        256: ReadoutConfig(16, 8, 2, 1),
    },
    "relevance": {**NVIDIA_SINGLE["relevance"], 64: ReadoutConfig(16, 8, 1, 2)},
}
SM90_SINGLE: Rows[ReadoutPass, ReadoutConfig] = {
    **NVIDIA_SINGLE,
    "readout_gradient": {**NVIDIA_SINGLE["readout_gradient"], 128: ReadoutConfig(16, 8, 1, 2)},
}
READOUT_TABLE: Table[ReadoutPass, ReadoutConfig] = {
    ("sm80", "half"): NVIDIA_HALF,
    ("sm86", "half"): SM86_HALF,
    ("sm90", "half"): NVIDIA_HALF,
    ("sm100", "half"): SM100_HALF,
    ("sm120", "half"): SM120_HALF,
    ("gfx942", "half"): AMD_HALF,
    ("sm80", "single"): NVIDIA_SINGLE,
    ("sm86", "single"): SM86_SINGLE,
    ("sm90", "single"): SM90_SINGLE,
    ("sm100", "single"): NVIDIA_SINGLE,
    ("sm120", "single"): NVIDIA_SINGLE,
    ("gfx942", "single"): AMD_SINGLE,
}

READOUT = Family(READOUT_TABLE, dict.fromkeys(get_args(ReadoutPass), ReadoutConfig(64, 4, 1, 4)))
