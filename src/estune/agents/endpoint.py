"""A set of weights behind an OpenAI-compatible endpoint: what any program that talks to a model can talk to.

Leaves out what constrains a completion (JSON schemas, penalties) or asks for more than its text (log-probabilities):
such requests are refused.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import secrets
import socket
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import date
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from estune.agents.answers import DONE, Writer, ending, usage
from estune.agents.requests import Body, ChatBody, Refusal, TextBody, read_body, shown_message
from estune.agents.tools import Style, beginning, find_style, parse_calls
from estune.completion import Completion, Message, Sampling
from estune.engines.continuous import Batcher, Request
from estune.engines.prompts import PromptEncoder
from estune.errors import EstuneError, first_line

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Receive, Scope, Send

log = logging.getLogger(__name__)

MOST_BYTES = 16 << 20
"""Of a request's body."""
BACKLOG = 4096
"""Connections that the system keeps until they are taken."""
ENCODED = 1024
"""Prompts whose token ids are kept: the members of a population are asked the same."""
LONGEST_ENCODED = 16_000
"""Characters of the longest of them."""

Asked = list[Message] | str | list[int]


@dataclass(frozen=True)
class Turn:
    """What one prompt asked and got.

    Attributes:
        messages: as they were sent; of /v1/completions the prompt, as text or token ids.
        tools: as they were sent.
        answers: the assistant's messages, as they were sent, with `tool_calls` where the model called functions: as
            many as were asked for, of one prompt.
        completions: what the model generated for each.
        prompt_tokens: tokens that the model was shown.
    """

    messages: Asked
    tools: tuple[dict[str, Any], ...]
    answers: tuple[Message, ...]
    completions: tuple[Completion, ...]
    prompt_tokens: int

    @property
    def answer(self) -> Message:
        """The first of the answers, which is the only one where `n` is not given."""
        return self.answers[0]


