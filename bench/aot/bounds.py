"""Upper bounds set by a chip: the rate of each of its pipes in a kernel's main loop, and how many programs fit.

One item of the main loop is one tile of BLOCK_M × BLOCK_N scores of one program. For each pipe of an SM, the cycles for
a tile are the results that its instructions request, divided by the pipe's results per clock. If everything overlaps
(resident programs, or stages within one), the slowest pipe is the bound. If a program's products and its other work
alternate and nothing fills the gaps, the products and the slowest of the rest add up. Latencies, memory, tails and
launches are not included, nor is the shared-memory traffic of TMA and tcgen05: the numbers are ceilings, not forecasts.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from bench.aot.machine_code import MachineCode
from maskattn.kernels.tables.config import Config, Pass, Target

# Largest shared memory of one program in bytes.
SHARED_LIMITS: dict[Target, int] = {
    "sm80": 163 * 1024,
    "sm86": 99 * 1024,
    "sm90": 227 * 1024,
    "sm100": 227 * 1024,
    "sm120": 99 * 1024,
    "gfx90a": 64 * 1024,
    "gfx942": 64 * 1024,
    "gfx950": 160 * 1024,
}

# Columns of Blackwell's tensor memory, per SM.
TENSOR_MEMORY_COLUMNS = 512

# Bytes that the driver reserves in addition to each program's own.
RESERVED_SHARED = 1024

# Number of products of shape (M, D) by (D, N), or of the same amount of work, for one tile.
PRODUCTS: dict[Pass, int] = {"forward": 2, "query_gradient": 3, "key_gradient": 4}


@dataclass(frozen=True)
class Chip:
    """One SM's rates per clock and its capacities, and the SMs and clock at which TFLOP/s are quoted.

    ``tensor_flop`` is the data sheet's dense bfloat16 rate over SMs and clock; lanes are results per clock from the
    table of arithmetic throughput in NVIDIA's CUDA C++ Programming Guide, in which minimum, maximum, comparison and
    conversion run at the integer rate. Four schedulers issue one instruction of a warp each; shared memory and L1 move
    128 bytes.
    """

    name: str
    sms: int
    clock_ghz: float
    tensor_flop: int
    fp32_lanes: int
    shared_bytes: int
    warps: int
    programs: int
    integer_lanes: int = 64
    mufu_lanes: int = 16
    shuffle_lanes: int = 32
    load_bytes: int = 128
    schedulers: int = 4
    registers: int = 65536

    @property
    def dense_tflops(self) -> float:
        """The tensor cores' rate without stalls, in TFLOP/s."""
        return self.tflops(self.tensor_flop)

    def tflops(self, flop_per_clock: float) -> float:
        """The chip's TFLOP/s if each SM does this many per clock."""
        return flop_per_clock * self.sms * self.clock_ghz / 1e3


CHIPS: dict[Target, Chip] = {
    "sm80": Chip("A100", 108, 1.41, 2048, fp32_lanes=64, shared_bytes=164 * 1024, warps=64, programs=32),
    "sm86": Chip("A40", 84, 1.74, 1024, fp32_lanes=128, shared_bytes=100 * 1024, warps=48, programs=16),
    "sm90": Chip("H200", 132, 1.83, 4096, fp32_lanes=128, shared_bytes=228 * 1024, warps=64, programs=32),
    "sm100": Chip("B200", 148, 1.85, 8192, fp32_lanes=128, shared_bytes=228 * 1024, warps=64, programs=32),
}


@dataclass(frozen=True)
class Cycles:
    """Clocks for which each pipe of one SM is busy with one tile.

    Shared memory is used by ``load_store`` (loads, stores and shuffles) and ``operands`` (direct reads by wgmma).
    """

    tensor: float
    operands: float
    mufu: float
    fp32: float
    integer: float
    load_store: float
    issue: float

    @property
    def of_pipes(self) -> dict[str, float]:
        """The clocks by pipe, with the two uses of shared memory added up."""
        return {
            "tensor": self.tensor,
            "mufu": self.mufu,
            "fp32": self.fp32,
            "integer": self.integer,
            "shared memory": self.operands + self.load_store,
            "issue": self.issue,
        }

    @property
    def overlapped(self) -> float:
        """The time if all pipes overlap: that of the slowest."""
        return max(self.of_pipes.values())

    @property
    def series(self) -> float:
        """The time if products and other work alternate: the products, then the slowest of the rest."""
        others = max(self.mufu, self.fp32, self.integer, self.load_store, self.issue)
        return max(self.tensor, self.operands) + others


@dataclass(frozen=True)
class Bound:
    """The bounds of one case; TFLOP/s count a pass's own products at the true head width."""

    cycles: Cycles
    slowest: str
    overlapped_tflops: float
    series_tflops: float
    resident_programs: int

    def columns(self) -> dict[str, object]:
        """Return the table's columns; clocks are those of one SM for one tile."""
        return {
            **{f"{name}_cycles": round(value) for name, value in asdict(self.cycles).items()},
            "slowest": self.slowest,
            "overlapped_tflops": round(self.overlapped_tflops, 1),
            "series_tflops": round(self.series_tflops, 1),
            "resident_programs": self.resident_programs,
        }


