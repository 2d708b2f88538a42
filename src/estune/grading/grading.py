"""Grading for a whole run: reward functions of every kind, applied to batch after batch.

- A plain function is called at once, in the caller's thread, in the order of submission: it need not be thread-safe.
- `async` functions of all batches in flight share one event loop in a thread of its own, as in TRL.
- Functions marked `isolated` go to a pool of processes, a completion at a time.
- Population-level functions wait for all members of a step.

Functions of the second and the third kind run while the caller does something else.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Future
from types import TracebackType
from typing import Any, Literal

from estune.children import cores
from estune.completion import Completion
from estune.errors import ACCEPT, EstuneError
from estune.grading.containment import contained
from estune.grading.convention import (
    Batch,
    Grades,
    Log,
    Population,
    RewardFunction,
    Row,
    TrainerState,
    arguments,
    as_scores,
    describe,
    is_async,
    reward_name,
)
from estune.grading.isolation import Isolation, isolation_of, refuse_grader
from estune.grading.level import level_of, refuse_level
from estune.grading.marks import Marks
from estune.grading.pending import Pending
from estune.grading.pool import GraderPool
from estune.grading.process import Call
from estune.grading.rollout import FromRollout
from estune.grading.verdict import Verdict

log = logging.getLogger(__name__)

OnError = Literal["raise", "exclude"]


MOST_PROCESSES = 8
MOST_NOTES = 20
"""How many lines of what a reward function prints are shown in a whole run."""


class Grading:
    """Applies reward functions to completions. A context manager; `close` ends what it started.

    Args:
        functions: reward functions under TRL's calling convention.
        weights: one for each, 1.0 if None.
        processes: graders for isolated functions; one per core, at most 8, if None. They start when first needed.
        deadline: seconds for one completion, for isolated functions that do not say so themselves.
        errors: what to do if a function raises: end the run, or leave the completion out of the mean.
        max_errors: calls that may fail in this way before the run ends after all. An isolated function is called for
            each completion, any other for each batch.
        state: what functions are told of the run. The caller keeps it up to date.

    Raises:
        EstuneError: weights do not match, an isolated function cannot be imported by other processes or is to see more
            than a completion, or a function's `prepare()` raises it.
    """

    def __init__(
        self,
        functions: Sequence[RewardFunction],
        weights: Sequence[float] | None = None,
        *,
        processes: int | None = None,
        deadline: float = 5.0,
        errors: OnError = "raise",
        max_errors: int = 100,
        state: TrainerState | None = None,
    ) -> None:
        refuse_grader()
        self.functions = list(functions)
        self.weights = list(weights or [1.0] * len(functions))
        if len(self.weights) != len(self.functions):
            raise EstuneError(f"{len(self.functions)} reward functions but {len(self.weights)} weights; give one each")
        self.state = state or TrainerState()
        self.errors = errors
        self.max_errors = max_errors
        self._excluded = 0
        self._told_nothing = False
        self._deadline = deadline
        self._notes: dict[str, int] = {}
        self._isolations = [isolation_of(function) for function in self.functions]
        self._levels = [level_of(function) for function in self.functions]
        isolated = [function for function, limits in zip(self.functions, self._isolations, strict=True) if limits]
        refuse_level(isolated, "isolated", "a grader is given one completion at a time", "corpus", "population")
        self._loop: asyncio.AbstractEventLoop | None = None
        self.pool: GraderPool | None = None
        memory = [isolation.memory for isolation in self._isolations if isolation]
        if memory:
            picked = {number: f for number, f in enumerate(self.functions) if self._isolations[number]}
            self.pool = GraderPool(picked, processes or min(cores(), MOST_PROCESSES), max(memory))
        for function, isolation in zip(self.functions, self._isolations, strict=True):
            if isolation is None:
                getattr(function, "prepare", lambda: None)()

    def grade(self, rows: Sequence[Row], completions: Sequence[Completion]) -> Grades:
        """Grades of the completions of `rows`.

        Raises:
            EstuneError: a function raised, or returned anything but a value for each completion.
        """
        return self.submit(rows, completions).result()

    def submit(self, rows: Sequence[Row], completions: Sequence[Completion]) -> Pending:
        """Begin to grade. Plain functions are done when this returns; population-level ones are called by `results`.

        Raises:
            EstuneError: a plain function failed.
        """
        batch = Batch(rows, completions, self.state)
        collect: dict[int, Callable[[], Marks]] = {}
        # Functions that run elsewhere come first, so that they run while plain functions do.
        for number, limits in enumerate(self._isolations):
            if limits:
                collect[number] = self._isolated(number, limits, batch)
            elif isinstance(self.functions[number], FromRollout):
                collect[number] = self._from_rollout(number, batch)
            elif self._levels[number] == "population":
                collect[number] = lambda: Marks(Log(len(batch)), values=[None] * len(batch))
            elif is_async(self.functions[number]):
                collect[number] = self._async(number, batch)
        for number in range(len(self.functions)):
            if number not in collect:
                marks = self._plain(number, batch)
                collect[number] = lambda marks=marks: marks  # type: ignore[misc]
        return Pending(self, batch, [collect[number] for number in range(len(self.functions))])

    def results(self, members: Sequence[Pending]) -> list[Grades]:
        """Grades of all members of a step, which population-level functions see together.

        Args:
            members: what `submit` returned for each, for the same rows.

        Raises:
            EstuneError: as `Pending.result`. A population-level function that fails as a whole ends the run in any
            case,
                since no member would have a reward.
        """
        marked = [pending.marks() for pending in members]
        for number, level in enumerate(self._levels):
            if level == "population":
                together = self._population(number, [pending.batch for pending in members])
                for marks, own in zip(marked, together, strict=True):
                    marks[number] = own
        return [pending.grades(marks) for pending, marks in zip(members, marked, strict=True)]

    def close(self) -> None:
        """End the graders and the event loop."""
        if self.pool is not None:
            self.pool.close()
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._loop = None

    def __enter__(self) -> Grading:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def exclude(self, function: RewardFunction, batch: Batch, row: int | None, why: str) -> None:
        """Note that a call of a function failed, on a row or, if that is None, on a batch as a whole.

        Raises:
            EstuneError: this ends the run.
        """
        where = "" if row is None else f" on row {row}, {batch.show(row)}"
        if self.errors == "raise":
            raise EstuneError(
                f"reward {reward_name(function)} {why}{where}; nothing is lost: mend it, then resume with {ACCEPT}"
            )
        self._excluded += 1
        if self._excluded > self.max_errors:
            raise EstuneError(
                f"{self._excluded} calls of rewards failed, more than max_reward_errors, {self.max_errors}; "
                f"the last: reward {reward_name(function)} {why}{where}; mend it, then resume with {ACCEPT}"
            )
        log.warning("reward %s %s%s: left out", reward_name(function), why, where)

    def note_nothing(self, total: Sequence[float | None], left_out: Collection[int], batch: Batch) -> None:
        """Warn once in a run if no function applies to any completion of a batch, which is hardly ever meant."""
        if not self._told_nothing and not left_out and all(value is None for value in total):
            self._told_nothing = True
            log.warning(
                "no reward applies to any of %d completions, such as %s: all gave None or NaN; they do not count",
                *(len(total), batch.show(0)),
            )

    def _population(self, number: int, members: Sequence[Batch]) -> list[Marks]:
        """The marks of a population-level function for the completions of each member."""
        function = self.functions[number]
        seen = Population(members)
        found = self._async(number, seen)() if is_async(function) else self._plain(number, seen)
        if None in found.errors:
            raise EstuneError(
                f"reward {reward_name(function)} {found.errors[None]}; it grades all members together, so none has a "
                f"reward: mend it, then resume with {ACCEPT}"
            )
        return [found.of_member(i, len(batch)) for i, batch in enumerate(members)]

    def _plain(self, number: int, batch: Batch | Population) -> Marks:
        function = self.functions[number]
        marks = Marks(Log(len(batch)))
        failure: str | None = None
        with contained() as around:
            try:
                returned = function(**arguments(batch.columns, self.state, marks.log))
                marks.take(as_scores(returned, len(batch), self._levels[number]), self._levels[number])
            except BaseException as error:
                if around.stopped and not isinstance(error, Exception):
                    raise  # Ctrl-C or SIGTERM came while it ran
                failure = describe(error)
        self.note(function, around.notes)
        if failure is not None:
            marks.fail(self._culprit(number, batch), failure, len(batch))
        return marks

    def note(self, function: RewardFunction, notes: Sequence[str]) -> None:
        """Log what a function printed, and what it did that was undone, up to the first lines."""
        name = reward_name(function)
        for note in notes:
            self._notes[name] = self._notes.get(name, 0) + 1
            if self._notes[name] <= MOST_NOTES:
                log.warning("reward %s: %s", name, note)
            elif self._notes[name] == MOST_NOTES + 1:
                log.warning("reward %s prints more than %d lines: the rest is not shown", name, MOST_NOTES)

    def _culprit(self, number: int, batch: Batch | Population) -> int | None:
        """The first row on which a function fails if called with it alone, to be named when the run ends."""
        function = self.functions[number]
        if self.errors == "exclude" or self._levels[number] == "corpus" or isinstance(batch, Population):
            return None  # who compares the completions of a batch must not be called with less
        for row in range(len(batch)):
            with contained() as around:
                try:
                    as_scores(function(**arguments(batch.row(row), self.state, Log(1))), 1)
                except BaseException as error:
                    if around.stopped and not isinstance(error, Exception):
                        raise
                    return row
        return None

    def _async(self, number: int, batch: Batch | Population) -> Callable[[], Marks]:
        function = self.functions[number]
        marks = Marks(Log(len(batch)))

        async def run() -> list[float | Exception | None]:
            process = os.getpid()
            try:
                returned = await function(**arguments(batch.columns, self.state, marks.log))
                return as_scores(returned, len(batch), self._levels[number])
            except (Exception, asyncio.CancelledError):
                raise
            except BaseException as error:
                raise EstuneError(describe(error)) from None  # as it is, it would end the loop, and the run
            finally:
                if os.getpid() != process:
                    os._exit(0)  # a child that it forked

        if self._loop is None:
            self._loop = asyncio.new_event_loop()
            threading.Thread(target=_run_loop, args=(self._loop,), name="estune-rewards", daemon=True).start()
        future = asyncio.run_coroutine_threadsafe(run(), self._loop)

        def collect() -> Marks:
            try:
                marks.take(future.result(), self._levels[number])
            except Exception as error:
                marks.fail(None, describe(error), len(batch))
            return marks

        return collect

    def _from_rollout(self, number: int, batch: Batch) -> Callable[[], Marks]:
        function = self.functions[number]
        assert isinstance(function, FromRollout)

        def collect() -> Marks:
            marks = Marks(Log(len(batch)))
            for row, played in enumerate(batch.played):
                marks.add(row, function.verdict(played), Isolation(), len(batch))
            return marks

        return collect

    def _isolated(self, number: int, isolation: Isolation, batch: Batch) -> Callable[[], Marks]:
        assert self.pool is not None
        deadline = isolation.deadline or self._deadline
        # A function of one task of a mix says so of other tasks' rows before they are sent anywhere.
        applies: Callable[[Mapping[str, Sequence[Any]]], bool] | None = getattr(self.functions[number], "applies", None)
        verdicts: list[Future[Verdict] | Verdict] = []
        for row, length in enumerate(batch.lengths):
            columns = batch.row(row)
            if applies is not None and not applies(columns):
                verdicts.append(Verdict("score", None))
            elif length > isolation.max_length:
                verdicts.append(Verdict("too_long"))
            else:
                verdicts.append(self.pool.submit(Call(number, columns, self.state), deadline))

        def collect() -> Marks:
            marks = Marks(Log(len(batch)), dict.fromkeys(("timeouts", "crashes", "too_long"), 0))
            for row, pending in enumerate(verdicts):
                verdict = pending if isinstance(pending, Verdict) else pending.result()
                marks.add(row, verdict, isolation, len(batch))
                crash = [f"{verdict.text} on row {row}, {batch.show(row)}"] if verdict.kind == "crashes" else []
                self.note(self.functions[number], [*verdict.notes, *crash])
            return marks

        return collect


def grade(
    functions: Sequence[RewardFunction],
    weights: Sequence[float] | None,
    rows: Sequence[Row],
    completions: Sequence[Completion],
) -> Grades:
    """Grades of one batch. For several batches, keep a `Grading`.

    Raises:
        EstuneError: as `Grading`.
    """
    with Grading(functions, weights) as grading:
        return grading.grade(rows, completions)


def _run_loop(loop: asyncio.AbstractEventLoop) -> None:
    try:
        loop.run_forever()
    finally:
        for task in asyncio.all_tasks(loop):
            task.cancel()
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.close()
