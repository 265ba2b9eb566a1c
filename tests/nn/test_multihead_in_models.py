"""The layer inside torch's transformer modules, torch.compile and autocast, and swapped into models that exist."""

from __future__ import annotations

import contextlib
import copy
import pickle

import pytest
import torch
from layer_pair import B, E, H, S, padding, pair
from oracles import assert_within_budget
from torch import nn

from maskattn.nn import MultiheadAttention, replace_attention

SIZES = {"d_model": E, "nhead": 4, "dim_feedforward": 32, "dropout": 0.0, "batch_first": True, "dtype": torch.float64}


@pytest.fixture
def forwards(monkeypatch) -> list[MultiheadAttention]:
    """Every layer of ours whose forward ran, in order."""
    ran = []
    forward = MultiheadAttention.forward

    def counted(self, *arguments, **options):
        ran.append(self)
        return forward(self, *arguments, **options)

    monkeypatch.setattr(MultiheadAttention, "forward", counted)
    return ran


def swapped(model: nn.Module) -> tuple[nn.Module, nn.Module]:
    return model, replace_attention(copy.deepcopy(model))


def encoder(**arguments: object) -> nn.TransformerEncoder:
    layer = nn.TransformerEncoderLayer(**SIZES | arguments)
    nested = not arguments.get("norm_first", False)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=nested)


def assert_same_gradients(theirs: nn.Module, ours: nn.Module) -> None:
    for (name, a), (_, b) in zip(theirs.named_parameters(), ours.named_parameters(), strict=True):
        torch.testing.assert_close(b.grad, a.grad, msg=lambda text, name=name: f"{name}: {text}")


def right_padding() -> torch.Tensor:
    return torch.arange(S) >= torch.tensor([[S], [4]])


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("masks", ["none", "keys", "keys and dense"])
def test_an_encoder_computes_the_same_and_through_our_forward(training, norm_first, masks, forwards):
    theirs, ours = (model.train(training) for model in swapped(encoder(norm_first=norm_first)))
    x = torch.randn(B, S, E, dtype=torch.float64)
    options = {} if masks == "none" else {"src_key_padding_mask": padding()}
    if masks == "keys and dense":
        options["mask"] = torch.ones(S, S, dtype=torch.bool).triu(1)
    results = [model(x, **options) for model in (theirs, ours)]
    torch.testing.assert_close(results[1], results[0])
    assert [id(layer) for layer in forwards] == [id(layer.self_attn) for layer in ours.layers]
    for result in results:
        result.sin().sum().backward()
    assert_same_gradients(theirs, ours)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("mask", ["none", "scattered", "padding on the right"])
# torch's encoder makes nested tensors of right-padded batches, which warn of themselves once.
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage:UserWarning")
def test_torchs_fast_path_does_not_bypass_our_forward(context, mask, forwards):
    theirs, ours = (model.eval() for model in swapped(encoder()))
    x = torch.randn(B, S, E, dtype=torch.float64)
    ignored = {"none": None, "scattered": padding(), "padding on the right": right_padding()}[mask]
    expected = theirs.train()(x, src_key_padding_mask=ignored).detach()
    with context():
        out = ours(x, src_key_padding_mask=ignored)
    kept = slice(None) if ignored is None else ~ignored
    torch.testing.assert_close(out[kept], expected[kept])
    assert len(forwards) == 2
    fast = theirs.eval()
    with context():
        torch.testing.assert_close(out[kept], fast(x, src_key_padding_mask=ignored)[kept])
    with context():
        torch.testing.assert_close(ours.layers[0](x), theirs.layers[0](x))
    assert len(forwards) == 3


# As above.
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage:UserWarning")
def test_an_encoder_built_of_our_layer_runs_it_without_a_warning(forwards):
    layer = nn.TransformerEncoderLayer(**SIZES)
    layer.self_attn = MultiheadAttention(E, 4, batch_first=True, dtype=torch.float64, skip_queries=True)
    model = nn.TransformerEncoder(layer, 3).eval()
    x = torch.randn(B, S, E, dtype=torch.float64)
    with torch.no_grad():
        first = model(x, src_key_padding_mask=right_padding())
    assert len(forwards) == 3
    model.layers[0].self_attn = copy.deepcopy(model.layers[0].self_attn)
    pickled = pickle.loads(pickle.dumps(model))
    with torch.no_grad():
        torch.testing.assert_close(pickled(x, src_key_padding_mask=right_padding()), first)
    assert len(forwards) == 6


@pytest.mark.parametrize("training", [True, False])
def test_a_decoder_computes_the_same_and_through_our_forward(training, forwards):
    theirs, ours = (model.train(training) for model in swapped(nn.TransformerDecoderLayer(**SIZES)))
    target, memory = (torch.randn(B, n, E, dtype=torch.float64) for n in (6, S))
    causal = torch.ones(6, 6, dtype=torch.bool).triu(1)
    options = {"tgt_mask": causal, "tgt_is_causal": True, "memory_key_padding_mask": padding()}
    results = [model(target, memory, **options) for model in (theirs, ours)]
    torch.testing.assert_close(results[1], results[0])
    assert [id(layer) for layer in forwards] == [id(ours.self_attn), id(ours.multihead_attn)]
    for result in results:
        result.sin().sum().backward()
    assert_same_gradients(theirs, ours)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage:UserWarning")
