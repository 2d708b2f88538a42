"""Playing the rollouts of a member: side by side over one engine that batches what they ask.

Rollouts that wait for the endpoint have a thread each. Environments share one, which takes the next turn of whichever
has its answer; more come where a turn takes long. What a user wrote can hang, and a thread cannot be ended: a rollout
that is late is left behind, without an engine to ask, and counted. Threads die with the process.
"""

from __future__ import annotations

import importlib
import os
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from functools import partial
from hashlib import blake2b

from estune.completion import Completion, Message, Played, Sampling
from estune.config import Config
from estune.engines.continuous import Batcher, Request, Serving
from estune.engines.prompts import PromptEncoder
from estune.errors import EstuneError
from estune.grading.convention import describe
from estune.grading.rollout import Kind, Opening, Outcome

AT_ONCE = 256
PROGRAMS_PER_CORE = 4
_LOOK_SECONDS = 0.1
_LONG_TURN = 0.05  # seconds, after which others do not wait for a turn to end
_PLAYERS: dict[Kind, tuple[str, str]] = {
    "environment": ("environment", "EnvironmentPlayer"),
    "function": ("client", "FunctionPlayer"),
    "program": ("program", "ProgramPlayer"),
    "verifiers": ("verifiers", "VerifiersPlayer"),
}
"""Module and class that play each kind, imported when a rollout is of it."""

Turns = Generator[tuple[list[int], Sampling], Completion, Outcome]
"""A rollout as a generator: it yields what is to be completed next, is sent the completion, and returns its outcome."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What a rollout may take.

    Attributes:
        seconds: for one rollout, from its beginning on.
        turn_seconds: for one step of an environment.
        turns: answers of the model in one rollout.
        at_once: rollouts side by side; None: four a core if some are programs, else 256.
    """

    seconds: float = 600.0
    turn_seconds: float = 60.0
    turns: int = 32
    at_once: int | None = None

    @staticmethod
    def of(config: Config) -> Limits:
        """Those of the settings."""
        return Limits(config.rollout_timeout, config.turn_timeout, config.max_turns, config.rollouts_at_once)


class Stopped(Exception):
    """A rollout was ended from outside."""


class TooLong(Exception):
    """A rollout has reached its limit of turns or tokens."""


@dataclass
class Run:
    """A rollout under way.

    Attributes:
        opening: what it begins with.
        seed: what its completions are drawn from.
        transcript: what was said so far.
        completions: the model's answers.
        first: token ids of the first prompt.
        began: when it began, by the monotonic clock.
        turn: since when a user's code has been computing a turn; None while it does not.
        over: whether it has been settled what became of it: `result`, after these `answers`.
        aborts: calls that end what it waits for.
    """

    opening: Opening
    seed: int
    transcript: list[Message] = field(default_factory=list)
    completions: list[Completion] = field(default_factory=list)
    first: list[int] = field(default_factory=list)
    began: float | None = None
    turn: float | None = None
    over: bool = False
    result: Played | None = None
    answers: list[Completion] = field(default_factory=list)
    aborts: list[Callable[[], object]] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def note(self, prompt_ids: Sequence[int], completion: Completion) -> None:
        """Remember an answer."""
        if not self.completions:
            self.first = list(prompt_ids)
        self.completions.append(completion)

    def begin_again(self) -> None:
        """Forget what was said so far."""
        with self.lock:
            self.transcript = []
            self.completions = []
            self.first = []
            self.aborts = []

    def on_abort(self, call: Callable[[], object]) -> None:
        """Call this when the rollout is ended from outside; at once if it already has been."""
        with self.lock:
            if not self.over:
                self.aborts.append(call)
                return
        call()  # it was ended meanwhile

    def settle(self, outcome: Outcome | None, failure: str = "", why: str = "") -> None:
        """Settle what became of it. Only the first call counts."""
        with self.lock:
            if self.over:
                return
            transcript = (outcome.transcript if outcome else None) or list(self.transcript)
            first = (self.first, list(self.completions[0].token_ids)) if self.first else ([], [])
            self.result = Played(
                reward=outcome.reward if outcome else None,
                metrics=outcome.metrics if outcome else {},
                transcript=transcript,
                turns=len(self.completions),
                failure=failure,
                why=why,
                first=first,
            )
            self.answers = list(self.completions)
            self.over = True

    def abort(self, failure: str, why: str) -> None:
        """End it from outside, if it has not ended."""
        self.settle(None, failure, why)
        with self.lock:
            aborts = self.aborts
            self.aborts = []
        for call in aborts:
            call()

    def completion(self) -> Completion:
        """All that was generated, with what became of it."""
        last = self.answers[-1].text if self.answers else ""
        tokens = [token for answer in self.answers for token in answer.token_ids]
        return Completion(last, tokens, all(a.finished for a in self.answers), self.result)

    def turn_seed(self) -> int:
        """The seed of the next answer, made of the rollout's seed and the number of the turn."""
        return mixed(self.seed, len(self.completions))


