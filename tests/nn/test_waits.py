"""A layer reads numbers from the device no more often than necessary."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

from maskattn import native_packing
from maskattn.nn import MultiheadAttention
from maskattn.packing import Packing, packing_and_answer

# Operations that wait for a device: reads by the host, and results whose size depends on values.
WAITS = frozenset({"tolist", "item", "__bool__", "__int__", "__float__", "__index__", "nonzero", "cpu", "unique"})


class CountedWaits(TorchFunctionMode):
    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in WAITS or (name == "to" and "cpu" in map(str, args[1:])):
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))


@pytest.fixture
def as_on_a_device(monkeypatch):
    """Masks are read with torch's own operations, as those of a GPU are, not by the extension."""
    monkeypatch.setattr(native_packing, "kept_tokens", lambda keep: None)


def waits_with(mask: torch.Tensor) -> Counter[str]:
    layer = MultiheadAttention(16, 2, batch_first=True, impl="torch").eval()
    x = torch.randn(2, 5, 16)
    with CountedWaits() as counted, torch.no_grad():
        layer(x, x, x, key_padding_mask=mask, need_weights=False)
    return counted.counts


@pytest.mark.usefixtures("as_on_a_device")
@pytest.mark.parametrize("bias", [0.0, 0.5])
def test_a_float_mask_waits_no_more_often_than_a_bool_mask(bias):
    ignored = torch.tensor([[False, True, False, False, True], [True, False, False, False, False]])
    as_floats = torch.full(ignored.shape, bias).masked_fill(ignored, float("-inf"))
    assert waits_with(ignored) == waits_with(as_floats)
    assert waits_with(ignored)["tolist"] >= 1


@pytest.mark.usefixtures("as_on_a_device")
@pytest.mark.parametrize("answer", [False, True])
def test_a_packing_and_an_answer_are_read_in_one_wait(answer):
    keep = torch.tensor([[True, False, True], [False, False, False]])
    with CountedWaits() as counted:
        packing, found = packing_and_answer(keep, torch.tensor(answer))
    assert counted.counts == {"tolist": 1}
    assert found is answer
    expected = Packing.from_keep(keep)
    assert packing.max_seqlen == expected.max_seqlen == 2
    for name in ("indices", "cu_seqlens", "row_of_token"):
        assert torch.equal(getattr(packing, name), getattr(expected, name))


@pytest.mark.usefixtures("as_on_a_device")
def test_a_bias_where_no_key_is_kept_is_no_bias():
    ignored = torch.tensor([[False, True]])
    layer = MultiheadAttention(16, 2, batch_first=True, impl="torch").eval()
    x = torch.randn(1, 2, 16)
    lowest = torch.finfo(torch.float32).min
    masks = (ignored, torch.zeros(1, 2).masked_fill(ignored, lowest))
    by_bool, by_float = (layer(x, x, x, key_padding_mask=mask, need_weights=False)[0] for mask in masks)
    assert torch.equal(by_bool, by_float)
