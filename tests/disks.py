"""A small file system of its own, of which the power can be cut. Linux, root."""

from __future__ import annotations

import filecmp
import os
import shutil
import subprocess
from pathlib import Path


class Disk:
    """ext4 in a file, mounted at `path`.

    What its kernel part has handed down lies in the file; what waits in memory does not. A copy of the file is what a
    power cut leaves. It is made to wait for five minutes instead of five seconds: nothing but a sync gets to the disk.

    Raises:
        OSError: it cannot be had here.
    """

    def __init__(self, folder: Path, mib: int = 48) -> None:
        self.path, self._image = folder / "disk", folder / "image"
        self.path.mkdir(parents=True)
        if os.getuid() != 0 or not shutil.which("mkfs.ext4") or not shutil.which("mount"):
            raise OSError("a disk of one's own takes root, mount and mkfs.ext4")
        with self._image.open("wb") as file:
            file.truncate(mib << 20)
        _run("mkfs.ext4", "-q", "-E", "lazy_itable_init=0,lazy_journal_init=0", str(self._image))
        self._mount()

    def image(self) -> Path:
        """A copy of what is on the disk now. Whoever writes must be stopped."""
        copy = self._image.with_name("copy")
        while True:
            shutil.copyfile(self._image, copy)
            if filecmp.cmp(self._image, copy, shallow=False):  # nothing was handed down meanwhile
                return copy

    def restore(self, image: Path) -> None:
        """Come back with what an earlier copy holds, as after the power was cut. Nobody may use the disk."""
        self.close()
        os.replace(image, self._image)
        self._mount()

    def close(self) -> None:
        """Unmount it."""
        _run("umount", str(self.path))

    def make_read_only(self) -> None:
        """Let nothing be written any more."""
        _run("mount", "-o", "remount,ro", str(self.path))

    def _mount(self) -> None:
        _run("mount", "-o", "loop,commit=300", str(self._image), str(self.path))


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise OSError(f"{command[0]}: {done.stderr.strip()}")
