"""What public operations do around their work: the options of a call, autocast, and which results are returned.

Dimension key: H heads.
"""

from __future__ import annotations

import torch
from torch import Tensor

from maskattn.attention.checks import check_values
from maskattn.attention.ops import is_autocast
from maskattn.dropout import new_seed
from maskattn.options import Options, maker

__all__ = ["as_asked", "as_autocast", "options_of_call"]

_made_once = maker(Options)


def options_of_call(
    q: Tensor,
    scale: float | None,
    key_bias: Tensor | None,
    slopes: Tensor | None,
    positions: tuple[Tensor | None, Tensor | None],
    dropout_p: float,
    precision: str = "ieee",
    deterministic: bool = True,
) -> Options:
    """The options of a call: the default scale is filled in, and a seed drawn where weights are dropped."""
    if dropout_p != 0:
        check_values(dropout_p=dropout_p)
    if precision != "ieee":
        check_values(precision=precision)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    seed = new_seed(q.device) if dropout_p > 0 else None
    make = Options if torch.compiler.is_compiling() else _made_once
    return make(scale, key_bias, slopes, *positions, dropout_p, seed, precision, deterministic)


def as_autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Cast as ``torch.autocast`` casts what goes into torch's attention; float64 stays."""
    kind = tensors[0].device.type
    if not is_autocast(kind):
        return tensors
    dtype = torch.get_autocast_dtype(kind)
    narrow = (torch.float32, torch.float16, torch.bfloat16)
    return tuple(x.to(dtype) if x.dtype in narrow else x for x in tensors)


def as_asked(
    out: Tensor, rows: Tensor, lse: Tensor, return_rows: bool, return_lse: bool
) -> Tensor | tuple[Tensor, ...]:
    """The results of a readout: ``out``, followed by rows and lse, in this order, where asked."""
    if not (return_rows or return_lse):
        return out
    return (out, *((rows,) if return_rows else ()), *((lse,) if return_lse else ()))
