"""The run's record: a header, then a line for each evaluation and step, enough to rebuild every step's weights.

JSON lines, format 2. Each line ends in `"check"`, a BLAKE2b hash of the line so far and of the previous line's check,
so that a changed, lost or moved line shows. A line is on disk before the next step starts; a last line without its
newline was cut off by a crash and is dropped. A run that ends says so in a last line: where it is lacking, lines are.
`docs/journal.md` describes every field.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shlex
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from estune.charts.words import amount
from estune.errors import EstuneError
from estune.files import locked, replacing, sync
from estune.journal import compact
from estune.journal.lines import sealed, take_kind, verified
from estune.journal.records import (
    SEARCH,
    EvaluationRecord,
    Header,
    StepRecord,
    decoded,
    encoded,
    encoded_evaluation,
    rank,
)
from estune.noise.reference import NOISE_VERSION

log = logging.getLogger(__name__)

FORMATS = (1, 2)  # those that can be read and gone on with; a journal stays in the one that its header names
FILE = "journal.jsonl"
TEMPORARY = f".{FILE}.tmp"  # until its header is whole

RESUME = "estune train --resume {run}"
"""What a user does to go on with a run whose task the command line knows, as `going_on` takes it."""


def going_on(how: str, run: Path) -> str:
    """What a user does to go on with a run.

    Args:
        how: the same for any run, with `{run}` where a shell is given its directory, or `{text}` where Python is.
        run: its directory.
    """
    return how.format(run=shlex.quote(str(run)), text=repr(str(run)))


def is_run(place: str | Path) -> bool:
    """Whether a directory holds a run's journal, or a file is one in the compact form."""
    path = Path(place)
    return (path / FILE).is_file() or (path / compact.FILE).is_file() or compact.is_compact(path)


