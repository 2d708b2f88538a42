"""Files that appear whole or not at all and outlive a power cut, and files that one process has for itself."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

from estune.errors import EstuneError

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_CLOSED = (errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EIO)
_KINDS = ("replica", "ray", "hub", "sandbox")  # of temporary folders
_SETTLED_SECONDS = 60.0
_HELD: dict[Path, int] = {}  # temporary folders of this process, each with the descriptor that locks it


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """Yield a temporary path beside `target`; on success it takes the target's place, on failure it is removed.

    Whenever the power is cut, the whole old content or the whole new one is there: the new one is on disk before it
    gets its name. A target has one writer at a time. What a killed writer leaves lies under the same names, and the
    next one clears it, as `clear_leftovers` does.

    Raises:
        EstuneError: it cannot be written.
    """
    make_folder(target.parent)
    temporary, old = _beside(target)
    with writing(target):
        _tidy(target, temporary, old)
        try:
            yield temporary
            _sync_tree(temporary)
            if not target.is_dir():
                os.replace(temporary, target)
            elif not exchange(temporary, target):  # then there is a moment at which only the old one is there, aside
                os.rename(target, old)
                os.rename(temporary, target)
            sync(target.parent)
        finally:
            _tidy(target, temporary, old)


@contextmanager
def writing(target: Path) -> Iterator[None]:
    """Explain errors of a full disk, or of one that cannot be written to: where it is, and what to do.

    Raises:
        EstuneError: in the place of such an error; other errors pass.
    """
    try:
        yield
    except OSError as error:
        if error.filename is not None and not _near(Path(os.fsdecode(error.filename)), target):
            raise  # of something that is read meanwhile
        if _remedy(error) is None:
            raise
        why = os.strerror(error.errno or 0)
        raise EstuneError(
            f"{target}: {why} while writing; what was there is untouched: {_remedy(error)}, then give the same command "
            "again or, if the run has begun, resume it"
        ) from error


def explained(error: OSError) -> str:
    """A system error in one line: what is full or closed, and what to do."""
    remedy = _remedy(error)
    if remedy is None:
        return str(error)
    places = f"the run's folder, {tempfile.gettempdir()} or Numba's cache (NUMBA_CACHE_DIR)"
    return f"{error.filename or places}: {os.strerror(error.errno or 0)}; {remedy}"


def _remedy(error: OSError) -> str | None:
    if error.errno in _FULL:
        return "make room there"
    return "make it writable, or give another directory" if error.errno in _CLOSED else None


def write_text(target: Path, text: str) -> None:
    """Make a file hold this text, as `replacing` does it."""
    with replacing(target) as temporary:
        temporary.write_text(text, encoding="utf-8")


def user_cache(name: str) -> Path:
    """The path of a file or a folder in this user's cache, where estune keeps what can be made again."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()) / "estune" / name


def make_folder(path: Path) -> None:
    """Make a directory, and those that it lies in, so that they outlive a power cut.

    Raises:
        EstuneError: it cannot be made.
    """
    with writing(path):
        missing = [p for p in (path, *path.parents) if not p.exists()]
        path.mkdir(parents=True, exist_ok=True)
        for made in missing:
            sync(made.parent)


def sync(path: Path) -> None:
    """Write a file's content, or the names in a directory, to the disk."""
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    except OSError as error:
        if error.errno != errno.EINVAL:  # a file system that keeps nothing, such as some networks'
            raise
    finally:
        os.close(opened)


def remove(target: Path) -> None:
    """Remove a file or a directory. Whenever the process is killed, it is there as it was, or gone."""
    if os.path.lexists(target):
        temporary, _ = _beside(target)
        _remove(temporary)
        os.rename(target, temporary)
        _remove(temporary)


def clear_leftovers(folder: Path) -> None:
    """Clear what killed writers of this folder's files have left; put an old directory that was set aside back."""
    for path in folder.glob(".*.*") if folder.is_dir() else ():
        name, _, kind = path.name[1:].rpartition(".")
        if kind in ("tmp", "old") and path.exists():
            _tidy(folder / name, *_beside(folder / name))


