"""Linear layers and blocks of the extension against the same layers of torch in float64, for every instruction set."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maskattn import _native
from maskattn.extension import argument_of
from maskattn.nn.blocks import Block, BlockOptions
from maskattn.nn.packed_tokens import PackedTokens
from maskattn.nn.self_attention import AttentionOptions
from maskattn.packing import Packing
from tests.oracles import assert_within_budget, cu_seqlens

SETS = _native.instruction_sets()
ACTIVATIONS = {"none": lambda x: x, "gelu": F.gelu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh")}


def packed(
    layer: nn.Linear, instruction_set: str = "", dtype: torch.dtype = torch.float32, threads: int = 0
) -> _native.LinearLayer:
    bias = None if layer.bias is None else layer.bias.detach().numpy()
    weight: Any = argument_of(layer.weight.detach().to(dtype))
    return _native.LinearLayer(weight, bias, instruction_set=instruction_set, threads=threads)


def applied(
    layer: nn.Linear, x: Tensor, activation: str = "none", instruction_set: str = "", threads: int = 1
) -> Tensor:
    out = np.full((len(x), layer.out_features), np.nan, np.float32)
    made = packed(layer, instruction_set, threads=threads)
    made.apply(x.numpy(), out, activation=activation, threads=threads)
    return torch.from_numpy(out)


@pytest.mark.parametrize("instruction_set", SETS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("inputs", "outputs"), [(1, 1), (7, 5), (96, 288), (100, 72), (513, 16), (1600, 65)])
def test_a_layer_meets_the_error_budget(instruction_set: str, activation: str, inputs: int, outputs: int) -> None:
    torch.manual_seed(inputs)
    layer, x = nn.Linear(inputs, outputs, bias=outputs != 72), 2 * torch.randn(101, inputs)
    act = ACTIVATIONS[activation]
    with torch.no_grad():
        exact = act(F.linear(x.double(), layer.weight.double(), None if layer.bias is None else layer.bias.double()))
        same = act(layer(x))
    got = applied(layer, x, activation, instruction_set)
    assert_within_budget(got, exact, same)
    for rows in (1, 6, 47, 48):
        assert torch.equal(applied(layer, x[:rows], activation, instruction_set), got[:rows])


@pytest.mark.parametrize("instruction_set", SETS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("inputs", "outputs"), [(2, 1), (6, 5), (96, 288), (100, 72), (514, 16), (1600, 65)])
def test_a_layer_in_bfloat16_meets_the_error_budget(
    instruction_set: str, activation: str, inputs: int, outputs: int
) -> None:
    torch.manual_seed(inputs)
    layer, x = nn.Linear(inputs, outputs, bias=outputs != 72), (2 * torch.randn(101, inputs)).bfloat16()
    act = ACTIVATIONS[activation]
    with torch.no_grad():
        bias = None if layer.bias is None else layer.bias.double()
        exact = act(F.linear(x.double(), layer.weight.bfloat16().double(), bias))
        same = act(F.linear(x, layer.weight.bfloat16(), None if bias is None else bias.bfloat16()))

    def applied_to(rows: Tensor, threads: int = 1) -> Tensor:
        out = rows.new_full((len(rows), outputs), torch.nan)
        given: Any = argument_of(rows), argument_of(out)
        packed(layer, instruction_set, torch.bfloat16).apply(*given, activation=activation, threads=threads)
        return out

    got = applied_to(x)
    assert_within_budget(got, exact, same)
    for rows in (1, 6, 47, 48):
        assert torch.equal(applied_to(x[:rows]), got[:rows])
    assert torch.equal(applied_to(x, threads=5), got)


@pytest.mark.parametrize("instruction_set", SETS)
@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh"])
def test_gelu_keeps_the_error_budget_over_its_whole_range(instruction_set: str, activation: str) -> None:
    x = torch.cat([torch.linspace(-9, 9, 40001), torch.tensor([-1e30, -1e4, -60.0, 60.0, 1e4, 1e30, 0.0, torch.nan])])
    layer = nn.Linear(1, 1, bias=False)
    nn.init.ones_(layer.weight)
    act, got = ACTIVATIONS[activation], applied(layer, x[:, None], activation, instruction_set)[:, 0]
    exact, torchs = act(x.double()), act(x)
    scale = x.abs().double().clamp_min(1e-3)
    error, theirs = (got - exact).abs() / scale, (torchs - exact).abs() / scale
    assert got[-1].isnan()
    assert float(error[:-1].max()) <= 2 * float(theirs[:-1].max())


@pytest.mark.parametrize("instruction_set", SETS)
@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh"])
def test_gelu_of_every_bfloat16_is_off_by_little_more_than_its_rounding(instruction_set: str, activation: str) -> None:
    x = torch.arange(-(1 << 15), 1 << 15).to(torch.int16).view(torch.bfloat16)
    x = torch.cat([x[x.abs() <= 1e30], torch.tensor([torch.nan]).bfloat16()])
    rows = torch.stack([x, torch.zeros_like(x)], dim=1)  # an even number of inputs
    layer, out = nn.Linear(2, 1, bias=False), rows.new_full((len(rows), 1), torch.nan)
    nn.init.ones_(layer.weight)
    given: Any = argument_of(rows), argument_of(out)
    packed(layer, instruction_set, torch.bfloat16).apply(*given, activation=activation, threads=1)
    exact = ACTIVATIONS[activation](x.double())
    rounding = exact.abs() / 256  # to 8 digits
    error = (out[:, 0] - exact).abs()
    assert out[-1].isnan()
    assert bool((error <= 1.15 * rounding + 5e-6)[:-1].all())


def test_rows_do_not_depend_on_their_neighbours_nor_on_threads() -> None:
    torch.manual_seed(0)
    layer, x = nn.Linear(768, 90), torch.randn(333, 768)
    whole = applied(layer, x, "gelu")
    for threads in (2, 5):
        assert torch.equal(applied(layer, x, "gelu", threads=threads), whole)
    assert torch.equal(torch.cat([applied(layer, part.contiguous(), "gelu") for part in x.split(50)]), whole)


def test_strided_rows_are_read_and_written_in_place() -> None:
    torch.manual_seed(0)
    layer, x = nn.Linear(24, 40), torch.randn(70, 3, 24)
    out = np.zeros((70, 2, 40), np.float32)
    packed(layer).apply(x[:, 1].numpy(), out[:, 1])
    assert torch.equal(torch.from_numpy(out[:, 1]), applied(layer, x[:, 1].contiguous()))
    assert not out[:, 0].any()


def small_block(width: int, heads: int, act: str = "gelu", bias: bool = True, init: float | None = None) -> Block:
    options = AttentionOptions(qkv_bias=bias, proj_bias=bias)
    block = Block(width, heads, BlockOptions(options, mlp_ratio=2.5, act_layer=act, init_values=init)).eval()
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return block


def packed_block(block: Block, instruction_set: str = "", dtype: torch.dtype = torch.float32) -> _native.EncoderBlock:
    def layer(linear: Any) -> _native.LinearLayer:
        return packed(linear, instruction_set, dtype)

    def values(x: Any) -> Any:
        return None if x is None else x.detach().numpy()

    return _native.EncoderBlock(
        norm1_weight=values(block.norm1.weight),
        norm1_bias=values(block.norm1.bias),
        norm1_eps=block.norm1.eps,
        qkv=layer(block.attn.qkv),
        proj=layer(block.attn.proj),
        scale1=values(getattr(block.ls1, "gamma", None)),
        norm2_weight=values(block.norm2.weight),
        norm2_bias=values(block.norm2.bias),
        norm2_eps=block.norm2.eps,
        fc1=layer(block.mlp.fc1),
        fc2=layer(block.mlp.fc2),
        scale2=values(getattr(block.ls2, "gamma", None)),
        heads=block.attn.num_heads,
        activation=block.mlp.act,
    )


def in_torch(block: Block, x: Tensor, starts: Tensor) -> Tensor:
    """The block by torch's way, with gradients, which the extension takes no part in but for attention."""
    longest = int(starts.diff().max())
    packing = Packing(torch.arange(len(x)), starts, longest, len(starts) - 1, max(longest, len(x)))
    block.attn.impl = "reference"
    return block(x, PackedTokens(x, packing, (1, len(x)), 0)).detach()


