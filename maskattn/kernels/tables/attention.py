"""Tile sizes of every kernel, by target, pass and padded head width.

Nothing here is measured yet. The rows started from what is published for the fastest kernels on an H100 and were then
chosen with triton 3.7.1 by compiling for each target: the first of a list of candidates that, with and without a key
bias and a gather, spills no register and fits in the chip's shared and tensor memory. Two chunks and descriptors are
used where the bounds of ``bench/aot`` then allow more. ``python -m bench.aot.report`` writes what each of them costs.
"""

from __future__ import annotations

from maskattn.kernels.tables.config import Config, Family, Pass, Table

__all__ = ["ATTENTION", "INTERPRETER", "TABLE"]

TABLE: Table[Pass, Config] = {
    ("sm80", "half"): {
        "forward": {
            16: Config(128, 64, 4, 3),
            32: Config(128, 64, 4, 3),
            64: Config(128, 64, 8, 3, split=True),
            128: Config(128, 32, 8, 3, split=True),
            256: Config(64, 64, 8, 2),
        },
        "query_gradient": {
            16: Config(64, 64, 4, 3),
            32: Config(64, 64, 4, 3),
            64: Config(128, 32, 8, 2, split=True),
            128: Config(128, 32, 8, 2, split=True),
            256: Config(64, 32, 8, 2, split=True),
        },
        "key_gradient": {
            16: Config(64, 128, 8, 2),
            32: Config(64, 128, 8, 2),
            64: Config(32, 64, 4, 2, split=True),
            128: Config(64, 64, 8, 2),
            256: Config(32, 32, 8, 1),
        },
    },
    ("sm80", "single"): {
        "forward": {
            16: Config(32, 32, 4, 1),
            32: Config(64, 32, 4, 1),
            64: Config(32, 32, 4, 1, split=True),
            128: Config(32, 16, 4, 1, split=True),
            256: Config(64, 16, 8, 1),
        },
        "query_gradient": {
            16: Config(64, 32, 8, 1),
            32: Config(32, 32, 4, 1),
            64: Config(32, 32, 4, 1, split=True),
            128: Config(16, 32, 4, 1, split=True),
            256: Config(32, 32, 16, 1),
        },
        "key_gradient": {
            16: Config(32, 64, 8, 1),
            32: Config(32, 64, 8, 1),
            64: Config(32, 32, 8, 1, split=True),
            128: Config(16, 32, 8, 1, split=True),
            256: Config(32, 32, 16, 1, split=True),
        },
    },
    ("sm86", "half"): {
        "forward": {
            16: Config(128, 64, 4, 3),
            32: Config(128, 64, 4, 3),
            64: Config(128, 64, 8, 3, split=True),
            128: Config(128, 32, 8, 3, split=True),
            256: Config(64, 32, 8, 2),
        },
        "query_gradient": {
            16: Config(64, 64, 4, 3),
            32: Config(64, 64, 4, 3),
            64: Config(128, 64, 8, 2, split=True),
            128: Config(128, 32, 8, 2, split=True),
            256: Config(64, 32, 8, 1),
        },
        "key_gradient": {
            16: Config(64, 128, 8, 2),
            32: Config(64, 128, 8, 2),
            64: Config(32, 64, 4, 2, split=True),
            128: Config(64, 64, 8, 2),
            256: Config(32, 32, 8, 1),
        },
    },
    ("sm86", "single"): {
        "forward": {
            16: Config(32, 32, 4, 1),
            32: Config(64, 32, 4, 1),
            64: Config(64, 32, 8, 1, split=True),
            128: Config(32, 16, 8, 1, split=True),
            256: Config(32, 16, 8, 1, split=True),
        },
        "query_gradient": {
            16: Config(64, 32, 8, 1),
            32: Config(32, 32, 4, 1),
            64: Config(32, 32, 4, 1, split=True),
            128: Config(16, 32, 8, 1, split=True),
            256: Config(32, 16, 8, 1),
        },
        "key_gradient": {
            16: Config(32, 64, 8, 1),
            32: Config(32, 64, 8, 1),
            64: Config(32, 32, 8, 1, split=True),
            128: Config(16, 16, 4, 1, split=True),
            256: Config(16, 32, 8, 1, split=True),
        },
    },
    ("sm90", "half"): {
        "forward": {
            16: Config(128, 64, 4, 3),
            32: Config(128, 64, 4, 3, descriptors=True),
            64: Config(128, 64, 4, 3, split=True, descriptors=True),
            128: Config(128, 64, 8, 3, split=True, descriptors=True),
            256: Config(64, 64, 8, 2, split=True, descriptors=True),
        },
        "query_gradient": {
            16: Config(128, 64, 8, 3),
            32: Config(128, 64, 8, 3, descriptors=True),
            64: Config(128, 64, 8, 3, split=True, descriptors=True),
            128: Config(128, 64, 8, 3, split=True, descriptors=True),
            256: Config(128, 32, 8, 2, split=True),
        },
        "key_gradient": {
            16: Config(64, 128, 8, 3),
            32: Config(64, 128, 8, 3, descriptors=True),
            64: Config(64, 128, 8, 3, split=True, descriptors=True),
            128: Config(64, 128, 8, 2, split=True, descriptors=True),
            256: Config(32, 32, 8, 2, descriptors=True),
        },
    },
    ("sm90", "single"): {
        "forward": {
            16: Config(64, 32, 4, 1),
            32: Config(64, 32, 4, 1),
            64: Config(64, 32, 8, 1, split=True),
            128: Config(32, 16, 8, 1, split=True),
            256: Config(32, 16, 8, 1),
        },
        "query_gradient": {
            16: Config(64, 32, 8, 1),
            32: Config(32, 32, 4, 1),
            64: Config(64, 32, 8, 1, split=True),
            128: Config(32, 32, 8, 1, split=True),
            256: Config(32, 32, 16, 1),
        },
        "key_gradient": {
            16: Config(32, 64, 8, 1),
            32: Config(32, 64, 8, 1),
            64: Config(32, 32, 8, 1, split=True),
            128: Config(16, 32, 8, 1, split=True),
            256: Config(16, 16, 8, 1),
        },
    },
    ("sm100", "half"): {
        "forward": {
            16: Config(128, 64, 8, 3),
            32: Config(128, 64, 8, 3),
            64: Config(128, 32, 4, 3, descriptors=True),
            128: Config(128, 64, 8, 3, descriptors=True),
            256: Config(128, 32, 8, 2, split=True),
        },
        "query_gradient": {
            16: Config(128, 64, 4, 2),
            32: Config(128, 64, 8, 2, descriptors=True),
            64: Config(128, 64, 4, 2, split=True, descriptors=True),
            128: Config(128, 64, 8, 2, split=True),
            256: Config(128, 32, 8, 1, split=True),
        },
        "key_gradient": {
            16: Config(64, 128, 8, 2),
            32: Config(64, 128, 8, 2, descriptors=True),
            64: Config(64, 128, 8, 2, descriptors=True),
            128: Config(64, 128, 8, 2, split=True, descriptors=True),
            256: Config(32, 64, 8, 1, split=True),
        },
    },
    ("sm100", "single"): {
        "forward": {
            16: Config(64, 32, 4, 1),
            32: Config(64, 32, 4, 1),
            64: Config(64, 32, 8, 1, split=True),
            128: Config(32, 16, 8, 1, split=True),
            256: Config(32, 16, 8, 1, split=True),
        },
        "query_gradient": {
            16: Config(64, 32, 8, 1),
            32: Config(64, 32, 8, 1),
            64: Config(64, 32, 8, 1, split=True),
            128: Config(32, 32, 8, 1, split=True),
            256: Config(32, 32, 16, 1, split=True),
        },
        "key_gradient": {
            16: Config(32, 64, 8, 1),
            32: Config(32, 64, 8, 1),
            64: Config(16, 32, 4, 1, split=True),
            128: Config(16, 32, 4, 1, split=True),
            256: Config(16, 16, 8, 1, split=True),
        },
    },
    ("gfx942", "half"): {
        "forward": {
            16: Config(128, 64, 4, 1),
            32: Config(128, 64, 4, 1),
            64: Config(128, 64, 4, 1),
            128: Config(128, 64, 4, 1),
            256: Config(64, 32, 4, 1, split=True),
        },
        "query_gradient": {
            16: Config(128, 64, 4, 1),
            32: Config(128, 64, 4, 1),
            64: Config(128, 64, 4, 1),
            128: Config(64, 64, 4, 1, split=True),
            256: Config(64, 32, 4, 1, split=True),
        },
        "key_gradient": {
            16: Config(64, 128, 4, 1),
            32: Config(64, 128, 4, 1),
            64: Config(32, 128, 4, 1),
            128: Config(32, 64, 4, 1, split=True),
            256: Config(16, 64, 8, 1),
        },
    },
    ("gfx942", "single"): {
        "forward": {
            16: Config(64, 32, 4, 1),
            32: Config(64, 32, 4, 1),
            64: Config(64, 32, 4, 1, split=True),
            128: Config(64, 32, 4, 1, split=True),
            256: Config(64, 16, 4, 1, split=True),
        },
        "query_gradient": {
            16: Config(64, 32, 4, 1),
            32: Config(64, 32, 4, 1),
            64: Config(64, 32, 4, 1, split=True),
            128: Config(32, 32, 4, 1, split=True),
            256: Config(16, 16, 4, 1, split=True),
        },
        "key_gradient": {
            16: Config(32, 64, 4, 1),
            32: Config(32, 64, 4, 1),
            64: Config(32, 64, 4, 1, split=True),
            128: Config(16, 32, 4, 1, split=True),
            256: Config(16, 16, 4, 1, split=True),
        },
    },
}

# Few and large tiles: the interpreter pays for every operation, not for its size.
INTERPRETER: dict[Pass, Config] = {
    "forward": Config(64, 32, 4, 1),
    "query_gradient": Config(64, 32, 4, 1),
    "key_gradient": Config(32, 64, 4, 1),
}

ATTENTION = Family(TABLE, INTERPRETER)
