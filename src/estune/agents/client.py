"""Rollouts that are functions: `rollout(client, row)`, with OpenAI's client at the member's endpoint."""

from __future__ import annotations

import asyncio
import threading
from typing import TYPE_CHECKING, Any

from estune.agents.play import Limits, Run, Stopped
from estune.agents.served import ServedPlayer
from estune.engines.prompts import PromptEncoder
from estune.errors import EstuneError
from estune.grading.convention import is_async
from estune.grading.rollout import Outcome, outcome_of

if TYPE_CHECKING:
    from openai import AsyncOpenAI, OpenAI

NO_KEY = "none"  # the client wants one from the beginning; each rollout has its own
_CLOSE_SECONDS = 5.0


class FunctionPlayer(ServedPlayer):
    """As `Player`, for functions: all that are `async` share one event loop, others have a thread each."""

    def __init__(self, encoder: PromptEncoder, limits: Limits) -> None:
        super().__init__(encoder, limits)
        self._lock = threading.Lock()  # rollouts begin in many threads, and share one loop and one client
        self._loop: asyncio.AbstractEventLoop | None = None
        self._async_client: AsyncOpenAI | None = None
        self._client: OpenAI | None = None

    def close(self) -> None:
        """As `Player.close`."""
        super().close()
        if self._client is not None:
            self._client.close()
            self._client = None
        if self._loop is not None and self._async_client is not None:
            asyncio.run_coroutine_threadsafe(self._async_client.close(), self._loop).result(_CLOSE_SECONDS)
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._loop = None

    def play(self, run: Run) -> Outcome:
        """As `Player.play`."""
        function = run.opening.rollout.target
        row = dict(run.opening.row)
        with self.admitted(run) as (url, key):
            if not is_async(function):
                return outcome_of(function(self._plain(url, key), row))
            client = self._asynchronous(url, key)
            assert self._loop is not None
            future = asyncio.run_coroutine_threadsafe(function(client, row), self._loop)
            run.on_abort(future.cancel)
            try:
                return outcome_of(future.result())
            except BaseException as error:
                if future.cancelled():
                    raise Stopped("was ended") from None
                raise error

    def _plain(self, url: str, key: str) -> Any:
        with self._lock:
            if self._client is None:
                self._client = _openai().OpenAI(base_url=url, api_key=NO_KEY, timeout=self._limits.seconds)
        return self._client.with_options(api_key=key)

    def _asynchronous(self, url: str, key: str) -> Any:
        """A client for the event loop: the connections that it keeps belong to that loop."""
        with self._lock:
            if self._loop is None or self._async_client is None:
                self._async_client = _openai().AsyncOpenAI(base_url=url, api_key=NO_KEY, timeout=self._limits.seconds)
                self._loop = asyncio.new_event_loop()
                threading.Thread(target=_run, args=(self._loop,), name="estune-rollouts", daemon=True).start()
        return self._async_client.with_options(api_key=key)


def _run(loop: asyncio.AbstractEventLoop) -> None:
    try:
        loop.run_forever()
    finally:
        loop.close()


def _openai() -> Any:
    try:
        import openai
    except ImportError as error:
        raise EstuneError("rollouts that are functions need OpenAI's client: pip install 'estune[agents]'") from error
    return openai
