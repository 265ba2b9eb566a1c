"""A stub of the CUDA driver for Triton's own compiler and launcher, which runs everything of a call but the kernels.

The interpreter and the tables of compiled kernels test kernels one by one. With the stub every public call takes the
same path as a user's, with tensors on the CPU whose addresses stand for the device's.
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

# Number of multiprocessors of an H100 or H200.
PROCESSORS = 132


class StubDevice:
    """A simulated GPU of this process; make one per process, before Triton launches anything.

    Args:
        target: a key of :data:`CAPABILITIES`.
        folder: folder in which the driver is built.

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
        """The number of launches so far that exceeded a limit."""
        return int(self._library.stub_refused())

    @property
    def compiled(self) -> Counter[str]:
        """Kernel → number of its variants loaded so far."""
        return Counter(self._name(index) for index in range(self._library.stub_functions()))

    @property
    def launches(self) -> Counter[str]:
        """Kernel → number of its launches so far."""
        counts: Counter[str] = Counter()
        for index in range(self._library.stub_functions()):
            counts[self._name(index)] += int(self._library.stub_launches(index))
        return counts

    def _name(self, index: int) -> str:
        return self._library.stub_name(index).decode()


def build(folder: Path) -> Path:
    """Compile the driver, unless it exists and is newer than its source."""
    source, library = Path(__file__).with_name("driver.c"), folder / "libcuda.so.1"
    folder.mkdir(parents=True, exist_ok=True)
    if not library.exists() or library.stat().st_mtime < source.stat().st_mtime:
        partial = folder / f"libcuda.{os.getpid()}.partial"
        # Triton's later loads of this name find the library that is loaded already.
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
            # CudaDriver's own constructor is not called, since it asks torch for a GPU.
            self.utils, self.launcher_cls = CudaUtils(), CudaLauncher
            self.get_current_device = lambda: 0
            self.get_current_stream = lambda device: 0
            self.set_current_device = lambda device: None
            self.get_device_capability = lambda device=0: capability

    triton.runtime.driver.set_active(Driver())


def _believe(capability: tuple[int, int]) -> None:
    """Make the package treat a tensor's device, which is the CPU here, as the GPU."""
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
