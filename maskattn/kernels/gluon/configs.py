"""Configurations of the Gluon kernel by head width and options; they fit and spill nothing, but were not measured.

Dimension key: D head width.
"""

from __future__ import annotations

from dataclasses import dataclass

from maskattn.kernels.tables.lookup import padded_width
from maskattn.options import Options

__all__ = ["GluonConfig", "GradientConfig", "choose", "choose_gradient"]


@dataclass(frozen=True)
class GluonConfig:
    """The configuration of a launch.

    Attributes:
        block_n: keys of a block.
        stages: blocks of keys, and of values, that shared memory holds.
        unroll: blocks that the main loop processes at a time, 1 or 2.
        consumer_registers: registers of a consumer's thread; the kernel has 168 for each thread on average.
        producer_registers: registers of the producer's thread.
    """

    block_n: int
    stages: int
    unroll: int = 1
    consumer_registers: int = 240
    producer_registers: int = 24


# Configurations by padded head width.
PLAIN = {
    16: GluonConfig(128, 4, 2),
    32: GluonConfig(128, 4, 2),
    64: GluonConfig(128, 4, 2),
    128: GluonConfig(128, 2),
    256: GluonConfig(64, 2),
}
WITH_OPTIONS = {
    16: GluonConfig(128, 4),
    32: GluonConfig(128, 4),
    64: GluonConfig(128, 4),
    128: GluonConfig(64, 4),
    256: GluonConfig(32, 4),
}


def choose(head_width: int, options: Options) -> GluonConfig:
    """Return the configuration for a head width and options."""
    has_terms = options.key_bias is not None or options.slopes is not None
    return (WITH_OPTIONS if has_terms else PLAIN)[padded_width(head_width)]


@dataclass(frozen=True)
class GradientConfig:
    """The configuration of a launch of backward in one pass.

    Attributes:
        blocks: blocks of 64 queries of a step, 1 or 2. With 2 each consumer computes dQ of one of them, with 1 it
            computes half of the columns, which must be at least 64.
        stages: blocks of queries, and of the gradients of their outputs, that shared memory holds.
        in_registers: whether a consumer holds its keys and values in registers, which spares shared memory.
        masks_all: whether all blocks are masked, which takes fewer registers than a loop of its own for partial ones.
        consumer_registers, producer_registers: as in :class:`GluonConfig`.
    """

    blocks: int
    stages: int
    in_registers: bool = False
    masks_all: bool = False
    consumer_registers: int = 240
    producer_registers: int = 24


# Configurations of backward by padded head width; wider heads have no room for the sums of dK and dV.
GRADIENT = {
    16: GradientConfig(2, 4, in_registers=True),
    32: GradientConfig(2, 4, in_registers=True),
    64: GradientConfig(2, 4, in_registers=True),
    128: GradientConfig(1, 2, masks_all=True),
}


def choose_gradient(head_width: int, options: Options) -> GradientConfig | None:
    """Return the configuration of backward in one pass; None for heads above 128 or with ALiBi, which would spill."""
    return None if options.slopes is not None else GRADIENT.get(padded_width(head_width))
