"""Which calls are supported, which configuration they get, and that offsets pass 32 bits."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import get_args

import pytest
import torch
import triton
import triton.language as tl

from maskattn.kernels.language.tiles import sequence_base, tile_offsets
from maskattn.kernels.launch import support
from maskattn.kernels.launch.arguments import constant_arguments
from maskattn.kernels.launch.rows import MAX_BLOCK, kept_rows, readable
from maskattn.kernels.tables import lookup
from maskattn.kernels.tables.attention import TABLE
from maskattn.kernels.tables.attention_short import SHORT, SHORT_BELOW
from maskattn.kernels.tables.attention_with_options import TABLE_WITH_OPTIONS
from maskattn.kernels.tables.config import Config, Family, Target, read_exceptions, read_table
from maskattn.options import Options


@pytest.mark.parametrize("dtype", support.DTYPES)
@pytest.mark.parametrize("pass_", ["forward", "query_gradient", "key_gradient"])
@pytest.mark.parametrize("target", get_args(Target))
@pytest.mark.parametrize(("alibi_or_dropout", "short"), [(False, False), (True, False), (False, True)])
def test_every_supported_head_width_has_a_configuration(alibi_or_dropout, short, target, pass_, dtype):
    for head_width in support.HEAD_WIDTHS:
        config = lookup.look_up(pass_, target, head_width, dtype, alibi_or_dropout, short=short)
        assert max(config.block_m, config.block_n) <= MAX_BLOCK
        first, second = lookup.split_width(head_width, config)
        assert head_width <= first + second <= lookup.padded_width(head_width)
        assert second == 0 or (second >= 16 and first < head_width)
        assert config.split or second == 0


def test_a_configuration_may_have_all_registers_of_a_multiprocessor():
    assert Config(64, 64, 8, 1).max_registers is None
    assert [Config(64, 64, warps, 1, all_registers=True).max_registers for warps in (4, 8, 16)] == [255, 255, 128]
    row = read_table("target precision pass 64 128\nsm80 half forward 64x32/16/2+s+r 64x32/8/2")["sm80", "half"]
    assert [row["forward"][width].all_registers for width in (64, 128)] == [True, False]
    assert constant_arguments(64, row["forward"][64], False)["maxnreg"] == 128
    assert "maxnreg" not in constant_arguments(64, row["forward"][128], False)


def test_exceptions_name_head_widths_one_by_one_or_from_to():
    table = read_exceptions("target precision pass widths tile\nsm80 half forward 72,168-192 16x32/4/1+s")
    assert table["sm80", "half"] == {
        "forward": dict.fromkeys((72, 168, 176, 184, 192), Config(16, 32, 4, 1, split=True))
    }


def test_a_head_width_is_split_where_that_saves_columns():
    split, padded = (Config(64, 64, 4, 1, split=split) for split in (True, False))
    assert [lookup.split_width(x, split) for x in (48, 80, 96)] == [(32, 16), (64, 16), (64, 32)]
    assert [lookup.split_width(x, split) for x in (24, 64, 112, 128)] == [(32, 0), (64, 0), (128, 0), (128, 0)]
    assert lookup.split_width(80, padded) == (128, 0)


def test_a_head_width_with_which_the_tiles_of_its_padded_width_spill_has_its_own():
    def tile(head_width: int, alibi_or_dropout: bool = False) -> tuple[int, int]:
        pass_ = "query_gradient" if alibi_or_dropout else "key_gradient"
        config = lookup.look_up(pass_, "sm90", head_width, torch.bfloat16, alibi_or_dropout)
        return config.block_m, config.block_n

    assert [tile(width) for width in (104, 112, 120)] == [(64, 128), (64, 64), (64, 128)]
    assert [tile(width, True) for width in (40, 48, 56, 64)] == [(128, 32), (128, 64), (128, 32), (128, 64)]


def test_short_sequences_are_read_otherwise_with_the_same_tiles(device, monkeypatch):
    monkeypatch.setattr(lookup, "target_of", lambda device: "sm90")
    q = torch.zeros(3, 2, 64, dtype=torch.bfloat16, device=device)
    short, long = (lookup.choose("forward", q, Options(1.0), longest) for longest in (SHORT_BELOW - 1, SHORT_BELOW))
    assert (short.descriptors, short.plain_tail) == (False, True)
    assert (long.descriptors, long.plain_tail) == (True, False)
    assert long == TABLE["sm90", "half"]["forward"][64]
    for (target, precision), passes in SHORT.items():
        dtype = torch.bfloat16 if precision == "half" else torch.float32
        for pass_, of_width in passes.items():
            for width, config in of_width.items():
                usual = lookup.look_up(pass_, target, width, dtype)
                same = replace(config, descriptors=usual.descriptors, plain_tail=usual.plain_tail)
                assert same == usual, (target, pass_, width)


def test_a_head_width_has_a_short_row_of_its_own_before_that_of_its_padded_width():
    def reads(head_width: int, short: bool) -> tuple[bool, bool]:
        config = lookup.look_up("query_gradient", "sm90", head_width, torch.bfloat16, short=short)
        return config.descriptors, config.plain_tail

    assert [reads(width, True) for width in (72, 80, 128)] == [(False, True), (True, True), (False, True)]
    assert {reads(width, False) for width in (72, 80, 128)} == {(True, True)}


def test_alibi_and_dropout_have_configurations_of_their_own(device, monkeypatch):
    monkeypatch.setattr(lookup, "target_of", lambda device: "sm80")
    q = torch.zeros(3, 2, 64, dtype=torch.float16, device=device)
    table, with_options = (x["sm80", "half"]["forward"][64] for x in (TABLE, TABLE_WITH_OPTIONS))
    for longest in (1, SHORT_BELOW):
        assert lookup.choose("forward", q, Options(1.0, key_bias=q[:, 0, 0]), longest) == table
        assert lookup.choose("forward", q, Options(1.0, slopes=q[0, :, 0]), longest) == with_options
        with_dropout = Options(1.0, dropout_p=0.1, dropout_seed=q[0, 0, :1])
        assert lookup.choose("forward", q, with_dropout, longest) == with_options


@pytest.mark.parametrize(
    ("capability", "target"),
    [
        ((8, 0), "sm80"),
        ((8, 6), "sm86"),
        ((8, 9), "sm86"),
        ((9, 0), "sm90"),
        ((10, 0), "sm100"),
        ((11, 0), "sm86"),
        ((12, 0), "sm120"),
        ((12, 1), "sm120"),
    ],
)
def test_a_gpu_without_a_row_of_its_own_gets_the_smallest_tiles(capability, target):
    assert lookup._target_of_capability(*capability) == target


@pytest.mark.parametrize(
    ("name", "target"), [("gfx90a:sramecc+:xnack-", "gfx90a"), ("gfx942", "gfx942"), ("gfx950:xnack-", "gfx950")]
)
def test_chips_of_amd_are_told_apart(name, target, monkeypatch):
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    monkeypatch.setattr(torch.version, "hip", "7.0")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(gcnArchName=name))
    assert lookup.target_of(torch.device("cuda", 0)) == target


def test_a_target_like_another_has_its_tiles_but_for_rows_of_its_own():
    own, other = Config(16, 16, 4, 1), Config(32, 32, 4, 1)
    family = Family(
        {("sm86", "half"): {"forward": {64: other, 128: other}}},
        {},
        exceptions={("sm120", "half"): {"forward": {72: own}}, ("sm86", "half"): {"forward": {80: own}}},
    )
    assert family.config("sm120", "half", "forward", 72, 128) == own
    assert family.config("sm120", "half", "forward", 80, 128) == own
    assert family.config("sm120", "half", "forward", 64, 64) == other
    assert family.config("sm86", "half", "forward", 72, 128) == other
    with pytest.raises(KeyError):
        family.config("sm120", "half", "forward", 256, 256)


def test_supported_calls(device):
    for head_width in (16, 24, 256):
        for dtype in support.DTYPES:
            assert support.supports(torch.zeros(3, 2, head_width, dtype=dtype, device=device), Options(1.0)) is None
    assert support.supports(torch.zeros(3, 2, 64, device=device), Options(1.0, torch.zeros(3, device=device))) is None


@pytest.mark.parametrize(
    ("q", "key_bias", "reason"),
    [
        (torch.zeros(3, 2, 64, dtype=torch.float64), None, "float32, float16 or bfloat16"),
        (torch.zeros(3, 2, 8), None, "head width"),
        (torch.zeros(3, 2, 20), None, "head width"),
        (torch.zeros(3, 2, 264), None, "head width"),
        (torch.zeros(3, 2, 64), torch.zeros(3, dtype=torch.int32), "floating key_bias"),
    ],
)
def test_an_unsupported_call_gets_the_reason(q, key_bias, reason):
    assert reason in support.supports(q, Options(1.0, key_bias))


def test_a_cpu_tensor_needs_the_interpreter(monkeypatch):
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    assert "GPU" in support.supports(torch.zeros(3, 2, 64), Options(1.0))


@pytest.fixture
def unknown_gpus():
    """No GPU's capability is known yet, and none afterwards."""
    lookup._capability.cache_clear()
    yield
    lookup._capability.cache_clear()


