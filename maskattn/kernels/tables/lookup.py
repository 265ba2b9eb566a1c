"""Look-up of a kernel's configuration by pass, target, head width, dtype and options.

Dimension key: D head width.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any, get_args, overload

import torch
import triton
from torch import Tensor

from maskattn.kernels.tables.attention import ATTENTION
from maskattn.kernels.tables.attention_short import SHORT_BELOW
from maskattn.kernels.tables.attention_tf32x3 import tf32x3_config
from maskattn.kernels.tables.attention_with_options import ATTENTION_WITH_OPTIONS
from maskattn.kernels.tables.config import Config, Family, Pass, Precision, ReadoutConfig, ReadoutPass, Target
from maskattn.kernels.tables.readout import READOUT
from maskattn.options import Options
from maskattn.registration import constant_in_traces

__all__ = [
    "capability_of",
    "choose",
    "look_up",
    "padded_width",
    "split_width",
    "target_of",
]

AMD_TARGETS: tuple[Target, ...] = ("gfx90a", "gfx942", "gfx950")


def padded_width(head_width: int) -> int:
    """Return D rounded up to a power of two, as tiles need it."""
    return triton.next_power_of_2(head_width)


def split_width(head_width: int, config: Config) -> tuple[int, int]:
    """Return the widths of a tile's two chunks, powers of two; the second is 0 unless two are narrower than one."""
    padded = padded_width(head_width)
    first = padded // 2
    second = max(16, padded_width(head_width - first)) if head_width > 32 else first
    return (first, second) if config.split and first + second < padded else (padded, 0)


@overload
def look_up(
    pass_: Pass,
    target: Target,
    head_width: int,
    dtype: torch.dtype,
    alibi_or_dropout: bool = ...,
    precision: str = ...,
    short: bool = ...,
) -> Config: ...
@overload
def look_up(
    pass_: ReadoutPass,
    target: Target,
    head_width: int,
    dtype: torch.dtype,
    alibi_or_dropout: bool = ...,
    precision: str = ...,
) -> ReadoutConfig: ...
@functools.cache
def look_up(
    pass_: Any,
    target: Target,
    head_width: int,
    dtype: torch.dtype,
    alibi_or_dropout: bool = False,
    precision: str = "ieee",
    short: bool = False,
) -> Config | ReadoutConfig:
    """Return the configuration of a pass on a target.

    Args:
        pass_: the pass.
        target: the target.
        head_width: D.
        dtype: dtype of q, k and v.
        alibi_or_dropout: whether the options include slopes or dropout.
        precision: the precision of the options, used if there are tiles for it.
        short: whether the sequences that a tile loops over are short.

    Raises:
        KeyError: there is no configuration; ``supports`` of ``launch/support.py`` refuses such calls beforehand.
    """
    on_tensor_cores = precision == "tf32x3" and dtype == torch.float32 and pass_ in get_args(Pass)
    if on_tensor_cores and target == "interpreter":
        return replace(ATTENTION.interpreter[pass_], precision=precision)
    width = padded_width(head_width)
    if on_tensor_cores and not alibi_or_dropout and (found := tf32x3_config(pass_, target, width)):
        return found
    family: Family[Any, Any] = ATTENTION_WITH_OPTIONS if alibi_or_dropout else ATTENTION
    if pass_ in get_args(ReadoutPass):
        family = READOUT
    if target == "interpreter":
        return family.interpreter[pass_]
    size: Precision = "single" if dtype == torch.float32 else "half"
    return family.config(target, size, pass_, head_width, width, short)


@overload
def choose(pass_: Pass, q: Tensor, options: Options, longest: int) -> Config: ...
@overload
def choose(pass_: ReadoutPass, q: Tensor, options: Options) -> ReadoutConfig: ...
def choose(pass_: Any, q: Tensor, options: Options, longest: int = SHORT_BELOW) -> Config | ReadoutConfig:
    """Return the configuration of a pass for queries (..., D).

    Args:
        pass_: the pass.
        q: the queries.
        options: the options of the call.
        longest: an upper bound of the number of tokens that a tile loops over.
    """
    alibi_or_dropout = options.slopes is not None or options.dropout_seed is not None
    return look_up(
        pass_, target_of(q.device), q.shape[-1], q.dtype, alibi_or_dropout, options.precision, longest < SHORT_BELOW
    )


def target_of(device: torch.device) -> Target:
    """Return the target of the table for a device."""
    if triton.knobs.runtime.interpret:
        return "interpreter"
    if torch.version.hip is not None:
        return _target_of_amd(torch.cuda.get_device_properties(device).gcnArchName)
    return _target_of_capability(*capability_of(device))


@constant_in_traces
def capability_of(device: torch.device) -> tuple[int, int]:
    """Return the compute capability of a CUDA GPU, which torch looks up anew every time, in as long as a launch."""
    return _capability(torch.cuda.current_device() if device.index is None else device.index)


@functools.cache
def _capability(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


@functools.cache
def _target_of_amd(architecture: str) -> Target:
    """Return the target for a chip of AMD's, whose name may be followed by features: ``gfx90a:sramecc+``."""
    name = architecture.partition(":")[0]
    return next((target for target in AMD_TARGETS if target == name), "gfx942")


@functools.cache
def _target_of_capability(major: int, minor: int) -> Target:
    """Return the target for a CUDA GPU; the one with the least shared memory if the table does not have it."""
    targets: dict[tuple[int, int], Target] = {
        (8, 0): "sm80",
        (9, 0): "sm90",
        (10, 0): "sm100",
        (10, 3): "sm100",
        (12, 0): "sm120",
        (12, 1): "sm120",
    }
    return targets.get((major, minor), "sm86")
