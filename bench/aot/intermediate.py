"""Triton's intermediate code: all of a compilation that depends on the kernels' Python, in a fraction of the time.

What follows it depends on the target, the options and Triton alone, so a row of a table stands as long as the
fingerprint of its intermediate code does.
"""

from __future__ import annotations

import hashlib
import re
from typing import Any

from triton._C.libtriton import ir
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend

__all__ = ["fingerprint", "intermediate_code"]

# Of values: what an operation, a loop, or a region begins with.
DEFINITIONS = re.compile(r"(?:^\s*|scf\.for |\(|, )(%\w+)(?::\d+)?(?= =|: \w+[,)])")


def intermediate_code(source: ASTSource, target: GPUTarget, options: dict[str, int]) -> str:
    """The code after Triton's own simplifications."""
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
    """Twelve hexadecimal digits for what a kernel computes and how it is compiled, whatever its arguments' names."""
    code = _without_names(intermediate_code(source, target, options))
    return hashlib.sha256(f"{code}{sorted(options.items())}".encode()).hexdigest()[:12]


def _without_names(code: str) -> str:
    """The operations, with constants in place and values named by the order in which they are used."""
    code = re.sub(r"(?m)^#loc.*\n?", "", re.sub(r" ?loc\((?:[^()\"]|\"[^\"]*\"|\([^()]*\))*\)", "", code))
    head, body = code.split(" attributes {noinline = false} {\n", 1)
    meaning = {name: what.strip() for name, what in re.findall(r"(%\w+): ([^%]+?),? ?(?=%|\)$)", head)}
    constants = re.compile(r"(?m)^ *(%\w+) = arith\.constant (.*)\n")
    meaning |= dict(constants.findall(body))
    names: dict[str, str] = {}
    count = 0
    lines = []
    for line in constants.sub("", body).splitlines():
        # Regions side by side may use a name again, so every definition has a number of its own.
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