class Player:
    """Plays rollouts of one kind.

    Args:
        encoder: makes token ids of what the model is asked.
        limits: what a rollout may take.
    """

    def __init__(self, encoder: PromptEncoder, limits: Limits) -> None:
        self._encoder = encoder
        self._limits = limits

    def open(self, batcher: Batcher, sampling: Sampling) -> None:
        """Begin with a member."""

    def play(self, run: Run) -> Outcome | Turns:
        """Play a rollout to its end, in the thread that calls, or turn by turn. What it raises fails the rollout."""
        raise NotImplementedError

    def shut(self) -> None:
        """End with the member: nobody is answered any more."""

    def close(self) -> None:
        """End for good."""


class Players:
    """Plays the rows of one member after another with one engine.

    Args:
        engine: what generates, with the weights it holds when `play` is called.
        encoder: makes token ids of what is asked.
        limits: what a rollout may take.
    """

    def __init__(self, engine: Serving, encoder: PromptEncoder, limits: Limits) -> None:
        self._engine = engine
        self._encoder = encoder
        self._limits = limits
        self._players: dict[Kind, Player] = {}
        self._batcher: Batcher | None = None  # of the play under way

    def play(self, openings: Sequence[Opening], sampling: Sampling) -> list[Completion]:
        """Play all rollouts; return the answers of each with what became of it, in the order of the openings.

        Raises:
            EstuneError: the engine failed.
        """
        runs = [Run(opening, mixed(sampling.seed, number)) for number, opening in enumerate(openings)]
        kinds = {run.opening.rollout.kind for run in runs}
        players = {kind: self._player(kind) for kind in kinds}
        with Batcher(self._engine) as batcher:
            self._batcher = batcher
            for player in players.values():
                player.open(batcher, sampling)
            try:
                _Side(runs, players, batcher, self._limits).play()
            finally:
                for player in players.values():
                    player.shut()
            if batcher.failure is not None:
                raise batcher.failure
            if batcher.ended:
                raise EstuneError("these weights are no longer served")
            self._batcher = None
        return [run.completion() for run in runs]

    def close(self) -> None:
        """End what was started, also a play that is under way in another thread."""
        if self._batcher is not None:
            self._batcher.close()
        for player in self._players.values():
            player.close()
        self._players.clear()

    def _player(self, kind: Kind) -> Player:
        if kind not in self._players:
            module, name = _PLAYERS[kind]
            made = getattr(importlib.import_module(f"estune.agents.{module}"), name)
            self._players[kind] = made(self._encoder, self._limits)
        return self._players[kind]


