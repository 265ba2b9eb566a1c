"""Linear layers in inference on x86 processors, with bias and activation within the product and weights packed once.

torch's own ``linear`` computes float32 products by MKL and copies the bias into the output first; an activation is one
more pass over the output, and under autocast the weights are cast again in every batch. oneDNN's product has bias and
activation as its last step, and so has that of the C++ kernels (:mod:`maskattn.nn.native_layers`), which is taken where
it is known to be faster. Both take weights in an order of their own, into which they are packed once in runs over many
batches (:func:`packed_weights`); oneDNN's also takes them as they are.

Gradients, compilation, export, GPUs, other dtypes, and layers to which something is attached (hooks, adapters,
quantised weights) take torch's way.

Dimension key: C input and D output features of a layer.
"""

from __future__ import annotations

import contextlib
import platform
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import replace
from functools import cache
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maskattn.nn import native_layers
from maskattn.nn.kept_memory import keeping_memory
from maskattn.nn.packed_tokens import PackedTokens
from maskattn.nn.plain_modules import forwards_of, has_plain_parameters, is_plain
from maskattn.packing import Packing, is_jit_traced
from maskattn.shapes import Float
from maskattn.transforms import is_transformed

__all__ = [
    "GELUS",
    "computed_in",
    "kept_or_packed",
    "linear",
    "linear_and_activation",
    "multiplies_natively",
    "packed_weights",
    "product",
    "rounded_up",
    "rows_at_once",
    "runs_here",
]

_LINEAR = forwards_of([nn.Linear])
GELUS = {"gelu": "none", "gelu_tanh": "tanh"}
# A copy of larger weights costs more memory than packing them anew in each batch costs time.
_MOST_PACKED_BYTES = 10 << 20
_ROWS_PACKED_FOR = 2048
# The C++ kernels take packed weights alone, and packing them takes as long as multiplying some 80 rows by them.
_FEWEST_ROWS_TO_PACK_FOR = 1024
_STEPS = 32
# Of one feature of all rows: 3,200 rows in float32. More leave the last cache between two layers.
_BYTES_PER_FEATURE_AT_ONCE = 12_800
_EVERY = slice(None)

# A module of a model in a run → what was packed of it, by its dtype and part.
_packed: WeakKeyDictionary[nn.Module, dict[Hashable, Any]] = WeakKeyDictionary()


def linear(layer: nn.Module, x: Float[Tensor, "... C"]) -> Float[Tensor, "... D"]:
    """Compute ``layer(x)``, (..., C) → (..., D), for any layer."""
    dtype = runs_here(x)
    if dtype is not None and is_plain(layer, _LINEAR) and has_plain_parameters(layer):
        return _fused(layer, x, dtype)
    out: Tensor = layer(x)
    return out


def linear_and_activation(
    layer: nn.Module, x: Float[Tensor, "... C"], act: str, activation: Callable[[Tensor], Tensor]
) -> Float[Tensor, "... D"]:
    """Compute ``activation(layer(x))``, (..., C) → (..., D), for any layer.

    Args:
        layer: the layer.
        x: its input.
        act: the activation's name; a GELU is computed within the product.
        activation: the activation.
    """
    dtype = runs_here(x) if act in GELUS else None
    if dtype is not None and is_plain(layer, _LINEAR) and has_plain_parameters(layer):
        return _fused(layer, x, dtype, gelu=GELUS[act])
    return activation(linear(layer, x))


def product(
    layer: nn.Module, x: Float[Tensor, "... C"], outputs: slice = _EVERY, gelu: str | None = None
) -> Float[Tensor, "... D"]:
    """Compute some outputs of a linear layer from its weights, as its call would if nothing is attached to it.

    Args:
        layer: a linear layer, or a convolution whose kernel is its stride, for flattened patches.
        x: (..., C), its input.
        outputs: the outputs to compute.
        gelu: GELU's ``approximate`` ("none" or "tanh") if the outputs go through it; None for no activation.
    """
    dtype = runs_here(x)
    if dtype is None:
        weight, bias = _weight_and_bias(layer, outputs)
        out = F.linear(x, weight, bias)
        return out if gelu is None else F.gelu(out, approximate=gelu)
    return _fused(layer, x, dtype, outputs, gelu)


