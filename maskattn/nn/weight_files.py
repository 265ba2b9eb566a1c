"""Reading of weight files without running code in them, with errors that name the file and the reason."""

from __future__ import annotations

import argparse
import contextlib
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

__all__ = ["read_weights", "start_reading"]


def read_weights(path: str | Path) -> dict[str, Any]:
    """Read a file of tensors; no code in it is run.

    Returns:
        The file's content: a state dict, or a training checkpoint.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is of another kind, is damaged, or holds objects that only running code could build.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"there is no file {path}; a model's name must begin with timm: or hf-hub:, e.g. hf-hub:MahmoodLab/UNI2-h"
        )
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    if path.suffix not in (".pt", ".pth", ".bin", ".ckpt"):
        raise ValueError(f"a file of weights must end in .safetensors, .pt, .pth, .bin or .ckpt, got {path}")
    # DINO and HIPT store the arguments of their training with the weights.
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a file that is not a pickle can fail with any error
        raise _unreadable(path, error) from error
    if not isinstance(content, dict):
        raise ValueError(
            f"weights must be tensors by name, got a {type(content).__name__} in {path}; save model.state_dict()"
        )
    return content


def start_reading(path: str | Path) -> Callable[[], dict[str, Any]]:
    """Start to read a file of tensors in a thread; what is returned waits, and returns or raises as `read_weights`."""
    found: list[dict[str, Any]] = []

    def read() -> None:
        with contextlib.suppress(Exception):  # whoever waits meets it again
            found.append(read_weights(path))

    # Daemonic: an interrupted command does not wait for a drive that does not answer.
    thread = threading.Thread(target=read, name="maskattn reads weights", daemon=True)
    thread.start()

    def wait() -> dict[str, Any]:
        thread.join()
        return found.pop() if found else read_weights(path)

    return wait


def _unreadable(path: Path, error: Exception) -> ValueError:
    """Return the error for a file that cannot be read: its pickle names code, or it is damaged."""
    message = " ".join(str(error).split())
    if code := re.search(r"GLOBAL ([A-Za-z_][\w.]*)", message):
        return ValueError(
            f"weights must be tensors by name, got the code {code[1]} pickled in {path}, and code in files is never "
            "run; save model.state_dict() where the model was trained"
        )
    return ValueError(
        f"weights must be a complete file that torch.save or safetensors wrote, got {path}: {type(error).__name__}: "
        f"{message[:200] or 'it ends too early'}; copy it again"
    )


def _read_safetensors(path: Path) -> dict[str, Any]:
    """Read the tensors of a file, opening it anew for each: mapped pages count as memory until the file is closed."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            keys = list(file.keys())
    except SafetensorError as error:
        raise _unreadable(path, error) from error
    state = {}
    for key in keys:
        with safe_open(path, "pt") as file:
            state[key] = file.get_tensor(key).clone()
    return state
