"""Linear layers in inference by the C++ kernels, which apply bias and GELU while a product is still in registers.

They multiply float32 by weights that were packed before. A row's result does not depend on the rows beside it.

Dimension key: T rows, C input and D output features of a layer.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from maskattn.extension import argument_of, extension, has_extension
from maskattn.shapes import Float

__all__ = ["apply_layer", "are_faster_here", "argument_or_none", "float32_rows", "pack_layer"]

_NARROW = 128  # features


def are_faster_here(inputs: int, outputs: int) -> bool:
    """Return whether these kernels are faster on this processor than the libraries that torch comes with.

    They are where AVX2 is the best instruction set. With AVX-512 oneDNN's layers are as fast (bench/results/LOG.md). It
    compiles them for each number of rows, which takes as long as multiplying a thousand rows by a narrow layer.

    Args:
        inputs: the number of a layer's input features.
        outputs: the number of its output features.
    """
    best = _instruction_set()
    return best == "avx2" or (best.startswith("avx512") and min(inputs, outputs) <= _NARROW)


@cache
def _instruction_set() -> str:
    return str(extension().instruction_sets()[0]) if has_extension() else ""


def pack_layer(weight: Float[Tensor, "D C"], bias: Float[Tensor, "D"] | None) -> Any:
    """Pack a linear layer's weights."""
    return extension().LinearLayer(argument_or_none(weight), argument_or_none(bias))


def apply_layer(layer: Any, x: Float[Tensor, "... C"], features: int, gelu: str | None) -> Float[Tensor, "... D"]:
    """Compute a packed layer, (..., C) → (..., D), in float32.

    Args:
        layer: what :func:`pack_layer` returned.
        x: its input, of any floating dtype.
        features: D.
        gelu: GELU's ``approximate`` ("none" or "tanh") if the outputs go through it; None for no activation.
    """
    rows_TC = float32_rows(x.reshape(-1, x.shape[-1]))
    out_TD = rows_TC.new_empty((len(rows_TC), features))
    activation = {None: "none", "none": "gelu", "tanh": "gelu_tanh"}[gelu]
    layer.apply(argument_of(rows_TC), argument_of(out_TD), activation=activation, threads=torch.get_num_threads())
    return out_TD.view(*x.shape[:-1], features)


def float32_rows(x: Tensor) -> Tensor:
    """Return a tensor as the kernels read it."""
    return x.to(torch.float32).contiguous()


def argument_or_none(x: Tensor | None) -> Any:
    """Return a parameter's values as an array."""
    return None if x is None else argument_of(float32_rows(x.detach()))
