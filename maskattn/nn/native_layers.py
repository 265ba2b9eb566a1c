"""Linear layers in inference by the C++ kernels, which apply bias and GELU while a product is still in registers.

They multiply by weights that were packed before, float32 or bfloat16, and add up in float32. A row's result does not
depend on the rows beside it.

Dimension key: T rows, C input and D output features of a layer.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from maskattn.extension import argument_of, extension, has_extension
from maskattn.shapes import Float

__all__ = ["apply_layer", "are_faster_here", "argument_or_none", "can_pack", "pack_layer", "rows_in"]

# The smaller of a layer's numbers of features, up to which it is faster here although the processor has AVX-512, by
# dtype and best instruction set: of layers whose numbers of rows are few, and of those whose numbers vary. AMX
# multiplies bfloat16 in tiles, in oneDNN too.
_NARROW = {
    torch.float32: {"avx512": (128, 128), "avx512_bf16": (768, 768), "amx_bf16": (192, 384)},
    torch.bfloat16: {"avx512_bf16": (768, 768), "amx_bf16": (192, 384)},
}


def are_faster_here(inputs: int, outputs: int, dtype: torch.dtype = torch.float32, rows_vary: bool = False) -> bool:
    """Return whether these kernels are faster on this processor than the libraries that torch comes with.

    They are where AVX2 is the best instruction set. With AVX-512 oneDNN's wide layers are as fast, or were not compared
    (see bench/results/LOG.md). It compiles a layer for each number of rows, which takes as long as multiplying a
    thousand rows by a narrow one.

    Args:
        inputs: the number of a layer's input features.
        outputs: the number of its output features.
        dtype: the dtype of the operands of its product.
        rows_vary: whether the number of rows differs from call to call, as under masks.
    """
    best = _instruction_set()
    if best == "avx2":
        return dtype == torch.float32
    return min(inputs, outputs) <= _NARROW.get(dtype, {}).get(best, (0, 0))[rows_vary]


@cache
def _instruction_set() -> str:
    return str(extension().instruction_sets()[0]) if has_extension() else ""


def can_pack(inputs: int, dtype: torch.dtype) -> bool:
    """Return whether weights of this number of input features can be packed for products of a dtype."""
    return dtype != torch.bfloat16 or inputs % 2 == 0


def pack_layer(weight: Float[Tensor, "D C"], bias: Float[Tensor, "D"] | None, dtype: torch.dtype) -> Any:
    """Pack a linear layer's weights for products of float32 or bfloat16."""
    operands = argument_of(rows_in(dtype, weight.detach())), argument_or_none(bias)
    return extension().LinearLayer(*operands, threads=torch.get_num_threads())


def apply_layer(
    layer: Any, x: Float[Tensor, "... C"], features: int, gelu: str | None, dtype: torch.dtype
) -> Float[Tensor, "... D"]:
    """Compute a packed layer, (..., C) → (..., D); the result has the dtype of its product's operands.

    Args:
        layer: what :func:`pack_layer` returned.
        x: its input, of any floating dtype.
        features: D.
        gelu: GELU's ``approximate`` ("none" or "tanh") if the outputs go through it; None for no activation.
        dtype: the dtype that it was packed for.
    """
    rows_TC = rows_in(dtype, x.reshape(-1, x.shape[-1]))
    out_TD = rows_TC.new_empty((len(rows_TC), features))
    activation = {None: "none", "none": "gelu", "tanh": "gelu_tanh"}[gelu]
    layer.apply(argument_of(rows_TC), argument_of(out_TD), activation=activation, threads=torch.get_num_threads())
    return out_TD.view(*x.shape[:-1], features)


def rows_in(dtype: torch.dtype, x: Tensor) -> Tensor:
    """Return a tensor as the kernels read it."""
    return x.to(dtype).contiguous()


def argument_or_none(x: Tensor | None) -> Any:
    """Return a parameter's values as an array of float32."""
    return None if x is None else argument_of(rows_in(torch.float32, x.detach()))
