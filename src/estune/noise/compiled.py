"""How kernels for the CPU are compiled: kept on disk, and compiled again where any source of theirs has changed."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

_ESTUNE = Path(__file__).parents[1]
FOLDERS = (_ESTUNE / "noise", _ESTUNE / "engines" / "cpu")
"""Of all kernels."""


def jit(function: Callable[..., Any]) -> Any:
    """A function compiled when it is first called, which then holds no lock of Python's.

    Numba keeps what it has compiled until the function's own file changes. Those that it calls lie in other files and
    are compiled into it, so that it would go on with theirs as they were. No fastmath: contraction to fused
    multiply-add or reassociation would change the bits.
    """
    import numba

    kernel = numba.njit(nogil=True, cache=True, error_model="numpy")(function)
    kept = getattr(getattr(kernel, "_cache", None), "_cache_file", None)  # none where it cannot keep anything
    if kept is not None:
        kept._source_stamp = fingerprint()
    return kernel


@cache
def fingerprint() -> str:
    """Hash of the sources of all kernels."""
    files = [file for folder in FOLDERS for file in sorted(folder.glob("*.py"))]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
