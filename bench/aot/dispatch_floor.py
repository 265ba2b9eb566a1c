"""Operations with the schemas of packed attention that only allocate, to measure torch's own time for a call.

They are registered like those of packed attention, forward and backward as separate operations. A call goes through
torch's dispatcher and autograd in the same way, but computes nothing.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from maskattn.attention import operations

__all__ = ["empty_attention"]

_FORWARD, _BACKWARD = (
    getattr(torch.ops.maskattn, f"{operations.PACKED.name}{what}").default for what in ("", "_backward")
)


def _schema_of(operation: Any) -> str:
    """Return an operation's schema without its name."""
    text = str(operation._schema)
    return text[text.index("(") :]


def _allocate(q: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(q), q.new_empty((q.shape[1], q.shape[0]), dtype=torch.float32), q.new_empty(0)


def _allocate_gradients(grad_out: Tensor, grad_lse: Tensor | None, q: Tensor, *_: Any) -> tuple[Tensor, ...]:
    return *(torch.empty_like(q) for _ in range(3)), q.new_empty(0), q.new_empty(0)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    ctx.given = inputs[3:]
    ctx.save_for_backward(*inputs[:3], *output)


def _differentiate(ctx: Any, grad_out: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    q, k, v, *outputs = ctx.saved_tensors
    found = empty_backward(grad_out, None, q, k, v, *outputs, *ctx.given[:-2], ctx.given[-1])
    return *found[:3], *[None] * len(ctx.given)


empty_attention = torch.library.custom_op(
    "maskattn_bench::empty_attention", mutates_args=(), schema=_schema_of(_FORWARD)
)(_allocate)
empty_backward = torch.library.custom_op(
    "maskattn_bench::empty_attention_backward", mutates_args=(), schema=_schema_of(_BACKWARD)
)(_allocate_gradients)
empty_attention.register_autograd(_differentiate, setup_context=_save)
