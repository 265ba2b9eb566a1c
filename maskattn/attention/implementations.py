"""Which implementation runs: each is a module with the same functions, imported when it is first asked for."""

from __future__ import annotations

import importlib
import importlib.util
from types import ModuleType

from torch import Tensor

from maskattn.options import Options

__all__ = ["IMPLS", "choose", "implementation"]

_MODULES = {
    "triton": "maskattn.kernels.operations",
    "cpu": "maskattn.attention.native",
    "torch": "maskattn.attention.torch_operations",
    "reference": "maskattn.attention.reference_operations",
}

IMPLS = tuple(_MODULES)


def implementation(impl: str) -> ModuleType:
    """The module of an implementation."""
    return importlib.import_module(_MODULES[impl])


def choose(impl: str | None, q: Tensor, options: Options) -> str:
    """The name of the implementation that runs a call.

    Args:
        impl: a name, or None for the best that supports the call on q's device.
        q: the queries.
        options: of the call.

    Raises:
        ValueError: there is no such implementation, or it lacks what the call needs.
    """
    if impl is None:
        best = "triton" if q.is_cuda else "cpu"
        return best if _missing(best, q, options) is None else "torch"
    if impl not in IMPLS:
        raise ValueError(f"impl must be one of {', '.join(IMPLS)} or None, got impl={impl!r}")
    lacks = _missing(impl, q, options)
    if lacks is not None:
        raise ValueError(f"impl={impl!r} {lacks}; pass impl=None to let the package choose, or impl='torch'")
    return impl


def _missing(impl: str, q: Tensor, options: Options) -> str | None:
    """What the implementation lacks for a call, as the end of a sentence that names it."""
    if impl in ("torch", "reference"):
        return None
    not_here = _not_installed(impl)
    if not_here is not None:
        return not_here
    if impl == "cpu":
        from maskattn.attention.native import supports as native_supports

        return native_supports(q, options)
    from maskattn.kernels.configs import supports

    return supports(q, options)


def _not_installed(impl: str) -> str | None:
    """A fact of the machine, which torch.compile need not trace."""
    if impl == "triton" and importlib.util.find_spec("triton") is None:
        return "needs the package triton, which is not installed"
    if impl == "cpu" and importlib.util.find_spec("maskattn._native") is None:
        return "needs the C++ extension, which was not built (`maskattn doctor` says why)"
    return None


# What torch.compiler.assume_constant_result does; but that imports the whole compiler, which takes as long as torch.
_not_installed._dynamo_marked_constant = True  # type: ignore[attr-defined]