class Endpoint:
    """Serves requests over HTTP, in a thread of its own. `close` ends it.

    Args:
        encoder: the model's; it shows conversations to the model as its chat template has them.
        sampling: how tokens are drawn where a request says nothing. Its seed is not used: each key has its own.
        model: the name that requests have to give, but with `any_model`.
        host: the address to listen at; by default no other machine reaches it.
        port: the port; by default any that is free.
        requests: completions that may be asked for and not be there yet; who asks for more is told to wait (429).
        any_model: answer requests for whatever model: of programs that name one.

    Attributes:
        url: its address, as OpenAI's clients take it (`base_url`).

    Raises:
        EstuneError: starlette or uvicorn is missing, or the port is taken.
    """

    def __init__(
        self,
        encoder: PromptEncoder,
        sampling: Sampling,
        *,
        model: str,
        host: str = "127.0.0.1",
        port: int = 0,
        requests: int = 1024,
        any_model: bool = False,
    ) -> None:
        try:
            import uvicorn

            app = _application(self)
        except ImportError as error:
            raise EstuneError(f"an endpoint needs {error.name}: pip install 'estune[agents]'") from error
        self.encoder = encoder
        self.sampling = sampling
        self.model = model
        self.any_model = any_model
        self._most = requests
        self._under_way = 0
        self._batcher: Batcher | None = None
        self._clients: dict[bytes, _Client] = {}
        self._lock = threading.Lock()
        self._encoding = ThreadPoolExecutor(1, "estune-endpoint-encode")
        self._encoded = lru_cache(maxsize=ENCODED)(self._encode)
        self._socket = _listen(host, port)
        shown = f"[{host}]" if ":" in host else host
        self.url = f"http://{shown}:{self._socket.getsockname()[1]}/v1"
        self._server = uvicorn.Server(
            uvicorn.Config(
                app, log_config=None, log_level="critical", access_log=False, lifespan="off", loop="asyncio", ws="none",
                timeout_graceful_shutdown=1, backlog=BACKLOG, server_header=False,
            )
        )  # fmt: skip
        self._thread = threading.Thread(target=self._run, name="estune-endpoint", daemon=True)
        self._thread.start()

    def serve(self, batcher: Batcher | None) -> None:
        """Answer with these weights from now on. All keys so far are revoked.

        Args:
            batcher: completes with them; None if nobody is to be answered.
        """
        with self._lock:
            clients = list(self._clients.values())
            self._clients.clear()
            self._batcher = batcher
        for client in clients:
            client.revoke()

    def admit(self, seed: int, told: Callable[[Turn], None], key: str | None = None) -> str:
        """A key with which one rollout, or client, may ask the weights that are served now.

        Args:
            seed: what its completions are drawn from, with what it asks and how often it has asked that: a rollout
                that asks the same gets the same, in whatever order its requests come.
            told: called with each turn, before the client has its answer, from a thread of the endpoint's.
            key: its key; a new random one by default.

        Raises:
            EstuneError: no weights are served.
        """
        key = key or secrets.token_urlsafe(24)
        with self._lock:
            if self._batcher is None:
                raise EstuneError("no weights are served: call serve first")
            self._clients[_digest(key)] = _Client(self._batcher, seed, told)
        return key

    def revoke(self, key: str) -> None:
        """Cancel what a key asked for and has not got, and refuse (401) what it asks for from now on.

        When this returns, `told` is not called any more.
        """
        with self._lock:
            client = self._clients.pop(_digest(key), None)
        if client is not None:
            client.revoke()

    def close(self) -> None:
        """Revoke all keys, and end."""
        self.serve(None)
        self._server.should_exit = True
        self._thread.join()
        self._socket.close()
        self._encoding.shutdown(wait=False, cancel_futures=True)

    def __enter__(self) -> Endpoint:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def client(self, authorization: str) -> _Client:
        """Who has sent a request.

        Raises:
            Refusal: nobody that is admitted.
        """
        kind, _, key = authorization.partition(" ")
        with self._lock:
            client = self._clients.get(_digest(key.strip())) if kind.lower() == "bearer" else None
        if client is None:
            raise Refusal(
                401, "this key is not, or no longer, good for the weights that are served" if key else "no key; send "
                "one in the header, as `Authorization: Bearer KEY`", "invalid_api_key",
            )  # fmt: skip
        return client

    @contextmanager
    def place(self, count: int) -> Iterator[None]:
        """Room for so many completions, as long as they are under way; within the loop's thread.

        Raises:
            Refusal: there is none.
        """
        if count > self._most:
            raise Refusal(400, f"{count} completions in one request; {self._most} are the most", param="n")
        if self._under_way + count > self._most:
            raise Refusal(429, f"{self._under_way} completions are under way; ask again later", "rate_limit_exceeded")
        self._under_way += count
        try:
            yield
        finally:
            self._under_way -= count

    def style(self) -> Style:
        """How the model writes tool calls.

        Raises:
            EstuneError: as `find_style`.
        """
        template = self.encoder.tokenizer.get_chat_template() if self.encoder.has_template else None
        return find_style(self.model, template)

    async def encode(self, asked: Asked, options: dict[str, Any], begin: str) -> list[int]:
        """The token ids that the model is shown; the templates' process is waited for elsewhere.

        Args:
            asked: messages, text or token ids.
            options: further variables for the chat template.
            begin: how the answer begins.
        """
        if isinstance(asked, list) and isinstance(asked[0], int):
            return asked
        today = date.today().isoformat()  # a template may show it
        what = json.dumps([asked, options])
        encode = self._encoded if len(what) <= LONGEST_ENCODED else self._encode
        return await asyncio.get_running_loop().run_in_executor(self._encoding, encode, what, begin, today)

    def _encode(self, what: str, begin: str, today: str) -> list[int]:
        asked, options = json.loads(what)
        if isinstance(asked, str):
            return self.encoder.encode([asked])[0]
        text = self.encoder.render(asked, options=options) + begin
        ids: list[int] = self.encoder.tokenizer(text, add_special_tokens=False)["input_ids"]
        if not ids:
            raise EstuneError(f"messages: {asked!r:.80} encode to no token; give them text")
        return ids

    def _run(self) -> None:
        asyncio.run(self._server.serve(sockets=[self._socket]))


class _Client:
    """Whoever has a key: the weights that it may ask, and what it has under way."""

    def __init__(self, batcher: Batcher, seed: int, told: Callable[[Turn], None]) -> None:
        self.revoked = False
        self._batcher = batcher
        self._seed = seed
        self._told = told
        self._asked: Counter[int] = Counter()
        self._futures: set[Future[Completion]] = set()
        self._lock = threading.RLock()

    def seeds(self, ids: Sequence[int], given: int | None, count: int) -> list[int]:
        """A seed for each of so many completions of a prompt: of the request's seed, or else of the client's."""
        if given is not None:
            return [_hash(given, index) for index in range(count)]
        prompt = _hash(tuple(ids))
        with self._lock:
            times = self._asked[prompt]
            self._asked[prompt] += 1
        return [_hash(self._seed, index, times, prompt) for index in range(count)]

    def submit(self, request: Request) -> Future[Completion]:
        """As `Batcher.submit`, for a prompt that has been checked.

        Raises:
            Refusal: the key was revoked, or the batcher has ended.
        """
        with self._lock:
            self.check()
            try:
                future = self._batcher.submit(request)
            except EstuneError as error:
                raise Refusal(503, str(error)) from error
            self._futures.add(future)
        future.add_done_callback(self._futures.discard)
        return future

    def tell(self, turns: Sequence[Turn]) -> None:
        """Tell of turns.

        Raises:
            Refusal: the key was revoked.
        """
        with self._lock:
            self.check()
            for turn in turns:
                self._told(turn)

    def check(self) -> None:
        """Refuse, if the key was revoked."""
        if self.revoked:
            raise Refusal(401, "this key is no longer good for the weights that are served", "invalid_api_key")

    def revoke(self) -> None:
        """Cancel what is under way, and refuse what comes."""
        with self._lock:
            self.revoked = True
            for future in list(self._futures):
                future.cancel()


