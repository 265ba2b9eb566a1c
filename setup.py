"""Builds the C++ extension ``maskattn._native``; everything else is in pyproject.toml."""

from pybind11.setup_helpers import Pybind11Extension, build_ext
from setuptools import setup

native = Pybind11Extension(
    "maskattn._native",
    sources=["csrc/bindings.cpp", "csrc/coverage.cpp"],
    depends=["csrc/coverage.hpp"],
    cxx_std=17,
    extra_compile_args=["-O3", "-pthread", "-Wall", "-Wextra"],
    extra_link_args=["-pthread"],
    optional=True,  # without a compiler the install still succeeds; what needs the extension then says so
)

setup(ext_modules=[native], cmdclass={"build_ext": build_ext})
