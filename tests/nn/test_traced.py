"""Programs written down instead of run: the meta device, ``torch.export``, ``torch.jit.trace``, ``torch.fx``."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from layer_pair import B, E, H, L, S, inputs_of, padding
from torch import Tensor, nn

from maskattn import masked_attention, packed_attention
from maskattn.nn import MultiheadAttention, VisionTransformer, replace_attention
from maskattn.packing import Packing, pack, unpack

# torch.jit.trace warns that it is deprecated, and of each comparison of sizes.
tracing = pytest.mark.filterwarnings("ignore:.*torch.jit.trace", "ignore::torch.jit.TracerWarning")
strictness = pytest.mark.parametrize("strict", [False, True])

VARIANTS = [
    {},
    {"global_pool": "avg", "reg_tokens": 2},
    {"global_pool": "map", "class_token": False},
    {"global_pool": "coca", "pool_dim": 64},
    {"global_pool": ""},
    {"pos_embed": "rotary", "qk_norm": True},
    {"pos_embed": "alibi"},
]


def random_vit(**arguments: object) -> VisionTransformer:
    small = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 3}
    model = VisionTransformer(**{**small, **arguments}).eval()
    for p in model.parameters():
        nn.init.normal_(p, std=0.3)
    return model


def images_and_masks(batch: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    keeps = torch.rand(2, batch, 4, 4) > 0.4
    keeps[:, :, 0, 0] = True
    return torch.randn(batch, 3, 32, 32), *keeps


class Called(nn.Module):
    """A layer with its options fixed; tensors are the program's inputs."""

    def __init__(self, layer: nn.Module, tensors: tuple[str, ...] = (), **options: object) -> None:
        super().__init__()
        self.layer, self.tensors, self.options = layer, tensors, options

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *more: Tensor) -> tuple[Tensor, ...]:
        result = self.layer(query, key, value, **dict(zip(self.tensors, more, strict=True)), **self.options)
        return tuple(x for x in result if x is not None)


def float_padding() -> Tensor:
    bias = torch.randn(B, S, dtype=torch.float64)
    return bias.masked_fill(padding(), float("-inf"))


MASKS = {
    "none": dict,
    "keys": lambda: {"key_padding_mask": padding()},
    "all keys": lambda: {"key_padding_mask": torch.ones(B, S, dtype=torch.bool)},
    "float keys": lambda: {"key_padding_mask": float_padding()},
    "dense": lambda: {"attn_mask": torch.rand(L, S) > 0.6},
    "dense of heads": lambda: {"attn_mask": torch.randn(B * H, L, S, dtype=torch.float64)},
    "both": lambda: {"key_padding_mask": float_padding(), "attn_mask": torch.randn(L, S, dtype=torch.float64)},
}
LAYERS = [
    {},
    {"batch_first": False},
    {"kdim": 16, "vdim": 20, "bias": False},
    {"add_bias_kv": True, "add_zero_attn": True},
]


@tracing
@pytest.mark.parametrize("arguments", LAYERS)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("weights", ["none", "mean", "of heads"])
def test_a_traced_layer_computes_the_same_with_other_masks_and_tokens(arguments, mask, weights):
    layer = MultiheadAttention(E, H, **{"batch_first": True, **arguments}).double().eval()
    options = {"need_weights": weights != "none", "average_attn_weights": weights == "mean"}
    first, second = MASKS[mask](), MASKS[mask]()
    model = Called(layer, tuple(first), **options)
    traced = torch.jit.trace(model, (*inputs_of(layer), *first.values()), check_trace=False)
    others = (*inputs_of(layer), *second.values())
    torch.testing.assert_close(traced(*others), model(*others))


@tracing
def test_a_traced_layer_takes_other_numbers_of_sequences_and_tokens():
    model = Called(MultiheadAttention(E, H, batch_first=True).eval(), ("key_padding_mask",), need_weights=False)
    x = torch.randn(2, 5, E)
    traced = torch.jit.trace(model, (x, x, x, padding(2, 5)), check_trace=False)
    y, mask = torch.randn(4, 9, E), padding(4, 9)
    torch.testing.assert_close(traced(y, y, y, mask), model(y, y, y, mask))


@tracing
@pytest.mark.parametrize("skip_queries", [False, True])
def test_masked_keys_of_a_traced_layer_are_poisoned_without_harm(skip_queries):
    layer = MultiheadAttention(E, H, batch_first=True, skip_queries=skip_queries).double()
    mask = padding(B, S)
    model = Called(layer, ("key_padding_mask",), need_weights=False)
    x = torch.randn(B, S, E, dtype=torch.float64)
    traced = torch.jit.trace(model, (x, x, x, mask), check_trace=False)
    nan = x.masked_fill(mask[:, :, None], float("nan"))
    inputs = (nan, nan, nan) if skip_queries else (x, nan, nan)
    (out,) = traced(*inputs, mask)
    torch.testing.assert_close(out, model(x, x, x, mask)[0])
    out.sum().backward()
    assert all(p.grad.isfinite().all() for p in layer.parameters())