def test_a_nested_query_without_sequences_is_named():
    empty = torch.nested.nested_tensor([])
    with pytest.raises(ValueError, match=r"at least one sequence, got query\.size\(0\)=0"):
        MultiheadAttention(8, 2, batch_first=True).eval()(empty, empty, empty, need_weights=False)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage:UserWarning")
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
def test_nested_tensors_are_packed_rows(layout):
    theirs, ours = pair(add_zero_attn=True)
    pieces = [torch.randn(n, E, dtype=torch.float64, requires_grad=True) for n in (4, 7)]
    nested = torch.nested.as_nested_tensor(pieces, layout=layout)
    out = ours(nested, nested, nested, need_weights=False)[0]
    assert (out.is_nested, out.layout) == (True, layout)
    expected = [theirs(x, x, x, need_weights=False)[0] for x in pieces]
    torch.testing.assert_close(list(out.unbind()), expected)
    loss, expected_loss = (sum(x.sin().sum() for x in each) for each in (out.unbind(), expected))
    torch.testing.assert_close(torch.autograd.grad(loss, pieces), torch.autograd.grad(expected_loss, pieces))
    for call in ((nested, nested, nested, padding()), (nested, pieces[0], pieces[0])):
        with pytest.raises(ValueError, match="a nested query must be key and value too, without masks"):
            ours(*call, need_weights=False)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage:UserWarning")
@pytest.mark.parametrize("average", [True, False])
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
def test_weights_of_nested_tensors_are_padded_with_zeros(layout, average):
    theirs, ours = pair()
    pieces = [torch.randn(n, E, dtype=torch.float64) for n in (4, 7)]
    nested = torch.nested.as_nested_tensor(pieces, layout=layout)
    out, weights = ours(nested, nested, nested, average_attn_weights=average)
    assert weights.shape == ((2, 7, 7) if average else (2, H, 7, 7))
    for piece, got, rows in zip(pieces, out.unbind(), weights, strict=True):
        expected, expected_rows = theirs(piece, piece, piece, average_attn_weights=average)
        n = len(piece)
        torch.testing.assert_close((got, rows[..., :n, :n]), (expected, expected_rows))
        assert rows[..., n:, :].abs().sum() == rows[..., n:].abs().sum() == 0
    with pytest.raises(ValueError, match="only impl='torch' supports need_weights=True, got impl='reference'"):
        MultiheadAttention(E, H, batch_first=True, impl="reference")(nested, nested, nested)


@pytest.mark.parametrize("widths", [{}, {"kdim": 5, "vdim": 6}])
def test_biases_may_have_a_precision_of_their_own(widths):
    theirs, ours = pair(**widths)
    for layer in (theirs, ours):
        layer.in_proj_bias = nn.Parameter(layer.in_proj_bias.half())
    inputs = [torch.randn(B, 3, width, dtype=torch.float64) for width in (E, theirs.kdim, theirs.vdim)]
    rounded = [layer.in_proj_bias.double() for layer in (theirs, ours)]
    got = ours(*inputs)[0]
    for layer, bias in zip((theirs, ours), rounded, strict=True):
        layer.in_proj_bias = nn.Parameter(bias)
    torch.testing.assert_close(got, theirs(*inputs)[0])


def test_swapping_keeps_parameters_sharing_hooks_mode_and_position(forwards):
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(E, H, batch_first=True, dtype=torch.bfloat16).eval()
            self.again = self.attention
            self.inner = nn.ModuleDict({"list": nn.ModuleList([nn.MultiheadAttention(E, H, add_bias_kv=True)])})
            self.mine = MultiheadAttention(E, H, skip_queries=True)

    model = Tied()
    called = []
    model.attention.register_forward_hook(lambda module, inputs, output: called.append(module))
    model.inner["list"][0].in_proj_weight.requires_grad_(False)
    before, keys = dict(model.named_parameters()), list(model.state_dict())
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    assert replace_attention(model, skip_queries=False, impl="torch") is model
    assert all(isinstance(layer, MultiheadAttention) for layer in (model.attention, model.inner["list"][0]))
    assert model.attention is model.again
    assert list(model.state_dict()) == keys
    assert all(parameter is before[name] for name, parameter in model.named_parameters())
    assert (model.attention.impl, model.mine.impl, model.mine.skip_queries) == ("torch", None, True)
    assert (model.attention.training, model.inner["list"][0].training) == (False, True)
    x = torch.randn(B, S, E, dtype=torch.bfloat16)
    out = model.attention(x, x, x, need_weights=False)[0]
    assert called == forwards == [model.attention]
    out.float().square().sum().backward()
    weight = model.attention.in_proj_weight.detach().clone()
    optimizer.step()
    assert not torch.equal(model.attention.in_proj_weight, weight)
    hooks = len(model.attention._forward_pre_hooks)
    replace_attention(model)
    assert len(model.attention._forward_pre_hooks) == hooks


