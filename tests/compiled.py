"""Where what Numba compiles is kept, for this version of it and these sources."""

from __future__ import annotations

import hashlib
from importlib.metadata import version
from pathlib import Path


def compiled() -> str:
    """A folder of its own, to be named before Numba is imported, here and in children.

    Numba compiles a function again when its own file has changed, but not when one that it imports has, and throws away
    what another version has compiled.
    """
    root = Path(__file__).parents[1]
    sources = b"".join(path.read_bytes() for path in sorted((root / "src" / "estune").rglob("*.py")))
    kept = root / ".pytest_cache" / f"numba-{version('numba')}" / hashlib.sha256(sources).hexdigest()[:16]
    return str(kept)
