"""Right arguments of the extension's function for pictures, which ``fuzz_arguments.py`` spoils."""

from __future__ import annotations

from random import Random
from typing import Any

import numpy as np

SIZES = (0, 1, 2, 3, 7)


def numbers_below(rng: Random, most: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(rng.getrandbits(32)).integers(0, most, shape)


def overlay(rng: Random) -> dict[str, Any]:
    height, width = rng.choice(SIZES), rng.choice((0, 1, 30))
    tokens, colours = rng.choice(SIZES[1:]), rng.choice(SIZES)
    return {
        "picture": numbers_below(rng, 256, height, width, 3).astype(np.uint8),
        "grey": numbers_below(rng, 256, height, width).astype(np.uint8),
        "token": numbers_below(rng, tokens, height, width).astype(np.int32),
        "colour": (numbers_below(rng, colours + 1, tokens) - 1).astype(np.int32),
        "mixtures": numbers_below(rng, 256, colours, 256, 3).astype(np.uint8),
        "result": np.empty((height, width, 3), np.uint8),
    }