@dataclass
class _Job:
    """A request that is being answered.

    Attributes:
        endpoint, client, body: whose it is, and what it asks.
        prompts: as they were sent.
        ids: token ids of each.
        sampling: for each.
        style: how the model writes calls, where it was told of tools.
        begin: how each answer begins.
    """

    endpoint: Endpoint
    client: _Client
    body: Body
    prompts: list[Asked]
    ids: list[list[int]]
    sampling: list[Sampling]
    style: Style | None
    begin: str

    @property
    def count(self) -> int:
        """Completions of each prompt."""
        return self.body.n or 1

    @property
    def prompt_tokens(self) -> int:
        """Tokens that are read."""
        return sum(map(len, self.ids))

    def submit(self, told: Callable[[int, str], None] | None = None) -> list[Future[Completion]]:
        """Ask for all completions, prompt after prompt.

        Args:
            told: called with a completion's number and its text so far.
        """
        futures: list[Future[Completion]] = []
        for ids, sampling in zip(self.ids, self.sampling, strict=True):
            for seed in self.client.seeds(ids, self.body.seed, self.count):
                number = len(futures)
                hear = None if told is None else lambda text, number=number: told(number, text)
                futures.append(self.client.submit(Request(ids, replace(sampling, seed=seed), self.body.stops, hear)))
        return futures

    def answer(self, completion: Completion, number: int) -> Message:
        """A completion as the assistant's message."""
        if self.style is None:
            return {"role": "assistant", "content": completion.text}
        body = self.body
        assert isinstance(body, ChatBody)
        text = self.begin + self._spelled(completion)
        seed = _hash(self.prompt_tokens, number, 0, tuple(completion.token_ids))
        content, calls = parse_calls(text, self.style, body.shown_tools, seed)
        if calls:
            return {"role": "assistant", "content": content or None, "tool_calls": calls}
        return {"role": "assistant", "content": self.begin + completion.text}

    def tell(self, answers: Sequence[Message], completions: Sequence[Completion]) -> None:
        """Tell the client's owner of all turns."""
        tools = tuple(self.body.tools or ()) if isinstance(self.body, ChatBody) else ()
        turns = []
        for place, (prompt, ids) in enumerate(zip(self.prompts, self.ids, strict=True)):
            part = slice(place * self.count, (place + 1) * self.count)
            turns.append(Turn(prompt, tools, tuple(answers[part]), tuple(completions[part]), len(ids)))
        self.client.tell(turns)

    def _spelled(self, completion: Completion) -> str:
        """A completion's text with its special tokens, as far as it goes, without the token that ended it."""
        tokenizer = self.endpoint.encoder.tokenizer
        ids = completion.token_ids
        plain: str = tokenizer.decode(ids, skip_special_tokens=True)
        if plain == completion.text:
            spelled: str = tokenizer.decode(ids[:-1] if completion.finished else ids, skip_special_tokens=False)
            return spelled
        whole: str = tokenizer.decode(ids, skip_special_tokens=False)
        return whole[: min((place for stop in self.body.stops if (place := whole.find(stop)) >= 0), default=None)]


