"""Answering requests over HTTP: one at a time from its body to its completions, whole or as a stream."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from estune.agents.answers import DONE, Writer, ending, usage
from estune.agents.clients import Asked, Client, Turn, mixed_bits
from estune.agents.requests import Body, ChatBody, Refusal, TextBody, read_body, shown_message
from estune.agents.tools import Style, beginning, parse_calls
from estune.completion import Completion, Message, Sampling
from estune.engines.continuous import Request
from estune.errors import EstuneError, first_line

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Receive, Scope, Send

    from estune.agents.endpoint import Endpoint

log = logging.getLogger(__name__)

MOST_BYTES = 16 << 20
"""Bytes of the longest body of a request."""


@dataclass
class _Job:
    """A request that is being answered.

    Attributes:
        endpoint, client, body: whose it is, and what it asks.
        prompts: as they were sent.
        ids: token ids of each prompt.
        sampling: how the completions of each prompt are drawn.
        style: how the model writes tool calls, where it was told of tools.
        begin: how each answer begins.
    """

    endpoint: Endpoint
    client: Client
    body: Body
    prompts: list[Asked]
    ids: list[list[int]]
    sampling: list[Sampling]
    style: Style | None
    begin: str

    @property
    def count(self) -> int:
        """How many completions each prompt gets."""
        return self.body.n or 1

    @property
    def prompt_tokens(self) -> int:
        """Tokens of all prompts."""
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
        self.client.expect(-1)
        return futures

    def answer(self, completion: Completion, number: int) -> Message:
        """A completion as the assistant's message."""
        if self.style is None:
            return {"role": "assistant", "content": completion.text}
        body = self.body
        assert isinstance(body, ChatBody)
        text = self.begin + self._spelled(completion)
        seed = mixed_bits(self.prompt_tokens, number, 0, tuple(completion.token_ids))
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
            turns.append(Turn(prompt, tools, tuple(answers[part]), tuple(completions[part]), ids))
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
        self, client: Client, body: Body, prompts: list[Asked], scope: Scope, receive: Receive, send: Send
    ) -> None:
        client.expect(1)  # what has come before is decoded with it
        job = None
        try:
            job = await self._prepare(client, body, prompts)
        except EstuneError as error:
            raise Refusal(400, str(error)) from error
        finally:
            if job is None:
                client.expect(-1)
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

    async def _prepare(self, client: Client, body: Body, prompts: list[Asked]) -> _Job:
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
    """How a prompt's completion is drawn; up to the model's last position where the request sets no length."""
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
    """All completions. If nobody waits for them any more, those that are left are cancelled."""
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
    """Send pieces as they come; where there may be tool calls, send all at the end."""
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


def application(endpoint: Endpoint) -> ASGIApp:
    """What an endpoint serves, each path and each error.

    Raises:
        ImportError: starlette is missing.
    """
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
