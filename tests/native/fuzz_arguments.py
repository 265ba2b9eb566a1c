"""Call every binding of the extension with wrong arguments: each call must return or raise a Python exception.

Run as a process of its own by ``test_native_arguments.py``, so that a crash is seen: ``python fuzz_arguments.py
EXTENSION SEED CALLS``. The last line it prints names the call that it did not survive.

Dimension key: B sequences, N tokens, Tq and Tk packed query and key tokens, R readout queries, H heads, D head width,
K classes.
"""

from __future__ import annotations

import faulthandler
import functools
import importlib.util
import os
import resource
import sys
from collections.abc import Callable
from random import Random
from typing import Any

import numpy as np
from fuzz_pictures import overlay
from numpy.lib.stride_tricks import as_strided

Call = dict[str, Any]

MEMORY = 4 * 2**30  # more than any valid call here needs: whatever asks for more gets a MemoryError
SIZES = (0, 1, 2, 3, 7)
HEAD_WIDTHS = (16, 24, 40, 64)


def rows(rng: Random, half: bool, *shape: int) -> np.ndarray:
    """Rows of q, k or v; bfloat16 as its bits."""
    values = np.random.default_rng(rng.getrandbits(32)).standard_normal(shape, np.float32)
    return (values.view(np.uint32) >> 16).astype(np.uint16) if half else values


def floats(rng: Random, *shape: int) -> np.ndarray:
    return rows(rng, False, *shape)


def starts_of(rng: Random, sequences: int, total: int) -> np.ndarray:
    inner = sorted(rng.randint(0, total) for _ in range(sequences - 1))
    return np.array([0, *inner, total] if sequences else [0], np.int32)


def terms(rng: Random, bias: tuple[int, ...], places_q: tuple[int, ...], places_k: tuple[int, ...], H: int) -> Call:
    given: Call = {"threads": rng.choice([0, 1, 3]), "instruction_set": ""}
    if rng.random() < 0.5:
        given["key_bias"] = floats(rng, *(bias[:1] if rng.random() < 0.5 and len(bias) == 2 else bias))
    if rng.random() < 0.5:
        given |= {"coords_q": floats(rng, *places_q), "coords_k": floats(rng, *places_k), "slopes": floats(rng, H)}
    return given


def gradient_terms(rng: Random, given: Call) -> Call:
    pairs = (("dbias", "key_bias"), ("dslopes", "slopes"))
    return {name: np.empty_like(given[of]) for name, of in pairs if of in given and rng.random() < 0.8}


def packed(rng: Random, backward: bool) -> Call:
    half, D, H, B = rng.random() < 0.5, rng.choice(HEAD_WIDTHS), rng.choice(SIZES), rng.choice(SIZES[1:])
    Tq, Tk = rng.choice((0, 1, 5, 99)), rng.choice((0, 1, 5, 70, 300))
    q, k, v = rows(rng, half, Tq, H, D), rows(rng, half, Tk, H, D), rows(rng, half, Tk, H, D)
    lengths = {"cu_seqlens_q": starts_of(rng, B, Tq), "cu_seqlens_k": starts_of(rng, B, Tk)}
    given = terms(rng, (Tk, H), (Tq, 2), (Tk, 2), H)
    call = {"q": q, "k": k, "v": v, **lengths, "out": np.empty_like(q), "lse": np.empty((H, Tq), np.float32)}
    return finish(rng, call, given, backward)


def masked(rng: Random, backward: bool) -> Call:
    half, D, H, B = rng.random() < 0.5, rng.choice(HEAD_WIDTHS), rng.choice(SIZES), rng.choice(SIZES)
    N, skip = rng.choice((0, 1, 5, 99)), rng.random() < 0.5
    Nq = N if skip else rng.choice((0, 1, 33))
    q, k, v = rows(rng, half, B, H, Nq, D), rows(rng, half, B, H, N, D), rows(rng, half, B, H, N, D)
    keep = np.random.default_rng(rng.getrandbits(32)).random((B, N)) < 0.5
    given = terms(rng, (B, H, N), (B, Nq, 2), (B, N, 2), H) | {"skip_queries": skip}
    call = {"q": q, "k": k, "v": v, "keep": keep, "out": np.empty_like(q), "lse": np.empty((B, H, Nq), np.float32)}
    return finish(rng, call, given, backward)


