"""Torch and this package's kernels held to an instruction set below the machine's best.

Importing this holds the kernels of this process to the one that the variable ``BENCH_HELD_TO`` names, if there is one;
torch reads its own variables when it is imported.
"""

from __future__ import annotations

import os
from functools import partial

__all__ = ["TORCH_WITH", "held_environment", "held_to"]

_VARIABLE = "BENCH_HELD_TO"

# What keeps torch from more than an instruction set has.
TORCH_WITH = {
    "avx2": {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"},
    "avx512": {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_VNNI", "MKL_ENABLE_INSTRUCTIONS": "AVX512"},
    "avx512_bf16": {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16"},
    "amx_bf16": {},
}


def held_environment(instruction_set: str) -> dict[str, str]:
    """Return the variables of a process that is held to an instruction set."""
    return {**TORCH_WITH[instruction_set], _VARIABLE: instruction_set}


def held_to() -> str:
    """Return the instruction set that this process is held to; "" if it may use all."""
    return os.environ.get(_VARIABLE, "")


def _hold(instruction_set: str) -> None:
    from maskattn import _native

    known = _native.instruction_sets()
    usable = known[known.index(instruction_set) :]
    kernels = [name for name in dir(_native) if "attention" in name or "readout" in name or "relevance" in name]
    for name in (*kernels, "LinearLayer"):
        setattr(_native, name, partial(getattr(_native, name), instruction_set=instruction_set))
    _native.instruction_sets = lambda: usable


if held_to():
    _hold(held_to())
