"""The workers of a run: who starts them, keeps their weights up to date, gives them jobs and replaces those lost.

Where they come from, the crew does not know: from Ray (`ray/`), or they are servers elsewhere (`remote/`). Each worker
has a thread here (`Crew._serve`). The trainer's thread queues jobs, or asks each worker to do one, and waits.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

from estune.config import Config
from estune.errors import EstuneError, first_line
from estune.es.strategy import Update
from estune.pool.base import Description
from estune.pool.deadlines import Deadlines, Lost
from estune.pool.slots import Handle, Job, Slot, Source, State, compare
from estune.pool.worker import StaleWeights, software

T = TypeVar("T")
log = logging.getLogger(__name__)

PATIENCE = 45.0  # seconds without any worker, nor one that loads its model
MOST_LOSSES = 5  # workers that one job may cost, and, for each worker, in a row without anything finished
MOST_ERRORS = 2  # of a worker that cannot be started, until its place stays empty
LONGEST_PAUSE = 10.0  # seconds before a worker that was lost again is replaced again


@dataclass(frozen=True, slots=True)
class Weights:
    """What every worker's weights must be: the base and these updates."""

    history: list[Update]
    fingerprint: str = ""  # after them


class Crew:
    """The workers of a run, now or as soon as there is room for them.

    Args:
        config: the run's settings.
        count: how many.
        source: where they come from.
    """

    def __init__(self, config: Config, count: int, source: Source) -> None:
        self._config = config
        self._source = source
        self.weights = Weights([])
        self.checkpoint: tuple[int, Path] | None = None  # where those who come can begin
        self.reference: tuple[dict[str, str], Description] | None = None  # software and model of the first
        self.slots = [Slot(number) for number in range(count)]
        self._changed = threading.Condition(threading.RLock())
        self._closed = threading.Event()
        self._jobs: deque[Job] = deque()
        self._losses = 0  # since any worker finished something
        self._cause = ""  # of the last loss
        self._deadlines = Deadlines(config.worker_timeout)
        self._threads = [threading.Thread(target=self._serve, args=(slot,), daemon=True) for slot in self.slots]
        for thread in self._threads:
            thread.start()

    # For the trainer's thread.

    def run(self, kind: str, arguments: Sequence[tuple[Any, ...]], *, at_once: bool = False) -> Jobs:
        """Let any free worker do a job for each of these arguments; `at_once` puts them before other jobs."""
        finished: deque[Job] = deque()
        jobs = [Job(kind, each, finished, index) for index, each in enumerate(arguments)]
        with self._changed:
            if at_once:
                self._jobs.extendleft(reversed(jobs))
            else:
                self._jobs.extend(jobs)
            self._changed.notify_all()
        return Jobs(self, jobs, finished)

    def drop(self, jobs: Sequence[Job]) -> bool:
        """Take back the jobs that nobody has begun; return whether the others have ended."""
        with self._changed:
            for job in jobs:
                if job in self._jobs:
                    self._jobs.remove(job)
                    job.done = True
            return all(job.done or job.error is not None for job in jobs)

    @property
    def at_work(self) -> bool:
        """Whether jobs for any free worker are waiting or under way."""
        with self._changed:
            return bool(self._jobs) or any(slot.busy for slot in self.slots)

    def ask(self, slots: Sequence[Slot], kind: str, arguments: tuple[Any, ...]) -> dict[Slot, Any]:
        """Let each of these workers that is ready do a job; return the results of those that did it.

        Raises:
            Exception: what a worker raised, if none did it.
        """
        finished: deque[Job] = deque()
        with self._changed:
            jobs = {s: Job(kind, arguments, finished, alone=True) for s in slots if s.state == "ready"}
            for slot, job in jobs.items():
                slot.own.append(job)
            self._changed.notify_all()
        self.wait(lambda: len(finished) == len(jobs) or None)
        results = {slot: job.result for slot, job in jobs.items() if job.done}
        errors = [error for job in jobs.values() for error in job.errors]
        if errors and not results:
            raise errors[0]
        return results

    def commit(self, weights: Weights, handles: Sequence[Handle]) -> None:
        """Make these the weights that all workers must have; those of `handles` have them already."""
        with self._changed:
            self.weights = weights
            for handle in handles:
                handle.done = len(weights.history)
            self._changed.notify_all()

    def wait(self, found: Callable[[], T | None]) -> T:
        """Wait until `found` returns something other than None, as long as there are workers or may be.

        Raises:
            EstuneError: no worker is left, and none can be had.
        """
        with self._changed:
            while (result := found()) is None:
                self._check_hope()
                self._changed.wait(0.5)  # not for ever: handlers of signals run in between
            return result

    def ready(self) -> list[Slot]:
        """Those that can be given jobs now."""
        return [slot for slot in self.slots if slot.state == "ready"]

    def close(self) -> None:
        """End all workers."""
        with self._changed:
            self._closed.set()
            self._changed.notify_all()
            handles = [slot.handle for slot in self.slots if slot.handle is not None]
        for handle in handles:
            handle.end()
        deadline = time.monotonic() + 20
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))

    def _check_hope(self) -> None:
        """Check that a worker may still come.

        Raises:
            EstuneError: none will; the message says why.
        """
        self._source.check()
        left = [slot for slot in self.slots if slot.state != "refused"]
        if not left:
            raise self.slots[0].errors[0]
        if self._losses > MOST_LOSSES * len(left):
            raise EstuneError(
                f"{self._losses} workers in a row were lost with nothing finished, the last one: {self._cause}; "
                "no step is lost: mend that and resume"
            )
        idle = time.monotonic() - max(slot.since for slot in left)
        if all(slot.state == "waiting" for slot in left) and idle > max(PATIENCE, self._config.worker_timeout or 0):
            raise EstuneError(self._source.missing(idle, self._cause))

    # A worker's life, in a thread of its own.

    def _serve(self, slot: Slot) -> None:
        while not self._closed.is_set() and slot.state != "refused":
            job: Job | None = None
            try:
                if slot.handle is None:
                    self._start(slot)
                self._catch_up(slot)
                job = self._next(slot)
                if job is not None:
                    self._do(slot, job)
            except Lost as error:
                self._lose(slot, str(error), job)
            except Exception as error:
                self._fail(slot, error, job)
        if slot.handle is not None:
            slot.handle.end()

    def _start(self, slot: Slot) -> None:
        """Start a worker, let it load the model, and check that it holds what the others hold."""
        handle = slot.handle = self._source.hire(slot.number, self._deadlines)
        while (place := handle.look(1.0)) is None:
            if self._closed.is_set():
                raise Lost("the run has ended")
        self._enter(slot, "loading")
        ours = software()
        compare(handle, place.software, {key: ours[key] for key in ("estune", "noise", "journal")})
        description, done = handle.open()
        with self._changed:
            if self.reference is None:
                self.reference = place.software, description
                self.weights = Weights([], description.fingerprint)
            versions, model = self.reference
        compare(handle, place.software, versions)
        compare(handle, _fields(description), _fields(model))
        handle.done = done

    def _catch_up(self, slot: Slot) -> None:
        """Let a worker make the updates that it has not made."""
        handle = slot.handle
        weights = self.weights
        checkpoint = self.checkpoint
        assert handle is not None
        history = weights.history
        if handle.done == len(history):
            return
        found = ""
        if handle.done:
            for done in range(handle.done, len(history)):
                found = handle.call("apply", done, history[done])
        for start in (checkpoint, None):
            if found != weights.fingerprint:
                found = handle.call("rebuild", history, start, units=len(history))
        compare(handle, {"fingerprint": found}, {"fingerprint": weights.fingerprint})
        handle.done = len(history)

    def _next(self, slot: Slot) -> Job | None:
        """A job for a worker that is up to date; None if it no longer is, or the run has ended."""
        assert slot.handle is not None
        self._enter(slot, "ready")
        with self._changed:
            while not self._closed.is_set() and slot.handle.done == len(self.weights.history):
                jobs = slot.own or self._jobs
                if jobs:
                    slot.busy = jobs is self._jobs
                    return jobs.popleft()
                self._changed.wait()
        return None

    def _do(self, slot: Slot, job: Job) -> None:
        assert slot.handle is not None
        job.handle = slot.handle
        try:
            units = len(job.arguments[0]) if job.kind == "rebuild" else 1
            arguments = job.arguments if job.alone else (slot.handle.done, *job.arguments)
            job.result = slot.handle.call(job.kind, *arguments, units=units)
        except StaleWeights:
            log.warning("%s has other weights than the run, and makes them anew", slot)
            slot.handle.done = None
            slot.busy = False
            self._give_back(job)
            return
        with self._changed:
            slot.busy = False
            self._losses = slot.losses = 0
            slot.errors.clear()
            job.done = True
            self._finish(job)

    def _lose(self, slot: Slot, cause: str, job: Job | None) -> None:
        """Give a lost worker's job to others, and make room for another worker."""
        if self._closed.is_set():
            return
        what = f" in {job.kind}" if job else ""
        log.warning("%s was lost%s: %s; it is replaced, and others do its work", slot, what, cause)
        self._empty(slot, "waiting")
        with self._changed:
            slot.busy = False
            self._losses += 1
            self._cause = cause
        if job is not None:
            job.losses += 1
            if job.losses >= MOST_LOSSES:
                job.error = EstuneError(
                    f"{job.kind} cost {job.losses} workers, the last one: {cause}; no step is lost: mend it and resume"
                )
            self._give_back(job)
        self._closed.wait(min(LONGEST_PAUSE, slot.losses - 1))
        slot.losses += 1

    def _fail(self, slot: Slot, error: Exception, job: Job | None) -> None:
        """Note that a worker raised an error. It is the run's error if no other worker does better."""
        if job is not None:
            job.errors.append(error)
            if len(job.errors) >= min(3, sum(s.state != "refused" for s in self.slots)):
                job.error = error
            self._lose(slot, first_line(error), job)
            return
        slot.errors.append(error)
        if len(slot.errors) < MOST_ERRORS:
            self._empty(slot, "waiting")
            return
        log.warning("%s is of no use, and its place stays empty: %s", slot, first_line(error))
        self._empty(slot, "refused")

    def _empty(self, slot: Slot, state: State) -> None:
        if slot.handle is not None:
            slot.handle.end()
        with self._changed:
            slot.handle = None
            self._enter(slot, state)
            while slot.own:
                self._finish(slot.own.popleft())

    def _give_back(self, job: Job) -> None:
        with self._changed:
            if job.alone or job.error is not None:
                self._finish(job)
            else:
                self._jobs.appendleft(job)
                self._changed.notify_all()

    def _finish(self, job: Job) -> None:
        with self._changed:
            job.finished.append(job)
            self._changed.notify_all()

    def _enter(self, slot: Slot, state: State) -> None:
        with self._changed:
            if slot.state != state:
                slot.state = state
                slot.since = time.monotonic()
            self._changed.notify_all()


class Jobs:
    """Jobs for any free worker, in the order in which they are done.

    Args:
        crew: the workers.
        jobs: all jobs.
        finished: jobs that are done and were not taken yet.
    """

    def __init__(self, crew: Crew, jobs: Sequence[Job], finished: deque[Job]) -> None:
        self._crew = crew
        self._jobs = jobs
        self._finished = finished
        self._left = len(jobs)

    def __iter__(self) -> Jobs:
        return self

    def __next__(self) -> Job:
        """The next job that is done.

        Raises:
            Exception: what workers raised in a job that several have tried.
        """
        if not self._left:
            raise StopIteration
        self._left -= 1
        try:
            job = self._crew.wait(lambda: self._finished.popleft() if self._finished else None)
            if job.error is not None:
                raise job.error
        except BaseException:
            self._crew.drop(self._jobs)
            raise
        return job

    def close(self) -> None:
        """Drop jobs that nobody has begun, and wait for the others."""
        self._crew.wait(lambda: self._crew.drop(self._jobs) or None)


def _fields(description: Description) -> dict[str, Any]:
    return {f.name: getattr(description, f.name) for f in fields(description)}
