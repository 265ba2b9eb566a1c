"""Tile sizes of kernels with two-dimensional ALiBi or dropout, by target, pass and padded head width.

Random words and distances take registers that the tiles of ``attention.py`` need. Chosen as those were: the first of
a list of candidates that spills nothing with all options and a gather.
"""

from __future__ import annotations

from maskattn.kernels.tables.attention import INTERPRETER
from maskattn.kernels.tables.config import Config, Family, Pass, Table

__all__ = ["ATTENTION_WITH_OPTIONS", "TABLE_WITH_OPTIONS"]

TABLE_WITH_OPTIONS: Table[Pass, Config] = {
    ("sm80", "half"): {
        "forward": {
            64: Config(128, 32, 8, 3, split=True),
            128: Config(128, 16, 8, 3, split=True),
            256: Config(64, 16, 8, 2),
        },
        "query_gradient": {
            64: Config(128, 32, 8, 2, split=True),
            128: Config(128, 16, 8, 2, split=True),
            256: Config(64, 16, 8, 2, split=True),
        },
        "key_gradient": {
            64: Config(16, 64, 8, 2, split=True),
            128: Config(16, 64, 8, 2, split=True),
            256: Config(16, 32, 8, 1),
        },
    },
    ("sm80", "single"): {
        "forward": {
            64: Config(32, 16, 8, 1, split=True),
            128: Config(16, 16, 8, 1, split=True),
            256: Config(16, 16, 4, 1),
        },
        "query_gradient": {
            64: Config(32, 32, 8, 1, split=True),
            128: Config(16, 16, 8, 1, split=True),
            256: Config(32, 16, 16, 1, split=True),
        },
        "key_gradient": {
            64: Config(16, 32, 8, 1, split=True),
            128: Config(16, 32, 8, 1, split=True),
            256: Config(16, 32, 16, 1, split=True),
        },
    },
    ("sm86", "half"): {
        "forward": {
            64: Config(128, 32, 8, 3, split=True),
            128: Config(128, 16, 8, 3, split=True),
            256: Config(64, 16, 8, 2),
        },
        "query_gradient": {
            64: Config(128, 32, 8, 2, split=True),
            128: Config(128, 16, 8, 2, split=True),
            256: Config(64, 16, 8, 1),
        },
        "key_gradient": {
            64: Config(16, 64, 8, 2, split=True),
            128: Config(16, 64, 8, 2),
            256: Config(16, 16, 8, 1),
        },
    },
    ("sm86", "single"): {
        "forward": {
            64: Config(32, 16, 8, 1, split=True),
            128: Config(16, 16, 8, 1, split=True),
            256: Config(16, 16, 4, 1),
        },
        "query_gradient": {
            64: Config(32, 16, 8, 1, split=True),
            128: Config(16, 16, 8, 1, split=True),
            256: Config(32, 16, 16, 1),
        },
        "key_gradient": {
            64: Config(16, 32, 8, 1, split=True),
            128: Config(16, 32, 8, 1, split=True),
            256: Config(16, 32, 16, 1, split=True),
        },
    },
    ("sm90", "half"): {
        "forward": {
            64: Config(128, 64, 8, 3, split=True, descriptors=True),
            128: Config(128, 32, 8, 3, split=True, descriptors=True),
            256: Config(64, 32, 8, 2, split=True, descriptors=True),
        },
        "query_gradient": {
            64: Config(128, 64, 8, 3, split=True, descriptors=True),
            128: Config(128, 32, 8, 3, split=True, descriptors=True),
            256: Config(128, 16, 8, 2, split=True, descriptors=True),
        },
        "key_gradient": {
            64: Config(32, 128, 8, 3, split=True, descriptors=True),
            128: Config(16, 128, 8, 1, split=True, descriptors=True),
            256: Config(32, 32, 8, 2, descriptors=True),
        },
    },
    ("sm90", "single"): {
        "forward": {
            64: Config(64, 16, 8, 1, split=True),
            128: Config(32, 16, 8, 1, split=True),
            256: Config(32, 16, 8, 1),
        },
        "query_gradient": {
            64: Config(64, 32, 8, 1, split=True),
            128: Config(32, 16, 8, 1, split=True),
            256: Config(32, 16, 16, 1),
        },
        "key_gradient": {
            64: Config(16, 32, 8, 1, split=True),
            128: Config(16, 16, 8, 1, split=True),
            256: Config(16, 16, 8, 1),
        },
    },
    ("sm100", "half"): {
        "forward": {
            64: Config(128, 32, 8, 3, descriptors=True),
            128: Config(128, 32, 8, 3, descriptors=True),
            256: Config(128, 16, 8, 2, split=True, descriptors=True),
        },
        "query_gradient": {
            64: Config(128, 32, 8, 2, split=True, descriptors=True),
            128: Config(128, 32, 8, 2, split=True, descriptors=True),
            256: Config(64, 16, 8, 1, split=True, descriptors=True),
        },
        "key_gradient": {
            64: Config(32, 128, 8, 2, descriptors=True),
            128: Config(32, 128, 8, 2, split=True, descriptors=True),
            256: Config(16, 64, 8, 1, split=True, descriptors=True),
        },
    },
    ("sm100", "single"): {
        "forward": {
            64: Config(64, 16, 8, 1, split=True),
            128: Config(32, 16, 8, 1, split=True),
            256: Config(32, 16, 8, 1, split=True),
        },
        "query_gradient": {
            64: Config(64, 32, 8, 1, split=True),
            128: Config(32, 16, 8, 1, split=True),
            256: Config(32, 16, 16, 1, split=True),
        },
        "key_gradient": {
            64: Config(16, 32, 8, 1, split=True),
            128: Config(16, 32, 8, 1, split=True),
            256: Config(16, 16, 8, 1, split=True),
        },
    },
    ("gfx942", "half"): {
        "forward": {
            64: Config(128, 32, 8, 1),
            128: Config(128, 16, 8, 1),
            256: Config(64, 16, 8, 1, split=True),
        },
        "query_gradient": {
            64: Config(128, 16, 8, 1),
            128: Config(64, 16, 8, 1, split=True),
            256: Config(64, 16, 8, 1, split=True),
        },
        "key_gradient": {
            64: Config(16, 128, 8, 1),
            128: Config(16, 64, 8, 1, split=True),
            256: Config(16, 32, 8, 1),
        },
    },
    ("gfx942", "single"): {
        "forward": {
            64: Config(64, 32, 8, 1, split=True),
            128: Config(64, 16, 8, 1, split=True),
            256: Config(32, 16, 8, 1, split=True),
        },
        "query_gradient": {
            64: Config(64, 16, 8, 1, split=True),
            128: Config(32, 16, 8, 1, split=True),
            256: Config(16, 16, 4, 1, split=True),
        },
        "key_gradient": {
            64: Config(16, 64, 8, 1, split=True),
            128: Config(16, 32, 8, 1, split=True),
            256: Config(16, 16, 4, 1, split=True),
        },
    },
}

ATTENTION_WITH_OPTIONS = Family(TABLE_WITH_OPTIONS, INTERPRETER, narrowest=64)