@pytest.mark.parametrize("instruction_set", SETS)
@pytest.mark.parametrize(
    ("width", "heads", "options"),
    [(96, 3, {}), (72, 3, {"act": "gelu_tanh", "init": 0.1}), (128, 2, {"bias": False}), (16, 1, {"init": 1.0})],
)
def test_a_block_meets_the_error_budget(instruction_set: str, width: int, heads: int, options: dict[str, Any]) -> None:
    torch.manual_seed(width)
    block, starts = small_block(width, heads, **options), cu_seqlens([65, 1, 0, 130, 7])
    x = torch.randn(int(starts[-1]), width)
    same = in_torch(block, x, starts)
    exact = in_torch(block.double(), x.double(), starts)
    made = packed_block(block.float(), instruction_set)
    out = np.full(x.shape, np.nan, np.float32)
    made.apply(x.numpy(), starts.numpy(), out, threads=2)
    assert_within_budget(torch.from_numpy(out), exact, same)
    in_place = x.clone().numpy()
    made.apply(in_place, starts.numpy(), in_place, threads=1)
    assert np.array_equal(in_place, out)


@pytest.mark.parametrize("instruction_set", SETS)
@pytest.mark.parametrize(
    ("width", "heads", "options"),
    [(96, 3, {}), (72, 3, {"act": "gelu_tanh", "init": 0.1}), (128, 2, {"bias": False}), (16, 1, {"init": 1.0})],
)
def test_a_block_in_bfloat16_is_as_close_as_torchs_own(
    instruction_set: str, width: int, heads: int, options: dict[str, Any]
) -> None:
    torch.manual_seed(width)
    block, starts = small_block(width, heads, **options), cu_seqlens([65, 1, 0, 130, 7])
    with torch.no_grad():
        for layer in (block.attn.qkv, block.attn.proj, block.mlp.fc1, block.mlp.fc2):
            layer.weight.copy_(layer.weight.bfloat16())
    x = torch.randn(int(starts[-1]), width)
    with torch.autocast("cpu", torch.bfloat16):
        theirs = in_torch(block, x, starts)
    exact = in_torch(block.double(), x.double(), starts)
    out = np.full(x.shape, np.nan, np.float32)
    packed_block(block.float(), instruction_set, torch.bfloat16).apply(x.numpy(), starts.numpy(), out, threads=2)
    assert (torch.from_numpy(out) - exact).norm() <= (theirs - exact).norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_sequence_does_not_depend_on_those_beside_it(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    block, lengths = packed_block(small_block(64, 2), dtype=dtype), [300, 5, 77]
    x, starts = torch.randn(sum(lengths), 64).numpy(), cu_seqlens(lengths).numpy()
    together = np.empty_like(x)
    block.apply(x, starts, together)
    for first, last in pairwise(starts):
        alone = np.empty((last - first, 64), np.float32)
        block.apply(x[first:last], np.array([0, last - first], np.int32), alone)
        assert np.array_equal(alone, together[first:last])


@pytest.mark.parametrize("threads", [1, 2, 3, 5])
@pytest.mark.parametrize(
    "lengths",
    [
        [90, 0, 200] * 20,  # at this width groups of about 512 rows
        [1500, 2500, 90],  # of one sequence each, in pieces
        [90, 6000, 1, 2],  # beyond what groups may take together
        [7],
        [0, 0],
    ],
)
def test_sequences_are_processed_in_groups_that_workers_share(lengths: list[int], threads: int) -> None:
    torch.manual_seed(0)
    block = packed_block(small_block(256, 4))
    x, starts = torch.randn(sum(lengths), 256).numpy(), cu_seqlens(lengths).numpy()
    together = np.full_like(x, np.nan)
    for _ in range(2):
        block.apply(x, starts, together, threads=threads)
    for first, last in {last - first: (first, last) for first, last in pairwise(starts)}.values():
        alone = np.empty((last - first, 256), np.float32)
        block.apply(x[first:last], np.array([0, last - first], np.int32), alone, threads=1)
        assert np.array_equal(alone, together[first:last])
    assert np.isfinite(together).all()


def a_layer(outputs: int, inputs: int, instruction_set: str = "") -> _native.LinearLayer:
    return _native.LinearLayer(np.zeros((outputs, inputs), np.float32), instruction_set=instruction_set)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"x": np.zeros((3, 5), np.float32)}, r"x of shape \(T, 8\), got x.shape=\(3, 5\); pass rows"),
        ({"x": np.zeros((3, 16), np.float32)[:, ::2]}, "x contiguous along its last axis"),
        ({"out": np.zeros((3, 3), np.float32)}, r"out of shape \(T, O\) = \(3, 4\), got out.shape=\(3, 3\)"),
        ({"activation": "relu"}, "an activation, got activation='relu'; choose among none, gelu and gelu_tanh"),
        ({"threads": -1}, "threads >= 0, got threads=-1"),
    ],
)
def test_wrong_arguments_of_a_layer_are_refused(changed: dict[str, Any], message: str) -> None:
    good = {"x": np.zeros((3, 8), np.float32), "out": np.zeros((3, 4), np.float32)}
    with pytest.raises(ValueError, match=message):
        a_layer(4, 8).apply(**(good | changed))


