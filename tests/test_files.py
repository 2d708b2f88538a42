"""Files that appear whole or not at all: what a full or closed disk, a kill and another process leave of them."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from estune import files
from estune.errors import EstuneError
from estune.files import (
    clear_leftovers,
    clear_temporary,
    explained,
    make_folder,
    make_temporary,
    remove,
    remove_temporary,
    replacing,
)
from estune.run.monitors.base import Sample
from estune.run.monitors.files import JsonlMonitor

FULL = Path("/dev/full")  # takes no byte


def model(folder: Path, text: str) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(text)
    return folder


def write_to_full_disk(target: Path) -> None:
    with replacing(target) as temporary:
        temporary.symlink_to(FULL)
        temporary.write_text("new")


@pytest.mark.parametrize("at_once", [True, False])
def test_a_directory_is_replaced(at_once: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not at_once:  # as on systems that cannot
        monkeypatch.setattr(files, "exchange", lambda one, other: False)
    target = model(tmp_path / "best", "old")
    with replacing(target) as folder:
        model(folder, "new")
    assert (target / "config.json").read_text() == "new"
    assert os.listdir(tmp_path) == ["best"]


def test_what_a_killed_writer_left_is_cleared(tmp_path: Path) -> None:
    model(tmp_path / ".best.old", "old")  # between two names
    model(tmp_path / ".best.tmp", "half")
    model(tmp_path / ".checkpoint-2.tmp", "half")
    model(tmp_path / "final", "whole")
    (tmp_path / ".hidden").write_text("somebody's")
    clear_leftovers(tmp_path)
    assert sorted(os.listdir(tmp_path)) == [".hidden", "best", "final"]
    assert (tmp_path / "best" / "config.json").read_text() == "old"
    remove(tmp_path / "best")
    remove(tmp_path / "best")
    assert sorted(os.listdir(tmp_path)) == [".hidden", "final"]


@pytest.mark.skipif(not FULL.exists(), reason="no /dev/full here")
def test_a_full_disk_is_named_and_leaves_what_was_there(tmp_path: Path) -> None:
    target = tmp_path / "config.yaml"
    target.write_text("old")
    with pytest.raises(EstuneError, match=r"config.yaml: No space left on device while writing; .*make room there"):
        write_to_full_disk(target)
    assert (target.read_text(), os.listdir(tmp_path)) == ("old", ["config.yaml"])
    (tmp_path / "metrics.jsonl").symlink_to(FULL)
    monitor = JsonlMonitor(tmp_path / "metrics.jsonl")
    with pytest.raises(EstuneError, match=r"metrics.jsonl: No space left on device"):
        monitor.on_step_end({"step": 1}, Sample("", "", None))
    monitor.close()


def test_a_place_that_cannot_be_written_to_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for make in (make_folder, lambda path: make_temporary("x", path)):
        with pytest.raises(EstuneError, match="file.*: Not a directory while writing.*give another directory"):
            make(tmp_path / "file" / "run")


def test_an_error_of_something_that_is_read_is_not_blamed_on_what_is_written(tmp_path: Path) -> None:
    with pytest.raises(PermissionError), replacing(tmp_path / "out" / "best"):
        raise PermissionError(errno.EACCES, "Permission denied", str(tmp_path / "base" / "config.json"))


def test_errors_from_elsewhere_say_what_to_do() -> None:
    full = OSError(errno.ENOSPC, "No space left on device")
    assert explained(full).endswith("Numba's cache (NUMBA_CACHE_DIR): No space left on device; make room there")
    full.filename = "/cache/kernel.nbi"
    assert explained(full) == "/cache/kernel.nbi: No space left on device; make room there"
    assert explained(FileNotFoundError(errno.ENOENT, "No such file", "x")) == "[Errno 2] No such file: 'x'"


def test_whatever_is_left_of_any_kind_is_cleared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    for name in ("replica-a", "ray-b", "hub-c", "sandbox-old", "sandbox-new", "tests-d"):
        (tmp_path / f"estune-{name}" / "inner").mkdir(parents=True)
    os.utime(tmp_path / "estune-sandbox-old", (0, 0))
    mine = make_temporary("hub")  # which clears its own kind
    clear_temporary.cache_clear()
    clear_temporary()
    assert {path.name for path in tmp_path.iterdir()} == {mine.name, "estune-sandbox-new", "estune-tests-d"}
    remove_temporary(mine)


HOLD = """
import sys
from pathlib import Path
from estune.files import make_temporary
print(make_temporary("test", Path(sys.argv[1])), flush=True)
sys.stdin.read()
"""


def test_folders_of_dead_processes_are_swept(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    other = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert other.stdout is not None
    theirs = Path(other.stdout.readline().strip())
    (theirs / "socket").write_text("")
    kept = tmp_path / "estune-tests-of-somebody"
    kept.mkdir()
    mine = make_temporary("test", tmp_path)
    assert (theirs.is_dir(), mine.is_dir()) == (True, True)
    other.kill()
    other.communicate()
    remove_temporary(mine)
    again = make_temporary("test", tmp_path)
    assert sorted(os.listdir(tmp_path)) == sorted([again.name, kept.name])
    assert again.parent != Path(tempfile.gettempdir())
    remove_temporary(again)
