"""Where what Numba compiles is kept, for this version of it and these kernels."""

from __future__ import annotations

import fcntl
import hashlib
import os
import threading
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

from estune.files import user_cache
from estune.noise.compiled import FOLDERS, hash_of_sources


def compiled() -> str:
    """A folder of its own, to be named before Numba is imported, here and in children.

    Numba throws away what another version of it, or of a source, has compiled. Compiling all takes minutes, so every
    checkout of this user shares what is kept: Numba has a folder for each place where source lies, and what this
    checkout's are called are links to the same two.
    """
    cache = user_cache("tests") / f"numba-{version('numba')}-{hash_of_sources()[:16]}"
    for folder in FOLDERS:
        shared = cache / folder.name
        shared.mkdir(parents=True, exist_ok=True)
        with suppress(FileExistsError):
            (cache / _numbas_name(folder)).symlink_to(shared.name)
    return str(cache)


def compile_once() -> None:
    """From now on no two processes compile a function at the same time: the second one finds it in what is kept."""
    from numba.core.dispatcher import Dispatcher

    kept = Path(os.environ["NUMBA_CACHE_DIR"])
    compile_here = Dispatcher.compile
    within = threading.local()  # what a function calls is compiled with it

    def compile_alone(self: Any, signature: Any) -> Any:
        if getattr(within, "one", False):
            return compile_here(self, signature)
        with (kept / f"{self.py_func.__qualname__}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            within.one = True
            try:
                return compile_here(self, signature)
            finally:
                within.one = False
                fcntl.flock(lock, fcntl.LOCK_UN)  # a fork of this process may have the file open

    Dispatcher.compile = compile_alone


def _numbas_name(folder: Path) -> str:
    """As `numba.core.caching` has it, which reads where to cache once it is imported."""
    return f"{folder.name}_{hashlib.sha1(str(folder).encode()).hexdigest()}"
