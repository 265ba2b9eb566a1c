"""Builds the C++ extension ``maskattn._native``; everything else is in pyproject.toml."""

from __future__ import annotations

import platform
from glob import glob
from pathlib import Path

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension, build_ext
from setuptools import setup

FLAGS_FILE = "csrc/dispatch/flags.mk"


def compiler_flags() -> dict[str, list[str]]:
    """The flags in csrc/dispatch/flags.mk by their names there."""
    lines = Path(FLAGS_FILE).read_text(encoding="utf-8").splitlines()
    assignments = (line.partition(" := ") for line in lines if line and not line.startswith("#"))
    return {name: flags.split() for name, _, flags in assignments}


class BuildWithInstructionSets(build_ext):
    """Compiles each instruction set's source with its own flags; which of them runs is chosen at run time."""

    def build_extensions(self) -> None:
        """Have the compiler add a source's own flags to those of the extension."""
        compile_one = self.compiler._compile

        def compile_with_own_flags(obj, src, ext, cc_args, extra_postargs, pp_opts):  # type: ignore[no-untyped-def]
            path = Path(src)
            own = FLAGS.get(f"FLAGS_{path.stem}", []) if on_x86 and path.parent.name == "dispatch" else []
            compile_one(obj, src, ext, cc_args, [*extra_postargs, *own], pp_opts)

        self.compiler._compile = compile_with_own_flags
        super().build_extensions()


on_x86 = platform.machine().lower() in ("x86_64", "amd64")
FLAGS = compiler_flags()
TESTS = set(glob("csrc/tests/*"))
native = Pybind11Extension(
    "maskattn._native",
    sources=sorted(set(glob("csrc/*/*.cpp")) - TESTS),
    depends=[*sorted(set(glob("csrc/*/*.hpp")) - TESTS), FLAGS_FILE],
    include_dirs=["csrc"],
    cxx_std=int(FLAGS["CXX_STANDARD"][0]),
    extra_compile_args=["-O3", *FLAGS["FLAGS"]],
    extra_link_args=["-pthread"],
    optional=True,  # without a compiler the install still succeeds; what needs the extension then says so
)

ParallelCompile().install()
setup(ext_modules=[native], cmdclass={"build_ext": BuildWithInstructionSets})