def bound_of(code: MachineCode, config: Config, pass_: Pass, target: Target, head_width: int, tile_width: int) -> Bound:
    """Compute the bound of one compiled case.

    Args:
        code: its machine code, for an NVIDIA target.
        config: the tile and warps of the compilation.
        pass_, target: its pass and chip.
        head_width: D, the columns that count as work.
        tile_width: columns that the tile computes, padding included; used if opcodes do not name a product's shape.
    """
    chip, scores = CHIPS[target], config.block_m * config.block_n
    flop_at_tile_width = 2.0 * PRODUCTS[pass_] * scores * tile_width
    cycles = pipe_cycles(code.loop, config.num_warps, chip, flop_at_tile_width)
    flop = 2.0 * PRODUCTS[pass_] * scores * head_width
    return Bound(
        cycles=cycles,
        slowest=max(cycles.of_pipes, key=lambda pipe: cycles.of_pipes[pipe]),
        overlapped_tflops=chip.tflops(flop / cycles.overlapped),
        series_tflops=chip.tflops(flop / cycles.series),
        resident_programs=resident_programs(code, config.num_warps, chip),
    )


def pipe_cycles(loop: Sequence[str], num_warps: int, chip: Chip, flop_without_shape: float = 0.0) -> Cycles:
    """Compute the clocks of one SM's pipes for one tile.

    Args:
        loop: instructions that each of the program's warps issues for a tile.
        num_warps: warps of the program.
        chip: the chip whose rates apply.
        flop_without_shape: the tensor cores' work, used if an opcode does not name its shape (``UTCHMMA``).
    """
    results = dict.fromkeys(("mufu", "fp32", "integer"), 0.0)
    tensor_flop = operand_bytes = bytes_moved = shuffles = 0.0
    for instruction in loop:
        opcode = instruction.split()[0]
        tensor_flop += _flop_per_warp(opcode)
        operand_bytes += _operand_bytes_per_warp(instruction)
        bytes_moved += _bytes_per_warp(opcode)
        shuffles += opcode.startswith(("SHFL", "MOVM"))
        pipe, lanes = _pipe(opcode)
        if pipe:
            results[pipe] += lanes
    if any(re.match(r"UTC\w*MMA", instruction) for instruction in loop):
        tensor_flop = flop_without_shape / num_warps
    return Cycles(
        tensor=num_warps * tensor_flop / chip.tensor_flop,
        operands=num_warps * operand_bytes / chip.load_bytes,
        mufu=num_warps * results["mufu"] / chip.mufu_lanes,
        fp32=num_warps * results["fp32"] / chip.fp32_lanes,
        integer=num_warps * results["integer"] / chip.integer_lanes,
        load_store=num_warps * (bytes_moved / chip.load_bytes + 32 * shuffles / chip.shuffle_lanes),
        issue=num_warps * len(loop) / chip.schedulers,
    )


def resident_programs(code: MachineCode, num_warps: int, chip: Chip) -> int:
    """Compute how many programs one SM holds, by registers, shared and tensor memory and the chip's own limits."""
    # Each scheduler has its own registers and allocates them to warps in units of 256.
    of_warp = -(-code.registers * 32 // 256) * 256
    warps = min(chip.warps, chip.schedulers * (chip.registers // chip.schedulers // of_warp))
    limits = [chip.programs, warps // num_warps, chip.shared_bytes // (code.shared_bytes + RESERVED_SHARED)]
    if code.tensor_memory:
        limits.append(TENSOR_MEMORY_COLUMNS // code.tensor_memory)
    return min(limits)


def _flop_per_warp(opcode: str) -> float:
    """Return a warp's share of the tensor cores' work in an instruction whose opcode names its shape."""
    if match := re.match(r"HGMMA\.(\d+)x(\d+)x(\d+)", opcode):
        m, n, k = map(int, match.groups())
        # Four warps issue one product together.
        return 2.0 * m * n * k / 4
    if match := re.match(r"HMMA\.16(8)(8|16)\b", opcode):
        return 2.0 * 16 * int(match.group(1)) * int(match.group(2))
    return 0.0


def _operand_bytes_per_warp(instruction: str) -> float:
    """Return a warp's share of the bytes that a product itself reads from shared memory."""
    match = re.match(r"HGMMA\.(\d+)x(\d+)x(\d+)", instruction)
    if match is None:
        return 0.0
    m, n, k = map(int, match.groups())
    # The right operand is always in shared memory, the left one unless registers hold it.
    rows = n if re.search(r",\s*R\d+,\s*gdesc", instruction) else m + n
    return 2.0 * rows * k / 4


def _bytes_per_warp(opcode: str) -> float:
    """Return the bytes that an instruction of one warp moves through shared memory and L1."""
    if match := re.match(r"LDSM\.16\.\w+\.(\d)", opcode):
        return 128.0 * int(match.group(1))
    if re.match(r"(LD|ST)[GSL]|LDGSTS|ATOM|RED", opcode) and not re.match(r"LDGDEPBAR|REDUX", opcode):
        width = re.search(r"\.(128|64|U?16|[SU]8)\b", opcode)
        bits = int(re.sub(r"\D", "", width.group(1))) if width else 32
        return 32.0 * bits / 8
    return 0.0


def _pipe(opcode: str) -> tuple[str, float]:
    """Return the pipe that an opcode uses and its number of results for one warp; "" for one that only issues."""
    if opcode.startswith("MUFU"):
        return "mufu", 32.0
    if re.match(r"F(ADD|MUL|FMA)2", opcode):
        return "fp32", 64.0
    if re.match(r"F(ADD|MUL|FMA)|H(ADD|MUL|FMA)2", opcode):
        return "fp32", 32.0
    if re.match(r"IMAD", opcode):
        # Only half of the multiply-add lanes support integers.
        return "fp32", 64.0
    # The uniform datapath (U…) computes once for a warp, independently of these lanes.
    if re.match(r"F(MNMX|SEL|SETP|CHK|2)|I(2F|ADD|SETP|MNMX|ABS)|LEA|LOP|SHF\b|PRMT|MOV\b|SEL|VI|PLOP|SGXT", opcode):
        return "integer", 32.0
    return "", 0.0