@contextlib.contextmanager
def packed_weights(model: nn.Module) -> Iterator[None]:
    """Within the context, keep packed copies of the weights that a model multiplies by, up to 10 MiB each.

    The weights must not change within the context. It may be entered again within itself. On a CPU, the memory of
    results is kept too (:mod:`maskattn.nn.kept_memory`).
    """
    on_cpu = any(parameter.device.type == "cpu" for parameter in model.parameters())
    mine = [module for module in model.modules() if module not in _packed]
    for module in mine:
        _packed[module] = {}
    try:
        with keeping_memory() if on_cpu else contextlib.nullcontext():
            yield
    finally:
        for module in mine:
            _packed.pop(module, None)


def kept_or_packed(
    module: nn.Module, key: Hashable, weights: Sequence[Tensor], rows: int, pack: Callable[[], Any]
) -> Any | None:
    """Return what ``pack`` makes of a module's weights, kept for the run; None if packing does not pay for these rows.

    Args:
        module: the module.
        key: what distinguishes several packed forms of it.
        weights: the weights that are packed.
        rows: the number of rows to multiply.
        pack: packs them.
    """
    kept = _packed.get(module)
    if kept is None or max(weight.numel() * 4 for weight in weights) > _MOST_PACKED_BYTES:
        return pack() if rows >= _FEWEST_ROWS_TO_PACK_FOR else None
    if key not in kept:
        kept[key] = pack()
    return kept[key]


def multiplies_natively(x: Float[Tensor, "T C"], tokens: PackedTokens | None = None) -> torch.dtype | None:
    """Return the dtype of weights and results if the C++ kernels multiply rows like ``x``, of ``tokens``; else None."""
    dtype, width = runs_here(x), x.shape[-1]
    if dtype is None:  # in a trace, the number of rows has no value
        return None
    rows_vary = tokens is not None and not is_whole(tokens)
    return dtype if native_layers.are_faster_here(width, width, computed_in(dtype), rows_vary) else None


def is_whole(tokens: PackedTokens) -> bool:
    """Return whether no token is masked: the numbers of rows are then as few as those of images."""
    packing = tokens.packing
    return packing.batch_size * packing.num_tokens == packing.total


