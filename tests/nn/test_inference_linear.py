"""Linear layers in inference equal torch's own, and what torch's own would have done still happens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maskattn.nn import TileEncoder, VisionTransformer, blocks, inference_linear, native_layers
from maskattn.nn.encoders import EncoderCard
from maskattn.nn.inference_linear import (
    linear,
    linear_and_activation,
    packed_weights,
    product,
    rounded_up,
    runs_here,
)
from maskattn.nn.packed_tokens import PackedTokens
from maskattn.packing import Packing

pytestmark = pytest.mark.skipif(
    not inference_linear._has_product(torch.float32), reason="this processor or torch has no oneDNN product"
)


@pytest.fixture(params=[False, True], ids=["oneDNN", "C++"])
def natively(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether the C++ kernels multiply, for any number of rows, or oneDNN does."""
    chosen: bool = request.param
    monkeypatch.setattr(native_layers, "are_faster_here", lambda *_: chosen)
    monkeypatch.setattr(inference_linear, "_FEWEST_ROWS_TO_PACK_FOR", 1)
    return chosen


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[torch.dtype]:
    """The dtypes of the products that did not take torch's way, of single layers and of blocks as wholes."""
    seen: list[torch.dtype] = []
    fused, apply_whole = inference_linear._fused, blocks.apply_whole

    def record(layer: nn.Module, x: Tensor, dtype: torch.dtype, *arguments: Any, **options: Any) -> Tensor:
        seen.append(dtype)
        return fused(layer, x, dtype, *arguments, **options)

    def record_whole(block: blocks.Block, x: Tensor, tokens: PackedTokens) -> Tensor | None:
        out = apply_whole(block, x, tokens)
        if out is not None:
            seen.append(inference_linear.multiplies_natively(x))
        return out

    monkeypatch.setattr(inference_linear, "_fused", record)
    monkeypatch.setattr(blocks, "apply_whole", record_whole)
    return seen


def images_and_mask(B: int = 5) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    keep = torch.rand(B, 8, 8) < 0.4
    keep[0] = False
    return torch.randn(B, 3, 64, 64), keep


