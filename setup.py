"""Builds the C++ extension ``maskattn._native``; everything else is in pyproject.toml."""

from __future__ import annotations

import platform
from glob import glob

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension, build_ext
from setuptools import setup

AVX2 = ["-mavx2", "-mfma"]
# GCC 12 takes the undefined operands inside its own AVX-512 intrinsics for mistakes of ours.
AVX512 = [
    *AVX2,
    "-mavx512f",
    "-mavx512bw",
    "-mavx512dq",
    "-mavx512vl",
    "-Wno-uninitialized",
    "-Wno-maybe-uninitialized",
]
# Flags of the one source that holds an instruction set's kernels; which runs is chosen at run time.
INSTRUCTION_SETS = {
    "csrc/kernels_avx2.cpp": AVX2,
    "csrc/kernels_avx512.cpp": AVX512,
    "csrc/kernels_avx512_bf16.cpp": [*AVX512, "-mavx512bf16"],
}


class BuildWithInstructionSets(build_ext):
    """Compiles each instruction set's source with its own flags."""

    def build_extensions(self) -> None:
        """Have the compiler add a source's own flags to those of the extension."""
        compile_one = self.compiler._compile

        def compile_with_own_flags(obj, src, ext, cc_args, extra_postargs, pp_opts):  # type: ignore[no-untyped-def]
            own = INSTRUCTION_SETS.get(src.replace("\\", "/"), []) if on_x86 else []
            compile_one(obj, src, ext, cc_args, [*extra_postargs, *own], pp_opts)

        self.compiler._compile = compile_with_own_flags
        super().build_extensions()


on_x86 = platform.machine().lower() in ("x86_64", "amd64")
native = Pybind11Extension(
    "maskattn._native",
    sources=sorted(glob("csrc/*.cpp")),
    depends=sorted(glob("csrc/*.hpp")),
    cxx_std=17,
    # Neither option changes a value: products are fused with sums, and sqrt need not set errno.
    extra_compile_args=["-O3", "-pthread", "-Wall", "-Wextra", "-ffp-contract=fast", "-fno-math-errno"],
    extra_link_args=["-pthread"],
    optional=True,  # without a compiler the install still succeeds; what needs the extension then says so
)

ParallelCompile().install()
setup(ext_modules=[native], cmdclass={"build_ext": BuildWithInstructionSets})
