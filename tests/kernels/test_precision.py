"""precision="tf32x3": that every product of float32 tiles asks for it, and that its sums keep float32's error budget.

The interpreter multiplies float32 as it is, whatever it is asked for. Here its product rounds as tensor cores do:
operands to the ten bits of TensorFloat-32, their products and sums in float32. With three products x·y is taken as
x₁·y₁ + x₁·y₂ + x₂·y₁, where x₁ is x rounded to the nearest and x₂ the rest, cut off (Markidis et al., IPDPSW 2018).
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
import triton
from launch import run_masked, run_packed
from oracles import (
    assert_meets_specification,
    cu_seqlens,
    keep_mask,
    masked_inputs,
    packed_inputs,
    specify_masked,
    specify_packed,
    with_alibi,
)
from triton._C.libtriton import ir
from triton.runtime import interpreter

pytestmark = pytest.mark.skipif(not triton.knobs.runtime.interpret, reason="a GPU has tensor cores of its own")

LENGTHS = [70, 0, 33]


def nearest_tf32(x: np.ndarray) -> np.ndarray:
    """x rounded to the nearest number of TensorFloat-32, halves away from 0."""
    return ((x.view(np.uint32) + np.uint32(0x1000)) & np.uint32(0xFFFFE000)).view(np.float32)


def cut_tf32(x: np.ndarray) -> np.ndarray:
    """x without the bits that TensorFloat-32 lacks."""
    return (x.view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32)


def one_product(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.matmul(nearest_tf32(a), nearest_tf32(b), dtype=np.float32)


def three_products(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    a1, b1 = nearest_tf32(a), nearest_tf32(b)
    a2, b2 = cut_tf32(a - a1), cut_tf32(b - b1)
    small = np.matmul(a2, b1, dtype=np.float32) + np.matmul(a1, b2, dtype=np.float32)
    return small + np.matmul(a1, b1, dtype=np.float32)


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each precision was asked for; "tf32x3" is computed as ``product`` of the counter says."""
    asked: Counter[str] = Counter()
    builder = interpreter.InterpreterBuilder
    plain = builder.create_dot

    def create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        single = a.data.dtype == np.float32
        asked[input_precision.name if single else "half"] += 1
        if not single or input_precision != ir.INPUT_PRECISION.TF32x3:
            return plain(self, a, b, d, input_precision, max_num_imprecise_acc)
        multiply = asked.product
        return interpreter.TensorHandle(multiply(a.data.copy(), b.data.copy()) + d.data, d.dtype.scalar)

    asked.product = three_products
    monkeypatch.setattr(builder, "create_dot", create_dot)
    return asked


def with_precision(inputs, precision="tf32x3"):
    return replace(inputs, precision=precision)


@pytest.mark.parametrize("bias", [None, "per_head"])
@pytest.mark.parametrize("head_width", [16, 40, 64])
def test_three_products_of_tf32_keep_the_budget_of_float32(head_width, bias, products):
    inputs = with_precision(packed_inputs(LENGTHS, head_width=head_width, bias=bias))
    starts = cu_seqlens(LENGTHS)
    assert_meets_specification(run_packed(inputs, LENGTHS, LENGTHS, "cpu"), inputs, specify_packed(starts, starts))
    # Forward, both gradients: nothing was multiplied in another way.
    assert set(products) == {"TF32x3"}


def test_dense_tensors_with_options_too(products):
    inputs, keep = with_precision(with_alibi(masked_inputs(2, 50, bias="shared"))), keep_mask("random", 2, 50)
    assert_meets_specification(run_masked(inputs, keep, True, "cpu"), inputs, specify_masked(keep, True))
    assert set(products) == {"TF32x3"}


def test_one_product_of_tf32_does_not(products):
    products.product = one_product
    inputs, starts = with_precision(packed_inputs(LENGTHS)), cu_seqlens(LENGTHS)
    results = run_packed(inputs, LENGTHS, LENGTHS, "cpu")
    with pytest.raises(AssertionError, match="over budget"):
        assert_meets_specification(results, inputs, specify_packed(starts, starts))


def test_nothing_is_rounded_without_the_option(products):
    inputs = packed_inputs(LENGTHS)
    run_packed(inputs, LENGTHS, LENGTHS, "cpu")
    assert set(products) == {"IEEE"}


def test_half_precision_has_no_such_choice(products):
    inputs = with_precision(packed_inputs(LENGTHS, dtype=torch.float16))
    run_packed(inputs, LENGTHS, LENGTHS, "cpu")
    assert set(products) == {"half"}