def rounded_up(tokens: PackedTokens) -> PackedTokens:
    """Return tokens with rows of 0 after the last, as one more image, so that few numbers of rows occur in a run.

    oneDNN compiles a product for each number of rows and keeps it, half a megabyte each. The numbers are multiples of a
    power of two, at most a 32nd of the rows. Where other products are computed, the tokens are returned as they are.
    """
    packing, T, P = tokens.packing, tokens.packing.total, tokens.num_prefix
    most = min(T // _STEPS, packing.num_tokens - P)
    step = 1 << most.bit_length() - 1 if most > 0 else 1
    more = -T % step
    if 0 < more < P:  # an image has all of its prefix tokens
        more += -(-(P - more) // step) * step
    if is_whole(tokens):
        return tokens
    if not more or tokens.shards is not None or runs_here(tokens.rows_TC) is None:
        return tokens
    if multiplies_natively(tokens.rows_TC, tokens) is not None:
        return tokens
    start = packing.batch_size * packing.num_tokens
    longer = Packing(
        torch.cat([packing.indices, torch.arange(start, start + more)]),
        torch.cat([packing.cu_seqlens, packing.cu_seqlens[-1:] + more]),
        max(packing.max_seqlen, more),
        packing.batch_size + 1,
        packing.num_tokens,
    )
    rows_TC = F.pad(tokens.rows_TC, (0, 0, 0, more))
    coords = None if tokens.coords_T2 is None else F.pad(tokens.coords_T2, (0, 0, 0, more), value=torch.nan)
    rotation = tokens.rotation
    if rotation is not None:
        cos, sin = rotation
        rotation = F.pad(cos, (0, 0, 0, more), value=1.0), F.pad(sin, (0, 0, 0, more))
    return replace(tokens, rows_TC=rows_TC, packing=longer, coords_T2=coords, rotation=rotation)


def rows_at_once(x: Tensor) -> int | None:
    """Return the number of rows up to which a product of rows like ``x`` is fastest; None if torch's way is taken."""
    dtype = runs_here(x)
    return None if dtype is None else _BYTES_PER_FEATURE_AT_ONCE // computed_in(dtype).itemsize


def runs_here(x: Tensor) -> torch.dtype | None:
    """Return the dtype in which products of ``x`` are computed here; None if torch's own way is taken."""
    if torch.compiler.is_compiling() or not torch.is_inference_mode_enabled():  # in this order, for torch.compile
        return None
    if type(x) is not Tensor or x.device.type != "cpu" or not x.numel() or is_jit_traced():
        return None
    if is_transformed((x,)):
        return None
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
    return dtype if torch.backends.mkldnn.enabled and _has_product(computed_in(dtype)) else None


def _fused(
    layer: nn.Module, x: Tensor, dtype: torch.dtype, outputs: slice = _EVERY, gelu: str | None = None
) -> Float[Tensor, "... D"]:
    """Compute :func:`product` with bias and activation in it; the result has the dtype that :func:`runs_here` gives."""
    weight, bias = _weight_and_bias(layer, outputs)
    computed = computed_in(dtype)
    outs, ins = weight.shape
    if native_layers.are_faster_here(ins, outs, computed) and native_layers.can_pack(ins, computed):

        def pack() -> Any:
            return native_layers.pack_layer(weight.to(dtype), None if bias is None else bias.to(dtype), computed)

        key = ("native", dtype, outputs.start, outputs.stop)
        packed = kept_or_packed(layer, key, [weight], x.numel() // x.shape[-1], pack)
        if packed is not None:
            return native_layers.apply_layer(packed, x, len(weight), gelu, computed).to(dtype)
    weight, bias = _operands(layer, weight, bias, outputs, dtype)
    attribute, algorithm = ("none", "") if gelu is None else ("gelu", gelu)
    out: Tensor = torch.ops.mkldnn._linear_pointwise(x.to(weight.dtype), weight, bias, attribute, [], algorithm)
    return out.to(dtype)


def _operands(
    layer: nn.Module, weight: Tensor, bias: Tensor | None, outputs: slice, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    """Return weight and bias as oneDNN's product takes them, packed in a run."""
    kept, key = _packed.get(layer), ("oneDNN", dtype, outputs.start, outputs.stop)
    if kept is not None and key in kept:
        operands: tuple[Tensor, Tensor | None] = kept[key]
        return operands
    computed = computed_in(dtype)
    weight, bias = weight.to(dtype).to(computed), None if bias is None else bias.to(dtype).to(computed)
    if kept is not None and weight.nbytes <= _MOST_PACKED_BYTES:
        kept[key] = torch.ops.mkldnn._reorder_linear_weight(weight, _ROWS_PACKED_FOR), bias
        return kept[key]
    return weight, bias


def _weight_and_bias(layer: nn.Module, outputs: slice) -> tuple[Tensor, Tensor | None]:
    weight, bias = cast(Tensor, layer.weight), cast(Tensor | None, layer.bias)
    weight = weight if weight.ndim == 2 else weight.flatten(1)
    return (weight, bias) if outputs == _EVERY else (weight[outputs], None if bias is None else bias[outputs])


@cache
def computed_in(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of a product's operands; bfloat16 is computed in float32 where the processor cannot multiply it.

    torch and oneDNN emulate it there, which takes several times as long.
    """
    try:
        emulated = dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported()
    except (AttributeError, RuntimeError):  # a torch without oneDNN
        return dtype
    return torch.float32 if emulated else dtype


@cache
def _has_product(dtype: torch.dtype) -> bool:
    """Return whether this torch has oneDNN's product for operands of a dtype here, by trying a small one."""
    if dtype not in (torch.float32, torch.bfloat16) or platform.machine() not in ("x86_64", "AMD64"):
        return False
    try:
        x, weight, bias = (torch.linspace(-1, 1, n, dtype=dtype) for n in (96, 192, 6))
        x, weight = x.view(3, 32), weight.view(6, 32)
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, 3)
        with torch.autocast("cpu", enabled=False):
            expected = F.gelu(F.linear(x.float(), weight.float(), bias.float()))
        given = [torch.ops.mkldnn._linear_pointwise(x, w, bias, "gelu", [], "none") for w in (weight, packed)]
        return all(torch.allclose(out.float(), expected, rtol=0.02, atol=0.02) for out in given)
    except (AttributeError, RuntimeError, NotImplementedError):  # the operations are torch's own, and may change
        return False
