"""token_relevance against the specification."""

from __future__ import annotations

import itertools

import pytest
import torch
import triton
from launch import WIDTHS_AND_DTYPES
from oracles import LENGTHS, assert_within_budget
from readout_cases import Readout, make_readout, pairs_of
from torch import Tensor

from maskattn.attention import reference
from maskattn.kernels.launch.support import HEAD_WIDTHS
from maskattn.kernels.readout import call, relevance
from maskattn.kernels.readout.forward import readout_forward
from maskattn.kernels.readout.relevance import token_relevance
from maskattn.kernels.tables.config import ReadoutConfig

INTERPRETING = bool(triton.knobs.runtime.interpret)

ORIGINS = ("none", "per_head", "per_token")


def origin(kind: str, like: Tensor, seed: int) -> Tensor | None:
    shape = {"none": None, "per_head": like.shape[1:], "per_token": like.shape}[kind]
    generator = torch.Generator().manual_seed(seed)
    return None if shape is None else torch.randn(shape, generator=generator).to(like.dtype)


def gradients(readout: Readout, classes: int) -> Tensor:
    """(K, B, R, H, D), each class's gradient of the readout."""
    generator = torch.Generator().manual_seed(5)
    q = readout.inputs.q
    return torch.randn(classes, *q.shape, generator=generator).to(q.dtype)


def run(
    readout: Readout, grad_out: Tensor, key_origin: Tensor | None, value_origin: Tensor | None, device: str
) -> Tensor:
    moved = readout.to(device)
    x, sides = moved.inputs, moved.sides
    out, lse, _, _ = readout_forward(x.q, x.k, x.v, *sides, x.options, False)
    origins = (None if o is None else o.to(device) for o in (key_origin, value_origin))
    return token_relevance(x.q, x.k, x.v, out, lse, grad_out.to(device), *origins, *sides, x.options)


def check(
    readout: Readout,
    device: str,
    classes: int = 3,
    kinds: tuple[str, str] = ("per_head", "per_head"),
    grad_out: Tensor | None = None,
) -> None:
    __tracebackhide__ = True
    grad_out = gradients(readout, classes) if grad_out is None else grad_out
    origins = [origin(kind, readout.inputs.k, seed) for seed, kind in enumerate(kinds)]
    result = run(readout, grad_out, *origins, device)
    assert result.dtype == torch.float32

    def specify(dtype: torch.dtype, grad_out: Tensor) -> Tensor:
        x = readout.inputs.to(dtype)
        rest = (None if o is None else o.to(dtype) for o in origins)
        return reference.token_relevance(x.q, x.k, x.v, grad_out.to(dtype), *rest, readout.sides[0], x.options)

    dtype = readout.inputs.q.dtype
    exact, same = specify(torch.float64, grad_out), specify(dtype, grad_out)
    # The rounding of lse, a float32 whatever the inputs are, enters each row's weights as a factor, as a factor of the
    # row's gradients does.
    x = readout.inputs.to(torch.float64)
    lse = reference.readout(x.q, x.k, x.v, readout.sides[0], x.options)[1]
    size = lse.masked_fill(lse.isinf(), 0).abs()[..., None]
    relative = torch.finfo(torch.float32).eps / torch.finfo(dtype).eps
    carried = relative * specify(torch.float64, grad_out.double() * size).abs()
    assert result.shape == exact.shape
    if exact.numel():
        assert_within_budget(result, exact, same, "relevance", carried)


@pytest.mark.parametrize("length", [0, *LENGTHS])
def test_one_sequence_of_each_length(length, device, monkeypatch):
    if INTERPRETING and length > 200:
        monkeypatch.setattr(call, "choose", lambda *_: ReadoutConfig(256, 4, 1, 4))
    check(make_readout([length], heads=1, head_width=16), device)


@pytest.mark.parametrize(
    ("lengths", "queries"), [((15, 1, 65), 1), ((0, 64, 0, 3), 2), ((15, 65), 5), ((20,), 16), ((0, 0), 2)], ids=str
)
def test_sequences_of_unequal_lengths(lengths, queries, device):
    check(make_readout(lengths, queries, head_width=16), device)


def test_no_sequences(device):
    readout = make_readout([], 2)
    assert run(readout, gradients(readout, 3), None, None, device).shape == (3, 0)


