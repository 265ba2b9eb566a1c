"""Packing and unpacking by kernel against torch's indexing, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from oracles import ROW_DTYPES

from maskattn import Packing, pack, unpack
from maskattn.kernels.attention import gather


def numbers(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> torch.Tensor:
    x = torch.randint(-100, 100, shape, device=device)
    if dtype.is_complex:
        return torch.complex(x.double(), x.flip(0).double()).to(dtype)
    return (x > 0) if dtype == torch.bool else x.to(torch.float32).to(dtype)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    a, b = (torch.view_as_real(x) if x.is_complex() else x for x in (a, b))
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


@pytest.fixture
def packing(device) -> Packing:
    return Packing.from_keep(torch.rand(3, 41) > 0.4).to(device)


def expected_rows(x: torch.Tensor, packing: Packing) -> torch.Tensor:
    # Through integers, since torch cannot index every dtype.
    rows = [x.flatten(0, 1)[i] for i in packing.indices.tolist()]
    return torch.stack(rows) if rows else x.new_zeros((0, *x.shape[2:]))


@pytest.mark.parametrize("dtype", ROW_DTYPES, ids=str)
def test_every_dtype_is_moved_bit_for_bit(dtype, packing, device):
    x = numbers((3, 41, 2, 5), dtype, device)
    rows = pack(x, packing)
    assert rows.is_contiguous()
    assert same_bits(rows, expected_rows(x, packing))
    dense = unpack(rows, packing).flatten(0, 1)
    kept = packing.row_of_token >= 0
    assert same_bits(dense[kept], rows)
    assert not dense[~kept].to(torch.complex128 if dtype.is_complex else torch.float64).any()


@pytest.mark.parametrize("rest", [(), (1,), (3,), (64,), (6, 32), (1100,), (2, 3, 5)], ids=str)
def test_whatever_follows_the_tokens(rest, packing, device):
    x = numbers((3, 41, *rest), torch.float32, device)
    rows = pack(x, packing)
    assert same_bits(rows, expected_rows(x, packing))
    assert same_bits(pack(unpack(rows, packing), packing), rows)


def relayouts() -> dict:
    return {
        "tokens_first": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
        "of_three": lambda x: torch.stack([x, x + 1, x + 2], dim=2)[:, :, 1],
        "every_other_column": lambda x: torch.stack([x, x + 1], dim=-1)[..., 0],
        "one_column": lambda x: x[..., :1].expand_as(x),
        "one_token": lambda x: x[:, :1].expand_as(x),
        "columns_first": lambda x: x.permute(3, 2, 0, 1).contiguous().permute(2, 3, 1, 0),
    }


@pytest.mark.parametrize("relayout", relayouts().values(), ids=relayouts().keys())
def test_any_strides(relayout, packing, device):
    x = relayout(numbers((3, 41, 2, 6), torch.float16, device))
    rows = pack(x, packing)
    assert same_bits(rows, expected_rows(x, packing))
    strided = relayout(rows[None].expand(2, -1, -1, -1))[0]
    assert same_bits(unpack(strided, packing), unpack(strided.contiguous(), packing))


def test_background_is_never_read_and_has_gradient_zero(device):
    keep = torch.tensor([[True, False, True], [False, False, True]], device=device)
    x = torch.where(keep[..., None], torch.randn(2, 3, 4, device=device), float("nan")).requires_grad_()
    packing = Packing.from_keep(keep)
    unpack(pack(x, packing) * 2, packing).sum().backward()
    assert torch.equal(x.grad, 2.0 * keep[..., None].expand(2, 3, 4))


def test_gradients_and_their_gradients_are_exact(device):
    packing = Packing.from_keep(torch.tensor([[True, False, True], [False, True, False]], device=device))
    x = torch.randn(2, 3, 2, dtype=torch.float64, device=device, requires_grad=True)

    def there_and_back(x: torch.Tensor) -> torch.Tensor:
        return unpack(pack(x, packing).sin(), packing)

    assert torch.autograd.gradcheck(there_and_back, x)
    assert torch.autograd.gradgradcheck(there_and_back, x)


@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (2, 5)])
def test_nothing_and_everything_kept(shape, kept, device):
    packing = Packing.from_keep(torch.full(shape, kept, device=device))
    x = torch.randn(*shape, 3, device=device)
    rows = pack(x, packing)
    assert rows.shape == (shape[0] * shape[1] * kept, 3)
    assert torch.equal(unpack(rows, packing), x * kept)
    assert pack(x[..., :0], packing).shape == (rows.shape[0], 0)


def test_pack_and_unpack_are_one_launch_each(packing, device, monkeypatch):
    # Launches dominate the cost of a small call; more of them would give the same result.
    launches = []
    kernel = gather.gather_kernel

    class Counted:
        def __getitem__(self, grid):
            launches.append(grid)
            return kernel[grid]

    monkeypatch.setattr(gather, "gather_kernel", Counted())
    x = torch.randn(3, 41, 2, 8, device=device)
    unpack(pack(x, packing), packing)
    assert len(launches) == 2


def test_offsets_pass_32_bits(device):
    # numpy's zeros take no memory until they are touched.
    far = torch.from_numpy(np.zeros(2**31 + 64, np.uint8)).to(device)
    far[2**31 : 2**31 + 16] = 7
    x = far.as_strided((2, 16), (2**31, 1))
    assert gather.gather_rows(x, torch.tensor([1], device=device)).eq(7).all()
