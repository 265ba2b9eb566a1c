"""The chips that every kernel is compiled for."""

from __future__ import annotations

from triton.backends.compiler import GPUTarget

from maskattn.kernels.tables.config import Target

# Chips that are launched with another's tiles: compute capability 12.0 with those of 8.6.
SIBLINGS: dict[str, tuple[Target, GPUTarget]] = {
    "sm120": ("sm86", GPUTarget("cuda", 120, 32)),
    "gfx90a": ("gfx942", GPUTarget("hip", "gfx90a", 64)),
    "gfx950": ("gfx942", GPUTarget("hip", "gfx950", 64)),
}

GPU_TARGETS: dict[Target, GPUTarget] = {
    "sm80": GPUTarget("cuda", 80, 32),
    "sm86": GPUTarget("cuda", 86, 32),
    "sm90": GPUTarget("cuda", 90, 32),
    "sm100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
