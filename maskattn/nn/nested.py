"""Conversion between torch's nested tensors and packed rows.

In evaluation, ``nn.TransformerEncoder`` makes a nested tensor of a batch that is padded on the right.

Dimension key: B sequences, T rows of all of them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from maskattn.packing import Packing

__all__ = ["nested_like", "nested_rows"]


def nested_rows(x: Tensor) -> tuple[Tensor, Packing]:
    """Return the (T, C) rows of a nested (B, ·, C), and their packing in (B, longest).

    Raises:
        ValueError: the tensor holds no sequence, so that C is unknown.
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
    """Return (T, C) rows as a nested tensor with the sequences and layout of ``x``."""
    if x.layout == torch.jagged:
        return torch.nested.nested_tensor_from_jagged(rows, offsets=x.offsets())  # type: ignore[attr-defined]
    lengths = packing.cu_seqlens.diff().tolist()
    return torch.nested.as_nested_tensor(list(rows.split(lengths)))
