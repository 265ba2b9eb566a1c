"""The import of timm without torch's compiler, which takes four times as long to import as timm itself.

Two imports bring the compiler, ``torch.distributed`` and sympy, and only for later: torchvision's ``ops/roi_align.py``
takes one function from ``torch._dynamo.utils``, and ``timm/models/naflexvit.py`` excludes one of its methods from
compilation. While they are imported here, two functions take the place of torch's, and call torch's when they are used.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import threading
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import torch

__all__ = ["import_timm"]

_COMPILER, _UTILS = "torch._dynamo", "torch._dynamo.utils"


def import_timm() -> Any:
    """Return timm, imported without the compiler if nothing has imported it before.

    Raises:
        ModuleNotFoundError: timm is not installed.
    """
    if not {_COMPILER, "timm"} & sys.modules.keys() and _is_alone():
        # If the import needs more of the compiler than these functions, it is repeated with the compiler.
        with contextlib.suppress(ImportError, AttributeError), _compiler_later():
            import timm
    import timm

    return timm


def _is_alone() -> bool:
    """Return whether no other thread might import the compiler meanwhile, which would get this module's functions."""
    main = threading.main_thread()
    # The command line's own threads wait for signals and import nothing.
    return all(thread is main or thread.name.startswith("maskattn ") for thread in threading.enumerate())


@contextlib.contextmanager
def _compiler_later() -> Iterator[None]:
    utils = ModuleType(_UTILS)
    vars(utils)["is_compile_supported"] = _is_compile_supported
    disable = torch.compiler.disable
    sys.modules[_UTILS] = utils
    vars(torch.compiler)["disable"] = _disable
    try:
        yield
    finally:
        vars(torch.compiler)["disable"] = disable
        if sys.modules.get(_UTILS) is utils:
            del sys.modules[_UTILS]


def _is_compile_supported(device_type: Any) -> Any:
    from torch._dynamo.utils import is_compile_supported

    return is_compile_supported(device_type)


def _disable(function: Callable[..., Any] | None = None, recursive: bool = True, *, reason: str | None = None) -> Any:
    """Exclude a function from compilation, as ``torch.compiler.disable`` does, from its first call on."""
    if function is None:
        return functools.partial(_disable, recursive=recursive, reason=reason)
    disabled: list[Callable[..., Any]] = []

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if not disabled:
            disabled.append(torch.compiler.disable(function, recursive, reason=reason))
        return disabled[0](*args, **kwargs)

    return call
