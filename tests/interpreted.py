"""Triton's interpreter with NumPy of today, which takes no number from an array `[1]`, as Triton before 3.7 does.

And in three quarters of the time: it looks through Triton's language for what to replace whenever a kernel is launched
or calls a function, thousands of times a test. Here it looks once, and replaces where a launch begins.
"""

from __future__ import annotations

import functools
import inspect
from types import SimpleNamespace
from typing import Any

from triton.runtime import interpreter

# Kernels see one of these, and functions of Triton's own that they call the other.
_ALL = SimpleNamespace(__globals__={"tl": interpreter.tl, "core": interpreter.tl.core})

_patch_tensor, _patch_language = interpreter._patch_lang_tensor, interpreter._patch_lang


def _with_numbers(tensor: Any, scope: Any) -> None:
    _patch_tensor(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.squeeze()))


@functools.cache
def _builtins(package: Any) -> list[tuple[str, Any]]:
    return [each for each in inspect.getmembers(package) if interpreter.tl.core.is_builtin(each[1])]


def _replace_builtins(package: Any, builder: Any, scope: Any) -> None:
    for name, member in _builtins(package):
        interpreter._patch_attr(package, name, member, builder, scope)


class _Launch:
    """What a launch has replaced, until it ends; functions that its kernel calls find it so."""

    under_way = False

    def __init__(self, kernel: Any) -> None:
        self.scope = None if _Launch.under_way else _patch_language(_ALL)
        _Launch.under_way = True

    def restore(self) -> None:
        if self.scope is not None:
            self.scope.restore()
            _Launch.under_way = False


interpreter._patch_lang_tensor = _with_numbers
interpreter._patch_builtin = _replace_builtins
interpreter._patch_lang = _Launch
