"""How fast a run goes, and how long it will take: arithmetic over what its engines count."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

from estune.charts.words import DAY, duration
from estune.engines.progress import Progress
from estune.run.monitors.base import Metrics, Plan, Work

KNOWN_AFTER = 3.0  # seconds of writing, of all engines together, after which a pace is known
RECENT = 20  # steps whose mean the next ones will take


@dataclass(frozen=True, slots=True)
class Pace:
    """Seconds of one engine for a token of a prompt, and for a place of a completion.

    Where completions end early, a place costs less: those that stay empty count too.

    Attributes:
        reading, writing: these seconds.
        most: no completion has ended before its last place, so that times are at most those that follow.
    """

    reading: float
    writing: float
    most: bool

    @classmethod
    def of(cls, done: Progress) -> Pace | None:
        """The pace at which this was done; None where nothing is known of it."""
        if not done.settled or not done.writing:
            return None
        reading = done.reading / done.read if done.read else 0.0
        return cls(reading / 1e9, done.writing / done.settled / 1e9, done.settled == done.tokens)

    def seconds(self, work: Work, done: Progress) -> float:
        """How long the rest of some work takes. Its pieces are shared out over the engines."""
        alone = (work.prompt_tokens - done.read) * self.reading + (work.places - done.settled) * self.writing
        return max(0.0, alone) * math.ceil(work.pieces / work.engines) / work.pieces


@dataclass(frozen=True, slots=True)
class Look:
    """How far the work under way has come.

    Attributes:
        work: what it is.
        share: of it that is done, from 0 to 1.
        seconds: since it began.
        tokens_per_second: generated since then.
        left, run_left: seconds, of the work and of the run; None as long as nothing is known.
    """

    work: Work
    share: float
    seconds: float
    tokens_per_second: float
    left: float | None
    run_left: float | None


class Stopwatch:
    """Follows a run: what is under way, its pace, and what has been measured of steps and evaluations.

    Args:
        plan: what the run sets out to do.
        clock: gives seconds.
    """

    def __init__(self, plan: Plan, clock: Callable[[], float] = time.monotonic) -> None:
        self.plan = plan
        self.work: Work | None = None
        self.done = plan.first_step
        self.began = clock()  # the run, or this part of it
        self._clock = clock
        self._work_began = self.began
        self._pace: Pace | None = None
        self._warm: Progress | None = None  # what was done by the first look that found a token
        self._steps: list[float] = []
        self._evaluation: float | None = None  # seconds of the last one
        self._turns: dict[str, float] = {}  # of each kind of work: how many times what was planned the last one took

    def begin(self, work: Work) -> None:
        """Some work begins. Rollouts of several turns ask for more than is planned, and again for about as much."""
        turns = self._turns_of(work.name)
        self.work = replace(work, prompt_tokens=round(turns * work.prompt_tokens), places=round(turns * work.places))
        self._warm = None
        self._work_began = self._clock()

    def step_done(self, metrics: Metrics) -> None:
        """A step has been taken."""
        self._end()
        self.done = int(metrics["step"])
        self._steps = [*self._steps[1 - RECENT :], metrics["step_time"]]

    def evaluated(self) -> None:
        """An evaluation has been made."""
        self._end()
        self._evaluation = self._clock() - self._work_began

    def look(self) -> Look | None:
        """How far the work under way has come; None between two."""
        work = self.work
        if work is None:
            return None
        done = work.done()
        self._take(done, KNOWN_AFTER)
        seconds = self._clock() - self._work_began
        share = (done.read + done.settled) / (work.prompt_tokens + work.places)
        left = None if self._pace is None or share > 1 else self._pace.seconds(work, done)
        run_left = None
        if left is not None and self.step_seconds is not None:
            steps = self.plan.steps - self.done - (work.name == "members")
            run_left = left + steps * self.step_seconds + self._evaluations()
        speed = done.tokens / seconds if seconds else 0.0
        return Look(work, min(1.0, share), seconds, speed, left, run_left)

    @property
    def most(self) -> bool:
        """Whether times are those of completions that all are as long as they may be."""
        return not self._steps and self._pace is not None and self._pace.most

    @property
    def step_tokens(self) -> int:
        """Tokens that a step generates at most, as far as is known."""
        plan = self.plan
        places: int = plan.population * plan.prompts_per_step * plan.config["max_new_tokens"]
        return round(self._turns_of("members") * places)

    @property
    def run_left(self) -> float | None:
        """Seconds that the run will take from a step's end on; None as long as nothing is known."""
        step = self.step_seconds
        return None if step is None else (self.plan.steps - self.done) * step + self._evaluations()

    @property
    def step_seconds(self) -> float | None:
        """Seconds of a step: those that were measured or, before the first ends, what generating takes at this pace."""
        if self._steps:
            return statistics.fmean(self._steps)
        plan = self.plan
        return self._generating("members", plan.population, plan.population * plan.prompts_per_step)

    def _evaluations(self) -> float:
        """Seconds of the evaluations that are due after this step."""
        plan = self.plan
        count = evaluations_left(plan.steps, plan.config["eval_steps"], self.done) if plan.eval_size else 0
        each = self._evaluation or self._generating("evaluation", 1, plan.eval_size * plan.config["eval_samples"])
        return count * (each or 0.0)

    def _generating(self, name: str, pieces: int, completions: int) -> float | None:
        plan = self.plan
        turns = self._turns_of(name)
        tokens = round(turns * completions * plan.prompt_tokens / plan.prompts_per_step)
        places = round(turns * completions * plan.config["max_new_tokens"])
        work = Work(name, pieces, tokens, completions, places, plan.engines, Progress)
        return None if self._pace is None else self._pace.seconds(work, Progress())

    def _turns_of(self, name: str) -> float:
        """How many times what is planned such work asks for: as the last one did or, of the first, as any did."""
        return self._turns.get(name, max(self._turns.values(), default=1.0))

    def _end(self) -> None:
        """The work under way is done."""
        if (work := self.work) is not None:
            done = work.done()
            self._take(done, 0)
            more = (done.read + done.settled) / (work.prompt_tokens + work.places)
            self._turns[work.name] = max(1.0, more * self._turns_of(work.name))
        self.work = None

    def _take(self, done: Progress, after: float) -> None:
        """Note the pace of what has been done, if it has taken so many seconds of engines.

        What is compiled or set up at first use is no part of it, as far as looks are close enough to tell.
        """
        if self._warm is None and done.settled:
            self._warm = done
        warm = done.since(self._warm or Progress())
        found = Pace.of(warm._replace(read=done.read, reading=done.reading)) or Pace.of(done)
        if found is not None and (warm if warm.settled else done).writing >= 1e9 * after:
            self._pace = found


def evaluations_left(steps: int, every: int, done: int) -> int:
    """Evaluations of a run of so many steps that are due after the one that is done, the last step's among them."""
    if done >= steps:
        return 0
    return 1 + ((steps - 1) // every - done // every if every else 0)


def outlook(tokens: int, step: float, run: float, *, most: bool, how: str) -> str:
    """What a run will take, in a line.

    Args:
        tokens: that a step generates at most.
        step, run: seconds of a step, and of the run or what is left of it.
        most: whether times are those of completions that all are as long as they may be.
        how: where times come from.
    """
    about = "at most" if most else "about"
    return f"a step: at most {tokens:,} tokens, {about} {duration(step)}; the run: {about} {duration(run)} ({how})"


def too_long(run: float) -> str | None:
    """A warning of a run of more than a day."""
    if run <= DAY:
        return None
    return (
        f"this takes {duration(run)} at this pace: fewer steps, a smaller population, fewer prompts_per_step or "
        "max_new_tokens take less, in proportion"
    )
