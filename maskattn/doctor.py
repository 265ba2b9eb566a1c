"""The doctor: tries what this machine offers the package, and names the remedy for what is missing."""

from __future__ import annotations

import functools
import importlib
import platform
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata

import torch

import maskattn

__all__ = ["Finding", "examine", "try_attention"]

_SLIDE = "pip install 'maskattn[slide]'"
_PACKAGES = {
    # module: (distribution, how to install it)
    "triton": ("triton", "pip install triton (Linux; for GPUs)"),
    "openslide": ("openslide-python", _SLIDE),
    "cv2": ("opencv-python-headless", _SLIDE),
    "tifffile": ("tifffile", _SLIDE),
    "h5py": ("h5py", _SLIDE),
    "shapely": ("shapely", _SLIDE),
    "PIL": ("pillow", _SLIDE),
    "matplotlib": ("matplotlib", _SLIDE),
    "safetensors": ("safetensors", _SLIDE),
    "timm": ("timm", "pip install 'maskattn[timm]' (only to convert timm's models)"),
    "transformers": ("transformers", "pip install 'maskattn[hf]' (only to convert Hugging Face's models)"),
}
_SLOW_TO_IMPORT = ("timm", "transformers")
_NATIVE = "install a C++ compiler (Debian: apt install g++) and install maskattn again"


@dataclass(frozen=True)
class Finding:
    """The result of one check.

    Attributes:
        subject: what was checked.
        works: whether it can be used here.
        detail: its version, or the reason why it cannot be used.
        remedy: how to install it; empty if it works or there is no remedy.
    """

    subject: str
    works: bool
    detail: str
    remedy: str = ""


def examine() -> list[Finding]:
    """Check the interpreter, packages, the extension, devices and attention implementations."""
    findings = [
        Finding("python", True, f"{platform.python_version()} ({sys.executable})"),
        Finding("maskattn", True, maskattn.__version__),
        Finding("torch", True, torch.__version__),
    ]
    findings += [_package(module, *where) for module, where in _PACKAGES.items()]
    findings.append(_attempt("C++ extension", _run_native, _NATIVE))
    findings.append(Finding("cpu", True, f"{torch.get_num_threads()} threads"))
    devices = ["cpu"]
    for index in range(torch.cuda.device_count()):
        devices.append(f"cuda:{index}")
        findings.append(Finding(devices[-1], True, torch.cuda.get_device_name(index)))
    if len(devices) == 1:
        findings.append(Finding("cuda", False, "no GPU that torch can use; the CPU is used instead"))
    for device in devices:
        for impl in _impls():
            findings.append(_attempt(f"impl {impl!r} on {device}", functools.partial(try_attention, impl, device)))
    return findings


def _package(module: str, distribution: str, remedy: str) -> Finding:
    def version() -> str:
        if module not in _SLOW_TO_IMPORT:
            importlib.import_module(module)
        return metadata.version(distribution)

    return _attempt(distribution, version, remedy)


def _attempt(subject: str, trial: Callable[[], str], remedy: str = "") -> Finding:
    try:
        return Finding(subject, True, trial())
    except Exception as error:  # any failure is a finding
        text = " ".join(str(error).split()) or type(error).__name__
        return Finding(subject, False, text[:200], remedy)


def _run_native() -> str:
    import numpy as np

    native = importlib.import_module("maskattn._native")
    fraction = native.token_coverage(np.ones((2, 2), dtype=bool), 1.0, 1.0, 0.0, 0.0, 2.0, 2.0, 1, 1)
    if float(fraction[0, 0]) != 1.0:
        raise RuntimeError(f"token coverage of full tissue must be 1, got {float(fraction[0, 0])}")
    return f"token coverage runs; attention's best instruction set here is {native.instruction_sets()[0]}"


def _impls() -> tuple[str, ...]:
    from maskattn.attention.implementation import IMPLS

    return IMPLS


def try_attention(impl: str, device: str) -> str:
    """Run a tiny packed attention, compare it with the reference, and return the result in words.

    Raises:
        ValueError: there is no such implementation, or it does not support the device.
        RuntimeError: it runs, but its result is wrong.
    """
    # "gluon" multiplies only in half precision.
    dtype = torch.float16 if impl == "gluon" else torch.float32
    q = torch.randn(5, 2, 16, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    lengths = torch.tensor([0, 2, 5], dtype=torch.int32, device=device)
    out, expected = (
        torch.as_tensor(maskattn.packed_attention(q, q, q, lengths, lengths, 3, 3, impl=name))
        for name in (impl, "reference")
    )
    difference = float((out - expected).abs().max())
    if not difference < 1e-2:
        raise RuntimeError(f"impl {impl!r} runs on {device} but differs from the reference by {difference:.2g}")
    return f"runs; differs from the reference by {difference:.1e}"
