"""The simulator is as strict as hardware: barriers are exact, data is late, integers and memory have their bounds."""

from __future__ import annotations

import pytest
import torch
from simulated_launch import simulating
from simulated_machine import Barrier
from simulated_values import ProgramError
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma


def test_a_barrier_ends_its_phase_with_the_last_arrival_and_the_last_byte():
    barrier = Barrier(2)
    assert barrier.has_passed(1)
    assert not barrier.has_passed(0)
    barrier.expect(64)
    barrier.arrive(1)
    barrier.complete(32)
    assert barrier.phase == 0
    barrier.complete(32)
    assert barrier.phase == 1
    assert barrier.has_passed(0)
    assert not barrier.has_passed(1)
    with pytest.raises(ProgramError, match="3 arrivals where a barrier of 2 waits for 2"):
        barrier.arrive(3)


@gluon.jit
def copy_kernel(source_ptr, out_ptr, rows, WAITS: gl.constexpr, TWICE: gl.constexpr):
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [16, 2], [4, 1], [1, 0])
    SHARED: gl.constexpr = gl.NVMMASharedLayout.get_default_for([16, 16], gl.float16)
    desc = tma.make_tensor_descriptor(source_ptr, [rows, 16], [16, 1], [16, 16], SHARED)
    room = gl.allocate_shared_memory(gl.float16, [16, 16], SHARED)
    barrier = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(barrier, count=1)
    mbarrier.expect(barrier, desc.block_type.nbytes)
    tma.async_copy_global_to_shared(desc, [0, 0], barrier, room)
    if WAITS:
        mbarrier.wait(barrier, 0)
    offsets = gl.arange(0, 16, gl.SliceLayout(1, LAYOUT))[:, None] * 16 + gl.arange(0, 16, gl.SliceLayout(0, LAYOUT))
    gl.store(out_ptr + offsets, room.load(LAYOUT))
    if TWICE:
        mbarrier.wait(barrier, 1)


def copied(rows: int = 16, waits: bool = True, twice: bool = False) -> tuple[Tensor, Tensor]:
    source, out = torch.randn(rows, 16).half(), torch.zeros(16, 16).half()
    with simulating():
        copy_kernel[(1,)](source, out, rows, waits, twice)
    return source, out


def test_what_the_copy_engine_brings_is_there_after_the_wait_and_rows_past_the_bound_are_zero():
    source, out = copied(rows=5)
    assert torch.equal(out[:5], source)
    assert out[5:].eq(0).all()


def test_a_block_that_nobody_waits_for_and_a_phase_that_never_ends_are_faults():
    with pytest.raises(ProgramError, match="nobody waited for"):
        copied(waits=False)
    with pytest.raises(ProgramError, match="deadlock: parity 1"):
        copied(twice=True)


@gluon.jit
def product_kernel(x_ptr, out_ptr, FENCED: gl.constexpr, WAITED: gl.constexpr):
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [16, 2], [4, 1], [1, 0])
    RESULT: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 64, 16])
    SHARED: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, 16], gl.float16)
    offsets = gl.arange(0, 64, gl.SliceLayout(1, LAYOUT))[:, None] * 16 + gl.arange(0, 16, gl.SliceLayout(0, LAYOUT))
    x = gl.allocate_shared_memory(gl.float16, [64, 16], SHARED)
    x.store(gl.load(x_ptr + offsets))
    if FENCED:
        hopper.fence_async_shared()
    zeros = gl.full([64, 64], 0.0, gl.float32, RESULT)
    product = hopper.warpgroup_mma(x, x.permute((1, 0)), zeros, is_async=True)
    if not WAITED:
        x.store(gl.load(x_ptr + offsets))
    result = hopper.warpgroup_mma_wait(0, deps=(product,))
    rows, columns = gl.arange(0, 64, gl.SliceLayout(1, RESULT)), gl.arange(0, 64, gl.SliceLayout(0, RESULT))
    gl.store(out_ptr + rows[:, None] * 64 + columns[None, :], result)


def multiplied(fenced: bool = True, waited: bool = True) -> tuple[Tensor, Tensor]:
    x, out = torch.randn(64, 16).half(), torch.zeros(64, 64)
    with simulating():
        product_kernel[(1,)](x, out, fenced, waited)
    return x, out


def test_a_product_is_exact_and_shared_memory_is_fenced_before_and_untouched_until_it_is_done():
    x, out = multiplied()
    torch.testing.assert_close(out, x.float() @ x.float().T)
    with pytest.raises(ProgramError, match="without a fence"):
        multiplied(fenced=False)
    with pytest.raises(ProgramError, match="a product that was not waited for reads it"):
        multiplied(waited=False)


@gluon.jit
def offset_kernel(x_ptr, out_ptr, stride, WIDE: gl.constexpr):
    place = gl.program_id(0).to(gl.int64) if WIDE else gl.program_id(0)
    gl.store(out_ptr, gl.load(x_ptr + (place + 3) * stride))


@gluon.jit
def cast_kernel(out_ptr, count):
    gl.store(out_ptr, count.to(gl.int64))


def test_integers_do_not_overflow_and_memory_ends_where_the_tensor_does():
    x, out = torch.randn(8), torch.zeros(1)
    with simulating():
        offset_kernel[(1,)](x, out, 2, False)
        assert out == x[6]
        with pytest.raises(ProgramError, match="would read outside a tensor of 8 elements"):
            offset_kernel[(1,)](x, out, 3, False)
        with pytest.raises(ProgramError, match=r"does not fit into torch\.int32"):
            offset_kernel[(1,)](x, out, 2**30, False)
        with pytest.raises(ProgramError, match="would read outside"):
            offset_kernel[(1,)](x, out, 2**30, True)


def test_a_number_that_is_one_is_a_constant_as_the_launcher_makes_it():
    with simulating():
        cast_kernel[(1,)](torch.zeros(1), 2)
        with pytest.raises(AttributeError, match="no attribute 'to'"):
            cast_kernel[(1,)](torch.zeros(1), 1)
