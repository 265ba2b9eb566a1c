"""The implementations of attention: their interface, and the choice of one for a call.

An implementation is a module in ``impl/``, named like the argument ``impl``. It has the functions of
:class:`Implementation`, and imports no other implementation.
"""

from __future__ import annotations

import functools
import importlib.util
from dataclasses import MISSING, fields
from typing import Any, Protocol

import torch
from torch import Tensor

from maskattn.operands import QKV, ClassGradients, KeySequences, Mask, Origins, Sequences
from maskattn.options import Options, is_given
from maskattn.registration import constant_in_traces
from maskattn.results import Gradients, OutputGradients, Outputs, ReadoutGradients, ReadoutOutputs

__all__ = ["IMPLS", "Implementation", "choose", "implementation", "keeps_rest", "refuse_missing"]

IMPLS = ("triton", "gluon", "cpu", "torch", "reference")


class Implementation(Protocol):
    """The interface of a module in ``impl/``.

    The arguments of its functions have been checked: shapes, dtypes and devices match, sequences are contiguous, and no
    option outside ``OPTIONS`` is given. Strides are arbitrary. Results are on the device of the inputs. The formulas
    are those of ``maskattn/attention/reference.py``, and every implementation obeys these rules:

    - A query without keys gives out 0, lse −inf and gradients of 0.
    - Tokens that take no part are never read, so NaN in them does not propagate.
    - The same inputs give the same bits, unless the option ``deterministic`` is False.

    Attributes:
        OPTIONS: names of the fields of :class:`~maskattn.options.Options` that it supports. Calls with others are
            refused, so that an option is never silently ignored.
        WITH_REST: names of the options with which forward also returns the *rest* of lse, its rounding error, for
            backward. These options add terms to the scores, which may then be large. A float32 lse alone would no
            longer resolve how many keys share the largest score, and recomputed weights would be off by a factor for
            each query.
        READS_OUTPUTS: whether backward recomputes the weights from the lse, and reads the out, that it is given. If so,
            it also differentiates some of a sequence's keys, given lse and out over all of them. An implementation that
            starts again from q, k and v does not.
    """

    OPTIONS: frozenset[str]
    WITH_REST: frozenset[str]
    READS_OUTPUTS: bool

    def supports(self, q: Tensor, options: Options) -> str | None:
        """The reason why it cannot run a call with these queries, as the end of a sentence; None if it can.

        This covers device, dtype and head width, but not which options it has.
        """

    def packed_forward(self, qkv: QKV, where: Sequences, options: Options, need_lse: bool) -> Outputs:
        """Attention of each packed sequence.

        For q (Tq, H, D) and k, v (Tk, H, D), it returns out (Tq, H, D), lse (H, Tq) and its rest. Without
        ``need_lse`` an implementation for which lse costs extra may return it as (H, 0); only "torch" does.
        """

    def packed_backward(
        self, grads: OutputGradients, qkv: QKV, outputs: Outputs, where: Sequences, options: Options
    ) -> Gradients:
        """Gradients of :meth:`packed_forward`, of the shapes and dtypes of q, k, v and of the options that are given.

        Its arguments include those of forward and the results of forward.
        """

    def masked_forward(self, qkv: QKV, where: Mask, options: Options, need_lse: bool) -> Outputs:
        """Attention of dense tensors over their kept keys.

        For q (B, H, Nq, D) and k, v (B, H, N, D), it returns out (B, H, Nq, D), lse (B, H, Nq) and its rest; lse
        may be (B, H, 0) as in :meth:`packed_forward`. Skipped queries give out 0 and lse −inf.
        """

    def masked_backward(
        self, grads: OutputGradients, qkv: QKV, outputs: Outputs, where: Mask, options: Options
    ) -> Gradients:
        """Gradients of :meth:`masked_forward`; those of background tokens are 0."""

    def readout_forward(
        self, qkv: QKV, where: KeySequences, options: Options, need_lse: bool, need_rows: bool
    ) -> ReadoutOutputs:
        """Attention of R ≤ 16 queries of each sequence over its packed keys.

        For q (B, R, H, D) and k, v (T, H, D), it returns out (B, R, H, D), lse (B, R, H) and its rest, and rows
        (R, H, T), or (R, H, 0) without ``need_rows``. Without ``need_lse`` and ``need_rows`` lse may be (B, R, 0).
        """

    def readout_backward(
        self, grads: ReadoutGradients, qkv: QKV, outputs: Outputs, where: KeySequences, options: Options
    ) -> Gradients:
        """Gradients of :meth:`readout_forward`."""

    def token_relevance(
        self, qkv: QKV, classes: ClassGradients, origins: Origins, where: KeySequences, options: Options
    ) -> Tensor:
        """The relevance (K, T) of every token for every class, for scores that read a readout; without dropout."""


