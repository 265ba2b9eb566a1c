"""The layer against torch's own, with the same weights."""

from __future__ import annotations

import contextlib
import copy
import io
import itertools
import pickle

import pytest
import torch
from layer_pair import B, E, H, L, S, assert_alike, inputs_of, padding, pair
from torch import nn

from maskattn.nn import MultiheadAttention

LAYERS = [
    {},
    {"bias": False},
    {"batch_first": False},
    {"kdim": 10, "vdim": 7},
    {"add_bias_kv": True, "batch_first": False},
    {"add_zero_attn": True},
    {"add_bias_kv": True, "add_zero_attn": True, "kdim": 10},
]


def key_padding_mask(kind: str) -> torch.Tensor | None:
    ignored = padding()
    float_mask = torch.randn(B, S, dtype=torch.float64)
    return {
        "none": None,
        "bool": ignored,
        "float": float_mask,
        "float with -inf": float_mask.masked_fill(ignored, float("-inf")),
    }[kind]


def attn_mask(kind: str) -> torch.Tensor | None:
    if kind == "none":
        return None
    shape = (L, S) if kind.endswith("2-D") else (B * H, L, S)
    ignored = torch.rand(shape) > 0.5
    ignored[..., 0] = False
    if kind.startswith("bool"):
        return ignored
    return torch.randn(shape, dtype=torch.float64).masked_fill(ignored, float("-inf"))


def may_warn_of_mismatched_masks(*masks: torch.Tensor | None) -> contextlib.AbstractContextManager:
    if len({mask.dtype for mask in masks if mask is not None}) < 2:
        return contextlib.nullcontext()
    return pytest.warns(UserWarning, match="Support for mismatched key_padding_mask and attn_mask is deprecated")


@pytest.mark.parametrize("options", [{"need_weights": False}, {}, {"average_attn_weights": False}])
@pytest.mark.parametrize("keys", ["none", "bool", "float", "float with -inf"])
@pytest.mark.parametrize("dense", ["none", "bool 2-D", "bool 3-D", "float 2-D", "float 3-D"])
def test_outputs_weights_and_gradients_are_torchs_for_every_mask(keys, dense, options):
    masks = {"key_padding_mask": key_padding_mask(keys), "attn_mask": attn_mask(dense)}
    for arguments, training in itertools.product(LAYERS, (True, False)):
        theirs, ours = (layer.train(training) for layer in pair(**arguments))
        with may_warn_of_mismatched_masks(*masks.values()):
            assert_alike(theirs, ours, inputs_of(theirs), **masks, **options)


@pytest.mark.parametrize("shared", ["query, key and value", "key and value", "query and key"])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("masked", [True, False])
def test_inputs_that_are_one_tensor_are_projected_together_and_rightly(shared, batch_first, masked):
    theirs, ours = pair(batch_first=batch_first)
    x, y, z = inputs_of(theirs, queries=S)
    inputs = {"query, key and value": [x, x, x], "key and value": [x, y, y], "query and key": [x, x, z]}[shared]
    assert_alike(theirs, ours, inputs, key_padding_mask=padding() if masked else None, need_weights=False)


@pytest.mark.parametrize("arguments", [{}, {"batch_first": False}, {"add_bias_kv": True, "add_zero_attn": True}])
@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("masked", [True, False])
def test_unbatched_inputs_are_taken(arguments, need_weights, masked):
    theirs, ours = pair(**arguments)
    x = torch.randn(S, E, dtype=torch.float64)
    masks = {"key_padding_mask": padding(1)[0], "attn_mask": torch.rand(H, S, S) > 0.9} if masked else {}
    if masked:
        masks["attn_mask"][..., 0] = False
    assert_alike(theirs, ours, [x, x, x], **masks, need_weights=need_weights)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("keys", ["none", "bool", "float with -inf"])
@pytest.mark.parametrize("arguments", LAYERS)
def test_the_causal_hint_means_what_torch_means(arguments, keys, need_weights, training):
    theirs, ours = (layer.train(training) for layer in pair(**arguments))
    mask = nn.Transformer.generate_square_subsequent_mask(S, dtype=torch.float64)
    keys_mask = key_padding_mask(keys)
    if keys == "bool":
        mask = mask.isneginf()
    options = {"key_padding_mask": keys_mask, "need_weights": need_weights, "is_causal": True}
    inputs = inputs_of(theirs, queries=S)
    with torch.no_grad():
        # A mask that the hint makes unused has no gradient, so only values are compared.
        expected, weights = theirs(*inputs, attn_mask=mask, **options)
        out, own_weights = ours(*inputs, attn_mask=mask, **options)
    torch.testing.assert_close(out, expected)
    assert need_weights == (own_weights is not None)
    if need_weights:
        torch.testing.assert_close(own_weights, weights)


