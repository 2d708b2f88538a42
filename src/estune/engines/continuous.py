"""Continuous batching: prompts join a batch when they come and leave it when they end, whoever asks for them.

A `Batcher` serves one set of weights, in a thread of its own, to any number of others: rollouts, and clients of an
endpoint. What decodes is a `Rows`: the fused decoder's and vLLM's take prompts at any token; other decoders take those
that wait in rounds, and the next when the last of a round has ended.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Protocol

from estune.completion import Completion, Sampling
from estune.errors import EstuneError

GRACE_SECONDS = 0.02
"""How long the next token waits for those that are expected to ask: if they came late, each would decode alone."""
MOST_WAITING = 10_000
"""Requests that may wait; more are refused."""


@dataclass(frozen=True, slots=True)
class Request:
    """A prompt to complete, as soon as there is room.

    Attributes:
        prompt_ids: its token ids.
        sampling: how tokens are drawn: the same prompt and seed give the same completion, whatever else is decoded.
        stop: texts at which the completion ends; they are not part of it.
        told: called with the text so far, from the batcher's thread, when it has grown by whole characters.
        expected: the caller is expected to ask again at once, or else to say `Batcher.expect(-1)`.
    """

    prompt_ids: Sequence[int]
    sampling: Sampling
    stop: Sequence[str] = ()
    told: Callable[[str], None] | None = None
    expected: bool = False


class Rows(Protocol):
    """A batch that prompts join and leave."""

    most_idle: float | None
    """Seconds after which `step` is called without any row too, to say that the batch is wanted; None: never."""

    def join(self, request: Request) -> int | None:
        """Take a prompt in; return the number of its row, or None as long as there is no room."""
        ...

    def step(self) -> list[tuple[int, list[int]]]:
        """Decode further; return rows with the tokens that each has gained, which may be none."""
        ...

    def leave(self, row: int) -> None:
        """Take a row out that has ended, or that nobody waits for any more."""
        ...


class Serving(Protocol):
    """What a batcher needs of an engine."""

    tokenizer: Any

    @property
    def end_ids(self) -> Sequence[int]:
        """Tokens that end a completion."""
        ...

    def check(self, prompt_ids: Sequence[Sequence[int]], sampling: Sampling) -> None:
        """As `Engine.check`."""
        ...

    def open_rows(self) -> Rows:
        """An empty batch, for the weights as they are."""
        ...


class Batcher:
    """Completes the prompts of any number of callers together. A context manager; `close` ends it.

    As long as it is open the engine must not be used otherwise, and its weights must stay.

    Args:
        engine: what decodes.
    """

    def __init__(self, engine: Serving) -> None:
        self._engine = engine
        self._ends = frozenset(engine.end_ids)
        self._waiting: deque[_Work] = deque()
        self._ready = threading.Condition()
        self._expected = 0  # callers that are about to ask
        self._closed = False
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="estune-batcher", daemon=True)
        self._thread.start()

    @property
    def failure(self) -> BaseException | None:
        """The error that the engine failed with, if it has."""
        return self._failure

    @property
    def ended(self) -> bool:
        """Whether it has failed or is closed, so that nothing is answered any more."""
        return self._closed

    def submit(self, request: Request) -> Future[Completion]:
        """Ask for a completion; to cancel it, cancel what is returned.

        Raises:
            EstuneError: the prompt is empty or, with `max_new_tokens`, longer than the model's positions reach, its
                sampling is out of range, too many wait, or the batcher has ended.
        """
        self._engine.check([request.prompt_ids], request.sampling)
        work = _Work(request, self._engine.tokenizer, self._ends)
        with self._ready:
            if self._failure is not None:
                raise EstuneError(f"the engine has failed: {self._failure}") from self._failure
            if self._closed:
                raise EstuneError("these weights are no longer served")
            if len(self._waiting) >= MOST_WAITING:
                raise EstuneError(f"{MOST_WAITING} requests wait already: send fewer at once")
            self._waiting.append(work)
            if request.expected:
                self._expect(-1)
            self._ready.notify()
        return work.future

    def expect(self, more: int) -> None:
        """Say that `more` callers will ask at once; with a negative number, that so many will not after all."""
        with self._ready:
            self._expect(more)

    def close(self) -> None:
        """End at once, and cancel all requests that are not complete."""
        with self._ready:
            self._closed = True
            self._ready.notify()
        self._thread.join()

    def __enter__(self) -> Batcher:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _run(self) -> None:
        active: dict[int, _Work] = {}
        try:
            rows = self._engine.open_rows()
            while self._admit(rows, active):
                for row, tokens in rows.step():
                    work = active[row]
                    if work.take(tokens):
                        rows.leave(row)
                        del active[row]
                        if work.request.expected:
                            self.expect(1)  # before whoever gets the completion can say `expect(-1)`
                        work.deliver()
            for row in active:
                rows.leave(row)
        except BaseException as error:
            self._failure = error
        finally:
            with self._ready:
                self._closed = True
                left = [*active.values(), *self._waiting]
                self._waiting.clear()
            for work in left:
                work.end(self._failure)

    def _expect(self, more: int) -> None:
        self._expected = max(0, self._expected + more)
        if not self._expected:
            self._ready.notify()

    def _admit(self, rows: Rows, active: dict[int, _Work]) -> bool:
        """Let waiting requests in as far as there is room; wait while there are none. False once it is closed."""
        with self._ready:
            if self._expected:
                self._ready.wait_for(lambda: self._closed or not self._expected, GRACE_SECONDS)
                self._expected = 0
            while not self._closed:
                while self._waiting:
                    work = self._waiting[0]
                    if not work.future.cancelled():
                        row = rows.join(work.request)
                        if row is None:
                            assert active, "an empty batch takes any prompt"
                            break
                        active[row] = work
                    self._waiting.popleft()
                if active:
                    return True
                if not self._ready.wait(rows.most_idle):
                    return True
            return False


class _Work:
    """A request, and what has become of it so far."""

    def __init__(self, request: Request, tokenizer: Any, ends: frozenset[int]) -> None:
        self.request = request
        self.future: Future[Completion] = Future()
        self._tokenizer = tokenizer
        self._ends = ends
        self._token_ids: list[int] = []
        self._heard = ""
        self._completion: Completion | None = None

    def take(self, tokens: Sequence[int]) -> bool:
        """Add tokens; return whether the completion has ended, or nobody wants it any more."""
        for token in tokens:
            self._token_ids.append(token)
            if self._complete(token):
                return True
        return self.future.cancelled()

    def deliver(self) -> None:
        """Give the completion to those who wait for it."""
        if self._completion is not None:
            with suppress(InvalidStateError):  # it was cancelled meanwhile
                self.future.set_result(self._completion)

    def end(self, error: BaseException | None) -> None:
        """Say that there will be no completion."""
        with suppress(InvalidStateError):
            if error is None:
                self.future.cancel()
            else:
                self.future.set_exception(error)

    def _complete(self, token: int) -> bool:
        request = self.request
        ended = token in self._ends
        full = len(self._token_ids) >= request.sampling.max_new_tokens
        if not (ended or full or request.stop or request.told):
            return False
        text: str = self._tokenizer.decode(self._token_ids, skip_special_tokens=True)
        places = [place for stop in request.stop if (place := text.find(stop)) >= 0]
        stopped = bool(places)
        if stopped:
            text = text[: min(places)]
        over = ended or full or stopped
        self._tell(text, over=over)
        if over:
            self._completion = Completion(text, self._token_ids, finished=ended or stopped)
        return over

    def _tell(self, text: str, *, over: bool) -> None:
        if self.request.told is None:
            return
        if not over:
            # The end may become another character, or turn out to be a text to stop at: it is held back until then.
            text = text.rstrip("\ufffd")
            held = max((_overlap(text, stop) for stop in self.request.stop), default=0)
            text = text[: len(text) - held]
        if len(text) > len(self._heard):
            self._heard = text
            self.request.told(text)


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of a text may be the beginning of a text to stop at."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)


class Rounds:
    """Rows of a decoder that takes whole batches only: those that have joined are decoded together, to their ends.

    Args:
        generate: `Engine.generate`.
        most: prompts of a round.
    """

    most_idle: float | None = None

    def __init__(
        self, generate: Callable[[Sequence[Sequence[int]], Sampling], list[Completion]], most: int = 1024
    ) -> None:
        self._generate = generate
        self._most = most
        self._joined: dict[int, Request] = {}
        self._numbers = 0

    def join(self, request: Request) -> int | None:
        """As `Rows.join`."""
        if len(self._joined) >= self._most:
            return None
        self._numbers += 1
        self._joined[self._numbers] = request
        return self._numbers

    def step(self) -> list[tuple[int, list[int]]]:
        """Decode all that have joined."""
        found: list[tuple[int, list[int]]] = []
        groups: dict[Sampling, list[int]] = {}
        for row, request in self._joined.items():
            groups.setdefault(request.sampling, []).append(row)
        for sampling, rows in groups.items():
            # What is drawn depends on a prompt's number in its batch: alone, each has the number 0.
            batches = [rows] if sampling.temperature == 0 else [[row] for row in rows]
            for batch in batches:
                prompts = [self._joined[row].prompt_ids for row in batch]
                completions = self._generate(prompts, sampling)
                found += [(row, done.token_ids) for row, done in zip(batch, completions, strict=True)]
        return found

    def leave(self, row: int) -> None:
        """As `Rows.leave`."""
        del self._joined[row]
