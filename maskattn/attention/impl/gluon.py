"""impl "gluon": ``packed_attention`` by the Hopper kernel of ``maskattn/kernels/gluon``, used only on request.

No GPU has run it: it is simulated and compiled ahead of time. Its gradients are those of the Triton kernels, which read
what its forward leaves. Every other operation is refused.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

from maskattn.kernels.attention import backward
from maskattn.kernels.gluon import support
from maskattn.kernels.launch import arguments
from maskattn.operands import QKV, Sequences
from maskattn.options import Options
from maskattn.results import Outputs

OPTIONS = frozenset({"scale", "key_bias", "slopes", "coords_q", "coords_k", "precision"})
WITH_REST = arguments.WITH_REST
READS_OUTPUTS = True

supports = support.supports
packed_backward = backward.packed_backward


def packed_forward(qkv: QKV, where: Sequences, options: Options, need_lse: bool) -> Outputs:
    """Attention of packed sequences; lse costs nothing here."""
    # Gluon is not in every triton that the package runs with; ``supports`` says which.
    from maskattn.kernels.gluon import forward

    return Outputs(*forward.packed_forward(qkv.q, qkv.k, qkv.v, where, options))


def _refused(operation: str) -> Callable[..., NoReturn]:
    def refuse(*given: Any) -> NoReturn:
        raise ValueError(
            f"impl='gluon' computes only packed_attention, got {operation}; pass impl=None or impl='triton'"
        )

    return refuse


masked_forward = masked_backward = _refused("masked_attention")
readout_forward = readout_backward = _refused("readout")
token_relevance = _refused("token_relevance")