class Journal:
    """An open journal. `steps` and `evaluations` hold what it records so far.

    Steps that an evaluation has taken back are in `steps` as ones that change nothing; their lines are as they were.

    `settings`, `files`, `code` and `prompts_hash` are those of the run by now: the header's, with what has changed
    since.

    `ended` says how the run ended ("finished", "stopped early" or "interrupted"). It is None where the last line is
    another: the run goes on, or was cut off, or the journal was.

    `inherited` holds the steps of its ancestors, the runs that this one started from. They come before its own.
    """

    def __init__(self, path: Path, header: Header, check: str) -> None:
        self.path = path
        self.run = path.parent  # as it was given: a directory, or the file of a journal in the compact form
        self.header = header
        self.lines: list[bytes] = []  # all of them, as they are on disk
        self.before: list[bytes] = []  # the journals of its ancestors, whole, oldest first
        self.inherited: list[StepRecord] = []
        self.steps: list[StepRecord] = []
        self.evaluations: list[EvaluationRecord] = []
        self.settings = _with_rate(header.config)
        self.files = header.files
        self.code = header.code
        self.prompts_hash = header.prompts_hash
        self.ended: str | None = None
        self.check = check  # of the last line, hence of all
        self.go_on = going_on(RESUME, path.parent)  # what its user does to go on with the run
        self._file: Any = None

    @classmethod
    def create(cls, run: Path, header: Header, parent: Journal | None = None) -> Journal:
        """Start the journal of a new run in the directory `run`, with a copy of its parent's and the parent's own.

        It appears with its header whole, or not at all.

        Raises:
            EstuneError: it cannot be written, another process is about to, or there is one.
        """
        if parent is not None:
            header = replace(header, ancestors=[*parent.header.ancestors, parent.check])
            for i, text in enumerate(parent.texts(), 1):
                with replacing(_ancestor(run, i)) as copy:
                    copy.write_bytes(text)
        journal = cls(run / FILE, header, "")
        journal.inherited = [] if parent is None else parent.history
        journal.before = [] if parent is None else parent.texts()
        temporary = run / TEMPORARY
        journal._file = locked(temporary, "ab")  # the lock stays when the file gets its name
        try:
            if journal.path.exists():
                raise EstuneError(f"{run} already holds a run; give another directory")
            journal._file.truncate(0)  # what a killed process has left
            journal.write("header", vars(header))
            os.rename(temporary, journal.path)
            sync(run)
        except BaseException:
            journal.close()
            temporary.unlink(missing_ok=True)
            raise
        return journal

    @classmethod
    def read(cls, run: Path, step: int | None = None) -> Journal:
        """Read a run's journal.

        Args:
            run: its directory, or a file that holds its journal in the compact form.
            step: as it was after so many steps; by default as it is.

        Raises:
            EstuneError: where there is none, its version is another, a line was changed (naming the step), or it has
                fewer steps.
        """
        path = run / FILE
        packed: list[bytes] | None = None
        if not path.is_file():
            path = run if run.is_file() else run / compact.FILE
            if not path.is_file():
                raise EstuneError(
                    f"{run}: no {FILE} here, so this is no run; give the output directory of `estune train`"
                )
            packed = compact.unpack(path.read_bytes(), path)
        journal = cls._parse(path, _whole_lines(path) if packed is None else packed[-1], step)
        journal.run = run
        for number, check in enumerate(journal.header.ancestors, 1):
            ancestor = _ancestor(run, number)
            if packed is not None and number < len(packed):
                text = packed[number - 1]
            elif packed is None and ancestor.is_file():
                text = _whole_lines(ancestor)
            else:
                raise EstuneError(f"{ancestor} is missing, a journal that {path} goes on from; restore it from a copy")
            found = cls._parse(ancestor, text)
            if found.check != check:
                raise EstuneError(f"{ancestor} is not the journal that {path} goes on from; restore it from a copy")
            journal.inherited += found.steps
            journal.before.append(text)
        return journal

    @classmethod
    def _parse(cls, path: Path, text: bytes, step: int | None = None) -> Journal:
        lines = text.split(b"\n")[:-1]
        if not lines:
            raise EstuneError(
                f"{path}: the run ended before its header was written, so nothing is lost: remove {path.parent} and "
                "start it again"
            )
        check, payload = verified(lines[0], "", path, "its header")
        for key, known in (("format", FORMATS), ("noise_version", (NOISE_VERSION,))):
            if payload.get(key) not in known:
                raise EstuneError(
                    f"{path}: {key.replace('_', ' ')} {payload.get(key)!r:.40}, this estune reads "
                    f"{' and '.join(map(str, known))}; "
                    f"use the estune that wrote it ({_writer(payload)})"
                )
        take_kind(path, "its header", payload, None)
        journal = cls(path, Header(**payload), check)
        journal.lines.append(lines[0] + b"\n")
        for number, line in enumerate(lines[1:], 2):
            done = len(journal.steps)
            where = f"line {number}, " + (f"after step {done}" if done else "before step 1")
            check, payload = verified(line, check, path, where)
            kind = take_kind(path, where, payload, len(journal.steps))
            if kind == "step" and done == step:
                break
            journal._take(kind, payload)
            journal.check = check
            journal.lines.append(line + b"\n")
        if step is not None and not 0 <= step <= len(journal.steps):
            missing = journal.shortfall()
            run = path.parent if path.name == FILE else path
            raise EstuneError(
                f"{run} has {amount(len(journal.steps), 'steps')}, not {step}: give --step from 0 to "
                f"{len(journal.steps)}" + (f" ({missing})" if missing else "")
            )
        return journal

    def texts(self) -> list[bytes]:
        """The journals of its ancestors, oldest first, and its own, as they are on disk."""
        return [*self.before, b"".join(self.lines)]

    def sha256(self) -> str:
        """Hash of all that `texts` gives, 64 hexadecimal digits: of the SHA-256 of each, one after another."""
        each = b"".join(hashlib.sha256(text).digest() for text in self.texts())
        return hashlib.sha256(each).hexdigest()

    def _take(self, kind: str, payload: dict[str, Any]) -> None:
        """Take in a line that was read."""
        self.ended = None
        match kind:
            case "step":
                self.steps.append(decoded(payload, self.steps))
            case "evaluation":
                self._take_evaluation(EvaluationRecord(**payload))
            case "settings":
                self.settings |= payload
            case "accepted":
                self.files = payload["files"]
                self.code = payload["code"]
                self.prompts_hash = payload.get("prompts_hash", self.prompts_hash)
            case "end":
                self.ended = payload["ended"]

    def _take_evaluation(self, record: EvaluationRecord) -> None:
        self.evaluations.append(record)
        for i in record.undone:
            self.steps[i] = self.steps[i].undone(self.fingerprint(record.back), record.state)

    @classmethod
    def resume(cls, run: Path) -> Journal:
        """Read a run's journal and go on writing it; a cut last line is removed from the file."""
        path = run / FILE
        if not path.is_file() and (run.is_file() or (run / compact.FILE).is_file()):
            raise EstuneError(
                f"{run} is a journal in the compact form, which does not grow: go on from it in a new run, by "
                f"`estune branch {shlex.quote(str(run))}`"
            )
        lock = locked(path, "r+b") if path.is_file() else None
        try:
            journal = cls.read(run)
        except BaseException:
            if lock is not None:
                lock.close()
            raise
        journal._file = lock
        journal._file.truncate(len(_whole_lines(path)))
        return journal

    def append_step(self, record: StepRecord) -> None:
        """Write a step; when this returns it is on disk."""
        self.write("step", encoded(record))
        self.steps.append(record)

    def append_evaluation(self, record: EvaluationRecord) -> None:
        """Write an evaluation; when this returns it is on disk."""
        self.write("evaluation", encoded_evaluation(record))
        self._take_evaluation(record)

    def append_settings(self, changed: dict[str, Any]) -> None:
        """Write settings that are no longer the header's, such as a new length of the run."""
        self.write("settings", changed)
        self.settings |= changed

    def append_accepted(self, files: dict[str, str], code: dict[str, str], prompts_hash: str | None = None) -> None:
        """Write what the run depends on from here on, where the user insisted on going on with it. Not in format 1."""
        if self.header.format > 1:
            prompts_hash = self.prompts_hash if prompts_hash is None else prompts_hash
            self.write("accepted", {"files": files, "code": code, "prompts_hash": prompts_hash})
            self.files = files
            self.code = code
            self.prompts_hash = prompts_hash

    def append_end(self, ended: str) -> None:
        """Write how the run ended, as its last line until it goes on. Format 1 has no such line."""
        if self.header.format > 1:
            self.write("end", {"step": len(self.steps), "ended": ended})
            self.ended = ended

    def base_model(self) -> str:
        """The base model as the run named it; where it and the run were moved together, where it lies now."""
        return self._moved(self.header.model)

    def folders(self) -> list[Path]:
        """Where paths in the run's settings may be relative to, likeliest first.

        These are the directory that it was begun in, the one that lies as that did from the run's, if both were moved,
        and this process's own.
        """
        folder = self.header.folder
        found = [Path(folder), Path(self._moved(folder))] if folder else []
        return [path for path in (*found, Path.cwd()) if path.is_dir()]

    def _moved(self, path: str) -> str:
        if not os.path.isabs(path) or os.path.exists(path) or not self.header.place:
            return path
        now = os.path.join(os.path.abspath(self.path.parent), os.path.relpath(path, self.header.place))
        return os.path.normpath(now) if os.path.exists(now) else path

    @property
    def best(self) -> EvaluationRecord | None:
        """The best evaluation so far, by the header's `best_by`; of equals the earliest."""
        return max(self.evaluations, key=lambda e: rank(e.metrics, self.header.best_by), default=None)

    @property
    def undone(self) -> set[int]:
        """Indices of its own steps that an evaluation has taken back."""
        return {i for evaluation in self.evaluations for i in evaluation.undone}

    @property
    def state(self) -> dict[str, float]:
        """Of the strategy after the last step, as far as seeds do not tell it."""
        return self.steps[-1].state if self.steps else {}

    @property
    def history(self) -> list[StepRecord]:
        """All steps from the base model on, its ancestors' and its own."""
        return [*self.inherited, *self.steps]

    def chronicle(self) -> list[StepRecord | EvaluationRecord]:
        """Steps and evaluations in the order in which they happened."""
        entries = [((r.step + 1, 0), r) for r in self.steps] + [((e.step, 1), e) for e in self.evaluations]
        return [entry for _, entry in sorted(entries, key=lambda pair: pair[0])]

    def shortfall(self) -> str | None:
        """What is missing of the run that it set out to be, or None: it ended as it was to, or stopped early.

        The checksums tell that no line was changed. That the last ones were taken away, only this tells.
        """
        done = len(self.steps)
        final = self.path.name != FILE or (self.run / "final").is_dir()  # the compact form has none beside it
        of = f"{done} of {amount(self.settings.get('steps', done), 'steps')}"
        over = self.ended is not None or (self.header.format == 1 and done >= self.settings.get("steps", done))
        if self.ended == "interrupted":
            return f"interrupted after {of}"
        if over:
            return None if final or self.header.task == SEARCH else f"ended after {of}, but final/ is missing"
        if not final:
            return f"the journal ends after {of}: the run goes on, or it or its journal was cut off"
        why = "whether the run ended there, its format does not say" if self.header.format == 1 else "lines are missing"
        return f"the journal ends after {of}, though final/ is there: {why}"

    def warn_of_shortfall(self) -> None:
        """Log a warning where something is missing."""
        if missing := self.shortfall():
            log.warning("%s: %s", self.run, missing)

    def fingerprint(self, step: int | None = None) -> str:
        """Fingerprint of the weights after so many steps, all by default."""
        step = len(self.steps) if step is None else step
        return self.steps[step - 1].fingerprint if step else self.header.fingerprint

    def close(self) -> None:
        """Close the file and let other processes have it."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def write(self, kind: str, payload: dict[str, Any]) -> None:
        """Append a line and have it on disk; where that fails, the file is as it was before.

        Raises:
            EstuneError: the system's error, and how to go on.
        """
        check, line = sealed({"kind": kind, **payload}, self.check)
        whole_line = line
        end = self._file.seek(0, os.SEEK_END)
        try:
            while line:
                line = line[self._file.write(line) :]
            os.fsync(self._file.fileno())
        except OSError as error:
            self._file.truncate(end)
            self.close()
            whole = f"; the run is whole up to step {len(self.steps)}" if self.check else ""
            then = f"go on with `{self.go_on}`" if self.check else "start it again"
            raise EstuneError(f"{self.path}: {error.strerror} while writing{whole}: make room, then {then}") from error
        self.check = check
        self.lines.append(whole_line)
        self.ended = None


def _with_rate(settings: Mapping[str, Any]) -> dict[str, Any]:
    """A header's settings; where older ones give no learning rate, it was half of sigma for any population."""
    given = settings.get("learning_rate", 0)
    return dict(settings) if given is not None else {**settings, "learning_rate": "0.5sigma"}


def _ancestor(run: Path, number: int) -> Path:
    return run / f"ancestor-{number}.jsonl"


def _whole_lines(path: Path) -> bytes:
    """A journal's bytes but for a last line that a crash cut off."""
    content = path.read_bytes()
    return content[: content.rfind(b"\n") + 1]


def _writer(payload: dict[str, Any]) -> str:
    """The version that wrote a header, if it tells."""
    packages = payload.get("packages")
    return str(packages.get("estune", "unknown")) if isinstance(packages, dict) else "unknown"
