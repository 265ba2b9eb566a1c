"""Compile every shipped kernel configuration without a GPU and write down what the machine code costs.

    python bench/aot_report.py                 writes bench/results/aot_<triton version>.csv and .md (some minutes)

A row has the registers, spilled bytes and shared memory of a kernel, and the instructions of its main loop *per score*:
per lane and per element of the BLOCK_M × BLOCK_N tile of scores, so that tile sizes compare. Those counts are issue
slots, not time. ``tests/kernels_aot`` compiles a part of these cases and fails where one got worse than its row.
"""

from __future__ import annotations

import argparse
import csv
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from maskattn.kernels.configs import Config, Pass, Target, look_up, padded_width
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

KERNELS: dict[Pass, Any] = {
    "forward": forward_kernel,
    "query_gradient": query_gradient_kernel,
    "key_gradient": key_gradient_kernel,
}

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

# First match wins; what matches nothing (barriers, branches, waits) is "control".
NVIDIA_CLASSES = (
    ("tensor", r"HGMMA|HMMA|UTC\w*MMA"),
    ("mufu", r"MUFU"),
    ("convert", r"F2F|F2FP|HADD2|I2F|F2I"),
    ("fp32", r"F(ADD|MUL|FMA|MNMX|SEL|SETP|CHK)"),
    ("load", r"LD[GSLTC]|LDSM|ST[GSLT]|STTM|UTMA|UBLKCP|ATOM|RED|CCTL"),
    ("shuffle", r"SHFL|MOVM"),
    ("control", r"BRA|BAR|BSSY|BSYNC|WARP|DEPBAR|SYNCS|NOP|EXIT|CALL|RET|FENCE|ELECT|UTCBAR|ACQ|MEMBAR"),
    ("integer", r"I[A-Z]|LEA|LOP|SHF|PRMT|MOV|SEL|VI|U[A-Z]|R2|S2|CS2|P2R|PLOP|SGXT|BREV|FLO|POPC"),
)  # fmt: skip
AMD_CLASSES = (
    ("tensor", r"v_mfma"),
    ("mufu", r"v_(exp|log|rcp|rsq|sqrt)"),
    ("convert", r"v_(cvt|perm)"),
    ("fp32", r"v_(pk_)?(add|sub|subrev|mul|fma|fmac|max|max3|cmp_\w+|maximum3)_f"),
    ("load", r"(global|buffer|ds|flat|scratch)_"),
    ("control", r"s_(waitcnt|barrier|cbranch|branch|nop|setprio|endpgm)"),
    ("integer", r"[vs]_"),
)
CLASSES = ("tensor", "mufu", "fp32", "convert", "integer", "load", "shuffle", "control")


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


@dataclass(frozen=True)
class Row:
    """What one case costs; instruction counts are per score and lane."""

    pass_: str
    target: str
    head_width: int
    dtype: str
    bias: bool
    gather: bool
    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    registers: int
    spilled_bytes: int
    shared_bytes: int
    tensor_memory: int
    tensor_instruction: str
    per_score: float
    tensor: float
    mufu: float
    fp32: float
    convert: float
    integer: float
    load: float
    shuffle: float
    control: float

    @property
    def key(self) -> tuple[str, ...]:
        """What names it in the table."""
        return tuple(str(getattr(self, field.name)) for field in fields(Case))


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


def measure(case: Case, config: Config | None = None) -> Row:
    """Compile one case and read its machine code."""
    config = config or look_up(case.pass_, case.target, case.head_width, DTYPES[case.dtype])
    compiled = compile_case(case, config)
    if case.target == "gfx942":
        registers, spilled, loop, tensor_instruction = _read_amd(compiled)
        lanes = 64
    else:
        registers, spilled, loop, tensor_instruction = _read_nvidia(compiled)
        lanes = 32
    scores_per_lane = config.block_m * config.block_n / (config.num_warps * lanes)
    counts = Counter(_classify(opcode, AMD_CLASSES if lanes == 64 else NVIDIA_CLASSES) for opcode in loop)
    return Row(
        **asdict(case),
        **asdict(config),
        registers=registers,
        spilled_bytes=spilled,
        shared_bytes=compiled.metadata.shared,
        tensor_memory=getattr(compiled.metadata, "tmem_size", None) or 0,
        tensor_instruction=tensor_instruction,
        per_score=round(len(loop) / scores_per_lane, 2),
        **{name: round(counts[name] / scores_per_lane, 3) for name in CLASSES},
    )


def _classify(opcode: str, classes: Iterable[tuple[str, str]]) -> str:
    return next((name for name, pattern in classes if re.match(pattern, opcode)), "control")


def _nvidia_tool(name: str) -> str:
    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


