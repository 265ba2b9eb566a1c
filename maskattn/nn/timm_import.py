"""The import of timm without torch's compiler and without the client of the Hugging Face hub.

The compiler takes four times as long to import as timm itself. Two imports bring it, with ``torch.distributed`` and
sympy, and only for later: torchvision's ``ops/roi_align.py`` takes one function from ``torch._dynamo.utils``, and
``timm/models/naflexvit.py`` excludes one of its methods from compilation. The hub's client takes half of timm's import,
and ``timm/models/_hub.py`` calls it only for networks on the hub. While timm is imported here, functions take the place
of these, and call them when they are used.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import sys
import threading
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import torch

__all__ = ["import_timm"]

_COMPILER, _UTILS = "torch._dynamo", "torch._dynamo.utils"
_HUB, _CLIENT, _OF_THE_CLIENT = "huggingface_hub", "huggingface_hub.hf_api", ("HfApi", "hf_hub_download", "model_info")


def import_timm() -> Any:
    """Return timm, imported without the compiler and the hub's client if nothing has imported them before.

    Raises:
        ModuleNotFoundError: timm is not installed.
    """
    if not {_COMPILER, "timm"} & sys.modules.keys() and _is_alone():
        # If the import needs more than these functions, it is repeated with what they stand for.
        with contextlib.suppress(ImportError, AttributeError), _compiler_later(), _client_later():
            import timm
    import timm

    return timm


def _is_alone() -> bool:
    """Return whether no other thread might import the same meanwhile, which would get this module's functions."""
    main = threading.main_thread()
    # The command line's own threads wait for signals or read a slide, and import none of it.
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


@contextlib.contextmanager
def _client_later() -> Iterator[None]:
    names: dict[str, Any] = {}
    if _CLIENT not in sys.modules:
        with contextlib.suppress(ImportError):  # the hub's package is not installed, which timm allows
            names = vars(importlib.import_module(_HUB))  # it imports its parts when they are asked for
    later = {name: functools.partial(_of_the_client, name) for name in _OF_THE_CLIENT if name not in names}
    names.update(later)
    try:
        yield
    finally:
        for name in later:
            del names[name]


def _of_the_client(name: str, *args: Any, **kwargs: Any) -> Any:
    return getattr(importlib.import_module(_HUB), name)(*args, **kwargs)


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