_LOADED: dict[str, Implementation] = {}


def implementation(impl: str) -> Implementation:
    """The module of an implementation, imported on first use."""
    found = _LOADED.get(impl)
    if found is None:
        found = _load(impl)
        # An import statement takes a tenth of a small call. torch.compile would treat the store as a side effect.
        if not torch.compiler.is_compiling():
            _LOADED[impl] = found
    return found


def _load(impl: str) -> Implementation:
    if impl == "triton":
        from maskattn.attention.impl import triton

        return triton
    if impl == "gluon":
        from maskattn.attention.impl import gluon

        return gluon
    if impl == "cpu":
        from maskattn.attention.impl import cpu

        return cpu
    if impl == "torch":
        from maskattn.attention.impl import torch as in_torch

        return in_torch
    from maskattn.attention.impl import reference

    return reference


def choose(impl: str | None, q: Tensor, options: Options) -> str:
    """The name of the implementation that runs a call.

    Args:
        impl: a name, or None for the best implementation that supports the call on q's device.
        q: the queries.
        options: the options of the call.

    Raises:
        ValueError: there is no such implementation, or it does not support the call.
    """
    if impl is None:
        best = "triton" if q.is_cuda else "cpu"
        if _lacking(best, q, options) is None:
            return best
        impl = "torch"
    if impl not in IMPLS:
        raise ValueError(f"impl must be one of {', '.join(IMPLS)} or None, got impl={impl!r}")
    lacks = _lacking(impl, q, options)
    if lacks is not None:
        raise ValueError(f"impl={impl!r} {lacks}; {_remedy(options)}")
    return impl


def refuse_missing(impl: str, options: Options) -> None:
    """Refuse an option that an implementation does not support.

    Raises:
        ValueError: such an option is given; the error names it.
    """
    lacks = _missing_option(impl, options)
    if lacks is not None:
        raise ValueError(f"impl={impl!r} {lacks}; {_remedy(options)}")


def keeps_rest(impl: str, options: Options) -> bool:
    """Whether an implementation returns the rest of lse for its backward with these options."""
    return any(getattr(options, name) is not None for name in implementation(impl).WITH_REST)


def _lacking(impl: str, q: Tensor, options: Options) -> str | None:
    """The reason why the implementation cannot run a call, as the end of a sentence that begins with its name."""
    not_here = _not_installed(impl)
    if not_here is not None:
        return not_here
    return implementation(impl).supports(q, options) or _missing_option(impl, options)


def _missing_option(impl: str, options: Options) -> str | None:
    for name, named, default in _undeclared(impl, type(options)):
        value = getattr(options, name)
        if is_given(value, default):
            got = f"of shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"{name}={value}"
            return f"has no {named}, got {got if name in got else f'{name} {got}'}"
    return None


def _remedy(options: Options) -> str:
    if _missing_option("torch", options) is None:
        return "pass impl=None to let the package choose, or impl='torch'"
    if _missing_option("reference", options) is None:
        return "pass impl='reference', which supports it but is slow"
    return "no implementation supports it, so leave it out"


@constant_in_traces
def _undeclared(impl: str, kind: type[Options]) -> tuple[tuple[str, str, Any], ...]:
    """The options that an implementation does not support: name of the field, name in messages, default."""
    return _compared(impl, kind)  # type: ignore[arg-type]  # mypy does not take a class for a hashable


@functools.cache
def _compared(impl: str, kind: type[Options]) -> tuple[tuple[str, str, Any], ...]:
    declared = implementation(impl).OPTIONS
    return tuple(
        (x.name, x.metadata.get("named") or x.name, None if x.default is MISSING else x.default)
        for x in fields(kind)
        if x.name not in declared
    )


@constant_in_traces
def _not_installed(impl: str) -> str | None:
    """The reason why an implementation is not installed, or None; a constant that torch.compile need not trace."""
    return _looked_for(impl)


@functools.cache
def _looked_for(impl: str) -> str | None:
    """The same, cached, because finding a module takes longer than a small call."""
    if impl in ("triton", "gluon") and importlib.util.find_spec("triton") is None:
        return "needs the package triton, which is not installed"
    if impl == "cpu" and importlib.util.find_spec("maskattn._native") is None:
        return "needs the C++ extension, which was not built (see `maskattn doctor`)"
    return None
