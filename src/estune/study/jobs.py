"""Child processes of a study, started, watched and ended; and a folder locked for one study.

    python -m estune.study.jobs MODULE ARGUMENT...

runs a module as `python -m MODULE ARGUMENT...` does, in a process that ends with the one that started it. Studies give
Python `-P` as well: a file in the working directory, which may be a stranger's run, must not be taken for a library.
"""

from __future__ import annotations

import json
import os
import re
import runpy
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, closing, contextmanager
from pathlib import Path
from typing import Any, TypeVar

from estune.children import end_with_parent
from estune.errors import EstuneError
from estune.files import locked, make_folder, read_claim, write_text
from estune.pool.waiting import told_while

T = TypeVar("T")
R = TypeVar("R")

LOCK = ".lock"
LONGEST = 300  # characters of an error
GRACE = 10.0  # seconds that a child has to end in once it was asked to
ERROR = "error: "
TRACEBACK = "Traceback (most recent call last):"
# Unicode's box drawing, or what rich draws where there is no Unicode.
_FRAME = re.compile(r"\s*([\u2500-\u257f]|\+-.*-\+$|\|.*\|$)")


class Jobs:
    """Modules run in processes of their own, none of which outlives this one or an interruption."""

    def __init__(self) -> None:
        self._running: set[subprocess.Popen[bytes]] = set()
        self._ended = False

    def run(self, module: str, *arguments: str, log: Path, **environment: str) -> str | None:
        """Run a module to its end, which may be days away: there is no deadline, but `end` ends even a stopped one.

        Args:
            module, arguments: as for `python -m`.
            log: what it prints is added to this file.
            environment: variables that differ from this process's.

        Returns:
            Why it failed, in a line; None if it did not.
        """
        command = [sys.executable, "-P", "-m", "estune.study.jobs", module, *arguments]
        # Unbuffered: in the order in which it was said, so that an error stands behind what came before it.
        variables = {**os.environ, "PYTHONUNBUFFERED": "1", **environment}
        with log.open("ab") as output:
            start = output.tell()
            process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=output, stderr=subprocess.STDOUT, env=variables
            )
        assert process.stdin is not None
        self._running.add(process)
        try:
            if self._ended:  # between two runs
                process.terminate()
            code = process.wait()
        except BaseException:
            self.end()
            raise
        finally:
            self._running.discard(process)
            process.stdin.close()
        if code == 0:
            return None
        said = log.read_bytes()[start:].decode(errors="replace")
        return (complaint(said) if code > 0 else None) or _how(code)

    def each(self, work: Callable[[T], R], items: Sequence[T], at_once: int) -> list[R]:
        """Do work, which may `run` modules, for each item, `at_once` at a time; return the results in order."""
        ended = list[None]()

        def counted(item: T) -> R:
            result = work(item)
            ended.append(None)
            return result

        with told_while_running(ended, len(items)), ThreadPoolExecutor(at_once) as threads:
            try:
                return list(threads.map(counted, items))
            except BaseException:
                threads.shutdown(wait=False, cancel_futures=True)
                self.end()
                raise

    def end(self) -> None:
        """Ask the modules that run to end, and kill those that do not. Modules started from now on end at once."""
        self._ended = True
        running = list(self._running)
        for process in running:
            process.terminate()
        for process in running:
            try:
                process.wait(GRACE)
            except subprocess.TimeoutExpired:
                process.kill()


def told_while_running(ended: Sized, count: int) -> AbstractContextManager[None]:
    """Tell, as long as this lasts, how many of so many runs have ended."""
    return told_while("training", so_far=lambda: f": {len(ended)} of {count} runs", share=lambda: len(ended) / count)


def complaint(text: str) -> str | None:
    """The line of a log that says what went wrong; None if there is none.

    It is the last line that begins with `error: `, else the error of the last traceback, else the last line with words.
    Lines in a box, such as a completion's, do not count.
    """
    lines = [line.rstrip() for line in text.splitlines() if not _FRAME.match(line)]
    found = next((line.removeprefix(ERROR) for line in reversed(lines) if line.startswith(ERROR)), None)
    if found is None and TRACEBACK in lines:
        last = len(lines) - 1 - lines[::-1].index(TRACEBACK)
        found = next((line for line in lines[last + 1 :] if line and not line.startswith(" ")), None)
    if found is None:
        found = next((line.strip() for line in reversed(lines) if line), None)
    return None if found is None else found[:LONGEST]


def _how(code: int) -> str:
    return f"exit code {code}" + (" (often a lack of memory)" if code == -9 else "")


@contextmanager
def claimed(
    folder: Path,
    file: str,
    what: str,
    mine: Mapping[str, Any],
    sections: Sequence[str],
    check: Callable[[dict[str, Any]], None],
) -> Iterator[None]:
    """Lock a folder for this process, and keep a record in it of what is done there.

    Args:
        folder: the folder, made if it is not there.
        file: name of the record's file.
        what: what is done, in a word.
        mine: the record, for JSON.
        sections: keys, with an object each, that every earlier record must have too.
        check: called with the earlier record, if there is one; raises `EstuneError` if it does not go with `mine`.

    Raises:
        EstuneError: another process has the folder, or it holds something else.
    """
    path = folder / file
    if not path.is_file() and folder.exists() and any(found.name != LOCK for found in folder.iterdir()):
        raise EstuneError(f"output_dir {folder} is not empty and holds no {what}; give another --output-dir")
    with _alone(folder, what):
        if path.is_file():
            check(read_claim(path, *sections))
        write_text(path, json.dumps(mine, indent=2))
        yield


@contextmanager
def _alone(folder: Path, what: str) -> Iterator[None]:
    make_folder(folder)
    try:
        file = locked(folder / LOCK, "ab")
    except EstuneError as error:
        raise EstuneError(
            f"{folder} is in use by another {what}; wait for it or stop it, or give another --output-dir"
        ) from error
    with closing(file):
        yield


def main() -> None:
    """Run the module named on the command line, in a process that ends with its parent."""
    end_with_parent(with_thread=True)
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
