"""Questions to a language model behind OpenAI's chat completions, none of which is asked or paid for twice.

Retries are those of OpenAI's client, which waits longer each time, up to 8 seconds, or as long as the server's
`Retry-After` says, after lost connections, timeouts and the states 408, 409, 429 and 5xx.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncIterator, Callable
from dataclasses import asdict, dataclass, field, replace
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from estune.errors import EstuneError
from estune.files import user_cache
from estune.rewards.cache import Cache

if TYPE_CHECKING:
    from openai import AsyncOpenAI

    from estune.rewards.judge import JudgeConfig

NO_KEY = "none"  # OpenAI's client wants one; servers of one's own take any


@dataclass(frozen=True, slots=True)
class Answer:
    """The model's answer to one question, and the tokens that it cost, which are none if it had been asked before.

    An answer that was cut off has not come to its verdict: what stands last in it may be a quotation.
    """

    text: str
    finished: bool = True
    prompt_tokens: int = 0
    completion_tokens: int = 0
    new: bool = False


@dataclass
class _Session:
    """What belongs to one event loop: a client, the cache, and the questions that are being asked."""

    client: AsyncOpenAI
    cache: Cache | None
    slots: asyncio.Semaphore
    asked: dict[str, asyncio.Task[Answer]] = field(default_factory=dict)


class Asker:
    """Asks a model from any number of event loops.

    Args:
        config: where the model is, and how it is asked.
        worth_keeping: whether an answer goes into the cache.
    """

    def __init__(self, config: JudgeConfig, worth_keeping: Callable[[Answer], bool]) -> None:
        self._config = config
        self._worth_keeping = worth_keeping
        self._sessions: WeakKeyDictionary[asyncio.AbstractEventLoop, tuple[AsyncIterator[_Session], _Session]]
        self._sessions = WeakKeyDictionary()

    async def open(self) -> None:
        """Open client and cache for the running loop, if they are not open. They close with the loop.

        Raises:
            EstuneError: OpenAI's client is not installed, or the cache cannot be opened.
        """
        loop = asyncio.get_running_loop()
        if loop not in self._sessions:
            opened = self._open()
            self._sessions[loop] = opened, await anext(opened)

    async def ask(self, body: dict[str, Any]) -> Answer:
        """An answer: from the cache, from a question that is under way, or a new one. Needs `open`.

        Args:
            body: the body of the request.

        Raises:
            EstuneError: the model cannot be asked.
        """
        _, session = self._sessions[asyncio.get_running_loop()]
        key = blake2b(
            json.dumps([str(session.client.base_url), body], sort_keys=True).encode(), digest_size=16
        ).hexdigest()
        if session.cache is not None and (kept := session.cache.get(key)) is not None:
            return Answer(**{**json.loads(kept), "prompt_tokens": 0, "completion_tokens": 0})
        if key in session.asked:
            return replace(await session.asked[key], prompt_tokens=0, completion_tokens=0, new=False)
        task = session.asked[key] = asyncio.ensure_future(self._answer(session, key, body))
        task.add_done_callback(lambda _: session.asked.pop(key, None))
        return replace(await task, new=True)

    async def ask_once(self, body: dict[str, Any]) -> Answer:
        """A new answer, with one retry at most; the cache is opened, but not used.

        Raises:
            EstuneError: the model cannot be asked, or the cache cannot be opened.
        """
        cached = self._cache()
        if cached is not None:
            cached.close()
        async with self._client(min(self._config.max_retries, 1)) as client:
            return await self._request(client, body)

    async def _open(self) -> AsyncIterator[_Session]:
        """A session, in a generator: a loop that ends closes its generators, and this one its client and file."""
        async with self._client(self._config.max_retries) as client:
            cached = self._cache()
            try:
                yield _Session(client, cached, asyncio.Semaphore(self._config.max_concurrency))
            finally:
                if cached is not None:
                    cached.close()

    def _client(self, retries: int) -> AsyncOpenAI:
        try:
            from openai import AsyncOpenAI
        except ImportError as error:
            raise EstuneError("a judge is asked by OpenAI's client: pip install 'estune[judge]'") from error
        config = self._config
        key = os.environ.get(config.api_key_env) or NO_KEY
        return AsyncOpenAI(base_url=config.base_url, api_key=key, timeout=config.timeout, max_retries=retries)

    def _cache(self) -> Cache | None:
        where = self._config.cache
        if where is None:
            return None
        return Cache(user_cache("judge.sqlite") if where == "auto" else Path(where).expanduser())

    async def _answer(self, session: _Session, key: str, body: dict[str, Any]) -> Answer:
        """A new answer, which is cached if it is worth keeping."""
        async with session.slots:
            answer = await self._request(session.client, body)
        if session.cache is not None and self._worth_keeping(answer):
            kept = asdict(answer)
            del kept["new"]
            session.cache.put(key, json.dumps(kept))
        return answer

    async def _request(self, client: AsyncOpenAI, body: dict[str, Any]) -> Answer:
        import openai

        config = self._config
        where = f"model {config.model} at {client.base_url}"
        fixed = {name: body[name] for name in ("model", "messages")}
        more = {name: value for name, value in body.items() if name not in fixed}
        try:
            done: Any = await client.chat.completions.create(**fixed, extra_body=more)
        except openai.APITimeoutError as error:
            raise EstuneError(f"had no answer from {where} within {config.timeout:g} s; raise timeout") from error
        except openai.APIConnectionError as error:
            why = error.__cause__ or error
            raise EstuneError(f"did not reach {where} ({why}); start its server, or set base_url") from error
        except (openai.AuthenticationError, openai.PermissionDeniedError) as error:
            raise EstuneError(
                f"was refused by {where} ({_short(error)}); put a key into the environment variable "
                f"{config.api_key_env}, or name another by api_key_env"
            ) from error
        except openai.OpenAIError as error:
            raise EstuneError(f"had an error from {where}: {_short(error)}") from error
        try:
            (choice, *_) = done.choices
            text = choice.message.content or ""
        except (AttributeError, TypeError, ValueError) as error:
            raise EstuneError(f"was answered by {where} with no chat completion: {str(done)[:200]!r}") from error
        usage = done.usage
        finished = choice.finish_reason != "length"
        return Answer(text, finished, getattr(usage, "prompt_tokens", 0), getattr(usage, "completion_tokens", 0))


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
