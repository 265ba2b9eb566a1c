"""Recording of a call's launches without a GPU: Triton's launcher decides the signatures, and nothing is compiled.

The launcher turns absent arguments and numbers equal to 1 into constants, and records which pointers and numbers are
multiples of 16. Each combination is a separate compilation, here a :class:`Launch`. The tensors of the call may be on
the CPU.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import triton
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource

from bench.aot.intermediate import fingerprint, intermediate_code
from bench.aot.targets import ALL_TARGETS
from maskattn.kernels.launch import support
from maskattn.kernels.tables import lookup
from maskattn.kernels.tables.config import Target

__all__ = ["Launch", "recorded_launches"]


@dataclass(frozen=True)
class Launch:
    """A kernel with the signature, constants and attributes that the launcher would compile it with."""

    target: Target
    kernel: Any
    key: str
    signature: dict[str, Any]
    constants: dict[tuple[int, ...], Any]
    attributes: dict[tuple[int, ...], list[list[object]]]
    num_warps: int
    num_stages: int
    max_registers: int | None = None

    @property
    def name(self) -> str:
        """The kernel's name."""
        return self.kernel.fn.__name__

    @property
    def constants_by_name(self) -> dict[str, Any]:
        """The constants by name, without those of tuples' fields."""
        return {self.kernel.arg_names[path[0]]: x for path, x in self.constants.items() if len(path) == 1}

    @property
    def source(self) -> ASTSource:
        """The compiler's input."""
        kind = GluonASTSource if self.kernel.is_gluon() else ASTSource
        return kind(self.kernel, self.signature, self.constants, self.attributes)

    @property
    def options(self) -> dict[str, int]:
        """The compiler's options."""
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages}
        return options if self.max_registers is None else {**options, "maxnreg": self.max_registers}

    def compile(self) -> Any:
        """Compile the kernel to machine code."""
        return triton.compile(self.source, target=ALL_TARGETS[self.target], options=self.options)

    def intermediate_code(self) -> str:
        """Return Triton's intermediate code, in a fraction of a compilation's time."""
        return intermediate_code(self.source, ALL_TARGETS[self.target], self.options)

    def fingerprint(self) -> str:
        """Return the fingerprint of the intermediate code."""
        return fingerprint(self.source, ALL_TARGETS[self.target], self.options)


class _NoDevice:
    """A replacement of Triton's driver; each target has its own cache of signatures."""

    def __init__(self, target: Target) -> None:
        self.target = target

    def get_current_target(self) -> Any:
        return ALL_TARGETS[self.target]

    def get_current_device(self) -> str:
        return self.target

    def get_current_stream(self, device: str) -> int:
        return 0


@contextlib.contextmanager
def recorded_launches(target: Target) -> Iterator[list[Launch]]:
    """Record every launch inside the context as one for ``target``, and run none."""
    launches: list[Launch] = []

    def record(*, key: str, fn: Any, compile: dict[str, Any], **_: Any) -> bool:
        launches.append(
            Launch(
                target,
                fn.jit_function,
                key,
                compile["signature"],
                compile["constants"],
                compile["configs"][0],
                compile["num_warps"],
                compile["num_stages"],
                json.loads(compile["specialization_data"])["options"].get("maxnreg"),
            )
        )
        # So that nothing is compiled, or kept, and the next launch comes here too.
        return True

    driver = triton.runtime.driver
    before = driver._active
    with contextlib.ExitStack() as patches:
        patches.enter_context(mock.patch.object(lookup, "target_of", return_value=target))
        patches.enter_context(mock.patch.object(support, "_missing_on", return_value=None))
        patches.enter_context(mock.patch.object(triton.knobs.runtime, "jit_cache_hook", record))
        driver.set_active(_NoDevice(target))
        try:
            yield launches
        finally:
            driver._active = before
