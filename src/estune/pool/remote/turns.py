"""Rollouts that are played where the run is, and whose turns a server completes.

The server holds a member's weights meanwhile and decodes all turns that it was given as one batch, which they join and
leave at any token. Calls carry new turns there, and those that have ended back.
"""

from __future__ import annotations

import itertools
import queue
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from estune.completion import Completion, Sampling
from estune.engines.continuous import Batcher, Request, Rows
from estune.engines.prompts import PromptEncoder
from estune.errors import EstuneError
from estune.grading.rollout import Opening
from estune.pool.remote.wire import LEASE_SECONDS, TURN_SECONDS, Ended, Joined

if TYPE_CHECKING:
    from estune.agents.play import Limits

Turns = Callable[[Sequence[Joined], Sequence[int]], list[Ended]]
"""Gives a server further turns, and the numbers of those that are not waited for, as they have come or nobody wants
them; returns the others that have ended."""


class Held:
    """What a server decodes for as long as it holds a member's weights.

    Args:
        play: a name of what is played with them.
        engine: whose weights they are.
    """

    def __init__(self, play: str, engine: Any) -> None:
        self.play = play
        self._batcher = Batcher(engine)
        self._futures: dict[int, Future[Completion]] = {}
        self._ended: queue.SimpleQueue[int] = queue.SimpleQueue()
        self._told: set[int] = set()  # until they are let go: an answer can be lost on its way

    def turns(self, joined: Sequence[Joined], left: Sequence[int]) -> list[Ended]:
        """Take turns in and let some go; return those that have ended, once there is one or a moment has passed.

        A turn is told of until it is let go.

        Raises:
            EstuneError: for a prompt that the model cannot take, or the engine failed.
        """
        for number, ids, sampling in joined:
            if number not in self._futures:  # a call may be repeated
                self._begin(number, Request(ids, sampling))
        for number in left:
            self._told.discard(number)
            if (future := self._futures.pop(number, None)) is not None:
                future.cancel()
        with suppress(queue.Empty):
            self._told.add(self._ended.get(timeout=0 if self._told else TURN_SECONDS))
            while True:
                self._told.add(self._ended.get_nowait())
        self._told &= self._futures.keys()
        return [(number, self._futures[number].result().token_ids) for number in sorted(self._told)]

    def close(self) -> None:
        """End all turns."""
        self._batcher.close()

    def _begin(self, number: int, request: Request) -> None:
        future = self._batcher.submit(request)
        self._futures[number] = future
        future.add_done_callback(lambda _: self._ended.put(number))


class Stage:
    """Plays the rollouts of one member after another with one server.

    Args:
        encoder: makes token ids of what is asked.
        end_ids: tokens that end a completion.
        limits: what a rollout may take.
    """

    def __init__(self, encoder: PromptEncoder, end_ids: Sequence[int], limits: Limits) -> None:
        from estune.agents.play import Players

        self._far = _Far(encoder, end_ids)
        self._players = Players(self._far, encoder, limits)

    def play(self, openings: Sequence[Opening], sampling: Sampling, turns: Turns) -> list[Completion]:
        """As `Players.play`, by a server that completes turns."""
        self._far.turns = turns
        return self._players.play(openings, sampling)

    def close(self) -> None:
        """End what was started."""
        self._players.close()


class _Far:
    """As `Serving`: an engine that is elsewhere."""

    turns: Turns

    def __init__(self, encoder: PromptEncoder, end_ids: Sequence[int]) -> None:
        self.tokenizer = encoder.tokenizer
        self.end_ids = end_ids
        self._encoder = encoder

    def check(self, prompt_ids: Sequence[Sequence[int]], sampling: Sampling) -> None:
        self._encoder.check(prompt_ids, sampling)

    def open_rows(self) -> Rows:
        return FarRows(self.turns, self.end_ids)


class FarRows:
    """As `Rows`, of a batch that is elsewhere. A row gains all of its tokens when it ends there."""

    # A server that nothing is asked of, as all rollouts compute, is neither lost to others nor lost unnoticed.
    most_idle: float | None = LEASE_SECONDS / 3

    def __init__(self, turns: Turns, end_ids: Sequence[int]) -> None:
        self._turns = turns
        self._ends = frozenset(end_ids)
        self._numbers = itertools.count()
        self._active: dict[int, int] = {}  # by its number, the most tokens of a row's completion
        self._joined: list[Joined] = []
        self._left: list[int] = []

    def join(self, request: Request) -> int:
        """As `Rows.join`."""
        row = next(self._numbers)
        self._active[row] = request.sampling.max_new_tokens
        self._joined.append((row, list(request.prompt_ids), request.sampling))
        return row

    def step(self) -> list[tuple[int, list[int]]]:
        """As `Rows.step`.

        Raises:
            EstuneError: a turn has ended at another length than was asked for.
        """
        joined = self._joined
        left = self._left
        self._joined = []
        self._left = []
        found = self._turns(joined, left)
        for row, ids in found:
            most = self._active.pop(row, 0)
            if not (len(ids) == most or (len(ids) < most and ids[-1] in self._ends)):
                raise EstuneError(
                    f"a server's answer to turn {row} has {len(ids)} tokens, neither {most} nor an end: do without it"
                )
        return found

    def leave(self, row: int) -> None:
        """As `Rows.leave`."""
        self._active.pop(row, None)
        self._left.append(row)
