"""A judge to ask over HTTP, which scores by a rule, and fails, hangs or talks nonsense as it is told."""

from __future__ import annotations

import asyncio
import re
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

KEY = "a-secret"


def part(text: str, name: str) -> str:
    """What stands between tags of this name, whatever their hash."""
    (found,) = re.findall(rf"<{name}-[0-9a-f]{{16}}>\n(.*?)\n</{name}-[0-9a-f]{{16}}>", text, re.DOTALL)
    return str(found)


@dataclass
class Served:
    """A server, and what it has been asked.

    Attributes:
        next: what it does with the next requests, one each: a status, `hang`, `page` (HTML), or a text to answer; with
            the rest it scores by a rule: the number of times that a completion says yes, or of two the longer one.
        bodies, keys: of the requests that came.
        most: how many were there at the same time.
        pause: seconds that an answer takes.
    """

    url: str = ""
    next: list[Any] = field(default_factory=list)
    bodies: list[dict[str, Any]] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)
    most: int = 0
    pause: float = 0.0
    finish: str = "stop"
    _now: int = 0

    async def answer(self, request: Request) -> Response:
        body = await request.json()
        self.bodies.append(body)
        self.keys.append(request.headers.get("authorization", ""))
        self._now += 1
        self.most = max(self.most, self._now)
        try:
            await asyncio.sleep(self.pause)
            return await self._respond(body)
        finally:
            self._now -= 1

    async def _respond(self, body: dict[str, Any]) -> Response:
        told = self.next.pop(0) if self.next else rule(body["messages"][-1]["content"])
        if told == "hang":
            await asyncio.sleep(600)
        if told == "page":
            return PlainTextResponse("<html>Welcome</html>", media_type="text/html")
        if isinstance(told, int):
            return JSONResponse({"error": {"message": f"state {told}"}}, told)
        message = {"role": "assistant", "content": told}
        choice = {"index": 0, "message": message, "finish_reason": self.finish}
        usage = {"prompt_tokens": 100, "completion_tokens": 7, "total_tokens": 107}
        shape = {"id": "1", "object": "chat.completion", "created": 0, "model": body["model"]}
        return JSONResponse({**shape, "choices": [choice], "usage": usage})


def rule(asked: str) -> str:
    """The judge's answer to what it is shown; it quotes the completion, as judges do."""
    if "<A-" in asked:
        a, b = len(part(asked, "A")), len(part(asked, "B"))
        return f"Lengths {a} and {b}.\nVerdict: {'tie' if a == b else 'A' if a > b else 'B'}"
    said = part(asked, "completion")
    return f"It says {said!r}.\nScore: {min(10, said.split().count('yes'))}"


@contextmanager
def serving() -> Iterator[Served]:
    """A server in a thread, on a port of its own."""
    served = Served()
    app = Starlette(routes=[Route("/v1/chat/completions", served.answer, methods=["POST"])])
    with socket.create_server(("127.0.0.1", 0)) as listening:
        served.url = f"http://127.0.0.1:{listening.getsockname()[1]}/v1"
        server = uvicorn.Server(uvicorn.Config(app, log_level="error", timeout_graceful_shutdown=1, lifespan="off"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        try:
            yield served
        finally:
            server.should_exit = True
            thread.join()
