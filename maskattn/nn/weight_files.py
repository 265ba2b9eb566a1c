"""Files of an encoder's weights: read without running code in them, and refused by name where they cannot be read."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

import torch

__all__ = ["read_weights"]


def read_weights(path: str | Path) -> dict[str, Any]:
    """Read a file of tensors; no code in it is run.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is of another kind, is damaged, or holds what only running code in it could build.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"there is no file {path}; a name begins with timm: or hf-hub:, e.g. hf-hub:MahmoodLab/UNI2-h"
        )
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    if path.suffix not in (".pt", ".pth", ".bin", ".ckpt"):
        raise ValueError(f"weights end in .safetensors, .pt, .pth, .bin or .ckpt, got {path}")
    # DINO and HIPT keep the arguments of their training beside the weights.
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a file that is no pickle can fail in any way
        raise _unreadable(path, error) from error
    if not isinstance(content, dict):
        raise ValueError(
            f"weights must be tensors by name, got a {type(content).__name__} in {path}; save model.state_dict()"
        )
    return content


def _unreadable(path: Path, error: Exception) -> ValueError:
    """Why a file of weights cannot be read: for code that its pickle names, or because it is damaged."""
    told = " ".join(str(error).split())
    if code := re.search(r"GLOBAL ([A-Za-z_][\w.]*)", told):
        return ValueError(
            f"weights must be tensors by name, got the code {code[1]} pickled in {path}, and no code in a file is run "
            "here; save model.state_dict() where it was trained"
        )
    return ValueError(
        f"weights must be a whole file that torch.save or safetensors wrote, got {path}: {type(error).__name__}: "
        f"{told[:200] or 'it ends too early'}; copy it again"
    )


def _read_safetensors(path: Path) -> dict[str, Any]:
    """The tensors of a file, mapped one at a time: what is mapped counts as memory until it is let go."""
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