def test_a_layer_itself_can_be_swapped():
    layer = nn.MultiheadAttention(E, H)
    assert type(replace_attention(layer)) is MultiheadAttention
    assert type(layer) is MultiheadAttention


def test_subclasses_of_torchs_layer_are_left_alone_and_named():
    class Rotary(nn.MultiheadAttention):
        pass

    model = nn.Sequential(Rotary(E, H), nn.MultiheadAttention(E, H), MultiheadAttention(E, H))
    with pytest.warns(UserWarning, match=r"left these subclasses unchanged: 0 \(Rotary\)$"):
        replace_attention(model)
    assert [type(module) for module in model] == [Rotary, MultiheadAttention, MultiheadAttention]


COMPILED = {
    "no mask": {"need_weights": False},
    "weights": {},
    "causal": {"need_weights": False, "is_causal": True, "attn_mask": torch.ones(S, S, dtype=torch.bool).triu(1)},
    "dense mask": {"need_weights": False, "attn_mask": torch.ones(B * H, S, S, dtype=torch.bool).triu(1)},
}


@pytest.mark.parametrize("way", [*COMPILED, "keys", "keys, weights"])
# Where a graph resumes, torch.compile reads .grad of tensors that have none.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_the_layer_compiles(way):
    torch.compiler.reset()
    _, ours = pair(add_zero_attn=True)
    masked = {"need_weights": way != "keys", "key_padding_mask": padding()}
    options = COMPILED.get(way, masked)
    # How many keys a mask keeps is data, at which the graph breaks.
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=way in COMPILED)
    results = []
    for layer in (ours, compiled):
        x = torch.randn(B, S, E, dtype=torch.float64, generator=torch.Generator().manual_seed(5)).requires_grad_()
        out, weights = layer(x, x, x, **options)
        loss = out.sin().sum() + (0 if weights is None else weights.sin().sum())
        results.append((out, weights, torch.autograd.grad(loss, [x, *ours.parameters()], materialize_grads=True)))
    torch.testing.assert_close(results[1], results[0])


@pytest.mark.parametrize("way", ["keys", "weights", "dense mask"])
def test_autocast_gives_its_dtype_as_it_gives_torchs(way):
    theirs, ours = (layer.float() for layer in pair(add_bias_kv=True))
    x, options = torch.randn(B, S, E), {"key_padding_mask": padding(), "need_weights": way == "weights"}
    if way == "dense mask":
        options["attn_mask"] = torch.rand(S, S).gt(0.8).logical_and(torch.arange(S) > 0)
    results = []
    for layer, context in (
        (theirs, torch.autocast("cpu", torch.bfloat16)),
        (ours, torch.autocast("cpu", torch.bfloat16)),
        (copy.deepcopy(theirs).double(), contextlib.nullcontext()),
    ):
        with context:
            inputs = x.to(layer.out_proj.weight.dtype)
            results.append(layer(inputs, inputs, inputs, **options))
    for torchs, got, exact in zip(*results, strict=True):
        if exact is not None:
            assert got.dtype == torchs.dtype
            assert_within_budget(got, exact, torchs.to(torch.bfloat16), way)


@pytest.mark.parametrize("way", ["keys", "weights", "dense mask"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mask_dtype", [torch.float32, torch.float16])
def test_a_half_precision_layer_takes_float_masks_of_any_dtype(way, dtype, mask_dtype):
    exact, ours = pair(add_zero_attn=True)
    half = ours.to(dtype)
    exact.load_state_dict({name: x.double() for name, x in half.state_dict().items()})
    x = torch.randn(B, S, E).to(dtype)
    keys = torch.randn(B, S).masked_fill(padding(), float("-inf")).to(mask_dtype)
    dense = torch.randn(S, S).to(mask_dtype) if way == "dense mask" else None
    same = copy.deepcopy(exact).to(dtype)
    results = []
    for layer in (half, exact, same):
        kind = torch.float64 if layer is exact else mask_dtype if layer is half else dtype
        masks = {"key_padding_mask": keys.to(kind), "attn_mask": None if dense is None else dense.to(kind)}
        inputs = x.to(layer.out_proj.weight.dtype)
        results.append(layer(inputs, inputs, inputs, **masks, need_weights=way == "weights"))
    for got, expected, torchs in zip(*results, strict=True):
        if expected is not None:
            assert got.dtype == dtype
            assert_within_budget(got, expected, torchs, way)


def test_the_warning_of_mismatched_masks_points_at_the_caller():
    _, ours = pair()
    x, dense = torch.randn(B, S, E, dtype=torch.float64), torch.zeros(S, S, dtype=torch.float64)
    with pytest.warns(UserWarning, match="mismatched") as caught:
        ours(x, x, x, padding(), attn_mask=dense)
    assert [warning.filename for warning in caught] == [__file__]
