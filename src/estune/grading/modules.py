"""Modules from files by path: a user's tasks and rewards, which graders load in the same way."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from dataclasses import dataclass
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


@dataclass(frozen=True, slots=True)
class Place:
    """Where this process and others get a module from.

    Attributes:
        name: the name that it is imported by.
        file: the file that it was loaded from by path; None if it was imported.
        root: the folder that its name begins in, or None. It may be on this process's path alone, as a script's is.
    """

    name: str
    file: str | None
    root: str | None

    def load(self) -> ModuleType:
        """The module, wherever other modules of that name lie: after those that this process has already.

        Raises:
            EstuneError: it cannot be loaded here.
        """
        if self.file is not None:
            return load_file(Path(self.file))
        if self.root is not None and self.root not in sys.path:
            sys.path.append(self.root)
        try:
            return importlib.import_module(self.name)
        except Exception as error:
            raise EstuneError(f"module {self.name} cannot be imported by another process: {one_line(error)}") from error


def place_of(module: ModuleType) -> Place:
    """Where a module of this process can be had by another."""
    file = getattr(module, "__file__", None)
    root = None
    if file is not None:
        path = Path(file).resolve()
        steps = module.__name__.count(".") + (path.name == "__init__.py")
        root = str(path.parents[steps]) if steps < len(path.parents) else None
    return Place(module.__name__, FILES.get(module.__name__), root)


def one_line(error: Exception) -> str:
    """An exception in one line: its type, its text, and where in the user's files it comes from."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}{place(error)}"