def test_an_empty_batch_gives_an_empty_output():
    _, ours = pair()
    x = torch.randn(0, S, E, dtype=torch.float64)
    for need_weights in (False, True):
        for masks in ({}, {"key_padding_mask": padding(0)}, {"attn_mask": torch.zeros(S, S, dtype=torch.bool)}):
            out, weights = ours(x, x, x, need_weights=need_weights, **masks)
            assert out.shape == (0, S, E)
            assert weights is None or weights.shape == (0, S, S)


@pytest.mark.parametrize("batch_first", [True, False])
def test_the_output_is_contiguous(batch_first):
    _, ours = pair(batch_first=batch_first)
    x = inputs_of(ours)[1]
    assert ours(x, x, x, need_weights=False)[0].is_contiguous()


def test_initialisation_and_keys_are_torchs():
    for arguments in LAYERS:
        layers = []
        for layer in (nn.MultiheadAttention, MultiheadAttention):
            torch.manual_seed(4)
            layers.append(layer(E, H, **arguments))
            layers[-1]._reset_parameters()
        states = [layer.state_dict() for layer in layers]
        assert list(states[0]) == list(states[1])
        assert all(torch.equal(states[1][name], x) for name, x in states[0].items())


def test_the_layer_can_be_copied_pickled_and_saved():
    ours = MultiheadAttention(E, H, batch_first=True, skip_queries=True, impl="torch", add_bias_kv=True).eval()
    file = io.BytesIO()
    torch.save(ours, file)
    file.seek(0)
    x, mask = torch.randn(B, S, E), padding()
    for twin in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours)), torch.load(file, weights_only=False)):
        assert (twin.skip_queries, twin.impl) == (True, "torch")
        assert twin.state_dict().keys() == ours.state_dict().keys()
        torch.testing.assert_close(twin(x, x, x, mask), ours(x, x, x, mask))


def test_arguments_that_do_not_fit_are_refused_and_named():
    x = torch.randn(B, S, E)
    layer = MultiheadAttention(E, H, batch_first=True)
    with pytest.raises(RuntimeError, match="Need attn_mask if specifying the is_causal hint"):
        layer(x, x, x, is_causal=True)
    with pytest.raises(ValueError, match=r"key_padding_mask must have shape \(B, S\) = \(2, 9\), got .*\(9, 2\)"):
        layer(x, x, x, key_padding_mask=padding(9, 2))
    with pytest.raises(ValueError, match=r"\(9, 9\) or \(B·H, L, S\) = \(6, 9, 9\), got attn_mask.shape=\(2, 9, 9\)"):
        layer(x, x, x, attn_mask=torch.zeros(2, 9, 9))
    for name in ("key_padding_mask", "attn_mask"):
        with pytest.raises(TypeError, match=f"{name} must be bool .*got {name}.dtype=torch.int64"):
            layer(x, x, x, **{name: torch.ones(2, 9, dtype=torch.long)})
    with pytest.raises(ValueError, match="must all be batched"):
        layer(x, x[0], x)
    with pytest.raises(ValueError, match=r"24, 24 and 24 channels.*\(2, 9, 24\), \(2, 8, 24\) and \(2, 9, 24\)"):
        layer(x, x[:, :8], x)
    with pytest.raises(ValueError, match="one batch"):
        layer(x, x[:1], x[:1])
    with pytest.raises(ValueError, match="24, 10 and 24 channels"):
        MultiheadAttention(E, H, kdim=10)(x, x, x)
    with pytest.raises(ValueError, match="5 queries and 9 keys"):
        MultiheadAttention(E, H, batch_first=True, skip_queries=True)(x[:, :5], x, x)
    with pytest.raises(ValueError, match="must be greater than 0"):
        MultiheadAttention(0, H)


def test_an_implementation_that_lacks_a_requested_option_is_refused():
    x = torch.randn(B, S, E)
    layer = MultiheadAttention(E, H, batch_first=True, impl="reference")
    expected = MultiheadAttention(E, H, batch_first=True)
    expected.load_state_dict(layer.state_dict())
    torch.testing.assert_close(layer(x, x, x, need_weights=False), expected(x, x, x, need_weights=False))
    with pytest.raises(ValueError, match="only impl='torch' supports need_weights=True, got impl='reference'"):
        layer(x, x, x)
    with pytest.raises(ValueError, match="only impl='torch' supports attn_mask, got impl='reference'"):
        layer(x, x, x, need_weights=False, attn_mask=torch.zeros(S, S))