def small_vit(**options: object) -> VisionTransformer:
    torch.manual_seed(0)
    vit = VisionTransformer(**{"img_size": 64, "patch_size": 8, "embed_dim": 64, "depth": 3, "num_heads": 4, **options})
    with torch.no_grad():
        for parameter in vit.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return vit.eval()


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("act", ["gelu", "gelu_tanh", "relu"])
def test_layers_and_activations_equal_torchs(
    packed: bool, bias: bool, act: str, natively: bool, calls: list[torch.dtype]
) -> None:
    torch.manual_seed(0)
    layer, x = nn.Linear(48, 80, bias=bias), torch.randn(3, 7, 48)
    activation = {"gelu": F.gelu, "gelu_tanh": lambda y: F.gelu(y, approximate="tanh"), "relu": F.relu}[act]
    with torch.no_grad():
        expected, expected_activated = layer(x), activation(layer(x))
        assert not calls
    with torch.inference_mode(), packed_weights(layer) if packed else torch.inference_mode():
        for _ in range(2):  # the second finds the packed copy
            torch.testing.assert_close(linear(layer, x), expected)
            torch.testing.assert_close(linear_and_activation(layer, x, act, activation), expected_activated)
            torch.testing.assert_close(product(layer, x, slice(16, 48)), expected[..., 16:48])
    assert calls == [torch.float32] * 6


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"global_pool": "avg", "reg_tokens": 3},
        {"global_pool": "map", "class_token": False},
        {"pos_embed": "rotary"},
        {"pos_embed": "alibi", "mlp_layer": "swiglu_packed", "mlp_ratio": 4.0},
        {"act_layer": "quick_gelu", "init_values": 0.1},
    ],
)
def test_a_vit_in_inference_equals_the_same_with_gradients(
    options: dict[str, object], natively: bool, calls: list[torch.dtype], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inference_linear, "_STEPS", 4)
    vit, (x, keep) = small_vit(**options), images_and_mask()
    expected = vit(x, keep).detach()
    with torch.inference_mode(), packed_weights(vit):
        tokens = vit.embed(x, keep)
        longer = rounded_up(tokens)
        assert (longer.packing.total > tokens.packing.total) == (not natively)  # the C++ kernels compile nothing
        assert calls
        torch.testing.assert_close(vit(tokens), expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(vit(longer)[: len(x)], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("emulated", [False, True])
def test_under_autocast_bfloat16_products_are_as_close_as_torchs_own(
    emulated: bool, natively: bool, calls: list[torch.dtype], monkeypatch: pytest.MonkeyPatch
) -> None:
    if emulated:  # as on a processor without bfloat16 products
        monkeypatch.setattr(inference_linear, "computed_in", lambda dtype: torch.float32)
    vit, (x, keep) = small_vit(), images_and_mask()
    with torch.no_grad():
        expected = vit(x, keep)
        with torch.autocast("cpu", torch.bfloat16):
            theirs = vit(x, keep).float()
    with torch.inference_mode(), packed_weights(vit), torch.autocast("cpu", torch.bfloat16):
        assert linear(vit.blocks[0].attn.qkv, x.new_ones(2, 64)).dtype == torch.bfloat16
        calls.clear()
        ours = vit(x, keep).float()
    assert set(calls) == {torch.bfloat16}
    assert (ours - expected).norm() <= 1.2 * (theirs - expected).norm()


def test_weights_that_change_between_runs_are_seen_and_within_a_run_outside_of_it(natively: bool) -> None:
    torch.manual_seed(0)
    layer, x = nn.Linear(32, 32), torch.randn(4, 32)
    with torch.inference_mode(), packed_weights(layer):
        linear(layer, x)
    layer.weight.data.mul_(2)  # which no version counter sees
    expected = layer(x).detach()
    with torch.inference_mode():
        torch.testing.assert_close(linear(layer, x), expected)
        with packed_weights(layer), packed_weights(layer):
            torch.testing.assert_close(linear(layer, x), expected)
    assert layer not in inference_linear._packed


def test_of_large_weights_no_copy_is_kept(natively: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inference_linear, "_MOST_PACKED_BYTES", 1000)
    layer, x = nn.Linear(32, 32), torch.randn(4, 32)
    with torch.inference_mode(), packed_weights(layer):
        torch.testing.assert_close(linear(layer, x), F.linear(x, layer.weight, layer.bias))
        assert not inference_linear._packed[layer]


def test_layers_with_something_attached_are_called(natively: bool, calls: list[torch.dtype]) -> None:
    x = torch.randn(4, 32)
    hooked, doubled = nn.Linear(32, 32), nn.Linear(32, 32)
    hooked.register_forward_hook(lambda module, inputs, output: output + 1)
    nn.utils.parametrizations.weight_norm(doubled)
    with torch.inference_mode():
        torch.testing.assert_close(linear(hooked, x), F.linear(x, hooked.weight, hooked.bias) + 1)
        torch.testing.assert_close(linear(doubled, x), doubled(x))
        assert linear(nn.Identity(), x) is x
    assert not calls


def test_gradients_other_dtypes_transforms_and_empty_rows_take_torchs_way(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(4, 32)
    assert runs_here(x) is None
    with torch.inference_mode():
        assert runs_here(x) == torch.float32
        assert runs_here(x.double()) is None
        assert runs_here(x.half()) is None
        assert runs_here(x.to("meta")) is None
        assert runs_here(x[:0]) is None
        seen: list[object] = []
        torch.vmap(lambda row: seen.append(runs_here(row)) or row)(x)
        assert seen == [None]
        monkeypatch.setattr(inference_linear, "_has_product", lambda dtype: False)
        assert runs_here(x) is None


def test_few_numbers_of_rows_occur(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native_layers, "are_faster_here", lambda *_: False)
    vit, generator = small_vit(depth=1), torch.Generator().manual_seed(0)
    before, after = set(), set()
    with torch.inference_mode():
        for _ in range(60):
            keep = torch.rand(40, 64, generator=generator) < 0.4
            tokens = rounded_up(vit.embed(torch.zeros(40, 3, 64, 64), keep))
            packing: Packing = tokens.packing
            assert packing.cu_seqlens[-1] == packing.total == len(tokens.rows_TC)
            before.add(int(keep.sum()) + 40)
            after.add(packing.total)
            assert packing.total <= (int(keep.sum()) + 40) * 33 // 32
    assert len(before) > 40
    assert len(after) <= 12
    with torch.no_grad():
        tokens = vit.embed(torch.zeros(40, 3, 64, 64), keep)
        assert rounded_up(tokens) is tokens


@pytest.mark.parametrize("masked", [False, True])
def test_a_large_batch_is_encoded_in_parts_with_the_same_features(
    masked: bool, natively: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = TileEncoder(small_vit(), EncoderCard("small", "token", (0.5,) * 3, (0.25,) * 3, 64, 64)).eval()
    tiles = torch.randint(0, 256, (7, 3, 64, 64), dtype=torch.uint8)
    keep = images_and_mask(7)[1] if masked else None
    with torch.no_grad():
        expected = encoder.encode_tiles(tiles, keep)
    sizes: list[int] = []
    encoder.vit.register_forward_pre_hook(lambda module, inputs: sizes.append(len(inputs[0].packing.cu_seqlens)))
    monkeypatch.setattr(inference_linear, "_BYTES_PER_FEATURE_AT_ONCE", 4 * 90)
    with torch.inference_mode():
        torch.testing.assert_close(encoder.encode_tiles(tiles, keep), expected, rtol=1e-4, atol=1e-5)
        assert len(sizes) > 1
        empty = encoder.encode_tiles(tiles[:0], None if keep is None else keep[:0])
        assert empty.shape == (0, 64)