def make_temporary(kind: str, parent: Path | None = None) -> Path:
    """A folder `estune-KIND-...` for this process, in the system's temporary directory or `parent`.

    Folders of this kind that killed processes of this user have left are removed. A folder is locked as long as the
    process that made it lives.

    Raises:
        EstuneError: it cannot be made.
    """
    place = parent or Path(tempfile.gettempdir())
    for path in place.glob(f"estune-{kind}-*"):
        _remove_dead(path)
    while True:
        with writing(place):
            folder = Path(tempfile.mkdtemp(prefix=f"estune-{kind}-", dir=place))
        try:
            _HELD[folder] = os.open(folder, os.O_RDONLY)
            fcntl.flock(_HELD[folder], fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (FileNotFoundError, BlockingIOError):  # another process found it before it was locked
            remove_temporary(folder)
            continue
        if folder.is_dir():
            return folder
        remove_temporary(folder)


@cache
def clear_temporary() -> None:
    """Remove folders of any kind that killed processes of this user have left in the temporary directory and `/tmp`.

    A process looks once. A sandbox is made before it is locked, so that a new one is left alone.
    """
    with suppress(OSError):  # there is no temporary directory: who needs one says so
        for place in {Path(tempfile.gettempdir()), Path("/tmp")}:
            for path in place.glob("estune-*-*"):
                kind = path.name.split("-")[1]
                if kind in _KINDS and (kind != "sandbox" or time.time() - path.lstat().st_mtime > _SETTLED_SECONDS):
                    _remove_dead(path)


def remove_temporary(folder: Path) -> None:
    """Remove a folder of `make_temporary`."""
    shutil.rmtree(folder, ignore_errors=True)
    if folder in _HELD:
        os.close(_HELD.pop(folder))


def locked(path: Path, mode: str) -> Any:
    """Open a file for this process alone. It is unbuffered, so that a failed write leaves nothing to be written later.

    Raises:
        EstuneError: another process has it.
    """
    with writing(path):
        file = path.open(mode, buffering=0)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.close()
        raise EstuneError(f"{path} is being written by another process; wait for it or stop it") from error
    return file


def read_claim(path: Path, *keys: str) -> dict[str, Any]:
    """The record of a sweep or a comparison in its folder: an object with these keys.

    Raises:
        EstuneError: it holds something else.
    """
    try:
        found = json.loads(path.read_text())
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict) or not all(isinstance(found.get(key), dict) for key in keys):
        raise EstuneError(f"{path} is damaged; put it back as it was, or give another --output-dir")
    return found


def _near(path: Path, target: Path) -> bool:
    """Whether a path takes part in writing the target: it is in its directory, or a directory above."""
    return path.is_relative_to(target.parent) or target.is_relative_to(path)


def _beside(target: Path) -> tuple[Path, Path]:
    """The paths at which a target's new content is made, and an old directory waits until the new has its name."""
    return target.with_name(f".{target.name}.tmp"), target.with_name(f".{target.name}.old")


def exchange(one: Path, other: Path) -> bool:
    """Let two directories change their names in one call, where system and file system can do that."""
    try:
        call = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):  # not Linux
        return False
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return bool(call(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0)


def _sync_tree(path: Path) -> None:
    """Write a file, or a directory with all that it holds, to the disk. Links are not followed."""
    if path.is_symlink():
        return
    if path.is_dir():
        for inner in path.iterdir():
            _sync_tree(inner)
    sync(path)


def _tidy(target: Path, temporary: Path, old: Path) -> None:
    """Remove what is left over; put an old directory back if nothing has taken its place."""
    if old.exists() and not target.exists():
        os.rename(old, target)
    _remove(temporary)
    _remove(old)


def _remove_dead(folder: Path) -> None:
    """Remove a folder of `make_temporary` if it is this user's and nobody has it locked."""
    try:
        if folder.is_symlink() or not folder.is_dir() or folder.stat().st_uid != os.getuid():
            return
        opened = os.open(folder, os.O_RDONLY | os.O_NOFOLLOW)
    except OSError:
        return
    try:
        fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(folder, ignore_errors=True)
    except OSError:
        pass  # its process lives
    finally:
        os.close(opened)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
