"""What a chip allows: memory of a program."""

from __future__ import annotations

from maskattn.kernels.configs import Target

# Bytes that one program may use.
SHARED_LIMITS: dict[Target, int] = {
    "sm80": 163 * 1024,
    "sm86": 99 * 1024,
    "sm90": 227 * 1024,
    "sm100": 227 * 1024,
    "gfx942": 64 * 1024,
}

# Of Blackwell's tensor memory, per SM.
TENSOR_MEMORY_COLUMNS = 512
