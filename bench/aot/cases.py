"""The compilations of the report: kernels, targets, features, signatures and constants."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
import triton
from triton.compiler import ASTSource

from bench.aot.intermediate import fingerprint
from bench.aot.targets import GPU_TARGETS
from maskattn.kernels.attention.forward import forward_kernel
from maskattn.kernels.attention.key_gradient import key_gradient_kernel
from maskattn.kernels.attention.query_gradient import query_gradient_kernel
from maskattn.kernels.language.bundles import (
    ABSENT,
    NO_POSITIONS,
    Bounds,
    Dropout,
    Positions,
    RowValues,
    Tokens,
    Width,
)
from maskattn.kernels.language.scores import Terms
from maskattn.kernels.tables.config import Config, Pass, Target
from maskattn.kernels.tables.lookup import look_up, split_width

KERNELS: dict[Pass, Any] = {
    "forward": forward_kernel,
    "query_gradient": query_gradient_kernel,
    "key_gradient": key_gradient_kernel,
}

TOKENS = ("q_tokens", "k_tokens", "v_tokens", "out_tokens", "dout_tokens", "dq_tokens", "dk_tokens", "dv_tokens")
ROW_VALUES = ("lse_values", "dlse_values", "delta_values", "scaled_lse_values")

# Single precision on tensor cores has tiles of its own.
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "tf32x3": torch.float32}


def precision_of(dtype: str) -> str:
    """Return the precision that a call of the dtype requests."""
    return "tf32x3" if dtype == "tf32x3" else "ieee"


@dataclass(frozen=True)
class Case:
    """One compilation: a pass for a target, with the features that change its code."""

    pass_: Pass
    target: Target
    head_width: int
    dtype: str
    bias: bool = False
    gather: bool = False
    alibi: bool = False
    dropout: bool = False
    # Dropout of chunks of longer sequences, whose positions in these are given.
    chunks: bool = False

    @property
    def key(self) -> tuple[str, ...]:
        """The values that identify the case's row in the table."""
        return tuple(str(value) for value in asdict(self).values())


def shipped_config(case: Case) -> Config:
    """Return the configuration with which a call of this case would be launched."""
    with_options = case.alibi or case.dropout
    dtype = DTYPES[case.dtype]
    return look_up(case.pass_, case.target, case.head_width, dtype, with_options, precision_of(case.dtype))


def all_cases() -> Iterator[Case]:
    """Yield every shipped configuration of the plain kernels and of those with features that add to their code."""
    for target in GPU_TARGETS:
        for pass_ in KERNELS:
            for width in (32, 48, 64, 80, 96, 128, 192, 256):
                yield Case(pass_, target, width, "bf16")
            for width in (80, 128, 256):
                yield Case(pass_, target, width, "bf16", bias=True, gather=True)
            for width in (48, 64, 80, 128, 256):
                yield Case(pass_, target, width, "fp32")
            yield Case(pass_, target, 64, "fp16")
            yield Case(pass_, target, 64, "bf16", bias=True)
            yield Case(pass_, target, 64, "bf16", gather=True)
            yield Case(pass_, target, 64, "bf16", alibi=True)
            yield Case(pass_, target, 64, "bf16", dropout=True)
            for dtype, width in (("bf16", 64), ("bf16", 128), ("bf16", 256), ("fp32", 64)):
                yield Case(pass_, target, width, dtype, bias=True, gather=True, alibi=True, dropout=True)


def compile_case(case: Case, config: Config) -> Any:
    """Compile one case."""
    return triton.compile(source_of(case, config), target=GPU_TARGETS[case.target], options=options_of(config))


def fingerprint_of(case: Case, config: Config) -> str:
    """Return a hash of the intermediate code of one case."""
    return fingerprint(source_of(case, config), GPU_TARGETS[case.target], options_of(config))


def options_of(config: Config) -> dict[str, int]:
    """Return the compiler's options."""
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    return options if config.max_registers is None else {**options, "maxnreg": config.max_registers}


def source_of(case: Case, config: Config) -> ASTSource:
    """Return the compiler's input for a packed call (or, with a gather, a masked one) of contiguous tensors."""
    signature: dict[str, Any] = {}
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], list[list[object]]] = {}

    def type_of(argument: Any, path: tuple[int, ...]) -> Any:
        if isinstance(argument, tuple):
            return type(argument)(*(type_of(leaf, (*path, index)) for index, leaf in enumerate(argument)))
        if not isinstance(argument, Varying):
            constants[path] = argument
            return "constexpr"
        if argument.aligned:
            attributes[path] = [["tt.divisibility", 16]]
        return argument.type

    arguments = _arguments(case, config)
    for position, name in enumerate(KERNELS[case.pass_].arg_names):
        signature[name] = type_of(arguments[name], (position,))
    return ASTSource(KERNELS[case.pass_], signature, constants, attributes)


@dataclass(frozen=True)
class Varying:
    """A leaf of a kernel's arguments that is unknown at compile time; ``aligned`` means a multiple of 16."""

    type: str
    aligned: bool = True


STRIDE = Varying("i32")
COUNT = Varying("i32", aligned=False)
SCALE = Varying("fp32", aligned=False)


def _arguments(case: Case, config: Config) -> dict[str, Any]:
    """Return every argument of every kernel by name, as the launchers pass it.

    Packed tensors have no stride of sequences.
    """
    single, index = Varying("*fp32"), Varying("*i32") if case.gather else None
    stride_b = STRIDE if case.gather else 0
    element = Tokens(Varying("*" + case.dtype.replace("tf32x3", "fp32")), stride_b, STRIDE, STRIDE)
    bias = Tokens(single, stride_b, 0, 1) if case.bias else ABSENT
    dbias = Tokens(single, stride_b, STRIDE, 1) if case.bias else ABSENT
    positions = Positions(single, stride_b, 2, 1) if case.alibi else NO_POSITIONS
    offsets = Varying("*i32") if case.chunks else None
    dropout = Dropout(Varying("*i64") if case.dropout else None, COUNT, SCALE, offsets, offsets)
    # cu_seqlens[1:] is not aligned.
    bounds = Bounds(Varying("*i32"), Varying("*i32", aligned=False), index)
    row_values = RowValues(single, stride_b, Varying("i32", aligned=False))
    return {
        **dict.fromkeys(TOKENS, element),
        **dict.fromkeys(ROW_VALUES, row_values),
        "lse_rest_values": row_values if case.bias else RowValues(None, 0, 0),
        "terms": Terms(SCALE, bias, single if case.alibi else None, positions, positions, dropout),
        "dslopes_ptr": single if case.alibi else None,
        **dict.fromkeys(("q_bounds", "k_bounds"), bounds),
        **dict.fromkeys(("heads", "tiles", "items"), COUNT),
        "scale": SCALE,
        # Sequences of unequal lengths.
        "items_ptr": Varying("*i32"),
        "dbias_tokens": dbias,
        "WIDTH": Width(case.head_width, *split_width(case.head_width, config), config.precision),
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "DESCRIBED": config.descriptors and not case.gather,
        "TAIL_STAGES": 1 if config.plain_tail else None,
    }
