"""Tensors as arguments of the extension, in DLPack capsules."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.utils.dlpack import from_dlpack, to_dlpack

from maskattn import _native
from maskattn.extension import argument_of

STARTS = torch.tensor([0, 2, 5], dtype=torch.int32)


def attend(q, k, v, out, lse, starts=STARTS):
    """Attend with these arguments, each a tensor or anything else."""
    given = [argument_of(x) if isinstance(x, torch.Tensor) else x for x in (q, k, v, starts, starts, out, lse)]
    _native.attention_forward(*given, scale=0.3)


def rows(*shape, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_tensor_and_an_array_of_the_same_memory_give_the_same(dtype):
    qkv, out, lse = rows(5, 3, 2, 24, dtype=dtype), rows(5, 2, 24, dtype=dtype), rows(2, 5)
    q, k, v = qkv.unbind(1)  # with strides
    attend(q, k, v, out, lse)
    arrays = [
        (x.view(torch.uint16) if dtype == torch.bfloat16 else x).numpy() for x in (q, k, v, torch.empty_like(out))
    ]
    lse_array = np.empty_like(lse.numpy())
    attend(*arrays, lse_array, starts=STARTS.numpy())
    assert np.array_equal(arrays[3], (out.view(torch.uint16) if dtype == torch.bfloat16 else out).numpy())
    assert np.array_equal(lse_array, lse.numpy())


def test_a_view_from_the_middle_of_a_tensor_is_read_there():
    x, out, lse = rows(9, 2, 16), [torch.empty(5, 2, 16) for _ in range(2)], torch.empty(2, 5)
    attend(x[3:8], x[3:8], x[3:8], out[0], lse)
    attend(*[x[3:8].clone()] * 3, out[1], lse)
    assert torch.equal(*out)


def test_the_memory_of_a_tensor_that_is_gone_lives_as_long_as_its_capsule():
    x, out, lse = rows(5, 2, 16), torch.empty(5, 2, 16), torch.empty(2, 5)
    expected = torch.empty_like(out)
    attend(x, x, x, expected, lse)
    capsules = [argument_of(x.clone()) for _ in range(3)]
    attend(*capsules, out, lse)
    assert torch.equal(out, expected)


def test_a_tensor_can_be_resized_after_it_was_an_argument():
    x = rows(5, 2, 16)
    attend(x, x, x, torch.empty(5, 2, 16), torch.empty(2, 5))
    assert x.resize_(50, 2, 16).shape == (50, 2, 16)


def test_a_tensor_that_learns_is_read():
    x = rows(5, 2, 16).requires_grad_()
    attend(x, x, x, torch.empty(5, 2, 16), torch.empty(2, 5))


def test_a_negated_view_is_read_with_its_sign():
    x = torch.view_as_complex(rows(5, 2, 16, 2)).conj().imag
    assert x.is_neg()
    outs = [torch.empty(5, 2, 16) for _ in range(2)]
    attend(x, x, x, outs[0], torch.empty(2, 5))
    attend(*[x.resolve_neg().contiguous()] * 3, outs[1], torch.empty(2, 5))
    assert torch.equal(*outs)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": rows(5, 2, 16).double()}, "q of dtype float32 or uint16 .bfloat16., got q.dtype=float64"),
        ({"k": rows(5, 2, 16).bfloat16()}, "k of dtype float32, got k.dtype=bfloat16"),
        ({"v": torch.zeros(5, 2, 16, dtype=torch.complex64)}, "got v.dtype=complex64"),
        ({"starts": torch.tensor([0, 2, 5])}, "cu_seqlens_q of dtype int32, got cu_seqlens_q.dtype=int64"),
    ],
)
def test_a_wrong_dtype_is_named(change, message):
    x = rows(5, 2, 16)
    given = {"q": x, "k": x, "v": x, "out": torch.empty(5, 2, 16), "lse": torch.empty(2, 5)} | change
    with pytest.raises(TypeError, match=message):
        attend(**given)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": rows(5, 32)}, r"q with 3 axes, got q.shape=\(5, 32\)"),
        ({"v": rows(4, 2, 16)}, r"v of shape \(Tk, H, D\) = \(5, 2, 16\), got v.shape=\(4, 2, 16\)"),
        ({"q": rows(5, 2, 32)[..., ::2]}, "q contiguous along its last axis"),
        ({"out": torch.empty(1, 2, 16).expand(5, 2, 16)}, "out whose elements each have a place of their own"),
    ],
)
def test_a_wrong_shape_or_stride_is_named(change, message):
    x = rows(5, 2, 16)
    given = {"q": x, "k": x, "v": x, "out": torch.empty(5, 2, 16), "lse": torch.empty(2, 5)} | change
    with pytest.raises(ValueError, match=message):
        attend(**given)


def test_a_capsule_that_became_a_tensor_is_refused():
    x = rows(5, 2, 16)
    capsule = to_dlpack(x)
    from_dlpack(capsule)
    with pytest.raises(TypeError, match="q as a numpy array or a DLPack capsule of a tensor, got <class 'PyCapsule'>"):
        attend(capsule, x, x, torch.empty(5, 2, 16), torch.empty(2, 5))


def test_tensors_without_memory_are_refused():
    def refused(x):
        with pytest.raises(RuntimeError):
            argument_of(x)
        return x

    torch.func.vmap(refused)(rows(5, 2))


def test_tensors_of_other_devices_are_refused():
    with pytest.raises(BufferError):
        argument_of(torch.empty(3, device="meta"))
