"""No program reads or writes outside its kernel's tensors; faults planted on purpose are detected."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from triton.runtime.errors import InterpreterError

from bench.aot.every_call import OPERATIONS, Shape, run

pytestmark = pytest.mark.skipif(not triton.knobs.runtime.interpret, reason="looks into the interpreter's memory")


@triton.jit
def copy_kernel(x_ptr, y_ptr, read, written, stride, BLOCK: tl.constexpr):
    row = tl.arange(0, BLOCK)
    tl.store(y_ptr + row, tl.load(x_ptr + row * stride, mask=row < read, other=0.0), mask=row < written)


@triton.jit
def describe_kernel(x_ptr, y_ptr, rows, BLOCK: tl.constexpr):
    x = tl.make_tensor_descriptor(x_ptr, [rows, 16], [16, 1], [BLOCK, 16]).load([0, 0])
    tl.store(y_ptr + tl.arange(0, BLOCK), tl.sum(x, 1), mask=tl.arange(0, BLOCK) < 4)


@triton.jit
def narrow_kernel(x_ptr, y_ptr, stride, IS_NARROW: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.arange(0, BLOCK)
    offset = tl.cast(stride, tl.int32 if IS_NARROW else tl.int64) + 1
    tl.store(y_ptr + row, tl.load(x_ptr + offset + row))


@pytest.fixture
def memory():
    from bench.aot.outside import checked_memory

    with checked_memory() as found:
        yield found


@pytest.mark.parametrize(
    ("read", "written", "what"), [(11, 10, "reads 1 el"), (10, 12, "writes 2 el"), (10, 10, None)], ids=str
)
def test_a_read_or_a_write_past_the_end_is_detected(read, written, what, memory):
    x, y = torch.zeros(10), torch.zeros(10)
    if what is None:
        copy_kernel[(1,)](x, y, read, written, 1, BLOCK=16)
    else:
        with pytest.raises(InterpreterError, match=f"copy_kernel {what}"):
            copy_kernel[(1,)](x, y, read, written, 1, BLOCK=16)


def test_a_read_of_another_buffer_or_of_a_gap_is_detected(memory):
    x, y, other = torch.zeros(10, 3), torch.zeros(10), torch.zeros(10)
    copy_kernel[(1,)](x[:, 1], y, 10, 10, 3, BLOCK=16)
    with pytest.raises(InterpreterError, match="reads 6 el"):
        copy_kernel[(1,)](x[:, 1], y, 9, 9, 1, BLOCK=16)
    apart = (other.data_ptr() - x.data_ptr()) // x.element_size()
    with pytest.raises(InterpreterError, match="reads 1 el"):
        copy_kernel[(1,)](x, y, 2, 2, apart, BLOCK=16)


def test_the_language_is_replaced_once_for_each_module_and_is_itself_after_a_launch(monkeypatch):
    from triton.runtime import interpreter

    counted = []
    plain = interpreter._patch_lang_core
    monkeypatch.setattr(interpreter, "_patch_lang_core", lambda *given: (counted.append(given), plain(*given)))
    before = tl.load, tl.range, tl.tensor.__add__
    run("packed_attention", Shape((50, 3), head_width=16, dtype=torch.float32))
    # Three kernels, each with its own module, the language's and at most ten others.
    assert 3 <= len(counted) <= 40
    assert (tl.load, tl.range, tl.tensor.__add__) == before


def test_a_descriptor_outside_its_tensor_is_detected(memory):
    x, y = torch.zeros(4, 16), torch.zeros(4)
    describe_kernel[(1,)](x, y, 4, BLOCK=8)
    with pytest.raises(InterpreterError, match="reads 16 el"):
        describe_kernel[(1,)](x, y, 5, BLOCK=8)


@pytest.mark.parametrize("options", [False, True])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_every_operation_stays_within_its_tensors(operation, options, memory):
    run(operation, Shape((3, 0, 17), queries=2, head_width=24, dtype=torch.float32, options=options))
    assert memory.touched


@pytest.mark.parametrize("operation", ["packed_attention", "readout_with_rows", "packing"])
def test_tensors_spread_over_more_than_2_to_the_31_elements_stay_within_them(operation, memory):
    run(operation, Shape((70, 70), 2, head_width=16, far_apart=True))
    assert memory.touched


def test_offsets_that_do_not_fit_32_bits_are_detected(memory):
    far = torch.empty_strided((2, 16), (2**31, 1), dtype=torch.uint8)
    y = torch.zeros(32, dtype=torch.uint8)
    narrow_kernel[(1,)](far, y, 2**31 - 1, False, BLOCK=16)
    with pytest.raises(InterpreterError, match="reads 16 el"):
        narrow_kernel[(1,)](far, y, 2**31 - 1, True, BLOCK=16)


def test_the_addresses_of_elements_are_those_that_torch_says():
    from bench.aot.outside import Elements

    generator = torch.Generator().manual_seed(0)
    base, other = torch.zeros(4000), torch.zeros(500, dtype=torch.float64)
    for _ in range(100):
        size, stride = (torch.randint(1, most, (3,), generator=generator).tolist() for most in (5, 40))
        view = base.as_strided(size, stride, int(torch.randint(0, 3000, (), generator=generator)))
        tensors = [view, view[:1], base[100:200:3], other[:9], base[7:7]]
        elements = {
            x.data_ptr() + x.element_size() * sum(i * s for i, s in zip(index, x.stride(), strict=True))
            for x in tensors
            for index in itertools.product(*(range(n) for n in x.shape))
        }
        first, last = min(elements), max(elements)
        around = np.unique(np.concatenate([np.arange(a - 9, a + 9) for a in (*elements, first, last)]))
        outside = Elements(tensors).outside(around)
        assert outside == sum(address not in elements for address in around.tolist())
        assert Elements(tensors).outside(np.array(sorted(elements))) == 0
    assert Elements([]).outside(np.array([5])) == 1


def test_moving_rows_stays_within_its_tensors(memory):
    from bench.aot.outside import rows_moved

    with rows_moved():
        run("masked_attention", Shape((1, 9), head_width=16, dtype=torch.float32, options=True))
    assert "move_kernel" in memory.kernels
