"""torch's attention layer and ours with the same weights, run on the same inputs."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from maskattn.nn import MultiheadAttention

E, H, B, L, S = 24, 3, 2, 5, 9


def pair(**arguments: object) -> tuple[nn.MultiheadAttention, MultiheadAttention]:
    """Both layers in float64, with biases that are not 0."""
    arguments = {"batch_first": True, **arguments}
    theirs, ours = (layer(E, H, **arguments).double() for layer in (nn.MultiheadAttention, MultiheadAttention))
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "bias" in name:
                parameter.normal_()
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def padding(batch: int = B, keys: int = S) -> Tensor:
    """A random mask, True = ignore, that leaves the first key of every sequence."""
    mask = torch.rand(batch, keys) > 0.5
    mask[:, 0] = False
    return mask


def inputs_of(layer: nn.MultiheadAttention, queries: int = L) -> list[Tensor]:
    """query, key and value in the layer's sizes and layout."""
    sizes = (queries, E), (S, layer.kdim), (S, layer.vdim)
    inputs = [torch.randn(B, *size, dtype=torch.float64) for size in sizes]
    return inputs if layer.batch_first else [x.transpose(0, 1) for x in inputs]


def assert_alike(theirs: nn.Module, ours: nn.Module, inputs: list[Tensor], **options: object) -> None:
    """Outputs, weights and every gradient, those of float masks too, are torch's."""
    __tracebackhide__ = True
    results, grads = zip(*(_run(layer, inputs, options) for layer in (theirs, ours)), strict=True)
    torch.testing.assert_close(results[1], results[0])
    assert grads[0].keys() == grads[1].keys()
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, msg=lambda text, name=name: f"gradient of {name}: {text}")


def _run(layer: nn.Module, inputs: list[Tensor], options: dict[str, object]) -> tuple[object, dict[str, Tensor]]:
    memo: dict[int, Tensor] = {}
    for x in (*inputs, *options.values()):
        if isinstance(x, Tensor):
            memo[id(x)] = x.detach().clone().requires_grad_(x.is_floating_point())
    own_inputs = [memo[id(x)] for x in inputs]
    own_options = {name: memo.get(id(x), x) if isinstance(x, Tensor) else x for name, x in options.items()}
    result = layer(*own_inputs, **own_options)
    leaves = dict(layer.named_parameters())
    leaves |= {f"input {i}": x for i, x in enumerate(own_inputs)}
    leaves |= {n: x for n, x in own_options.items() if isinstance(x, Tensor) and x.requires_grad}
    loss = sum(r.sin().sum() for r in result if r is not None)
    grads = torch.autograd.grad(loss, list(leaves.values()), materialize_grads=True)
    return result, dict(zip(leaves, grads, strict=True))
