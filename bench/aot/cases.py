"""Every compilation that the report makes: which kernels, targets, features, signatures and constants."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from maskattn.kernels.configs import Config, Pass, Target, padded_width
from maskattn.kernels.forward import forward_kernel
from maskattn.kernels.key_gradient import key_gradient_kernel
from maskattn.kernels.query_gradient import query_gradient_kernel

GPU_TARGETS: dict[Target, GPUTarget] = {
    "sm80": GPUTarget("cuda", 80, 32),
    "sm86": GPUTarget("cuda", 86, 32),
    "sm90": GPUTarget("cuda", 90, 32),
    "sm100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}

KERNELS: dict[Pass, Any] = {
    "forward": forward_kernel,
    "query_gradient": query_gradient_kernel,
    "key_gradient": key_gradient_kernel,
}

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class Case:
    """One compilation: a pass for a target, with the features that change its code."""

    pass_: Pass
    target: Target
    head_width: int
    dtype: str
    bias: bool = False
    gather: bool = False

    @property
    def key(self) -> tuple[str, ...]:
        """What names its row in the table."""
        return tuple(str(value) for value in asdict(self).values())


def all_cases() -> Iterator[Case]:
    """Every shipped configuration: the plain kernels, and with all that adds to their code."""
    widths = {"bf16": (16, 32, 48, 64, 80, 128, 256), "fp16": (64, 128), "fp32": (32, 64, 80, 128, 256)}
    for target in GPU_TARGETS:
        for pass_ in KERNELS:
            for dtype, dtype_widths in widths.items():
                for width in dtype_widths:
                    yield Case(pass_, target, width, dtype)
                    if dtype == "bf16" or (dtype == "fp32" and width in (64, 128)):
                        yield Case(pass_, target, width, dtype, bias=True, gather=True)
            yield Case(pass_, target, 64, "bf16", bias=True)
            yield Case(pass_, target, 64, "bf16", gather=True)


def compile_case(case: Case, config: Config) -> Any:
    """Compile one case as a packed call (or, gathering, a masked one) of contiguous tensors would be."""
    kernel = KERNELS[case.pass_]
    element = "*" + case.dtype
    constants: dict[str, Any] = {
        "HEAD_WIDTH": case.head_width,
        "BLOCK_D": padded_width(case.head_width),
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "HAS_BIAS": case.bias,
        "HAS_DLSE": True,
        "INDEX_Q": case.gather,
        "INDEX_K": case.gather,
        "stride_bt": 1,
        "stride_dbt": 1,
    }
    if not case.bias:
        constants |= dict.fromkeys(("bias_ptr", "dbias_ptr"))
    if not case.gather:
        constants |= dict.fromkeys(("q_index_ptr", "k_index_ptr"))
    signature, attributes, used = {}, {}, {}
    for position, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name], used[name] = "constexpr", constants[name]
            continue
        if name.endswith(("starts_ptr", "ends_ptr", "index_ptr")):
            signature[name] = "*i32"
        elif name in ("lse_ptr", "lse_log2_ptr", "dlse_ptr", "delta_ptr", "bias_ptr", "dbias_ptr"):
            signature[name] = "*fp32"
        elif name.endswith("_ptr"):
            signature[name] = element
        else:
            signature[name] = "fp32" if name.startswith("scale") else "i32"
        # cu_seqlens[1:] is not aligned; lengths and counts are any number.
        if not name.endswith("ends_ptr") and name not in ("scale", "scale_log2", "heads", "tiles", "stride_lh"):
            attributes[(position,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, used, attributes)
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    return triton.compile(source, target=GPU_TARGETS[case.target], options=options)
