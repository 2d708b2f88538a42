"""Where what Numba compiles is kept, for this version of it and these kernels."""

from __future__ import annotations

import hashlib
from importlib.metadata import version
from pathlib import Path

from estune.files import user_cache


def compiled() -> str:
    """A folder of its own, to be named before Numba is imported, here and in children.

    Numba compiles a function again when its own file has changed, but not when one that it imports has, and throws away
    what another version has compiled. Compiling all takes a minute, so every checkout of this user shares what is kept.
    """
    package = Path(__file__).parents[1] / "src" / "estune"
    files = sorted([*(package / "noise").glob("*.py"), *(package / "engines" / "cpu").glob("*.py")])
    kernels = hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]
    return str(user_cache("tests") / f"numba-{version('numba')}-{kernels}")
