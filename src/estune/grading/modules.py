"""Modules from files by path: a user's tasks and rewards, which graders load in the same way."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from hashlib import blake2b
from pathlib import Path
from types import ModuleType

from estune.errors import EstuneError
from estune.grading.convention import place

FILES: dict[str, str] = {}
"""Modules loaded from files by path: name to path. Graders load them in the same way."""


def load_file(path: Path) -> ModuleType:
    """The module in a Python file, executed once per process.

    Raises:
        EstuneError: there is no such file, or executing it fails.
    """
    path = path.expanduser().resolve()
    if not path.is_file():
        raise EstuneError(f"reward file {path}: no such file")
    name = f"estune_file_{path.stem}_{blake2b(str(path).encode(), digest_size=4).hexdigest()}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # functions are pickled by it
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise EstuneError(f"reward file {path} cannot be loaded: {one_line(error)}") from error
    FILES[name] = str(path)
    return module


def one_line(error: Exception) -> str:
    """An exception for a message: its type, what it says, and where in the user's files it comes from."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}{place(error)}"