def _read_nvidia(compiled: Any) -> tuple[int, int, list[str], str]:
    """Registers, spilled bytes, opcodes of the main loop and the tensor-core instruction of a cubin."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(compiled.asm["cubin"])
        usage = subprocess.run(
            [_nvidia_tool("cuobjdump"), "--dump-resource-usage", path], capture_output=True, text=True, check=True
        ).stdout
        code = subprocess.run([_nvidia_tool("nvdisasm"), path], capture_output=True, text=True, check=True).stdout
    match = re.search(r"REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)", usage)
    if match is None:
        raise RuntimeError(f"cuobjdump's resource usage has no REG, STACK and LOCAL: {usage!r}")
    registers, stack, local = map(int, match.groups())
    ptx = compiled.asm["ptx"]
    tensor_instruction = next((name for name in ("tcgen05.mma", "wgmma", "mma.sync") if name in ptx), "none")
    instructions = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)(.*)")
    loop = _main_loop(code, re.compile(r"^\s*\.(L_x_\d+):"), instructions, re.compile(r"\.(L_x_\d+)"), "BRA")
    return registers, stack + local, loop, tensor_instruction


def _read_amd(compiled: Any) -> tuple[int, int, list[str], str]:
    """The same of AMD's assembly, whose metadata has the counts."""
    code = compiled.asm["amdgcn"]

    def number(name: str) -> int:
        match = re.search(rf"\.{name}:\s+(\d+)", code)
        if match is None:
            raise RuntimeError(f"the assembly's metadata has no .{name}")
        return int(match.group(1))

    spilled = 4 * number("vgpr_spill_count") + number("private_segment_fixed_size")
    instructions = re.compile(r"^\s+([a-z]\w+)(.*)")
    loop = _main_loop(code, re.compile(r"^\.(LBB\d+_\d+):"), instructions, re.compile(r"\.(LBB\d+_\d+)"), r"s_c?branch")
    return number("vgpr_count"), spilled, loop, "mfma" if "v_mfma" in code else "none"


def _main_loop(
    code: str, label: re.Pattern[str], instruction: re.Pattern[str], target: re.Pattern[str], branch: str
) -> list[str]:
    """Opcodes of the loop with the most products; of several (a full and a masked tail tile), the shortest."""
    opcodes: list[str] = []
    places: dict[str, int] = {}
    loops: list[list[str]] = []
    for line in code.splitlines():
        if match := label.match(line):
            places[match.group(1)] = len(opcodes)
        elif match := instruction.search(line):
            opcodes.append(match.group(1))
            back = target.search(match.group(2))
            if back and re.match(branch, match.group(1)) and back.group(1) in places:
                body = opcodes[places[back.group(1)] :]
                # A slow path behind the end of the kernel jumps back too; it is no loop.
                if not any(re.match(r"EXIT|RET|s_endpgm", opcode) for opcode in body):
                    loops.append(body)

    def products(loop: list[str]) -> int:
        return sum(1 for opcode in loop if re.match(r"HGMMA|HMMA|UTC\w*MMA|FFMA|v_mfma|v_(pk_)?fmac?_f32", opcode))

    most = max(map(products, loops), default=0)
    return min((loop for loop in loops if 2 * products(loop) > most), key=len, default=[])


def table_path() -> Path:
    """The committed table of the installed triton."""
    return Path(__file__).parent / "results" / f"aot_{triton.__version__}.csv"


def read_table(path: Path) -> dict[tuple[str, ...], dict[str, str]]:
    """Rows of a table by their case."""
    with path.open(newline="") as file:
        return {tuple(row[field.name] for field in fields(Case)): row for row in csv.DictReader(file)}


def write_table(rows: list[Row], path: Path) -> None:
    """Write every row as CSV."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Row)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)


def write_summary(rows: list[Row], path: Path) -> None:
    """The rows that matter most, for reading."""
    lines = [
        f"# What the kernels compile to: triton {triton.__version__}, no GPU involved",
        "",
        "bfloat16, no bias, no gather. Instructions of the main loop per score and lane; `aot_*.csv` has every case.",
        "",
        "| pass | target | D | tile M×N | warps | stages | registers | shared KiB | products | per score "
        "| tensor | MUFU | FP32 | convert | integer | load | shuffle | control |",
        "|---|---|" + "---:|" * 6 + "---|" + "---:|" * 9,
    ]
    for row in rows:
        if row.dtype == "bf16" and row.head_width in (32, 64, 80, 128) and not (row.bias or row.gather):
            counts = " | ".join(f"{getattr(row, name):.2f}" for name in CLASSES)
            lines.append(
                f"| {row.pass_} | {row.target} | {row.head_width} | {row.block_m}×{row.block_n} | {row.num_warps} "
                f"| {row.num_stages} | {row.registers} | {row.shared_bytes / 1024:.0f} | {row.tensor_instruction} "
                f"| {row.per_score:.2f} | {counts} |"
            )
    path.write_text("\n".join(lines) + "\n")


def main() -> None:
    """Compile all cases and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=2, help="compilations side by side")
    arguments = parser.parse_args()
    with ProcessPoolExecutor(arguments.jobs) as pool:
        rows = list(pool.map(measure, all_cases()))
    write_table(rows, table_path())
    write_summary(rows, table_path().with_suffix(".md"))
    spilled = [row for row in rows if row.spilled_bytes]
    print(f"{len(rows)} kernels compiled, {len(spilled)} spill; table in {table_path()}")
    sys.exit(bool(spilled))


if __name__ == "__main__":
    main()
