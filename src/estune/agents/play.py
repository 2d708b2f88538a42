"""Playing the rollouts of a member: side by side, each in a thread of its own, over one engine that batches them all.

What a user wrote can hang, and a thread cannot be ended: a rollout that is late is left behind, without an engine to
ask, and counted. Threads die with the process.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from typing import Protocol

from estune.completion import Completion, Message, Played, Sampling
from estune.engines.continuous import Batcher, Request
from estune.engines.prompts import PromptEncoder
from estune.errors import EstuneError
from estune.grading.convention import describe
from estune.grading.rollout import Kind, Opening, Outcome

AT_ONCE = 256
PROGRAMS_PER_CORE = 4
_LOOK_SECONDS = 0.25


@dataclass(frozen=True, slots=True)
class Limits:
    """What a rollout may take.

    Attributes:
        seconds: of one rollout, from its begin on.
        turn_seconds: of one step of an environment.
        turns: answers of the model in one rollout.
        at_once: rollouts side by side; None: all of an environment's, and of programs four a core.
    """

    seconds: float = 600.0
    turn_seconds: float = 60.0
    turns: int = 32
    at_once: int | None = None


class Stopped(Exception):
    """A rollout was ended from outside."""


class TooLong(Exception):
    """A rollout has come to what it may not go beyond."""


@dataclass
class Run:
    """A rollout under way.

    Attributes:
        opening: what it begins with.
        seed: that its completions are drawn from.
        transcript: what was said so far.
        completions: the model's answers.
        first: token ids of the first prompt.
        began: when it did, by the monotonic clock.
        turn: since when a user's code computes a turn; None while it does not.
        over: somebody has decided what became of it: `result`, after these `answers`.
        aborts: what ends it, where it waits for something.
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

    def on_abort(self, call: Callable[[], object]) -> None:
        """Have something called where the rollout is ended from outside, which it may have been already."""
        with self.lock:
            if not self.over:
                self.aborts.append(call)
                return
        call()  # it was ended meanwhile

    def settle(self, outcome: Outcome | None, failure: str = "", why: str = "") -> None:
        """Say what became of it; the first word counts."""
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
        """That the next answer is drawn from: of the run's, the rollout's and the number of the turn."""
        return mixed(self.seed, len(self.completions))


class Player(Protocol):
    """Plays rollouts of one kind."""

    def open(self, batcher: Batcher, sampling: Sampling) -> None:
        """Begin with a member."""
        ...

    def play(self, run: Run) -> Outcome:
        """Play one to its end, in the thread that calls; what it raises is the rollout's failure."""
        ...

    def shut(self) -> None:
        """End with the member: nobody is answered any more."""
        ...

    def close(self) -> None:
        """End for good."""
        ...


