"""Arguments that the C++ attention refuses, and the messages with which it does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from maskattn import _native

INFINITY = float("inf")


def arguments(**changed: Any) -> dict[str, Any]:
    """A valid call of attention_forward with some of its arguments changed."""
    x, starts = np.zeros((5, 2, 16), np.float32), np.array([0, 2, 5], np.int32)
    good = {"q": x, "k": x, "v": x, "cu_seqlens_q": starts, "cu_seqlens_k": starts, "out": x.copy(), "scale": 1.0}
    return good | {"lse": np.zeros((2, 5), np.float32)} | changed


def rows(*shape: int, dtype: Any = np.float32) -> np.ndarray:
    return np.zeros(shape, dtype)


def read_only(x: np.ndarray) -> np.ndarray:
    x.flags.writeable = False
    return x


def misaligned(*shape: int) -> np.ndarray:
    return np.zeros(4 * int(np.prod(shape)) + 1, np.uint8)[1:].view(np.float32).reshape(shape)


BAD_TYPES = [
    ({"q": [[1.0]]}, "q as a numpy array or a DLPack capsule of a tensor, got <class 'list'>"),
    ({"q": rows(5, 2, 16, dtype=np.float64)}, "q of dtype float32 or uint16 .bfloat16., got q.dtype=float64"),
    ({"k": rows(5, 2, 16, dtype=np.uint16)}, "k of dtype float32, got k.dtype=uint16"),
    ({"v": rows(5, 2, 16, dtype=">f4")}, "v of dtype float32, got v.dtype=>f4"),
    ({"cu_seqlens_q": np.array([0, 2, 5])}, "cu_seqlens_q of dtype int32, got cu_seqlens_q.dtype=int64"),
    ({"lse": rows(2, 5, dtype=np.float64)}, "lse of dtype float32"),
    ({"key_bias": [0.0]}, "key_bias as a numpy array"),
    ({"scale": "1"}, "scale as a float, got '1'"),
    ({"threads": None}, "threads as an int, got None"),
    ({"key_bais": rows(5)}, "attention_forward needs keywords among .*key_bias.*, got key_bais"),
    ({"skip_queries": True}, "got skip_queries"),
    ({"threads": 1.5}, "threads as an int, got 1.5"),
    ({"instruction_set": 3}, "instruction_set as a str, got 3"),
]
BAD_VALUES = [
    ({"q": rows(5, 32)}, r"q with 3 axes, got q.shape=\(5, 32\)"),
    ({"q": rows(5, 2, 12)}, "D of 16 to 256 in steps of 8, got D=12"),
    ({"q": rows(5, 2, 264)}, "got D=264"),
    ({"q": rows(5, 2, 8)}, "got D=8"),
    ({"v": rows(4, 2, 16)}, r"v of shape \(Tk, H, D\) = \(5, 2, 16\), got v.shape=\(4, 2, 16\)"),
    ({"k": rows(5, 3, 16), "v": rows(5, 3, 16)}, r"k of shape .* got k.shape=\(5, 3, 16\)"),
    ({"q": rows(5, 2, 32)[..., ::2]}, "q contiguous along its last axis"),
    ({"q": misaligned(5, 2, 16)}, "q aligned to its elements"),
    ({"cu_seqlens_q": np.array([[0, 5]], np.int32)}, "cu_seqlens_q with 1 axes"),
    ({"cu_seqlens_q": np.array([], np.int32)}, r"cu_seqlens_q of shape \(B \+ 1,\), got no element"),
    ({"cu_seqlens_q": np.array([1, 2, 5], np.int32)}, r"starts at 0, got cu_seqlens_q\[0\]=1"),
    ({"cu_seqlens_q": np.array([0, 6, 5], np.int32)}, r"never decreases, got cu_seqlens_q\[2\]=5 after 6"),
    ({"cu_seqlens_k": np.array([0, 2, 4], np.int32)}, r"ends at the 5 rows of k, got cu_seqlens_k\[2\]=4"),
    ({"cu_seqlens_k": np.array([0, 5], np.int32)}, "as many query as key sequences, got 2 and 1"),
    ({"out": rows(5, 2, 24)}, r"out of shape \(Tq, H, D\)"),
    ({"out": read_only(rows(5, 2, 16))}, "out that can be written to, got a read-only array"),
    ({"out": np.lib.stride_tricks.as_strided(rows(5, 2, 16), (5, 2, 16), (0, 64, 4))}, "a place of their own"),
    ({"lse": rows(5, 2)}, r"lse of shape \(H, Tq\) = \(2, 5\), got lse.shape=\(5, 2\)"),
    ({"scale": INFINITY}, "a finite scale, got scale=inf"),
    ({"scale": float("nan")}, "a finite scale"),
    ({"key_bias": rows(4)}, r"key_bias of shape \(Tk,\) = \(5,\), got key_bias.shape=\(4,\)"),
    ({"key_bias": rows(2, 5)}, r"key_bias of shape \(Tk, H\)"),
    ({"slopes": rows(2)}, "coords_q, coords_k and slopes together, got 1 of the three"),
    ({"coords_q": rows(5, 2), "coords_k": rows(5, 3), "slopes": rows(2)}, r"coords_k of shape \(Tk, 2\)"),
    ({"coords_q": rows(5, 2), "coords_k": rows(5, 2), "slopes": rows(3)}, r"slopes of shape \(H,\)"),
    ({"threads": -1}, "threads >= 0, got threads=-1"),
    ({"instruction_set": "mmx"}, "instruction_set='mmx'; choose among .*portable"),
]


def dense_arguments(**more: Any) -> dict[str, Any]:
    """A valid call of masked_attention_forward."""
    x, keep = rows(2, 3, 5, 16), rows(2, 5, dtype=bool)
    return {"q": x, "k": x, "v": x, "keep": keep, "out": x.copy(), "lse": rows(2, 3, 5), "scale": 1.0} | more


def readout_arguments(**more: Any) -> dict[str, Any]:
    """A valid call of readout_forward."""
    q, x, starts = rows(1, 1, 2, 16), rows(5, 2, 16), np.array([0, 5], np.int32)
    good = {"q": q, "k": x, "v": x, "cu_seqlens": starts, "out": q.copy(), "lse": rows(1, 1, 2), "scale": 1.0}
    return good | more


def gradients(call: dict[str, Any]) -> dict[str, Any]:
    """The same call for the backward pass."""
    return call | {"grad_out": call["q"]} | {f"d{name}": np.zeros_like(call[name]) for name in "qkv"}


CALLS: dict[str, Callable[[], dict[str, Any]]] = {
    "attention_backward": lambda: gradients(arguments()),
    "masked_attention_forward": dense_arguments,
    "masked_attention_backward": lambda: gradients(dense_arguments()),
    "readout_forward": readout_arguments,
    "readout_backward": lambda: gradients(readout_arguments()),
    "token_relevance": lambda: readout_arguments(grad_out=rows(3, 1, 1, 2, 16), relevance=rows(3, 5)),
}


@pytest.mark.parametrize(("changed", "message"), BAD_TYPES)
def test_wrong_types_are_refused(changed, message):
    with pytest.raises(TypeError, match=message):
        _native.attention_forward(**arguments(**changed))


@pytest.mark.parametrize(("changed", "message"), BAD_VALUES)
def test_wrong_values_are_refused(changed, message):
    with pytest.raises(ValueError, match=message):
        _native.attention_forward(**arguments(**changed))


def test_a_good_call_is_not_refused():
    call = arguments()
    _native.attention_forward(**call)
    np.testing.assert_allclose(call["lse"], np.log([[2, 2, 3, 3, 3]] * 2), rtol=1e-6)


@pytest.mark.parametrize(
    ("operation", "foreign"),
    [
        ("attention_backward", "rows"),
        ("masked_attention_forward", "dbias"),
        ("masked_attention_backward", "grad_rows"),
        ("readout_forward", "skip_queries"),
        ("readout_backward", "key_origin"),
        ("token_relevance", "lse_rest"),
    ],
)
def test_a_keyword_of_another_operation_is_refused(operation, foreign):
    good = CALLS[operation]()
    getattr(_native, operation)(**good)
    with pytest.raises(TypeError, match=f"{operation} needs keywords among .*, got {foreign}"):
        getattr(_native, operation)(**good, **{foreign: None})


def refused(operation: Callable[..., None], message: str, *args: Any, **options: Any) -> None:
    with pytest.raises(ValueError, match=message):
        operation(*args, scale=1.0, **options)


def test_masked_calls_and_gradients_are_checked_too():
    dense, lse, keep = rows(2, 3, 5, 16), rows(2, 3, 5), rows(2, 5, dtype=bool)
    forward, backward = _native.masked_attention_forward, _native.masked_attention_backward
    q, out, one = rows(2, 3, 4, 16), rows(2, 3, 4, 16), rows(2, 3, 4)
    refused(forward, "as many queries as keys .* got Nq=4 and N=5", q, dense, dense, keep, out, one)
    refused(forward, r"keep of shape \(B, N\)", dense, dense, dense, keep[:, :4], dense.copy(), lse)
    with pytest.raises(TypeError, match="keep of dtype bool"):
        forward(dense, dense, dense, keep.view(np.uint8), dense.copy(), lse, scale=1.0)
    call = (dense, dense, dense, dense, dense, lse, keep, dense.copy(), dense.copy(), dense.copy())
    refused(backward, "key_bias to write dbias, got None", *call, dbias=rows(2, 5))
    refused(backward, "slopes to write dslopes, got None", *call, dslopes=rows(3))
    refused(backward, r"dbias of shape \(B, N\)", *call, key_bias=rows(2, 5), dbias=rows(2, 3, 5))
    refused(backward, r"grad_lse of shape \(B, H, Nq\)", *call, grad_lse=rows(2, 5, 3))
    backward(*call, scale=1.0)