def readout(rng: Random, backward: bool) -> Call:
    half, D, H, B = rng.random() < 0.5, rng.choice(HEAD_WIDTHS), rng.choice(SIZES), rng.choice(SIZES[1:])
    R, T = rng.choice((1, 2, 16)), rng.choice((0, 1, 5, 99, 300))
    q, k, v = rows(rng, half, B, R, H, D), rows(rng, half, T, H, D), rows(rng, half, T, H, D)
    given = terms(rng, (T, H), (B, R, 2), (T, 2), H)
    call = {"q": q, "k": k, "v": v, "cu_seqlens": starts_of(rng, B, T)}
    call |= {"out": np.empty_like(q), "lse": np.empty((B, R, H), np.float32)}
    if rng.random() < 0.5:
        given["grad_rows" if backward else "rows"] = floats(rng, R, H, T)
    return finish(rng, call, given, backward)


def finish(rng: Random, call: Call, given: Call, backward: bool) -> Call:
    """The arguments of both passes, and the gradients that the backward pass takes."""
    if backward:
        grads = {f"d{name}": np.empty_like(call[name]) for name in "qkv"}
        call |= {"grad_out": rows(rng, call["q"].dtype == np.uint16, *call["q"].shape), **grads}
        call["lse"] = floats(rng, *call["lse"].shape)
        given |= gradient_terms(rng, given)
        if rng.random() < 0.5:
            given["grad_lse"] = floats(rng, *call["lse"].shape)
    if rng.random() < 0.5:
        given["lse_rest"] = floats(rng, *call["lse"].shape)
    return call | {"scale": 0.3} | given


def relevance(rng: Random) -> Call:
    call = readout(rng, False)
    for name in ("rows", "lse_rest"):
        call.pop(name, None)
    K, half = rng.choice((0, 1, 5, 70)), call["q"].dtype == np.uint16
    origins = (call["k"].shape, call["k"].shape[1:])
    for name in ("key_origin", "value_origin"):
        if rng.random() < 0.5:
            call[name] = rows(rng, half, *rng.choice(origins))
    grads = rows(rng, half, K, *call["q"].shape)
    return call | {"grad_out": grads, "relevance": np.empty((K, call["k"].shape[0]), np.float32)}


def coverage(rng: Random) -> Call:
    mask = np.random.default_rng(rng.getrandbits(32)).random((9, 7)) < 0.5
    sizes = {"token_w_lv0": 2.5, "token_h_lv0": 3.0, "rows": 3, "cols": 4, "threads": rng.choice([0, 1, 3])}
    return {"mask": mask, "px_lv0_x": 1.0, "px_lv0_y": 1.0, "origin_x_lv0": -1.0, "origin_y_lv0": 0.5, **sizes}


def row_move(rng: Random) -> Call:
    values = np.random.default_rng(rng.getrandbits(32))
    rows, row_bytes, count = rng.choice((0, 1, 5, 300)), rng.choice((0, 1, 7, 4096)), rng.choice((0, 1, 99, 700))
    index = values.integers(-1, rows, count).astype(rng.choice((np.int32, np.int64)))
    threads = rng.choice([0, 1, 3])
    source, result = values.integers(0, 256, (rows, row_bytes), np.uint8), np.zeros((count, row_bytes), np.uint8)
    return {"source": source, "index": index, "result": result, "threads": threads}


def mask(rng: Random) -> Call:
    shape = rng.choice(SIZES), rng.choice((0, 1, 5, 99))
    return {"keep": np.random.default_rng(rng.getrandbits(32)).random(shape) < 0.5}


