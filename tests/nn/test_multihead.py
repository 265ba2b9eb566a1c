"""The layer against torch's own, with the same weights."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from maskattn.nn import MultiheadAttention


def pair(**arguments: object) -> tuple[nn.MultiheadAttention, MultiheadAttention]:
    theirs = nn.MultiheadAttention(24, 3, **{"batch_first": True, **arguments}).double()
    ours = MultiheadAttention(24, 3, **{"batch_first": True, **arguments}).double()
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def padding(B: int = 2, S: int = 9) -> torch.Tensor:
    mask = torch.rand(B, S) > 0.5
    mask[:, 0] = False
    return mask


def check(theirs: nn.Module, ours: nn.Module, inputs: list[torch.Tensor], **options: object) -> None:
    leaves = [[x.clone().requires_grad_() for x in inputs] for _ in range(2)]
    results = [module(*x, **options) for module, x in zip((theirs, ours), leaves, strict=True)]
    torch.testing.assert_close(results[1], results[0])
    grads = [
        torch.autograd.grad(
            sum(r.sin().sum() for r in result if r is not None), [*x, *module.parameters()], materialize_grads=True
        )
        for result, x, module in zip(results, leaves, (theirs, ours), strict=True)
    ]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(b, a)


@pytest.mark.parametrize("options", [{"need_weights": False}, {}, {"average_attn_weights": False}])
@pytest.mark.parametrize("mask", ["none", "bool", "float"])
@pytest.mark.parametrize(
    "arguments", [{}, {"bias": False}, {"batch_first": False}, {"kdim": 10, "vdim": 7}, {"dropout": 0.0}]
)
def test_outputs_weights_and_gradients_are_torchs(arguments, mask, options):
    theirs, ours = pair(**arguments)
    sizes = (24, arguments.get("kdim", 24), arguments.get("vdim", 24))
    inputs = [torch.randn(2, n, size, dtype=torch.float64) for n, size in zip((5, 9, 9), sizes, strict=True)]
    if arguments.get("batch_first") is False:
        inputs = [x.transpose(0, 1) for x in inputs]
    masks = {"none": None, "bool": padding()}
    masks["float"] = torch.randn(2, 9, dtype=torch.float64).masked_fill(padding(), float("-inf"))
    check(theirs, ours, inputs, key_padding_mask=masks[mask], **options)


def test_unbatched_inputs_are_taken():
    theirs, ours = pair()
    x = torch.randn(9, 24, dtype=torch.float64)
    check(theirs, ours, [x, x, x], key_padding_mask=padding(1)[0])


def test_a_query_whose_keys_are_all_masked_gives_the_bias_alone_not_nan():
    _, ours = pair()
    x = torch.randn(2, 9, 24, dtype=torch.float64, requires_grad=True)
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[1, 3] = False
    out, weights = ours(x, x, x, key_padding_mask=mask)
    torch.testing.assert_close(out[0], ours.out_proj.bias.expand(9, 24))
    assert (weights[0] == 0).all()
    (grad,) = torch.autograd.grad(out.sum() + weights.sum(), x)
    assert grad.isfinite().all()


def test_skip_queries_leaves_masked_positions_zero_and_unread():
    theirs, ours = pair()
    ours.skip_queries = True
    x, mask = torch.randn(2, 9, 24, dtype=torch.float64), padding()
    expected, expected_weights = theirs(x, x, x, key_padding_mask=mask)
    poisoned = x.masked_fill(mask[..., None], float("nan"))
    out, weights = ours(poisoned, poisoned, poisoned, key_padding_mask=mask)
    torch.testing.assert_close(out, expected.masked_fill(mask[..., None], 0))
    torch.testing.assert_close(weights, expected_weights.masked_fill(mask[..., None], 0))


def test_initialisation_and_keys_are_torchs():
    torch.manual_seed(4)
    theirs = nn.MultiheadAttention(24, 3)
    torch.manual_seed(4)
    ours = MultiheadAttention(24, 3)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    assert all(torch.equal(ours.state_dict()[name], x) for name, x in theirs.state_dict().items())


def test_the_layer_can_be_copied_and_pickled():
    ours = MultiheadAttention(24, 3, skip_queries=True, impl="torch")
    for twin in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert (twin.skip_queries, twin.impl) == (True, "torch")
        assert twin.state_dict().keys() == ours.state_dict().keys()


def test_what_it_does_not_take_is_refused_by_name():
    x = torch.randn(2, 9, 24)
    layer = MultiheadAttention(24, 3, batch_first=True)
    with pytest.raises(ValueError, match="attn_mask and is_causal are not taken"):
        layer(x, x, x, attn_mask=torch.zeros(9, 9, dtype=torch.bool))
    with pytest.raises(ValueError, match="attn_mask and is_causal are not taken"):
        layer(x, x, x, is_causal=True)
    with pytest.raises(ValueError, match="add_bias_kv=True"):
        MultiheadAttention(24, 3, add_bias_kv=True)
    with pytest.raises(ValueError, match=r"dropout=0\.1"):
        MultiheadAttention(24, 3, dropout=0.1, batch_first=True)(x, x, x)
    with pytest.raises(ValueError, match=r"key_padding_mask must have shape \(2, 9\), got \(9, 2\)"):
        layer(x, x, x, key_padding_mask=padding(9, 2))
    with pytest.raises(TypeError, match="must be bool"):
        layer(x, x, x, key_padding_mask=torch.ones(2, 9, dtype=torch.long))
    with pytest.raises(ValueError, match="must all be batched"):
        layer(x, x[0], x)
    with pytest.raises(ValueError, match="5 queries and 9 keys"):
        MultiheadAttention(24, 3, batch_first=True, skip_queries=True)(x[:, :5], x, x)
