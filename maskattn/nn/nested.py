"""torch's nested tensors are packed rows already: how to read their rows and how to give rows back in their form.

``nn.TransformerEncoder`` makes them in evaluation of a batch that is padded on the right.

Dimension key: B sequences, T rows of all of them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from maskattn.packing import Packing

__all__ = ["nested_like", "nested_rows"]


def nested_rows(x: Tensor) -> tuple[Tensor, Packing]:
    """The (T, C) rows of a nested (B, ·, C), and where they lie in (B, longest).

    Raises:
        ValueError: there is no sequence, whose width would say C.
    """
    pieces = x.unbind()
    if not pieces:
        raise ValueError(
            f"a nested query must hold at least one sequence, got query.size(0)={x.size(0)}; leave out empty batches"
        )
    lengths = [piece.shape[0] for piece in pieces]
    longest = max(lengths, default=0)
    keep = torch.arange(longest) < torch.tensor(lengths, dtype=torch.int64)[:, None]
    return torch.cat(pieces), Packing.from_keep(keep).to(x.device)


def nested_like(rows: Tensor, x: Tensor, packing: Packing) -> Tensor:
    """(T, C) rows as a nested tensor of the same sequences as ``x``."""
    if x.layout == torch.jagged:
        return torch.nested.nested_tensor_from_jagged(rows, offsets=x.offsets())  # type: ignore[attr-defined]
    lengths = packing.cu_seqlens.diff().tolist()
    return torch.nested.as_nested_tensor(list(rows.split(lengths)))
