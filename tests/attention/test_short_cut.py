"""A call that nothing observes goes straight to its kernel; whoever watches torch's dispatcher sees all others."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from maskattn import packed_attention
from maskattn.attention import operations
from maskattn.attention.ops import flat_options
from maskattn.options import Options
from maskattn.registration import short_cut

STARTS = torch.tensor([0, 3, 5], dtype=torch.int32)
OP = torch.ops.maskattn.packed_attention.default


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return packed_attention(q, k, v, STARTS, STARTS, 3, 3)


@pytest.fixture
def qkv() -> torch.Tensor:
    return torch.randn(3, 5, 2, 16)


class Probe:
    """x → x², by an operation that notes how it was called: the dispatcher makes lists of tuples."""

    def __init__(self, name: str) -> None:
        self.calls: list[type] = []
        schema = "(Tensor x, int[] names) -> Tensor"
        self.operation = torch.library.custom_op(f"maskattn_tests::{name}", mutates_args=(), schema=schema)(self.body)
        self.operation.register_autograd(self.differentiate, setup_context=self.save)

    def body(self, x: torch.Tensor, names: list[int]) -> torch.Tensor:
        self.calls.append(type(names))
        return x * x

    @staticmethod
    def save(ctx, inputs, output) -> None:
        ctx.save_for_backward(inputs[0])

    @staticmethod
    def differentiate(ctx, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return 2 * grad * ctx.saved_tensors[0], None

    def is_shortened(self, call, x: torch.Tensor) -> bool:
        self.calls.clear()
        torch.testing.assert_close(call(x, (1,)), x * x)
        return self.calls == [tuple]


@pytest.fixture(scope="module")
def probe():
    """Whether a call takes the short cut of an operation that does not say how it is differentiated."""
    made = Probe("probe")
    return partial(made.is_shortened, short_cut(made.operation))


@pytest.fixture(scope="module")
def learnt_probe():
    """The same of one that does, and its call."""
    made = Probe("learnt_probe")
    call = short_cut(made.operation, made.save, made.differentiate)
    return partial(made.is_shortened, call), call


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


def test_with_a_gradient_the_kernel_is_called_by_an_autograd_function(learnt_probe):
    shortened, call = learnt_probe
    x = torch.tensor([3.0, -1.0], requires_grad=True)
    assert shortened(x)
    assert shortened(x.detach())
    call(x, (1,)).sum().backward()
    assert x.grad.tolist() == [6.0, -2.0]
    with torch.profiler.profile():
        assert not shortened(x)


def test_whatever_looks_at_saved_tensors_sees_them(learnt_probe):
    _, call = learnt_probe
    x, seen = torch.tensor([3.0], requires_grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(lambda saved: seen.append(saved) or saved, lambda saved: saved):
        call(x, (1,))
    assert len(seen) == 1
    checkpoint(call, x, (1,), use_reentrant=False).sum().backward()
    assert x.grad.tolist() == [6.0]
    y = x * 1
    out = call(y, (1,))
    y.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_gradients_are_the_bits_of_those_by_the_dispatcher(qkv):
    def gradients() -> tuple[torch.Tensor, ...]:
        leaves = [x.clone().requires_grad_() for x in qkv]
        return torch.autograd.grad(attend(*leaves).square().sum(), leaves)

    straight = gradients()
    with torch.profiler.profile() as profile:
        watched = gradients()
    assert any(event.key == "maskattn::packed_attention_backward" for event in profile.key_averages())
    assert all(torch.equal(one, other) for one, other in zip(straight, watched, strict=True))


LEARNING = {
    "values alone": (False, False, True, False),
    "keys and biases": (False, True, False, True),
    "everything": (True,) * 4,
}


@pytest.mark.parametrize("learning", LEARNING.values(), ids=LEARNING)
def test_whatever_learns_has_the_gradients_of_the_dispatcher(learning, qkv):
    bias, coords = torch.randn(5, 2), torch.randn(5, 2)

    def gradients() -> tuple[torch.Tensor, ...]:
        given = [x.clone().requires_grad_(learns) for x, learns in zip((*qkv, bias), learning, strict=True)]
        slopes = torch.tensor([0.5, 0.25], requires_grad=True)
        q, k, v, key_bias = given
        options = {"key_bias": key_bias, "coords": coords, "slopes": slopes}
        out, lse = packed_attention(q, k, v, STARTS, STARTS, 3, 3, **options, return_lse=True)
        leaves = [x for x in (*given, slopes) if x.requires_grad]
        return torch.autograd.grad(out.square().sum() + lse.sin().sum(), leaves)

    straight = gradients()
    with torch.profiler.profile():
        watched = gradients()
    assert len(straight) == 1 + sum(learning)
    assert all(torch.equal(one, other) for one, other in zip(straight, watched, strict=True))


def test_results_that_are_not_asked_for_are_no_part_of_the_graph(qkv):
    leaf = qkv.clone().requires_grad_()

    def attend_asking(*asked: bool) -> tuple[torch.Tensor, ...]:
        options = Options(0.25)
        return operations.packed_attention(*leaf, STARTS, STARTS, 3, 3, *flat_options(options), *asked, "cpu")

    out, lse, rest = attend_asking(False)
    assert [x.requires_grad for x in (out, lse, rest)] == [True, False, False]
    assert lse.shape == (2, 5)
    asked_out, asked_lse, _ = attend_asking(True)
    assert asked_lse.requires_grad
    assert torch.equal(lse, asked_lse)
    assert torch.equal(out, asked_out)
    alone, together = (torch.autograd.grad(x.square().sum(), leaf)[0] for x in (out, asked_out))
    assert torch.equal(alone, together)


def test_one_tensor_may_be_several_arguments(qkv):
    x = qkv[0].clone().requires_grad_()
    (found,) = torch.autograd.grad(attend(x, x, x).square().sum(), x)
    apart = [x.detach().clone().requires_grad_() for _ in range(3)]
    torch.testing.assert_close(found, sum(torch.autograd.grad(attend(*apart).square().sum(), apart)))


@pytest.mark.parametrize("changed", ["q", "starts", "key_bias"])
def test_whatever_backward_reads_must_not_have_been_written_to(changed, qkv):
    # q is learnt; lengths and bias are not, and are saved all the same.
    q, starts, bias = qkv[0].clone().requires_grad_(), STARTS.clone(), torch.randn(5, 2)
    written = q * 1
    out = packed_attention(written, qkv[1], qkv[2], starts, starts, 3, 3, key_bias=bias)
    with torch.no_grad():
        {"q": written, "starts": starts, "key_bias": bias}[changed].add_(0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_backward_twice_needs_a_graph_that_was_kept(qkv):
    leaf = qkv.clone().requires_grad_()
    out = attend(*leaf).square().sum()
    first, again = (torch.autograd.grad(out, leaf, retain_graph=keep)[0] for keep in (True, False))
    assert torch.equal(first, again)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(out, leaf)


def test_hooks_see_the_gradients_of_tensors_and_of_the_node(qkv):
    seen: list[object] = []
    leaf = qkv.clone().requires_grad_()
    q, k, v = leaf.unbind()
    q.register_hook(lambda grad: seen.append("tensor") or 2 * grad)
    out = attend(q, k, v)
    out.grad_fn.register_prehook(lambda grads: seen.append("node"))
    (doubled,) = torch.autograd.grad(out.sum(), leaf)
    (plain,) = torch.autograd.grad(attend(*leaf).sum(), leaf)
    assert seen == ["node", "tensor"]
    assert torch.equal(doubled[0], 2 * plain[0])
    assert torch.equal(doubled[1:], plain[1:])


BACKWARD = torch.ops.maskattn.packed_attention_backward.default


def test_a_mode_sees_the_backward_of_a_call_that_nothing_saw(qkv):
    seen = []

    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(function)
            return function(*args, **(kwargs or {}))

    leaf = qkv.clone().requires_grad_()
    (expected,) = torch.autograd.grad(attend(*leaf).square().sum(), leaf)
    out = attend(*leaf).square().sum()
    assert OP not in seen
    with Mode():
        (found,) = torch.autograd.grad(out, leaf)
    assert BACKWARD in seen
    assert torch.equal(found, expected)


def test_the_profiler_sees_the_backward_of_a_call_that_nothing_saw(qkv):
    out = attend(*qkv.clone().requires_grad_()).sum()
    with torch.profiler.profile() as profile:
        out.backward()
    assert any(event.key == "maskattn::packed_attention_backward" for event in profile.key_averages())


# The functions that torch called with a tensor of the subclass.
WATCHED: list[str] = []


class Watched(torch.Tensor):
    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        WATCHED.append(str(function))
        return super().__torch_function__(function, types, args, kwargs)


def test_a_subclass_that_comes_as_a_gradient_sees_the_backward(qkv):
    WATCHED.clear()
    leaf = qkv.clone().requires_grad_()
    out = attend(*leaf)
    torch.autograd.grad(out, leaf, torch.ones_like(out).as_subclass(Watched))
    assert any("packed_attention_backward" in name for name in WATCHED)


def test_gradients_are_mapped_over(qkv):
    leaf, generator = qkv.clone().requires_grad_(), torch.Generator().manual_seed(0)
    directions = torch.randn(3, *qkv[0].shape, generator=generator)
    out = attend(*leaf)
    one_by_one = [torch.autograd.grad(out, leaf, each, retain_graph=True)[0] for each in directions]
    (together,) = torch.autograd.grad(out, leaf, directions, is_grads_batched=True)
    torch.testing.assert_close(together, torch.stack(one_by_one))


def test_a_subclass_that_a_hook_unpacks_sees_the_backward(qkv):
    WATCHED.clear()
    leaf = qkv.clone().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x.as_subclass(Watched)):
        out = attend(*leaf)
    torch.autograd.grad(out.square().sum(), leaf)
    assert any("packed_attention_backward" in name for name in WATCHED)


def test_tensors_that_hooks_unpack_are_those_that_backward_reads(qkv):
    leaf = qkv.clone().requires_grad_()
    (expected,) = torch.autograd.grad(attend(*leaf).square().sum(), leaf)
    with torch.autograd.graph.saved_tensors_hooks(
        lambda x: x.tolist() if x.dtype == torch.int32 else x, torch.as_tensor
    ):
        out = attend(*leaf).square().sum()
    with pytest.raises(TypeError, match="cu_seqlens_q of dtype int32"):  # as_tensor makes int64 of the lengths
        out.backward()
    with torch.autograd.graph.save_on_cpu():
        out = attend(*leaf).square().sum()
    (found,) = torch.autograd.grad(out, leaf)
    assert torch.equal(found, expected)


def test_autocast_may_begin_or_end_between_a_call_and_its_backward(qkv):
    leaf = qkv.clone().requires_grad_()
    (expected,) = torch.autograd.grad(attend(*leaf).sum(), leaf)
    out = attend(*leaf).sum()
    with torch.autocast("cpu"):
        (found,) = torch.autograd.grad(out, leaf)
        narrow = attend(*leaf)
    assert torch.equal(found, expected)
    assert narrow.dtype == torch.bfloat16
    (of_narrow,) = torch.autograd.grad(narrow.float().sum(), leaf)
    assert of_narrow.dtype == torch.float32


def test_results_have_the_same_dtypes_whatever_torchs_default_is(qkv):
    leaf = qkv.clone().requires_grad_()
    (expected,) = torch.autograd.grad(attend(*leaf).sum(), leaf)
    torch.set_default_dtype(torch.float64)
    try:
        (found,) = torch.autograd.grad(attend(*leaf).sum(), leaf)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(found, expected)


def test_a_second_derivative_is_refused(qkv):
    leaves = [x.clone().requires_grad_() for x in qkv]
    (grad,) = torch.autograd.grad(attend(*leaves).square().sum(), leaves[:1], create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivative"):
        grad.sum().backward()


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