def test_wrong_layers_are_refused() -> None:
    with pytest.raises(ValueError, match=r"weight with 2 axes, got weight.shape=\(4,\)"):
        _native.LinearLayer(np.zeros(4, np.float32))
    with pytest.raises(TypeError, match=r"weight of dtype float32 or uint16 \(bfloat16\), got weight.dtype=float64"):
        _native.LinearLayer(np.zeros((4, 4)))
    with pytest.raises(ValueError, match=r"an even number of input features in bfloat16, got weight.shape=\(4, 3\)"):
        _native.LinearLayer(np.zeros((4, 3), np.uint16))
    with pytest.raises(ValueError, match=r"1 to 65536 input and output features, got weight.shape=\(0, 4\)"):
        _native.LinearLayer(np.zeros((0, 4), np.float32))
    with pytest.raises(ValueError, match="an instruction set of this machine, got instruction_set='avx9'"):
        a_layer(4, 4, "avx9")


def block_of(**changed: Any) -> _native.EncoderBlock:
    layers = {"qkv": a_layer(96, 32), "proj": a_layer(32, 32), "fc1": a_layer(40, 32), "fc2": a_layer(32, 40)}
    vectors = ("norm1_weight", "norm1_bias", "scale1", "norm2_weight", "norm2_bias", "scale2")
    good = layers | dict.fromkeys(vectors) | {"norm1_eps": 1e-6, "norm2_eps": 1e-6, "heads": 2, "activation": "gelu"}
    return _native.EncoderBlock(**(good | changed))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"heads": 0}, "heads that divides the width 32, got heads=0"),
        ({"heads": 4}, "a head width D of 16 to 256 in steps of 8, got D=8"),
        ({"qkv": a_layer(32, 32)}, r"qkv of shape \(O, I\) = \(96, 32\), got \(32, 32\); pass the layers of one block"),
        ({"fc2": a_layer(32, 20)}, r"fc2 of shape \(O, I\) = \(32, 40\), got \(32, 20\)"),
        ({"norm1_eps": float("nan")}, "a finite eps >= 0 of the norms, got nan"),
        ({"scale2": np.zeros(3, np.float32)}, r"scale2 of shape \(O,\) = \(32,\), got scale2.shape=\(3,\)"),
        ({"activation": "relu"}, "got activation='relu'"),
    ],
)
def test_wrong_blocks_are_refused(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        block_of(**changed)


@pytest.mark.skipif(len(SETS) < 2, reason="this machine has one instruction set")
def test_layers_packed_for_several_instruction_sets_make_no_block() -> None:
    with pytest.raises(ValueError, match="layers packed for one instruction set, got several; pack them for the same"):
        block_of(qkv=a_layer(96, 32, SETS[1]))


def test_layers_of_several_dtypes_make_no_block() -> None:
    with pytest.raises(ValueError, match="layers of one dtype, got float32 and bfloat16; pass weights of the same"):
        block_of(fc1=_native.LinearLayer(np.zeros((40, 32), np.uint16)))


def test_rows_of_another_dtype_than_the_weights_are_refused() -> None:
    layer = _native.LinearLayer(np.zeros((4, 8), np.uint16))
    with pytest.raises(TypeError, match=r"x of dtype uint16 \(bfloat16\), got x.dtype=float32"):
        layer.apply(np.zeros((3, 8), np.float32), np.zeros((3, 4), np.uint16))


def test_wrong_calls_of_a_block_are_refused() -> None:
    block, x, starts = block_of(), np.zeros((3, 32), np.float32), np.array([0, 3], np.int32)
    with pytest.raises(ValueError, match=r"x of shape \(T, 32\), got x.shape=\(3, 16\)"):
        block.apply(x[:, :16], starts, x)
    with pytest.raises(ValueError, match="cu_seqlens that ends at the 3 rows of x, got"):
        block.apply(x, np.array([0, 2], np.int32), x)
    with pytest.raises(ValueError, match="out that can be written to, got a read-only array"):
        block.apply(x, starts, np.broadcast_to(x, x.shape))


@pytest.mark.parametrize("instruction_set", SETS)
@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh"])
def test_small_values_of_gelu_are_exact_in_bfloat16_too(instruction_set: str, activation: str) -> None:
    x = torch.linspace(-3, -1, 500).bfloat16()[:, None].expand(-1, 2).contiguous()
    layer = nn.Linear(2, 16, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([1.0, 0.0]).expand(16, 2))
    out = x.new_empty(500, 16)
    given: Any = argument_of(x), argument_of(out)
    packed(layer, instruction_set, torch.bfloat16).apply(*given, activation=activation)
    exact = ACTIVATIONS[activation](x[:, :1].double())
    assert ((out.double() - exact) / exact).abs().max() < 2**-8
