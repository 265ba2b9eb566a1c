"""An option that an implementation has never heard of is refused, and what depends on the options follows from them."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass, field, fields

import pytest
import torch

from maskattn.attention.implementation import IMPLS, choose, implementation
from maskattn.attention.schema import Arguments
from maskattn.operands import QKV, Sequences
from maskattn.options import Options, differentiable, option
from maskattn.results import Gradients, Tangents


@dataclass(frozen=True)
class WithCap(Options):
    """The options, and one that no implementation has heard of."""

    softcap: float = field(default=0.0, metadata=option())
    sinks: torch.Tensor | None = field(default=None, metadata=option(differentiable=True))


IMPLS_ON_CPUS = [impl for impl in IMPLS if impl not in ("triton", "gluon")]


@pytest.mark.parametrize("impl", IMPLS_ON_CPUS)
def test_an_implementation_refuses_an_option_that_it_has_never_heard_of(impl):
    if impl == "cpu":
        pytest.importorskip("maskattn._native")
    q = torch.randn(5, 2, 16)
    assert choose(impl, q, WithCap(0.25)) == impl
    with pytest.raises(
        ValueError, match=rf"impl='{impl}' has no softcap, got softcap=30\.0; no implementation supports it"
    ):
        choose(impl, q, WithCap(0.25, softcap=30.0))
    with pytest.raises(ValueError, match=rf"impl='{impl}' has no sinks, got sinks of shape \(2,\)"):
        choose(impl, q, WithCap(0.25, sinks=torch.zeros(2)))


def test_no_implementation_is_chosen_for_an_option_that_none_has():
    with pytest.raises(ValueError, match=r"has no softcap, got softcap=30\.0"):
        choose(None, torch.randn(5, 2, 16), WithCap(0.25, softcap=30.0))


@pytest.mark.parametrize("impl", IMPLS_ON_CPUS)
def test_an_implementation_declares_nothing_that_is_no_option(impl):
    assert not implementation(impl).OPTIONS - {x.name for x in fields(Options)}


def test_the_arguments_of_an_op_are_the_fields_of_what_an_implementation_is_given():
    arguments = Arguments((QKV, Sequences, WithCap), ("bool need_lse", "str impl"))
    assert arguments.schema.endswith(
        "str precision, bool deterministic, Tensor? query_offsets, Tensor? key_offsets, float softcap, "
        "Tensor? sinks, bool need_lse, str impl)"
    )
    options = 0.5, *[None] * 4, 0.0, None, "ieee", True, None, None, 30.0, None
    given = (*torch.zeros(3, 1), *torch.zeros(2, 1), 4, 5, *options, True, "cpu")
    assert arguments.grouped(given) == [
        QKV(*given[:3]),
        Sequences(*given[3:7]),
        WithCap(*options),
        True,
        "cpu",
    ]


def test_gradients_and_tangents_are_those_of_qkv_and_of_the_differentiable_options():
    for kind in (Gradients, Tangents):
        assert tuple(x.name for x in fields(kind)) == ("q", "k", "v", *differentiable())
    assert differentiable(WithCap) == (*differentiable(), "sinks")


PROGRAM = """
from dataclasses import dataclass, field, replace
import torch
from maskattn.attention.operations import PACKED
from maskattn.attention.ops import register
from maskattn.options import Options, option

@dataclass(frozen=True)
class WithCap(Options):
    softcap: float = field(default=0.0, metadata=option())

register(replace(PACKED, name="capped_attention", options=WithCap))
x, starts = torch.randn(5, 2, 16, requires_grad=True), torch.tensor([0, 2, 5], dtype=torch.int32)
for softcap in (0.0, 30.0):
    given = 0.25, None, None, None, None, 0.0, None, "ieee", True, None, None, softcap
    for impl in ("torch", "reference"):
        try:
            out, *_ = torch.ops.maskattn.capped_attention(x, x, x, starts, starts, 3, 3, *given, True, impl)
            print(impl, softcap, tuple(torch.autograd.grad(out.sum(), x)[0].shape))
        except ValueError as error:
            print(error)
"""


def test_an_operation_registered_with_another_option_runs_without_it_and_is_refused_with_it():
    """In a process of its own, because an op stays registered."""
    result = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=300)
    lines = result.stdout.splitlines()
    assert lines[:2] == ["torch 0.0 (5, 2, 16)", "reference 0.0 (5, 2, 16)"], result.stderr
    assert [line.partition(";")[0] for line in lines[2:]] == [
        f"impl='{impl}' has no softcap, got softcap=30.0" for impl in ("torch", "reference")
    ]