@pytest.mark.parametrize("classes", [0, 1, 2, 16, 17, 150])
@pytest.mark.parametrize("queries", [1, 2])
def test_any_number_of_classes(classes, queries, device):
    check(make_readout([70], queries, head_width=16), device, classes)


@pytest.mark.parametrize("classes", [1, 3])
@pytest.mark.parametrize("kinds", list(itertools.product(ORIGINS, ORIGINS)), ids=str)
def test_origins_of_keys_and_values(kinds, classes, device):
    check(make_readout([66], 1, head_width=16), device, classes, kinds)


OPTIONS: dict[str, dict] = {
    "bias": {"bias": "shared"},
    "bias_per_head": {"bias": "per_head"},
    "alibi": {"alibi": True},
    "negative_scale": {"scale": -0.3},
}


@pytest.mark.parametrize("classes", [1, 3])
@pytest.mark.parametrize("pair", pairs_of(OPTIONS), ids="+".join)
def test_options_go_together(pair, classes, device):
    check(make_readout([66], 2, head_width=16, **OPTIONS[pair[0]], **OPTIONS[pair[1]]), device, classes)


@pytest.mark.parametrize("classes", [1, 5])
@pytest.mark.parametrize(("head_width", "dtype"), WIDTHS_AND_DTYPES, ids=str)
def test_head_widths_and_dtypes(head_width, dtype, classes, device):
    check(make_readout([65, 3], 2, heads=1, head_width=head_width, dtype=dtype), device, classes)


@pytest.mark.parametrize(("block_n", "block_c"), [(8, 1), (16, 32), (128, 32)])
def test_any_tile_size(block_n, block_c, device, monkeypatch):
    monkeypatch.setattr(call, "choose", lambda *_: ReadoutConfig(block_n, 4, 1, 4))
    monkeypatch.setattr(relevance, "class_tile", lambda *_: block_c)
    check(make_readout([70, 3], heads=1, head_width=16, bias="shared"), device, 40)


def interleaved(x: Tensor) -> Tensor:
    return torch.stack([x, x + 1, x - 1], dim=1)[:, 0]


def last_first(x: Tensor) -> Tensor:
    return x.movedim(-1, 0).contiguous().movedim(0, -1)


@pytest.mark.parametrize("relayout", [interleaved, last_first])
def test_any_strides(relayout, device):
    readout = make_readout([70, 9], 2, bias="per_head", alibi=True, head_width=16)
    x = readout.inputs
    readout = readout.with_inputs(q=relayout(x.q), k=relayout(x.k), v=relayout(x.v), key_bias=relayout(x.key_bias))
    check(readout, device, grad_out=relayout(gradients(readout, 3)), kinds=("per_token", "per_head"))


def test_classes_that_share_a_gradient(device):
    readout = make_readout([70], head_width=16)
    check(readout, device, grad_out=gradients(readout, 1).expand(3, -1, -1, -1, -1))


def test_keys_biased_to_minus_infinity_have_relevance_zero(device):
    readout = make_readout([70, 5], 2, head_width=16, bias="shared")
    absent = torch.zeros(75, dtype=torch.bool)
    absent[3:9], absent[70:] = True, True
    readout = readout.with_inputs(key_bias=readout.inputs.key_bias.masked_fill(absent, float("-inf")))
    result = run(readout, gradients(readout, 3), None, None, device)
    assert result[:, absent].eq(0).all()
    check(readout, device)


def test_the_same_result_every_time(device):
    readout = make_readout([70, 30], 2, dtype=torch.float16)
    first, second = (run(readout, gradients(readout, 3), None, None, device) for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("head_width", HEAD_WIDTHS)
def test_every_head_width_on_a_gpu(head_width, dtype, device):
    for queries, classes in itertools.product((1, 2, 16), (1, 7, 1000)):
        readout = make_readout([300, 0, 1000, 65], queries, head_width=head_width, dtype=dtype)
        check(readout, device, classes)
    readout = make_readout([300, 0, 5000, 65], 2, head_width=head_width, dtype=dtype, bias="per_head", alibi=True)
    for kinds in itertools.product(ORIGINS, ORIGINS):
        check(readout, device, 40, kinds)