def test_a_gpus_capability_is_asked_for_once(unknown_gpus, monkeypatch):
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    monkeypatch.setattr(torch.version, "hip", None)
    asked = []
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: asked.append(index) or (8 + index, 0))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    first, current = torch.device("cuda", 0), torch.device("cuda")
    for _ in range(2):
        assert support._missing_on(first) is None
        assert (lookup.target_of(first), lookup.target_of(current)) == ("sm80", "sm90")
    assert asked == [0, 1]


@pytest.mark.parametrize(("capability", "reason"), [((7, 5), "7.5"), ((9, 0), None)])
def test_old_gpus_are_refused(capability, reason, unknown_gpus, monkeypatch):
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    q = torch.zeros(3, 2, 64, device="meta")
    monkeypatch.setattr(type(q), "device", torch.device("cuda", 0), raising=False)
    answer = support.supports(q, Options(1.0))
    assert answer is None if reason is None else reason in answer


@pytest.mark.parametrize(
    ("name", "reason"), [("gfx90a:sramecc+:xnack-", None), ("gfx950", None), ("gfx1100", "gfx1100")]
)
def test_amd_gpus_for_which_there_are_no_tiles_are_refused(name, reason, monkeypatch):
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    monkeypatch.setattr(torch.version, "hip", "7.0")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(gcnArchName=name))
    q = torch.zeros(3, 2, 64, device="meta")
    monkeypatch.setattr(type(q), "device", torch.device("cuda", 0), raising=False)
    answer = support.supports(q, Options(1.0))
    assert answer is None if reason is None else answer.endswith(f"got {reason}")


