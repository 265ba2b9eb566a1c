"""Properties of compiled kernels: registers, spills, shared memory, and the instructions of the main loop by class."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton

# The first match counts; an instruction without a match (barriers, branches, waits) is "control".
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
class MachineCode:
    """The resources of a compiled kernel, and the instructions that one warp issues for one tile in its main loop."""

    registers: int
    spilled_bytes: int
    shared_bytes: int
    tensor_memory: int
    tensor_instruction: str
    lanes: int
    loop: tuple[str, ...]

    def instructions_per_score(self, scores: int, num_warps: int) -> dict[str, float]:
        """Count instructions by class and in total ("per_score"), per lane and per score of the tile."""
        scores_per_lane = scores / (num_warps * self.lanes)
        classes = AMD_CLASSES if self.lanes == 64 else NVIDIA_CLASSES
        counts = Counter(_classify(instruction, classes) for instruction in self.loop)
        per_class = {name: round(counts[name] / scores_per_lane, 3) for name in CLASSES}
        return {"per_score": round(len(self.loop) / scores_per_lane, 2), **per_class}


def read(compiled: Any, lanes: int) -> MachineCode:
    """Read the machine code of a compiled kernel; 64 lanes are those of AMD's warps."""
    registers, spilled, loop, tensor_instruction = _read_amd(compiled) if lanes == 64 else _read_nvidia(compiled)
    return MachineCode(
        registers=registers,
        spilled_bytes=spilled,
        shared_bytes=compiled.metadata.shared,
        tensor_memory=getattr(compiled.metadata, "tmem_size", None) or 0,
        tensor_instruction=tensor_instruction,
        lanes=lanes,
        loop=tuple(loop),
    )


def _classify(instruction: str, classes: Iterable[tuple[str, str]]) -> str:
    return next((name for name, pattern in classes if re.match(pattern, instruction)), "control")


def nvidia_tool(name: str) -> str:
    """Return the path of a program of the CUDA toolkit in triton's wheel."""
    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


def registers_and_spills(compiled: Any) -> tuple[int, int]:
    """Registers of a thread, and the bytes that it spills."""
    if "amdgcn" in compiled.asm:
        return _read_amd(compiled)[:2]
    usage = _run_on_cubin(compiled, "cuobjdump", "--dump-resource-usage")
    match = re.search(r"REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)", usage)
    if match is None:
        raise RuntimeError(f"cuobjdump's resource usage has no REG, STACK and LOCAL: {usage!r}")
    registers, stack, local = map(int, match.groups())
    return registers, stack + local


def tensor_instruction_of(compiled: Any) -> str:
    """The instruction with which a kernel uses the tensor cores, "none" where it does not."""
    if "amdgcn" in compiled.asm:
        return "mfma" if "v_mfma" in compiled.asm["amdgcn"] else "none"
    return next((name for name in ("tcgen05.mma", "wgmma", "mma.sync") if name in compiled.asm["ptx"]), "none")


def nvidia_assembly(compiled: Any) -> str:
    """Return what ``nvdisasm`` prints of a compiled kernel."""
    return _run_on_cubin(compiled, "nvdisasm")


def _run_on_cubin(compiled: Any, *command: str) -> str:
    """What a program of the CUDA toolkit prints of a compiled kernel."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(compiled.asm["cubin"])
        name, *options = command
        return subprocess.run([nvidia_tool(name), *options, path], capture_output=True, text=True, check=True).stdout


def _read_nvidia(compiled: Any) -> tuple[int, int, list[str], str]:
    """Read registers, spilled bytes, instructions of the main loop and the tensor-core instruction of a cubin."""
    registers, spilled = registers_and_spills(compiled)
    code = nvidia_assembly(compiled)
    instructions = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)(.*)")
    # In warp-specialised kernels, warps wait for a partition in a loop around all partitions.
    loop = _main_loop(
        code, re.compile(r"^\s*\.(L_x_\d+):"), instructions, re.compile(r"\.(L_x_\d+)"), "BRA",
        "setmaxnreg" in compiled.asm["ptx"],
    )  # fmt: skip
    return registers, spilled, loop, tensor_instruction_of(compiled)


def _read_amd(compiled: Any) -> tuple[int, int, list[str], str]:
    """Read the same from AMD's assembly, whose metadata has the counts."""
    code = compiled.asm["amdgcn"]

    def number(name: str) -> int:
        match = re.search(rf"\.{name}:\s+(\d+)", code)
        if match is None:
            raise RuntimeError(f"the assembly's metadata has no .{name}")
        return int(match.group(1))

    spilled = 4 * number("vgpr_spill_count") + number("private_segment_fixed_size")
    instructions = re.compile(r"^\s+([a-z]\w+)(.*)")
    loop = _main_loop(code, re.compile(r"^\.(LBB\d+_\d+):"), instructions, re.compile(r"\.(LBB\d+_\d+)"), r"s_c?branch")
    return number("vgpr_count"), spilled, loop, tensor_instruction_of(compiled)


def _main_loop(
    code: str,
    label: re.Pattern[str],
    instruction: re.Pattern[str],
    target: re.Pattern[str],
    branch: str,
    innermost: bool = False,
) -> list[str]:
    """Return the loop with the most products; of several (for full and masked tail tiles), the shortest.

    With ``innermost``, a loop around another with products does not count.
    """
    instructions: list[str] = []
    starts: dict[str, int] = {}
    bounds: list[tuple[int, int]] = []
    for line in code.splitlines():
        if match := label.match(line):
            starts[match.group(1)] = len(instructions)
        elif match := instruction.search(line):
            instructions.append(match.group(1) + match.group(2))
            back = target.search(match.group(2))
            if back and re.match(branch, match.group(1)) and back.group(1) in starts:
                body = instructions[starts[back.group(1)] :]
                # A slow path after the end of the kernel also jumps back, but is not a loop.
                if not any(re.match(r"EXIT|RET|s_endpgm", each) for each in body):
                    bounds.append((starts[back.group(1)], len(instructions)))

    # Multiply-adds of the lanes count as products only without tensor-core products: distances use them, too.
    tensor = r"HGMMA|HMMA|UTC\w*MMA|v_mfma"
    product = tensor if any(re.match(tensor, each) for each in instructions) else r"FFMA|v_(pk_)?fmac?_f32"

    def products(loop: list[str]) -> int:
        return sum(1 for each in loop if re.match(product, each))

    def is_innermost(begin: int, end: int) -> bool:
        inside = [(b, e) for b, e in bounds if begin <= b and e <= end and (b, e) != (begin, end)]
        return not any(products(instructions[b:e]) for b, e in inside)

    loops = [instructions[b:e] for b, e in bounds if not innermost or is_innermost(b, e)]
    most = max(map(products, loops), default=0)
    return min((loop for loop in loops if 2 * products(loop) > most), key=len, default=[])
