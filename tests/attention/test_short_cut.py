"""A call that nothing observes goes straight to its kernel; whoever watches torch's dispatcher sees all others."""

from __future__ import annotations

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from maskattn import packed_attention
from maskattn.registration import short_cut

STARTS = torch.tensor([0, 3, 5], dtype=torch.int32)
OP = torch.ops.maskattn.packed_attention.default


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return packed_attention(q, k, v, STARTS, STARTS, 3, 3)


@pytest.fixture
def qkv() -> torch.Tensor:
    return torch.randn(3, 5, 2, 16)


@pytest.fixture(scope="module")
def probe():
    """An operation that says whether it was called by the dispatcher, which hides Python's own arguments."""
    calls: list[type] = []

    def body(x: torch.Tensor, names: list[int]) -> torch.Tensor:
        calls.append(type(names))
        return x + 1

    schema = "(Tensor x, int[] names) -> Tensor"
    operation = torch.library.custom_op("maskattn_tests::probe", mutates_args=(), schema=schema)(body)
    operation.register_autograd(lambda ctx, grad: (grad, None))
    call = short_cut(operation)

    def takes_the_short_cut(x: torch.Tensor) -> bool:
        calls.clear()
        torch.testing.assert_close(call(x, (1,)), x + 1)  # the dispatcher makes a list of a tuple
        return calls == [tuple]

    return takes_the_short_cut


def test_calls_without_a_gradient_take_it(probe):
    x, learnt = torch.ones(2), torch.nn.Parameter(torch.ones(2))
    assert probe(x)
    with torch.no_grad():
        assert probe(learnt)
        with torch.autocast("cpu"):
            assert probe(x)
    with torch.inference_mode():
        assert probe(torch.ones(2))


def test_calls_that_torch_must_see_do_not(probe):
    x = torch.ones(2)
    assert not probe(x.clone().requires_grad_())
    assert not probe((1j * x.to(torch.complex64)).conj().imag)  # the values are negated when they are read
    with torch.profiler.profile():
        assert not probe(x)
    with torch.device("cpu"):  # a mode that sees functions
        assert not probe(x)


def test_a_dispatch_mode_sees_every_call(qkv):
    seen = []

    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(function)
            return function(*args, **(kwargs or {}))

    with torch.no_grad(), Mode():
        attend(*qkv)
    assert OP in seen


def test_a_function_mode_sees_every_call(qkv):
    seen = []

    class Mode(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            seen.append(function)
            return function(*args, **(kwargs or {}))

    with torch.no_grad(), Mode():
        attend(*qkv)
    assert any("maskattn.packed_attention" in str(function) for function in seen)


def test_traces_and_the_profiler_record_the_operation(qkv):
    with torch.no_grad():
        graph = make_fx(attend)(*qkv).graph
        with torch.profiler.profile() as profile:
            attend(*qkv)
    assert any(node.target is OP for node in graph.nodes)
    assert any(event.key == "maskattn::packed_attention" for event in profile.key_averages())


def test_a_subclass_sees_every_call(qkv):
    seen = []

    class Watched(torch.Tensor):
        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            seen.append(function)
            return super().__torch_function__(function, types, args, kwargs)

    with torch.no_grad():
        attend(*(x.as_subclass(Watched) for x in qkv))
    assert any("maskattn.packed_attention" in str(function) for function in seen)


def test_both_ways_give_the_same_bits(qkv):
    with torch.no_grad():
        straight = attend(*qkv)
    recorded = attend(*qkv.clone().requires_grad_())
    assert recorded.requires_grad
    assert not straight.requires_grad
    assert torch.equal(straight, recorded)
