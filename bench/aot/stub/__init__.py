"""Triton's own compiler and launcher on a driver that runs nothing: all that a call does up to the GPU itself.

Interpretation and the tables of compiled kernels see the kernels one by one; here every public call goes through the
code that a user's call goes through, with tensors on the CPU whose addresses pass for the device's.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
from collections import Counter
from pathlib import Path
from typing import Any

__all__ = ["CAPABILITIES", "StubDevice"]

CAPABILITIES = {"sm80": (8, 0), "sm86": (8, 6), "sm90": (9, 0), "sm100": (10, 0), "sm120": (12, 0)}

# That of an H100 or H200.
PROCESSORS = 132


class StubDevice:
    """Makes this process believe that it has a GPU; once a process, before Triton launches anything.

    Args:
        target: of :data:`CAPABILITIES`.
        folder: where the driver is built.

    Raises:
        ValueError: there is no such target.
    """

    def __init__(self, target: str, folder: Path) -> None:
        if target not in CAPABILITIES:
            raise ValueError(f"the target must be one of {', '.join(CAPABILITIES)}, got {target}")
        self.target, self.capability = target, CAPABILITIES[target]
        os.environ["STUB_CAPABILITY"] = str(10 * self.capability[0] + self.capability[1])
        os.environ["TRITON_LIBCUDA_PATH"] = str(folder)
        self._library = ctypes.CDLL(str(build(folder)), mode=ctypes.RTLD_GLOBAL)
        self._library.stub_name.restype = ctypes.c_char_p
        self._library.stub_launches.restype = ctypes.c_long
        _drive(self.capability)
        _believe(self.capability)

    @property
    def refused(self) -> int:
        """Launches beyond a limit so far."""
        return int(self._library.stub_refused())

    @property
    def compiled(self) -> Counter[str]:
        """Kernel → how many variants of it were loaded so far."""
        return Counter(self._name(index) for index in range(self._library.stub_functions()))

    @property
    def launches(self) -> Counter[str]:
        """Kernel → how often it was launched so far."""
        counts: Counter[str] = Counter()
        for index in range(self._library.stub_functions()):
            counts[self._name(index)] += int(self._library.stub_launches(index))
        return counts

    def _name(self, index: int) -> str:
        return self._library.stub_name(index).decode()


def build(folder: Path) -> Path:
    """Compile the driver, unless it is there and newer than its source."""
    source, library = Path(__file__).with_name("driver.c"), folder / "libcuda.so.1"
    folder.mkdir(parents=True, exist_ok=True)
    if not library.exists() or library.stat().st_mtime < source.stat().st_mtime:
        partial = folder / f"libcuda.{os.getpid()}.partial"
        # A process that has loaded it finds it again by its name.
        options = ["-shared", "-fPIC", "-O1", "-Wall", "-Werror", "-Wl,-soname,libcuda.so.1"]
        subprocess.run([os.environ.get("CC", "cc"), *options, "-o", str(partial), str(source)], check=True)
        os.replace(partial, library)
    return library


def _drive(capability: tuple[int, int]) -> None:
    """Make the stub Triton's driver."""
    import triton
    from triton.backends.nvidia.driver import CudaDriver, CudaLauncher, CudaUtils

    class Driver(CudaDriver):
        def __init__(self) -> None:
            # Not CudaDriver's own, which asks torch for a GPU.
            self.utils, self.launcher_cls = CudaUtils(), CudaLauncher
            self.get_current_device = lambda: 0
            self.get_current_stream = lambda device: 0
            self.set_current_device = lambda device: None
            self.get_device_capability = lambda device=0: capability

    triton.runtime.driver.set_active(Driver())


def _believe(capability: tuple[int, int]) -> None:
    """Answer the package's questions about a tensor's device, which is the CPU here, as for the GPU."""
    from maskattn.kernels.launch import support
    from maskattn.kernels.readout import call
    from maskattn.kernels.tables import lookup

    modules: list[tuple[Any, str, Any]] = [
        (lookup, "target_of", lambda device: lookup._target_of_capability(*capability)),
        (support, "_missing_on", lambda device: None),
        (call, "processors_of", lambda device: PROCESSORS),
    ]
    for module, name, answer in modules:
        setattr(module, name, answer)
