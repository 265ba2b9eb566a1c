"""The chips that every kernel is compiled for."""

from __future__ import annotations

from triton.backends.compiler import GPUTarget

from maskattn.kernels.tables.config import Target

# Compute capability 12.0 is launched with the tiles of 8.6, and has limits of its own.
SM120 = GPUTarget("cuda", 120, 32)

GPU_TARGETS: dict[Target, GPUTarget] = {
    "sm80": GPUTarget("cuda", 80, 32),
    "sm86": GPUTarget("cuda", 86, 32),
    "sm90": GPUTarget("cuda", 90, 32),
    "sm100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