def layer(rng: Random) -> Call:
    outputs, inputs = rng.choice((1, 8, 48, 65)), rng.choice((1, 5, 16, 700))
    bias = rng.choice([None, floats(rng, outputs)])
    threads = rng.choice([0, 1, 3])
    return {"weight": floats(rng, outputs, inputs), "bias": bias, "instruction_set": "", "threads": threads}


def layer_call(rng: Random) -> Call:
    call, T = layer(rng), rng.choice((0, 1, 5, 99))
    outputs, inputs = call["weight"].shape
    chosen = {"activation": rng.choice(["none", "gelu", "gelu_tanh"]), "threads": rng.choice([0, 1, 3])}
    return call | {"x": floats(rng, T, inputs), "out": np.empty((T, outputs), np.float32)} | chosen


def block_call(rng: Random) -> Call:
    H, D, F, B, T = rng.choice((1, 2, 3)), rng.choice(HEAD_WIDTHS), rng.choice((1, 40)), rng.choice(SIZES[1:]), 70
    C = H * D
    shapes = {"qkv": (3 * C, C), "proj": (C, C), "fc1": (F, C), "fc2": (C, F)}
    call: Call = {name: floats(rng, *shape) for name, shape in shapes.items()}
    vectors = ("norm1_weight", "norm1_bias", "scale1", "norm2_weight", "norm2_bias", "scale2")
    call |= {name: rng.choice([None, floats(rng, C)]) for name in vectors}
    call |= {"norm1_eps": 1e-6, "norm2_eps": 0.0, "heads": H, "activation": rng.choice(["none", "gelu"])}
    x = floats(rng, T, C)
    return call | {"x": x, "cu_seqlens": starts_of(rng, B, T), "out": np.empty_like(x), "threads": rng.choice([0, 3])}


def is_array(x: Any) -> bool:
    return isinstance(x, np.ndarray) or type(x).__name__ == "PyCapsule"


def apply_layer(native: Any, **call: Any) -> None:
    """Make a layer and call it."""
    names = call.keys() & {"weight", "bias", "instruction_set"}
    made = native.LinearLayer(**{name: call.pop(name) for name in names})
    made.apply(**call)


def apply_block(native: Any, **call: Any) -> None:
    """Make the four layers, as far as they can be made, and the block, and call it."""
    layers = {name: call.pop(name) for name in ("qkv", "proj", "fc1", "fc2") if name in call}
    of_call = {name: call.pop(name) for name in ("x", "cu_seqlens", "out", "threads") if name in call}
    made = {name: native.LinearLayer(x) if is_array(x) else x for name, x in layers.items()}
    native.EncoderBlock(**made, **call).apply(**of_call)


OF_NUMPY_ALONE = {"token_coverage"}

# Functions of this file that call the methods of a class of the extension.
OF_CLASSES: dict[str, Callable[..., None]] = {"LinearLayer.apply": apply_layer, "EncoderBlock": apply_block}

MAKERS: dict[str, Callable[[Random], Call]] = {
    "attention_forward": lambda rng: packed(rng, False),
    "attention_backward": lambda rng: packed(rng, True),
    "masked_attention_forward": lambda rng: masked(rng, False),
    "masked_attention_backward": lambda rng: masked(rng, True),
    "readout_forward": lambda rng: readout(rng, False),
    "readout_backward": lambda rng: readout(rng, True),
    "token_relevance": relevance,
    "token_coverage": coverage,
    "move_rows": row_move,
    "kept_tokens": mask,
    "lay_over": overlay,
    "LinearLayer": layer,
    "LinearLayer.apply": layer_call,
    "EncoderBlock": block_call,
    "share_team": lambda rng: {"library": rng.choice(["", "no such file", "/", "libgomp.so.0"])},
}

SCALARS = (None, "x", -1, 0, 1.5, 2**31, 2**63, -(2**40), float("nan"), float("inf"), -1e308, [], np.zeros(2))
NAMES = ("avx9", "portable", "avx2", "avx512", "\0", "ü", None, 3, b"avx2")