class _Answering:
    """Answers requests of one kind; an application of ASGI's.

    Args:
        endpoint: whose it is.
        kind: of request.
    """

    def __init__(self, endpoint: Endpoint, kind: type[ChatBody] | type[TextBody]) -> None:
        self._endpoint = endpoint
        self._kind = kind

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, unless the client leaves."""
        from starlette.requests import Request as Asking

        asking = Asking(scope, receive)
        begun = False

        async def sending(message: Any) -> None:
            nonlocal begun
            begun = True
            await send(message)

        try:
            client = self._endpoint.client(asking.headers.get("authorization", ""))
            body = read_body(self._kind, await _read(asking))
            prompts: list[Asked] = [body.messages] if isinstance(body, ChatBody) else [*body.prompts]
            with self._endpoint.place(len(prompts) * (body.n or 1)):
                work = asyncio.ensure_future(self._answer(client, body, prompts, scope, receive, sending))
                left = asyncio.ensure_future(_leaves(receive))
                try:
                    await asyncio.wait({work, left}, return_when=asyncio.FIRST_COMPLETED)
                finally:
                    left.cancel()
                    work.cancel()
                with suppress(asyncio.CancelledError):
                    await work
        except Exception as error:
            refusal = _refusal(error)
            if begun:  # a stream ends with the error
                await send({"type": "http.response.body", "body": _event(refusal) + DONE, "more_body": False})
            else:
                await _refuse(refusal)(scope, receive, send)

    async def _answer(
        self, client: _Client, body: Body, prompts: list[Asked], scope: Scope, receive: Receive, send: Send
    ) -> None:
        try:
            job = await self._prepare(client, body, prompts)
        except EstuneError as error:
            raise Refusal(400, str(error)) from error
        writer = Writer(self._endpoint.model, isinstance(body, ChatBody))
        if body.stream:
            await _stream(job, writer, send)
            return
        from starlette.responses import JSONResponse

        completions = await _results(job, job.submit())
        answers = [job.answer(completion, number) for number, completion in enumerate(completions)]
        job.tell(answers, completions)
        used = usage(job.prompt_tokens, completions)
        whole = writer.whole(list(zip(answers, completions, strict=True)), used)
        await JSONResponse(whole)(scope, receive, send)

    async def _prepare(self, client: _Client, body: Body, prompts: list[Asked]) -> _Job:
        endpoint = self._endpoint
        if body.model != endpoint.model and not endpoint.any_model:
            raise _no_model(body.model, endpoint.model)
        style = None
        begin = ""
        options: dict[str, Any] = {}
        shown = prompts
        if isinstance(body, ChatBody):
            forced = body.forced
            options = dict(body.chat_template_kwargs or {})
            shown = [[shown_message(message) for message in body.messages]]
            if body.shown_tools:
                style = endpoint.style()
                begin = beginning(style, forced)
                options["tools"] = body.shown_tools
        ids = [await endpoint.encode(each, options, begin) for each in shown]
        sampling = [_fitting(each, body, endpoint) for each in ids]
        for each, drawn in zip(ids, sampling, strict=True):
            endpoint.encoder.check([each], drawn)
        return _Job(endpoint, client, body, prompts, ids, sampling, style, begin)


def _fitting(ids: Sequence[int], body: Body, endpoint: Endpoint) -> Sampling:
    """How a prompt's completion is drawn; as long as there is room, where the request does not say how long."""
    sampling = body.sampling(endpoint.sampling)
    positions = endpoint.encoder.positions
    if positions is None:
        return sampling
    room = positions - len(ids)
    wanted = body.most_tokens or 1
    if room < wanted:
        raise Refusal(
            400,
            f"the model reaches {positions} tokens, and the prompt has {len(ids)}, with {wanted} to come; shorten it "
            "or lower max_tokens",
            "context_length_exceeded",
            "prompt" if isinstance(body, TextBody) else "messages",
        )
    return replace(sampling, max_new_tokens=min(sampling.max_new_tokens, room))


async def _results(job: _Job, futures: Sequence[Future[Completion]]) -> list[Completion]:
    """All completions. What is left of them is cancelled where they are waited for no longer."""
    try:
        return list(await asyncio.gather(*map(asyncio.wrap_future, futures)))
    except asyncio.CancelledError:
        task = asyncio.current_task()
        if task is None or not task.cancelling():  # it was not that nobody waits for it
            job.client.check()
            raise Refusal(503, "these weights are no longer served") from None
        raise
    finally:
        for future in futures:
            future.cancel()