class _Side:
    """The rollouts of one member, side by side.

    Args:
        runs: the rollouts.
        players: one for each kind of rollout among them.
        batcher: completes what is asked.
        limits: what a rollout may take.
    """

    def __init__(self, runs: Sequence[Run], players: Mapping[Kind, Player], batcher: Batcher, limits: Limits) -> None:
        self._runs = runs
        self._players = players
        self._batcher = batcher
        self._limits = limits
        self._todo: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._threads = 0
        self._ended = threading.Semaphore(0)

    def play(self) -> None:
        """Play all to their ends."""
        runs = self._runs
        turn_by_turn = all(run.opening.rollout.kind == "environment" for run in runs)
        programs = any(run.opening.rollout.kind == "program" for run in runs)
        most = self._limits.at_once or (PROGRAMS_PER_CORE * (os.cpu_count() or 1) if programs else AT_ONCE)
        waiting = deque(runs)
        try:
            if turn_by_turn:  # what others ask goes by way of the endpoint
                self._batcher.expect(min(most, len(runs)))
            for _ in range(min(most, len(runs))):
                self._todo.put(partial(self._begin, waiting.popleft()))
            self._more_threads(1 if turn_by_turn else most)
            while not self._batcher.ended and not all(run.over for run in runs):
                if self._ended.acquire(timeout=_LOOK_SECONDS) and waiting:
                    self._todo.put(partial(self._begin, waiting.popleft()))
                self._look(most)
        finally:
            for run in runs:
                if not run.over:
                    run.abort("errors", "was ended with the run")
            for _ in range(self._threads):
                self._todo.put(None)

    def _look(self, most: int) -> None:
        """Settle rollouts that are late, and start more threads where others wait for a long turn."""
        now = time.monotonic()
        limits = self._limits
        for run in self._runs:
            if run.over or run.began is None:
                continue
            if now - run.began > limits.seconds:
                self._leave_behind(run, f"took more than {limits.seconds:g} s (rollout_timeout)")
            elif run.turn is not None and now - run.turn > limits.turn_seconds:
                self._leave_behind(run, f"took more than {limits.turn_seconds:g} s for a turn (turn_timeout)")
            elif run.turn is not None and now - run.turn > _LONG_TURN:
                self._more_threads(min(self._todo.qsize(), self._threads, most - self._threads))

    def _leave_behind(self, run: Run, why: str) -> None:
        """Settle a rollout whose thread may never come back, and start another thread in its place."""
        run.abort("timeouts", why)
        self._ended.release()
        self._more_threads(1)

    def _more_threads(self, count: int) -> None:
        for _ in range(count):
            self._threads += 1
            threading.Thread(target=self._work, name="estune-rollout", daemon=True).start()

    def _work(self) -> None:
        while (work := self._todo.get()) is not None:
            work()

    def _begin(self, run: Run) -> None:
        run.began = time.monotonic()

        def play() -> Outcome | None:
            played = self._players[run.opening.rollout.kind].play(run)
            return played if isinstance(played, Outcome) else self._turn(run, played, None)

        self._settle(run, play)

    def _turn(self, run: Run, turns: Turns, completion: Completion | None) -> Outcome | None:
        """Take a turn; return the rollout's outcome, or None if it has asked for the next completion."""
        run.turn = time.monotonic()
        try:
            ids, sampling = next(turns) if completion is None else turns.send(completion)
        except StopIteration as end:
            outcome: Outcome = end.value
            return outcome
        run.turn = None
        if not run.over:
            future = self._batcher.submit(Request(ids, replace(sampling, seed=run.turn_seed()), expected=True))
            run.on_abort(future.cancel)
            future.add_done_callback(lambda done: self._todo.put(partial(self._answer, run, turns, ids, done)))
        return None

    def _answer(self, run: Run, turns: Turns, ids: list[int], done: Future[Completion]) -> None:
        """Go on once a completion has come, or was cancelled."""

        def go_on() -> Outcome | None:
            if done.cancelled():
                raise Stopped("was ended")
            completion = done.result()
            run.note(ids, completion)
            return self._turn(run, turns, completion)

        self._settle(run, go_on)

    def _settle(self, run: Run, play: Callable[[], Outcome | None]) -> None:
        """Play on, and settle the rollout if it has ended, in whatever way."""
        over = run.over
        failure, why = "", ""
        outcome = None
        try:
            outcome = play()
            if outcome is None:
                return
        except Stopped as stop:
            failure, why = "crashes", str(stop)
        except TooLong as stop:
            failure, why = "too_long", str(stop)
        except TimeoutError:
            failure, why = "timeouts", "took too long"
        except EstuneError as error:
            failure, why = "errors", str(error)
        except BaseException as error:
            failure, why = "errors", describe(error)
        self._batcher.expect(-1)
        if not over:
            run.settle(outcome, failure, why)
            self._ended.release()


def mixed(seed: int, number: int) -> int:
    """A seed of 63 bits, made of another seed and a number."""
    digest = blake2b(f"{seed} {number}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