def with_other_type(rng: Random, x: np.ndarray) -> Any:
    dtype = rng.choice(["f8", "f2", ">f4", "f4", "u2", ">u2", "i4", "i8", ">i4", "?", "O", "c8", "S3", "M8[s]", "u1"])
    choices = [None, x.tolist(), "array", 7, x.tobytes(), np.zeros(x.shape, dtype)]
    return rng.choice([choices[-1], *choices])


def with_other_shape(rng: Random, x: np.ndarray) -> np.ndarray:
    axis = rng.randrange(x.ndim)
    shape = list(x.shape)
    shape[axis] = rng.choice([0, 1, shape[axis] + 1, max(shape[axis] - 1, 0), 17, 264, 8, 513])
    choices = [
        x[None],
        x.reshape(-1),
        x.sum(axis, dtype=x.dtype),
        x.T.copy(),
        np.resize(x, shape),
        x.reshape(*x.shape, 1),
    ]
    return rng.choice(choices)


def with_huge_shape(rng: Random, x: np.ndarray) -> np.ndarray:
    """An axis of stride 0 and the greatest length, or a long axis next to an empty one."""
    shape, strides = list(x.shape), list(x.strides)
    axis = rng.randrange(x.ndim)
    shape[axis], strides[axis] = rng.choice([2**31 - 1, 2**31, 2**33, 2**40]), 0
    try:
        return (
            as_strided(x, shape, strides)
            if x.size
            else np.empty([0, *shape[1:]] if axis else shape[:1] + [0] * (x.ndim - 1), x.dtype)
        )
    except (ValueError, MemoryError):
        return x


