"""Triton's intermediate code: the part of a compilation that depends on the kernels' Python, in a fraction of the time.

The later stages depend only on it, the target, the options and Triton, so a row of a table is valid as long as the
fingerprint of its intermediate code is unchanged.
"""

from __future__ import annotations

import hashlib
import re
from typing import Any

from triton._C.libtriton import ir
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend

__all__ = ["fingerprint", "fingerprint_of_code", "intermediate_code", "without_names"]

# Definitions of values: at the start of an operation, a loop or a region.
DEFINITIONS = re.compile(r"(?:^\s*|scf\.for |\(|, )(%\w+)(?::\d+)?(?= =|: \w+[,)])")


def intermediate_code(source: ASTSource, target: GPUTarget, options: dict[str, int]) -> str:
    """Return the code after Triton's own simplifications."""
    backend = make_backend(target)
    parsed = backend.parse_options(dict(options))
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    stages: dict[str, Any] = {}
    backend.add_stages(stages, parsed, source.language)
    implementation, modules = backend.get_codegen_implementation(parsed), backend.get_module_map()
    return str(stages["ttir"](source.make_ir(target, parsed, implementation, modules, context), {}))


def fingerprint(source: ASTSource, target: GPUTarget, options: dict[str, int]) -> str:
    """Return a hash of a kernel's code and its compiler options, independent of names, as twelve hexadecimal digits."""
    return fingerprint_of_code(intermediate_code(source, target, options), options)


def fingerprint_of_code(intermediate: str, options: dict[str, int]) -> str:
    """Return the fingerprint of intermediate code that a compilation has kept (``asm["ttir"]``)."""
    code = without_names(intermediate)
    return hashlib.sha256(f"{code}{sorted(options.items())}".encode()).hexdigest()[:12]


def without_names(code: str) -> str:
    """Return the operations with constants inlined and values named in the order of their use."""
    code = re.sub(r"(?m)^#loc.*\n?", "", re.sub(r" ?loc\((?:[^()\"]|\"[^\"]*\"|\([^()]*\))*\)", "", code))
    head, body = code.split(" attributes {noinline = false} {\n", 1)
    meaning = {name: what.strip() for name, what in re.findall(r"(%\w+): ([^%]+?),? ?(?=%|\)$)", head)}
    constants = re.compile(r"(?m)^ *(%\w+) = arith\.constant (.*)\n")
    meaning |= dict(constants.findall(body))
    names: dict[str, str] = {}
    count = 0
    lines = []
    for line in constants.sub("", body).splitlines():
        # Sibling regions may reuse a name, so every definition gets a number of its own.
        defined = set(DEFINITIONS.findall(line))
        renamed = []
        for piece in re.split(r"(%\w+)", line):
            first_use = piece.startswith("%") and piece not in names
            if first_use or piece in defined:
                names[piece] = f"%{count}<{meaning.get(piece, '')}>"
                count += 1
                defined.discard(piece)
            renamed.append(names.get(piece, piece))
        lines.append("".join(renamed))
    return "\n".join(lines)
