"""Whole blocks by the C++ kernels: which blocks they compute, and that the others are computed layer by layer."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from maskattn.nn import VisionTransformer, blocks, inference_linear, native_layers
from maskattn.nn.blocks import Block
from maskattn.nn.inference_linear import packed_weights
from maskattn.nn.native_layers import are_faster_here
from maskattn.nn.packed_tokens import PackedTokens
from tests.oracles import assert_within_budget

DEPTH = 3


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[Block]:
    """The blocks that the C++ kernels computed, which are chosen as on a processor where they are faster."""
    seen: list[Block] = []
    apply_whole = blocks.apply_whole

    def record(block: Block, x: Tensor, tokens: PackedTokens) -> Tensor | None:
        out = apply_whole(block, x, tokens)
        if out is not None:
            seen.append(block)
        return out

    monkeypatch.setattr(blocks, "apply_whole", record)
    monkeypatch.setattr(native_layers, "are_faster_here", lambda *_: True)
    return seen


def small_vit(**options: object) -> VisionTransformer:
    torch.manual_seed(0)
    # Mean pooling calls all blocks; a class token is read from the last without computing it for the others.
    given = {"img_size": 64, "patch_size": 8, "embed_dim": 64, "depth": DEPTH, "num_heads": 4, "global_pool": "avg"}
    vit = VisionTransformer(**{**given, **options})
    with torch.no_grad():
        for parameter in vit.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return vit.eval()


def images_and_mask() -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    keep = torch.rand(5, 8, 8) < 0.4
    keep[0] = False
    return torch.randn(5, 3, 64, 64), keep


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"reg_tokens": 3, "init_values": 0.1, "act_layer": "gelu_tanh"},
        {"class_token": False, "qkv_bias": False},
        {"pos_embed": "sine", "pre_norm": True, "mlp_ratio": 1.7},
    ],
)
def test_a_vit_of_whole_blocks_meets_the_error_budget(options: dict[str, object], taken: list[Block]) -> None:
    vit, (x, keep) = small_vit(**options), images_and_mask()
    keep[0, 0, 0] = True
    same = vit(x, keep).detach()
    exact = vit.double()(x.double(), keep).detach()
    vit.float()
    assert not taken
    with torch.inference_mode(), packed_weights(vit):
        got = vit(x, keep)
        again = vit(x, keep)
    assert len(taken) == 2 * DEPTH
    assert_within_budget(got, exact, same)
    assert torch.equal(got, again)


def test_the_class_tokens_block_is_read(taken: list[Block]) -> None:
    vit, (x, keep) = small_vit(global_pool="token"), images_and_mask()
    expected = vit(x, keep).detach()
    with torch.inference_mode(), packed_weights(vit):
        torch.testing.assert_close(vit(x, keep), expected, rtol=1e-4, atol=1e-5)
    assert len(taken) == DEPTH - 1


def hooked(vit: VisionTransformer) -> None:
    vit.blocks[1].mlp.register_forward_hook(lambda module, inputs, output: output * 2)


def adapted(vit: VisionTransformer) -> None:
    vit.blocks[1].attn.proj = nn.Sequential(vit.blocks[1].attn.proj, nn.Tanh())


def dropping(vit: VisionTransformer) -> None:
    vit.blocks[1].mlp.drop.p = 0.5
    vit.blocks[1].mlp.drop.train()


@pytest.mark.parametrize("change", [hooked, adapted])
def test_a_block_with_something_attached_is_called_layer_by_layer(
    change: Callable[[VisionTransformer], None], taken: list[Block]
) -> None:
    vit, (x, keep) = small_vit(), images_and_mask()
    change(vit)
    expected = vit(x, keep).detach()
    with torch.inference_mode(), packed_weights(vit):
        torch.testing.assert_close(vit(x, keep), expected, rtol=1e-4, atol=1e-5)
    assert taken == [vit.blocks[0], vit.blocks[2]]


def test_a_block_that_drops_at_random_still_does(taken: list[Block]) -> None:
    vit, (x, keep) = small_vit(), images_and_mask()
    dropping(vit)
    with torch.inference_mode(), packed_weights(vit):
        assert not torch.equal(vit(x, keep), vit(x, keep))
    assert vit.blocks[1] not in taken


@pytest.mark.parametrize(
    "options",
    [
        {"pos_embed": "alibi"},
        {"pos_embed": "rotary"},
        {"mlp_layer": "swiglu_packed"},
        {"act_layer": "quick_gelu"},
        {"qk_norm": True},
        {"scale_attn_norm": True},
        {"scale_mlp_norm": True},
        {"impl": "torch"},
        {"num_heads": 8},  # heads of width 8
    ],
)
def test_other_blocks_are_computed_layer_by_layer(options: dict[str, object], taken: list[Block]) -> None:
    vit, (x, keep) = small_vit(**options), images_and_mask()
    expected = vit(x, keep).detach()
    with torch.inference_mode(), packed_weights(vit):
        torch.testing.assert_close(vit(x, keep), expected, rtol=1e-4, atol=1e-5)
    assert not taken


def test_outside_a_run_weights_are_packed_for_many_rows_alone(
    taken: list[Block], monkeypatch: pytest.MonkeyPatch
) -> None:
    vit, (x, keep) = small_vit(), images_and_mask()
    with torch.inference_mode():
        expected = vit(x, keep)
        assert not taken
        monkeypatch.setattr(inference_linear, "_FEWEST_ROWS_TO_PACK_FOR", 100)
        torch.testing.assert_close(vit(x, keep), expected, rtol=1e-4, atol=1e-5)
        assert len(taken) == DEPTH
        vit.blocks[0].mlp.fc1.weight.data.mul_(2)  # which no version counter sees
        assert not torch.allclose(vit(x, keep), expected, rtol=1e-3)


def test_large_weights_are_packed_for_each_call(taken: list[Block], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inference_linear, "_MOST_PACKED_BYTES", 1000)
    monkeypatch.setattr(inference_linear, "_FEWEST_ROWS_TO_PACK_FOR", 1)
    vit, (x, keep) = small_vit(), images_and_mask()
    with torch.inference_mode(), packed_weights(vit):
        vit(x, keep)
        assert len(taken) == DEPTH
        assert not inference_linear._packed[vit.blocks[0]]


@pytest.mark.skipif(
    inference_linear.computed_in(torch.bfloat16) != torch.bfloat16, reason="this processor does not multiply bfloat16"
)
@pytest.mark.parametrize(
    "options",
    [{}, {"reg_tokens": 3, "init_values": 0.1, "act_layer": "gelu_tanh"}, {"class_token": False, "qkv_bias": False}],
)
def test_under_autocast_a_vit_of_whole_blocks_is_as_close_as_torchs_own(
    options: dict[str, object], taken: list[Block]
) -> None:
    vit, (x, keep) = small_vit(**options), images_and_mask()
    keep[0, 0, 0] = True
    with torch.no_grad():
        exact = vit.double()(x.double(), keep)
        vit.float()
        with torch.autocast("cpu", torch.bfloat16):
            theirs = vit(x, keep)
    assert not taken
    with torch.inference_mode(), packed_weights(vit), torch.autocast("cpu", torch.bfloat16):
        got = vit(x, keep)
    assert len(taken) == DEPTH
    assert got.dtype == theirs.dtype
    assert (got - exact).norm() <= 1.2 * (theirs - exact).norm()


@pytest.mark.parametrize(
    ("instruction_set", "widest_float32", "widest_bfloat16"),
    [
        ("portable", (0, 0), (0, 0)),
        ("avx2", (4096, 4096), (0, 0)),
        ("avx512", (128, 128), (0, 0)),
        ("avx512_bf16", (768, 768), (768, 768)),
        ("amx_bf16", (192, 384), (192, 384)),
    ],
)
def test_layers_are_left_to_onednn_where_it_is_as_fast(
    instruction_set: str,
    widest_float32: tuple[int, int],
    widest_bfloat16: tuple[int, int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(native_layers, "_instruction_set", lambda: instruction_set)
    for dtype, widest in ((torch.float32, widest_float32), (torch.bfloat16, widest_bfloat16)):
        for rows_vary in (False, True):
            taken = [x for x in (96, 128, 192, 384, 512, 768, 4096) if are_faster_here(x, x, dtype, rows_vary)]
            assert max(taken, default=0) == widest[rows_vary]


def test_an_odd_number_of_hidden_features_is_computed_layer_by_layer_in_bfloat16(taken: list[Block]) -> None:
    vit, (x, keep) = small_vit(mlp_ratio=63 / 64), images_and_mask()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = vit(x, keep)
    odd = inference_linear.computed_in(torch.bfloat16) == torch.bfloat16
    with torch.inference_mode(), packed_weights(vit), torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(vit(x, keep), expected, rtol=0.05, atol=0.05)
    assert len(taken) == (0 if odd else DEPTH)


def test_rows_in_bfloat16_stay_bfloat16(taken: list[Block], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inference_linear, "computed_in", lambda dtype: torch.float32)
    vit, (x, keep) = small_vit().bfloat16(), images_and_mask()
    with torch.inference_mode(), packed_weights(vit):
        tokens = vit.run_blocks(vit.embed(x.bfloat16(), keep))
    assert tokens.rows_TC.dtype == torch.bfloat16
    assert len(taken) == DEPTH