def with_other_strides(rng: Random, x: np.ndarray) -> np.ndarray:
    """An array of the same shape and dtype."""
    axis = rng.randrange(x.ndim)
    flat = [n * rng.choice([1, 2, 3]) for n in x.shape]
    wide = np.zeros(flat, x.dtype)[
        tuple(slice(None, None, a // n if n else 1) for a, n in zip(flat, x.shape, strict=True))
    ]
    backwards = np.flip(x, axis)
    still = as_strided(x, x.shape, [0 if a == axis else s for a, s in enumerate(x.strides)])
    bytes_ = np.zeros(x.nbytes + 8, np.uint8)
    between = np.ndarray(x.shape, x.dtype, bytes_.data, offset=1) if x.dtype != object else x
    far = as_strided(x, x.shape, [s if n > 1 else 2**62 for n, s in zip(x.shape, x.strides, strict=True)])
    frozen = x.copy()
    frozen.setflags(write=False)
    return rng.choice([wide, backwards, still, between, far, frozen, np.asfortranarray(x)])


def with_other_values(rng: Random, x: np.ndarray) -> np.ndarray:
    x = x.copy()
    if x.dtype in (np.int32, np.int64):
        values: list[Any] = [-1, -2, 2**31 - 1, -(2**31), 5, 10**6]
        if x.dtype == np.int64:
            values += [2**63 - 1, -(2**63), 2**40]
    elif x.dtype == np.uint16:
        values = [0x7FC0, 0x7F80, 0xFF80, 0x7F7F, 0xFFFF]
    else:
        values = [np.nan, np.inf, -np.inf, 3e38, 1e-45] if x.dtype == np.float32 else [0, 1]
    if x.size and rng.random() < 0.3:
        x[...] = rng.choice(values)
    for _ in range(rng.choice([1, 5])):
        if x.size:
            x[tuple(rng.randrange(n) for n in x.shape)] = rng.choice(values)
    return x


ARRAYS = (with_other_type, with_other_shape, with_huge_shape, with_other_strides, with_other_values, with_other_values)


def spoil(rng: Random, call: Call) -> Call:
    """Change one to three arguments, drop one or add one."""
    call = dict(call)
    for name in rng.sample(sorted(call), min(len(call), rng.choice([1, 1, 2, 3]))):
        value = call[name]
        if rng.random() < 0.03:
            del call[name]
        elif isinstance(value, np.ndarray) and value.ndim:
            call[name] = rng.choice(ARRAYS)(rng, value)
        else:
            call[name] = rng.choice(NAMES if name == "instruction_set" else SCALARS)
    return call


def handed_over(rng: Random, call: Call, used_up: bool = False) -> Call:
    """Pass half of the arrays as DLPack capsules, as tensors are, where numpy makes one; or some of them used up."""

    def one(x: Any) -> Any:
        if not isinstance(x, np.ndarray) or rng.random() < 0.5:
            return x
        try:
            capsule = x.__dlpack__()
        except (BufferError, TypeError, ValueError, AttributeError):  # read-only, foreign, or beyond DLPack
            return x
        if used_up and rng.random() < 0.05:
            np.from_dlpack(UsedUp(capsule))
        return capsule

    return {name: one(value) for name, value in call.items()}


class UsedUp:
    """An owner of a capsule, which becomes an array and thereby loses its content."""

    def __init__(self, capsule: Any) -> None:
        self._capsule = capsule

    def __dlpack__(self, **_: Any) -> Any:
        return self._capsule

    def __dlpack_device__(self) -> tuple[int, int]:
        return 1, 0


def described(call: Call) -> str:
    def one(x: Any) -> str:
        return f"{x.dtype}{x.shape}/{x.strides}" if isinstance(x, np.ndarray) else repr(x)[:40]

    return ", ".join(f"{name}={one(value)}" for name, value in call.items())


def huge_and_empty(native: Any) -> None:
    """Sizes whose products overflow, for arrays without elements."""
    for huge in (2**31, 2**33, 2**40, 2**50):
        for half in (np.float32, np.uint16):
            q, row = np.empty((0, 2, huge, 16), half), np.empty((0, huge, 16), half)
            lse, starts = np.empty((0, 2, huge), np.float32), np.zeros(1, np.int32)
            wide = np.empty((huge, 0, 0, 16), half)
            for name, arguments in {
                "readout_forward": (q, row, row, starts, q.copy(), lse),
                "attention_forward": (row, row, row, starts, starts, row.copy(), np.empty((huge, 0), np.float32)),
                "masked_attention_forward": (
                    *(wide, wide, wide, np.empty((huge, 0), bool), wide.copy()),
                    np.empty((huge, 0, 0), np.float32),
                ),
            }.items():
                attempt(native, name, dict(enumerate(arguments)), positional=True)


def attempt(native: Any, name: str, call: Call, positional: bool = False) -> bool:
    os.write(1, f"\n{name}({described({str(key): value for key, value in call.items()})})".encode())
    called = functools.partial(OF_CLASSES[name], native) if name in OF_CLASSES else getattr(native, name)
    try:
        called(*call.values(), scale=1.0) if positional else called(**call)
    except (TypeError, ValueError, MemoryError):
        return False
    return True


def main() -> None:
    path, seed, calls = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    faulthandler.enable()
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    spec = importlib.util.spec_from_file_location("maskattn._native", path)
    assert spec is not None
    assert spec.loader is not None
    native = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(native)
    bindings = {name for name in dir(native) if not name.startswith("_")} - {"instruction_sets"}
    made = {name.partition(".")[0] for name in MAKERS}
    assert bindings == made, f"not covered or gone: {bindings ^ made}"
    rng = Random(seed)
    huge_and_empty(native)
    refused = 0
    for number in range(calls):
        name = sorted(MAKERS)[number % len(MAKERS)]
        call = MAKERS[name](rng)
        right = call if name in OF_NUMPY_ALONE else handed_over(rng, call)
        assert attempt(native, name, right), "a right call was refused"
        refused += not attempt(native, name, handed_over(rng, spoil(rng, call), used_up=True))
    assert refused > calls // 3, f"{refused} of {calls} wrong calls were refused: the fuzzer is too tame"
    os.write(1, b"\nsurvived\n")


if __name__ == "__main__":
    main()