class Players:
    """Plays the rows of one member after another with one engine.

    Args:
        engine: what generates, with the weights it holds when `play` is called.
        encoder: makes token ids of what is asked.
        limits: what a rollout may take.
    """

    def __init__(self, engine: PromptEncoder, encoder: PromptEncoder, limits: Limits) -> None:
        self._engine = engine
        self._encoder = encoder
        self._limits = limits
        self._players: dict[Kind, Player] = {}

    def play(self, openings: Sequence[Opening], sampling: Sampling) -> list[Completion]:
        """Play all, and give each one's answers with what became of it, in the order of the openings.

        Raises:
            EstuneError: the engine failed.
        """
        runs = [Run(opening, mixed(sampling.seed, number)) for number, opening in enumerate(openings)]
        kinds = {run.opening.rollout.kind for run in runs}
        players = {kind: self._player(kind) for kind in kinds}
        with Batcher(self._engine) as batcher:  # type: ignore[arg-type]  # the engines encode, too
            for player in players.values():
                player.open(batcher, sampling)
            try:
                self._play_all(runs, players, batcher)
            finally:
                for player in players.values():
                    player.shut()
            if batcher.failure is not None:
                raise batcher.failure
        return [run.completion() for run in runs]

    def close(self) -> None:
        """End what was started."""
        for player in self._players.values():
            player.close()
        self._players.clear()

    def _player(self, kind: Kind) -> Player:
        if kind not in self._players:
            if kind == "environment":
                from estune.agents.environment import EnvironmentPlayer

                self._players[kind] = EnvironmentPlayer(self._encoder, self._limits)
            elif kind == "function":
                from estune.agents.client import FunctionPlayer

                self._players[kind] = FunctionPlayer(self._encoder, self._limits)
            else:
                from estune.agents.program import ProgramPlayer

                self._players[kind] = ProgramPlayer(self._encoder, self._limits)
        return self._players[kind]

    def _play_all(self, runs: Sequence[Run], players: Mapping[Kind, Player], batcher: Batcher) -> None:
        waiting = list(reversed(runs))
        ended = threading.Condition()

        def work() -> None:
            while True:
                with ended:
                    if not waiting:
                        return
                    run = waiting.pop()
                    run.began = time.monotonic()
                play_one(run, players[run.opening.rollout.kind])
                batcher.expect(-1)
                with ended:
                    ended.notify()

        programs = any(run.opening.rollout.kind == "program" for run in runs)
        most = self._limits.at_once or (PROGRAMS_PER_CORE * (os.cpu_count() or 1) if programs else AT_ONCE)
        try:
            if all(run.opening.rollout.kind == "environment" for run in runs):  # others go by way of the endpoint
                batcher.expect(min(most, len(runs)))
            for _ in range(min(most, len(runs))):
                threading.Thread(target=work, name="estune-rollout", daemon=True).start()
            with ended:
                while not all(run.over for run in runs):
                    ended.wait(_LOOK_SECONDS)
                    self._end_late(runs, work)
        finally:
            with ended:
                waiting.clear()
            for run in runs:
                if not run.over:
                    run.abort("errors", "was ended with the run")

    def _end_late(self, runs: Sequence[Run], work: Callable[[], None]) -> None:
        """Settle rollouts that are late; another thread takes the place of each one's, which may never come back."""
        now = time.monotonic()
        for run in runs:
            if run.over or run.began is None:
                continue
            limits = self._limits
            if now - run.began > limits.seconds:
                why = f"took more than {limits.seconds:g} s (rollout_timeout)"
            elif run.turn is not None and now - run.turn > limits.turn_seconds:
                why = f"took more than {limits.turn_seconds:g} s for a turn (turn_timeout)"
            else:
                continue
            run.abort("timeouts", why)
            threading.Thread(target=work, name="estune-rollout", daemon=True).start()


def play_one(run: Run, player: Player) -> None:
    """Play a rollout to its end, whatever that is."""
    try:
        run.settle(player.play(run))
    except Stopped as stop:
        run.settle(None, "crashes", str(stop))
    except TooLong as stop:
        run.settle(None, "too_long", str(stop))
    except TimeoutError:
        run.settle(None, "timeouts", "took too long")
    except EstuneError as error:
        run.settle(None, "errors", str(error))
    except BaseException as error:
        run.settle(None, "errors", describe(error))


def ask(batcher: Batcher, run: Run, prompt_ids: Sequence[int], sampling: Sampling) -> Completion:
    """Complete a prompt for a rollout, and wait for it.

    Raises:
        Stopped: the rollout was ended meanwhile.
        EstuneError: as `Batcher.submit`.
    """
    future = batcher.submit(Request(prompt_ids, replace(sampling, seed=run.turn_seed()), expected=True))
    run.on_abort(future.cancel)
    try:
        completion = future.result()
    except BaseException as error:
        if future.cancelled():
            raise Stopped("was ended") from None
        raise error
    run.note(prompt_ids, completion)
    return completion


def mixed(seed: int, number: int) -> int:
    """A seed of another one and a number, 63 bits."""
    digest = blake2b(f"{seed} {number}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
