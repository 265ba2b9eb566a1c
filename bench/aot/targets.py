"""The chips that every kernel is compiled for."""

from __future__ import annotations

from triton.backends.compiler import GPUTarget

from maskattn.kernels.tables.config import Target

__all__ = ["ALL_TARGETS", "GPU_TARGETS"]

# Chips with tables of their own.
GPU_TARGETS: dict[Target, GPUTarget] = {
    "sm80": GPUTarget("cuda", 80, 32),
    "sm86": GPUTarget("cuda", 86, 32),
    "sm90": GPUTarget("cuda", 90, 32),
    "sm100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}

# And those that are launched with another's tiles, with exceptions (``maskattn.kernels.tables.config.LIKE``).
ALL_TARGETS: dict[Target, GPUTarget] = {
    **GPU_TARGETS,
    "sm120": GPUTarget("cuda", 120, 32),
    "gfx90a": GPUTarget("hip", "gfx90a", 64),
    "gfx950": GPUTarget("hip", "gfx950", 64),
}
