"""Reading of checkpoints without running code in them.

A PyTorch checkpoint is a pickle, and a pickle can call anything. Only tensors and plain values are read here. Every
other object that a training program has pickled (its classes, versions, paths) becomes an inert :class:`Unread`, which
records the name of the original class or function; nothing of it is imported or called.
"""

from __future__ import annotations

import collections
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

__all__ = ["Unread", "read_checkpoint", "tensors_of"]

_BUILDERS = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("collections", "defaultdict"): collections.defaultdict,
    ("builtins", "set"): set,
    ("builtins", "frozenset"): frozenset,
    ("builtins", "int"): int,
    ("builtins", "float"): float,
    ("builtins", "str"): str,
    ("builtins", "list"): list,
    ("builtins", "dict"): dict,
    ("builtins", "tuple"): tuple,
    ("torch", "Size"): torch.Size,
    ("torch", "device"): torch.device,
}
_TENSORS = ("_rebuild_tensor", "_rebuild_tensor_v2", "_rebuild_parameter")
# Keys under which training checkpoints store the weights.
_WRAPPERS = ("state_dict", "model_state_dict", "model")


class Unread(dict):  # a dict, so that a pickle can fill it
    """A placeholder for an object in a checkpoint whose code was not run.

    Attributes:
        of: the full name of the class or function.
    """

    of = ""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()

    def __setstate__(self, state: Any) -> None:
        """Discard the state."""

    def append(self, value: Any) -> None:
        """Discard the value."""

    extend = add = append


class _Unpickler(pickle._Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        module = module.replace("__builtin__", "builtins")  # the name in torch.save's pickle protocol
        if (module, name) in _BUILDERS:
            return _BUILDERS[module, name]
        if module == "torch._utils" and name in _TENSORS:
            return getattr(torch._utils, name)
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if module in ("torch", "torch.storage") and name.endswith("Storage"):
            return getattr(torch.storage if module == "torch.storage" else torch, name)
        return type(name, (Unread,), {"of": f"{module}.{name}"})


class _InertPickle:
    """A replacement for the ``pickle`` module, with the names that ``torch.load`` uses."""

    __name__ = "maskattn.nn.slide_models.reading"
    Unpickler = _Unpickler

    @staticmethod
    def load(file: Any, **options: Any) -> Any:
        return _Unpickler(file, **options).load()


def read_checkpoint(path: str | Path) -> Mapping[str, Any]:
    """Read a file of weights: a state dict, or a training checkpoint that holds one.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is no checkpoint, or it is a pickled model, whose class would have to be run.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"a slide model's checkpoint must be a file, got no file {path}; check its spelling")
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(path)
        except SafetensorError as error:
            raise ValueError(f"a .safetensors file must be complete, got {path}: {error}; copy it again") from error
    try:
        content = torch.load(path, map_location="cpu", pickle_module=_InertPickle, weights_only=False)
    except Exception as error:  # a file that is no pickle can fail in any way
        reason = " ".join(str(error).split())[:200] or "it ends too early"
        raise ValueError(
            f"a checkpoint must be a file that torch.save wrote, got {path}: {type(error).__name__}: {reason}; copy it "
            "again, or save model.state_dict()"
        ) from error
    if isinstance(content, Unread) or not isinstance(content, Mapping):
        what = content.of if isinstance(content, Unread) else type(content).__name__
        raise ValueError(
            f"a checkpoint must hold tensors by name, got a pickled {what} in {path}, which could be loaded only by "
            "running code in it; save model.state_dict() where it was trained"
        )
    return content


def tensors_of(checkpoint: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the tensors in a checkpoint, without wrappers and the key prefixes of data-parallel training."""
    for wrapper in _WRAPPERS:
        if isinstance(checkpoint.get(wrapper), Mapping):
            return tensors_of(checkpoint[wrapper])
    return {
        key.removeprefix("module."): x
        for key, x in checkpoint.items()
        if isinstance(key, str) and isinstance(x, Tensor)
    }
