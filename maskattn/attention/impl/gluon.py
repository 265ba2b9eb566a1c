"""impl "gluon": ``packed_attention`` by the Hopper kernels of ``maskattn/kernels/gluon``, used only on request.

No GPU has run them: they are simulated and compiled ahead of time. Gradients are those of the Triton kernels, which
read what the Gluon forward leaves, unless ``deterministic=False`` allows the Gluon backward, whose sums depend on the
order in which programs come. Every other operation is refused.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch

from maskattn.kernels.attention import backward as two_passes
from maskattn.kernels.gluon import support
from maskattn.kernels.gluon.configs import choose_gradient
from maskattn.kernels.launch import arguments
from maskattn.operands import QKV, Sequences
from maskattn.options import Options
from maskattn.results import Gradients, OutputGradients, Outputs

OPTIONS = frozenset({"scale", "key_bias", "slopes", "coords_q", "coords_k", "precision", "deterministic"})
WITH_REST = arguments.WITH_REST
READS_OUTPUTS = True

supports = support.supports


def packed_forward(qkv: QKV, where: Sequences, options: Options, need_lse: bool) -> Outputs:
    """Attention of packed sequences; lse costs nothing here."""
    # Gluon is not in every triton that the package runs with; ``supports`` says which.
    from maskattn.kernels.gluon import forward

    return Outputs(*forward.packed_forward(qkv.q, qkv.k, qkv.v, where, options))


def packed_backward(
    grads: OutputGradients, qkv: QKV, outputs: Outputs, where: Sequences, options: Options
) -> Gradients:
    """Gradients in one pass where that is allowed and fits, and in two deterministic ones otherwise."""
    config = choose_gradient(qkv.q.shape[-1], options)
    if config is None or options.deterministic or torch.are_deterministic_algorithms_enabled():
        return two_passes.packed_backward(grads, qkv, outputs, where, options)
    from maskattn.kernels.gluon import backward

    return backward.packed_backward(grads, qkv, outputs, where, options, config)


def _refused(operation: str) -> Callable[..., NoReturn]:
    def refuse(*given: Any) -> NoReturn:
        raise ValueError(
            f"impl='gluon' computes only packed_attention, got {operation}; pass impl=None or impl='triton'"
        )

    return refuse


masked_forward = masked_backward = _refused("masked_attention")
readout_forward = readout_backward = _refused("readout")
token_relevance = _refused("token_relevance")