@tracing
def test_a_traced_readout_keeps_its_mask_an_input():
    layer = MultiheadAttention(E, H, batch_first=True).double().eval()

    class Readout(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer

        def forward(self, x, mask):
            return self.layer.readout(x[:, :1], x, x, mask)

    x, first, second = torch.randn(B, S, E, dtype=torch.float64), padding(), padding()
    traced = torch.jit.trace(Readout(), (x, first), check_trace=False)
    torch.testing.assert_close(traced(x, second), layer.readout(x[:, :1], x, x, second))


@tracing
def test_a_traced_transformer_encoder_keeps_its_mask_an_input():
    class Encoder(nn.Module):
        def __init__(self):
            super().__init__()
            layer = nn.TransformerEncoderLayer(E, H, 32, batch_first=True)
            self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

        def forward(self, x, mask):
            return self.encoder(x, src_key_padding_mask=mask)

    model = replace_attention(Encoder()).eval()
    x, first, second = torch.randn(B, S, E), padding(), padding()
    traced = torch.jit.trace(model, (x, first), check_trace=False)
    torch.testing.assert_close(traced(x, second), model(x, second))


@tracing
def test_a_mask_that_a_trace_would_freeze_is_refused_and_an_operation_that_takes_it_is_not():
    x, keep, other = images_and_masks()
    vit = random_vit()
    with pytest.raises(ValueError, match=r"torch\.jit\.trace, which would freeze"):
        torch.jit.trace(vit, (x, keep))
    with pytest.raises(ValueError, match=r"torch\.export"):
        torch.jit.trace(lambda x, keep: pack(x, Packing.from_keep(keep)), (x.flatten(2).mT, keep.flatten(1)))
    traced = torch.jit.trace(vit, (x,), check_trace=False)
    more = torch.randn(3, 3, 32, 32)
    torch.testing.assert_close(traced(more), vit(more))
    q = torch.randn(2, 2, 16, 8)
    traced = torch.jit.trace(lambda q, keep: masked_attention(q, q, q, keep), (q, keep.flatten(1)), check_trace=False)
    torch.testing.assert_close(traced(q, other.flatten(1)), masked_attention(q, q, q, other.flatten(1)))


@strictness
@pytest.mark.parametrize("mask", ["none", "keys", "float keys", "both"])
def test_an_exported_layer_needs_torch_alone_and_keeps_its_masks_inputs(mask, strict):
    layer = MultiheadAttention(E, H, batch_first=True).double().eval()
    first, second = MASKS[mask](), MASKS[mask]()
    model = Called(layer, tuple(first), need_weights=False)
    program = torch.export.export(model, (*inputs_of(layer), *first.values()), strict=strict)
    assert "maskattn" not in program.graph_module.code
    others = (*inputs_of(layer), *second.values())
    torch.testing.assert_close(program.module()(*others), model(*others))


@pytest.mark.parametrize(
    ("variant", "strict"), [*((variant, False) for variant in VARIANTS), (VARIANTS[1], True)], ids=str
)
def test_an_exported_vit_keeps_its_mask_an_input(variant, strict):
    vit, (x, keep, other) = random_vit(depth=1, **variant), images_and_masks()
    program = torch.export.export(vit, (x, keep), strict=strict).module()
    for mask in (keep, other, torch.ones_like(keep)):
        torch.testing.assert_close(program(x, mask), vit(x, mask))


@strictness
def test_a_vit_is_exported_without_a_mask(strict):
    vit, (x, _, _) = random_vit(), images_and_masks()
    torch.testing.assert_close(torch.export.export(vit, (x,), strict=strict).module()(x), vit(x))


def test_an_exported_vit_takes_other_batches_and_comes_back_from_a_file():
    vit, (x, keep, _) = random_vit(), images_and_masks()
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(vit, (x, keep), dynamic_shapes={"x": {0: batch}, "keep": {0: batch}})
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    more, mask, _ = images_and_masks(5)
    torch.testing.assert_close(loaded(more, mask), vit(more, mask))
    mask[1:3] = False
    torch.testing.assert_close(loaded(more, mask), vit(more, mask))


def test_an_exported_vit_reads_the_class_token_alone():
    vit, (x, _, _) = random_vit(), images_and_masks()
    operations = str(torch.export.export(vit, (x,)).graph)
    assert operations.count("maskattn.readout") == 1
    assert operations.count("maskattn.packed_attention") == 1


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_shapes_on_the_meta_device_are_those_of_the_cpu(variant):
    x, keep, _ = images_and_masks()
    vit = random_vit(**variant)
    expected = vit(x, keep)
    meta = copy.deepcopy(vit).to("meta")
    for mask in (None, keep, keep.to("meta")):
        output = meta(x.to("meta"), mask)
        assert (output.shape, output.dtype, output.device.type) == (expected.shape, expected.dtype, "meta")
    assert meta.forward_features(x.to("meta"), keep.to("meta")).shape == vit.forward_features(x, keep).shape


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("weights", [True, False])
def test_the_layer_has_shapes_on_the_meta_device(mask, weights):
    layer = MultiheadAttention(E, H, batch_first=True).double()
    options = MASKS[mask]() | {"need_weights": weights}
    expected = layer(*inputs_of(layer), **options)
    of_meta = {name: x.to("meta") if isinstance(x, Tensor) else x for name, x in options.items()}
    got = layer.to("meta")(*(x.to("meta") for x in inputs_of(layer)), **of_meta)
    assert [None if x is None else x.shape for x in got] == [None if x is None else x.shape for x in expected]


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.before = nn.Linear(E, E)
        self.attention = nn.MultiheadAttention(E, H, batch_first=True)
        self.after = nn.Linear(E, E)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = self.before(x)
        return self.after(x + self.attention(x, x, x, key_padding_mask=mask, need_weights=False)[0])


def test_a_swapped_layer_is_one_node_of_a_symbolic_trace_as_torchs_is():
    x, mask = torch.randn(B, S, E), padding()
    theirs = Residual().eval()
    ours = replace_attention(copy.deepcopy(theirs))
    graphs = [torch.fx.symbolic_trace(model).graph for model in (theirs, ours)]
    kinds = [[(node.op, str(node.target)) for node in graph.nodes] for graph in graphs]
    assert kinds[0] == kinds[1]
    module = torch.fx.GraphModule(ours, graphs[1])
    torch.testing.assert_close(module(x, mask), theirs(x, mask))


def test_torchvisions_feature_extractor_reads_a_swapped_model():
    pytest.importorskip("torchvision")
    from torchvision.models import VisionTransformer as Torchvisions
    from torchvision.models.feature_extraction import create_feature_extractor

    theirs = Torchvisions(32, 8, 2, 2, 32, 64, num_classes=3).eval()
    ours, x = replace_attention(copy.deepcopy(theirs)), torch.randn(1, 3, 32, 32)
    names = ["encoder.layers.encoder_layer_0.self_attention", "encoder.ln"]
    expected, got = (create_feature_extractor(model, names)(x) for model in (theirs, ours))
    torch.testing.assert_close(got["encoder.ln"], expected["encoder.ln"])
    torch.testing.assert_close(got[names[0]][0], expected[names[0]][0])


def test_a_vit_is_one_node_of_a_larger_model_and_refused_as_the_whole():
    class Classifier(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder = random_vit(num_classes=0)
            self.head = nn.Linear(32, 2)

        def forward(self, x, keep):
            return self.head(self.encoder(x / 255, keep))

    model, (x, keep, other) = Classifier().eval(), images_and_masks()
    traced = torch.fx.symbolic_trace(model)
    assert "encoder" in [node.target for node in traced.graph.nodes]
    for mask in (keep, other):
        torch.testing.assert_close(traced(x, mask), model(x, mask))
    with pytest.raises(TypeError, match="as one node of a larger model"):
        torch.fx.symbolic_trace(model.encoder)


def test_operations_are_nodes_of_a_symbolic_trace():
    class Model(nn.Module):
        def forward(self, q, keep, rows, starts):
            dense = masked_attention(q, q, q, keep)
            return dense.sum() + packed_attention(rows, rows, rows, starts, starts, 3, 3).sum()

    model = Model()
    q, keep = torch.randn(2, 2, 16, 8), images_and_masks()[1].flatten(1)
    rows, starts = torch.randn(5, 2, 8), torch.tensor([0, 3, 5], dtype=torch.int32)
    traced = torch.fx.symbolic_trace(model)
    torch.testing.assert_close(traced(q, keep, rows, starts), model(q, keep, rows, starts))


@pytest.mark.parametrize("is_constant", [False, True])
def test_packing_and_unpacking_are_nodes_of_a_symbolic_trace(is_constant):
    x, keep, other = torch.randn(2, 16, 2, 8), *(mask.flatten(1) for mask in images_and_masks()[1:])
    fixed = Packing.from_keep(keep) if is_constant else None

    class Model(nn.Module):
        def forward(self, x, keep):
            packing = fixed or Packing.from_keep(keep)
            rows, longest = pack(x, packing), packing.max_seqlen
            starts = packing.cu_seqlens
            return unpack(packed_attention(rows, rows, rows, starts, starts, longest, longest), packing)

    traced = torch.fx.symbolic_trace(Model())
    targets = [getattr(node.target, "__name__", "") for node in traced.graph.nodes]
    assert [name for name in ("pack", "packed_attention", "unpack") if targets.count(name) != 1] == []
    for mask in (keep, other):
        assert torch.equal(traced(x, mask), Model()(x, mask))
