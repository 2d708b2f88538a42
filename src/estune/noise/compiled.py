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
    """Compile a function when it is first called, and keep what came of it on disk. It runs without Python's lock.

    Numba keeps a kernel until the function's own file changes. What it calls lies in other files and is compiled into
    it, so that a kernel would go on with their old code. No fastmath: contraction to fused multiply-add or
    reassociation would change the bits.
    """
    import numba

    kernel = numba.njit(nogil=True, cache=True, error_model="numpy")(function)
    kept = getattr(getattr(kernel, "_cache", None), "_cache_file", None)  # none where it cannot keep anything
    if kept is not None:
        kept._source_stamp = hash_of_sources()
    return kernel


@cache
def hash_of_sources() -> str:
    """SHA-256 of the sources of all kernels, in hexadecimal."""
    files = [file for folder in FOLDERS for file in sorted(folder.glob("*.py"))]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
