"""torch.func over the layer as over torch's: gradients, per-sample gradients, and vmap over padding masks."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from maskattn.nn import MultiheadAttention

# torch's own attention, which all tokens go through where masks are mapped over, has no rule for vmap.
pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop because we have not yet implemented")


@pytest.mark.parametrize("float_mask", [False, True])
@pytest.mark.parametrize("transform", ["grad", "per-sample grad", "vmap"])
def test_transforms_give_what_they_give_of_torchs_layer(transform, float_mask):
    theirs = nn.MultiheadAttention(16, 4, batch_first=True).double()
    ours = MultiheadAttention(16, 4, batch_first=True).double()
    ours.load_state_dict(theirs.state_dict())
    x, pad = torch.randn(3, 5, 16).double(), torch.arange(5) >= torch.tensor([[5], [3], [4]])
    if float_mask:
        pad = torch.randn(3, 5).double().masked_fill(pad, float("-inf"))

    def result(layer: nn.Module) -> Tensor | dict[str, Tensor]:
        def loss(parameters: dict[str, Tensor], x: Tensor, pad: Tensor) -> Tensor:
            arguments = {"key_padding_mask": pad, "need_weights": False}
            return functional_call(layer, parameters, (x, x, x), arguments)[0].square().sum()

        calls: dict[str, Callable] = {
            "grad": grad(loss),
            "per-sample grad": vmap(grad(loss), (None, 0, 0)),
            "vmap": vmap(loss, (None, 0, 0)),
        }
        return calls[transform](dict(layer.named_parameters()), x, pad)

    torch.testing.assert_close(result(ours), result(theirs))


def test_a_readout_is_mapped_over_masks():
    layer = MultiheadAttention(16, 4, batch_first=True).eval()
    x, pads = torch.randn(2, 5, 16), torch.rand(3, 2, 5) > 0.6
    pads[..., 0] = False
    each = [layer.readout(x[:, :1], x, x, pad) for pad in pads]
    for got, *expected in zip(vmap(lambda pad: layer.readout(x[:, :1], x, x, pad))(pads), *each, strict=True):
        torch.testing.assert_close(got, torch.stack(expected))