@triton.jit
def offsets_kernel(offsets_ptr, sequence, head, start, first, stride_b, stride_h, stride_t, INDEXED: tl.constexpr):
    zero = tl.full([], 0, tl.int64)
    base = sequence_base(zero, tl.load(sequence), tl.load(head), tl.load(start), stride_b, stride_h, stride_t, INDEXED)
    rows = tl.arange(0, 4)
    if INDEXED:
        rows += tl.load(first)
    shift, offsets = tile_offsets(tl.load(first), rows, stride_t, INDEXED)
    tl.store(offsets_ptr + tl.arange(0, 4), base + shift + offsets)


@pytest.mark.parametrize("indexed", [False, True])
@pytest.mark.parametrize("place", [(70000, 0, 0, 0), (0, 70000, 0, 0), (0, 0, 70000, 0), (0, 0, 0, 70000)])
def test_offsets_pass_32_bits(place, indexed, device):
    if indexed and place[2]:
        pytest.skip("an index has no start to add")
    stride = 40000
    offsets = torch.zeros(4, dtype=torch.int64, device=device)
    scalars = [torch.tensor(x, dtype=torch.int32, device=device) for x in place]
    offsets_kernel[(1,)](offsets, *scalars, stride, stride, stride, INDEXED=indexed)
    assert offsets.tolist() == [(70000 + i) * stride for i in range(4)]


def test_rows_too_far_apart_for_32_bit_offsets_in_a_tile_are_copied(device):
    far = torch.zeros(2**24 + 16, device=device).as_strided((2, 1, 16), (2**24, 16, 1))
    near = torch.zeros(2**20 + 16, device=device).as_strided((2, 1, 16), (2**20, 16, 1))
    assert readable(far).is_contiguous()
    assert readable(near) is near


def test_kept_rows_come_first_and_in_order(device):
    keep = torch.tensor([[False, True, False, True], [False, False, False, False]], device=device)
    rows = kept_rows(keep)
    assert rows.starts.tolist() == [0, 4]
    assert rows.ends.tolist() == [2, 4]
    assert rows.index[:2].tolist() == [1, 3]
    assert rows.longest == 4
