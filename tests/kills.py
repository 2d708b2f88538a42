"""Runs that end at a chosen file event, killed or with the power cut, each in a fork of this process; and what is left.

A file event is a file below the run's folder that is opened, renamed, removed, made, cut or synced. The end comes just
before it.
"""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from transformers import AutoModelForCausalLM, AutoTokenizer

from estune.config import Config
from estune.errors import EstuneError
from estune.journal.journal import FILE, Journal
from estune.run.trainer import Trainer
from tests.disks import Disk
from tests.runs import make_task, substance

EVENTS = ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate", "os.link", "os.symlink")


def go_on(config: Config) -> None:
    """Give the command that began the run, or resume it; a run that is complete stays as it is."""
    assert config.output_dir is not None
    if not (config.output_dir / FILE).is_file():
        Trainer(config, task=make_task(), monitors=None).train()
        return
    try:
        trainer = Trainer.resume(config.output_dir, task=make_task(), monitors=None)
    except EstuneError as error:
        if "give --steps above" in str(error):
            return
        raise
    trainer.train()


def killed_at(event: int | None, config: Config) -> list[str] | None:
    """Go on with the run in a fork and kill it before its file event of this number.

    Returns:
        None where it was killed, else what its events were.
    """
    process, pipe = _started(event, config, signal.SIGKILL)
    with os.fdopen(pipe, "rb") as said:
        events = said.read().decode()
    _, status = os.waitpid(process, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return None
    assert os.WEXITSTATUS(status) == 0, events
    return events.splitlines()


def power_cut_at(event: int, config: Config, disk: Disk) -> None:
    """Go on with the run, which lies on the disk, in a fork, and cut the power before its file event of this number."""
    process, pipe = _started(event, config, signal.SIGSTOP)
    os.close(pipe)
    _, status = os.waitpid(process, os.WUNTRACED)
    assert os.WIFSTOPPED(status), f"the run has no event {event}"
    image = disk.image()
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)
    disk.restore(image)


def _started(event: int | None, config: Config, end: signal.Signals) -> tuple[int, int]:
    """A fork that goes on with the run, and the pipe in which it says what its events were."""
    inner, outer = os.pipe()
    process = os.fork()
    if process:
        os.close(outer)
        return process, inner
    os.close(inner)
    said, code = list[str](), 1
    try:
        _count_events(str(config.output_dir), said, event, end)
        go_on(config)
        code = 0
    except BaseException:
        said = [traceback.format_exc()]
    finally:
        os.write(outer, "\n".join(said).encode()[-60000:])
        os._exit(code)


def _count_events(folder: str, seen: list[str], last: int | None, end: signal.Signals) -> None:
    def note(what: str, target: Any, directory: int = -1) -> None:
        path = os.readlink(f"/proc/self/fd/{target}") if isinstance(target, int) else os.fsdecode(target)
        if directory >= 0:
            path = os.path.join(os.readlink(f"/proc/self/fd/{directory}"), path)
        if (what == "os.remove" and not os.path.lexists(path)) or (what == "os.mkdir" and os.path.lexists(path)):
            return  # nothing happens
        if path.startswith(folder):
            if len(seen) == last:
                os.kill(os.getpid(), end)
            seen.append(f"{what} {path[len(folder) + 1 :]}")

    def hook(name: str, arguments: tuple[Any, ...]) -> None:
        if name not in EVENTS or (name == "open" and not arguments[2] & (os.O_WRONLY | os.O_RDWR)):
            return
        if isinstance(arguments[0], int | str | bytes | os.PathLike):
            note(name, arguments[0], arguments[1] if name in ("os.remove", "os.rmdir") else -1)

    def fsync(target: int, call: Callable[[int], None] = os.fsync) -> None:
        note("fsync", target)
        call(target)

    os.fsync = fsync
    sys.addaudithook(hook)


def broken_promises(run: Path) -> list[str]:
    """What the journal says that there is, of a run that nobody has gone on with, and what cannot be used of it."""
    if not (run / FILE).is_file():
        return []
    journal, found = Journal.read(run), []
    names = [f"evaluation-{e.step:05d}" for e in journal.evaluations]
    names += [f"step-{r.step + 1:05d}" for r in journal.steps]
    tables = [run / "completions" / f"{name}.parquet" for name in names]
    models = [run / name for name in ("best",) * bool(journal.evaluations) + ("final",) * (journal.ended is not None)]
    for path, use in [(t, pq.read_table) for t in tables] + [(m, _load) for m in models]:
        try:
            use(path)
        except Exception as error:
            found.append(f"{path.relative_to(run)}: {error}"[:200])
    return found


def _load(folder: Path) -> None:
    AutoModelForCausalLM.from_pretrained(folder)
    AutoTokenizer.from_pretrained(folder)


def contents(run: Path) -> dict[str, bytes]:
    """All files of a run that must be the same however often it was killed."""
    own = {FILE, "metrics.jsonl", "config.yaml"}  # times, and the folder's name
    return {
        str(path.relative_to(run)): path.read_bytes() if path.name not in own else b""
        for path in sorted(run.rglob("*"))
        if path.is_file()
    }


def differences(run: Path, whole: Path) -> list[str]:
    """What is not as in a run that was left alone."""
    ours, theirs = contents(run), contents(whole)
    found = [name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name)]
    a, b = Journal.read(run), Journal.read(whole)
    if [substance(r) for r in a.steps] != [substance(r) for r in b.steps]:
        found.append("steps")
    if (a.evaluations, a.ended, a.settings.keys()) != (b.evaluations, b.ended, b.settings.keys()):
        found.append("evaluations or end")
    lines = [(each / "metrics.jsonl").read_bytes().count(b"\n") for each in (run, whole)]
    if lines[0] != lines[1]:
        found.append("metrics.jsonl")
    return sorted(found)