async def _stream(job: _Job, writer: Writer, send: Send) -> None:
    """Send pieces as they come; where there may be tool calls, all at the end."""
    loop = asyncio.get_running_loop()
    heard: asyncio.Queue[tuple[int, str | None]] = asyncio.Queue()

    def tell(number: int, text: str | None) -> None:
        with suppress(RuntimeError):  # the endpoint has been closed
            loop.call_soon_threadsafe(heard.put_nowait, (number, text))

    async def put(piece: bytes, *, more: bool = True) -> None:
        await send({"type": "http.response.body", "body": piece, "more_body": more})

    futures = job.submit(tell if job.style is None else None)
    try:
        for number, future in enumerate(futures):
            future.add_done_callback(lambda _, number=number: tell(number, None))  # type: ignore[misc]
        headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        sent = [""] * len(futures)
        answers: list[Message] = [{}] * len(futures)
        if writer.chat:
            for number in range(len(futures)):
                await put(writer.begun(number))
        left = len(futures)
        while left:
            number, text = await heard.get()
            if text is None:
                left -= 1
                completion = await _result(job, futures[number])
                answers[number] = job.answer(completion, number)
                text = answers[number]["content"] or ""
            if len(text) > len(sent[number]):
                await put(writer.grown(number, text[len(sent[number]) :]))
                sent[number] = text
            if answers[number]:
                if calls := answers[number].get("tool_calls"):
                    await put(writer.called(number, calls))
                await put(writer.ended(number, ending(futures[number].result(), answers[number])))
        completions = [future.result() for future in futures]
        job.tell(answers, completions)
        if job.body.include_usage:
            await put(writer.used(usage(job.prompt_tokens, completions)))
        await put(DONE, more=False)
    finally:
        for future in futures:
            future.cancel()


async def _result(job: _Job, future: Future[Completion]) -> Completion:
    (completion,) = await _results(job, [future])
    return completion


async def _leaves(receive: Receive) -> None:
    """Wait until the client has left."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def _read(asking: Any) -> bytes:
    """A request's body.

    Raises:
        Refusal: it is too large.
    """
    raw = bytearray()
    async for piece in asking.stream():
        raw += piece
        if len(raw) > MOST_BYTES:
            raise Refusal(413, f"the body has more than {MOST_BYTES} bytes; send less")
    return bytes(raw)


def _refusal(error: Exception) -> Refusal:
    """What a client is told of an error."""
    if isinstance(error, Refusal):
        return error
    log.warning("endpoint: %s: %s", type(error).__name__, first_line(error))
    return Refusal(500, f"the request has failed: {first_line(error)}")


def _refuse(refusal: Refusal) -> ASGIApp:
    from starlette.responses import JSONResponse

    headers = {"retry-after": "1"} if refusal.status == 429 else None
    return JSONResponse(refusal.body(), refusal.status, headers)


def _event(refusal: Refusal) -> bytes:
    return b"data: " + json.dumps(refusal.body()).encode() + b"\n\n"


def _no_model(found: str, model: str) -> Refusal:
    return Refusal(404, f"model {found!r:.80} is not served here; {model!r} is", "model_not_found", "model")


def _application(endpoint: Endpoint) -> ASGIApp:
    from starlette.applications import Starlette
    from starlette.exceptions import HTTPException
    from starlette.requests import Request as Asking
    from starlette.responses import JSONResponse, Response
    from starlette.routing import Route

    def described() -> dict[str, Any]:
        return {"id": endpoint.model, "object": "model", "created": 0, "owned_by": "estune"}

    async def models(asking: Asking) -> Response:
        endpoint.client(asking.headers.get("authorization", ""))
        return JSONResponse({"object": "list", "data": [described()]})

    async def model(asking: Asking) -> Response:
        endpoint.client(asking.headers.get("authorization", ""))
        if asking.path_params["name"] != endpoint.model:
            raise _no_model(asking.path_params["name"], endpoint.model)
        return JSONResponse(described())

    async def refused(asking: Asking, error: Exception) -> Response:
        assert isinstance(error, Refusal)
        return _refuse(error)  # type: ignore[return-value]

    async def unknown(asking: Asking, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        where = f"{asking.method} {asking.url.path}"
        return _refuse(Refusal(error.status_code, f"{where}: there is nothing here", "unknown_url"))  # type: ignore[return-value]

    return Starlette(
        routes=[
            Route("/v1/chat/completions", _Answering(endpoint, ChatBody), methods=["POST"]),
            Route("/v1/completions", _Answering(endpoint, TextBody), methods=["POST"]),
            Route("/v1/models", models),
            Route("/v1/models/{name:path}", model),
        ],
        exception_handlers={Refusal: refused, HTTPException: unknown},
    )


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=BACKLOG)
    except (OSError, OverflowError) as error:
        raise EstuneError(
            f"cannot listen at {host}, port {port} ({first_line(error)}); take another port, or 0 for any that is free"
        ) from error


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode(errors="surrogateescape")).digest()


def _hash(*values: Any) -> int:
    """63 bits of what is given."""
    return int.from_bytes(hashlib.blake2b(repr(values).encode(), digest_size=8).digest()) >> 1
