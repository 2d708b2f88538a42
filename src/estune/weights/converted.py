"""Copies in safetensors of models that come in another form, made once, in the user's cache."""

from __future__ import annotations

import fcntl
import logging
from collections.abc import Callable, Iterable
from hashlib import blake2b
from pathlib import Path

from estune.files import make_folder, replacing

log = logging.getLogger(__name__)


def made_once(copy: Path, make: Callable[[Path], None], why: str) -> Path:
    """The copy in the cache, made now if it is not there. One process makes it, and others wait until it has.

    Args:
        copy: where it lies.
        make: writes it into a folder that it is given, which is not there yet.
        why: what the user is told before it is made.

    Raises:
        EstuneError: as `make`, or it cannot be written.
    """
    if copy.is_dir():
        return copy
    make_folder(copy.parent)
    with copy.with_name(f"{copy.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not copy.is_dir():
            log.warning("%s, once, in %s", why, copy)
            with replacing(copy) as folder:
                make(folder)
    return copy


def state_of(files: Iterable[Path]) -> str:
    """A name for these files as they are now, by place, size and time."""
    found = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in sorted(files)]
    return blake2b(repr(found).encode(), digest_size=12).hexdigest()
