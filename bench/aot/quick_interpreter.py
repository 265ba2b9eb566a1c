"""A faster interpreter: the language is replaced once for a launch, not at every call of a device function.

Triton's interpreter replaces the functions of ``triton.language`` when a launch begins, and goes through all of them
again for each call within it, although nothing is left to replace. That takes almost half of the time of small tiles.
"""

from __future__ import annotations

from typing import Any

from triton.runtime import interpreter

__all__ = ["replace_once"]


def replace_once() -> None:
    """Let this process's interpreter replace what a module sees of the language once a launch; repeated calls do
    nothing."""
    plain, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    if hasattr(plain, "replaced"):
        return
    # Functions of one module share their globals, and with them what is replaced.
    replaced: set[int] = set()

    def patch(fn: Any) -> Any:
        if id(fn.__globals__) in replaced:
            return interpreter._LangPatchScope()
        replaced.add(id(fn.__globals__))
        return plain(fn)

    def launch_anew(self: Any, *arguments: Any, **constants: Any) -> Any:
        # The end of a launch undoes what its beginning replaced.
        replaced.clear()
        try:
            return launch(self, *arguments, **constants)
        finally:
            replaced.clear()

    setattr(patch, "replaced", replaced)  # noqa: B010 (a name that mypy does not know)
    interpreter._patch_lang = patch
    interpreter.GridExecutor.__call__ = launch_anew
