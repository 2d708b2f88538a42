"""A set of weights behind an OpenAI-compatible endpoint: what any program that talks to a model can talk to.

Leaves out what constrains a completion (JSON schemas, penalties) or asks for more than its text (log-probabilities):
such requests are refused.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import secrets
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import date
from typing import Any

from estune.agents.answering import application
from estune.agents.clients import Asked, Client, Turn
from estune.agents.requests import Refusal
from estune.agents.tools import Style, find_style
from estune.completion import Sampling
from estune.engines.continuous import Batcher
from estune.engines.prompts import PromptEncoder
from estune.errors import EstuneError, first_line

IDLE_SECONDS = 120
"""How long a connection is kept without a request: one that a client is about to use again must not be closed."""
BACKLOG = 4096
"""Connections that the system keeps until they are taken."""
ENCODED = 1024
"""Prompts whose token ids are kept: the members of a population are asked the same."""
LONGEST_ENCODED = 16_000
"""Characters of the longest of them."""


class Endpoint:
    """Serves requests over HTTP, in a thread of its own. `close` ends it.

    Args:
        encoder: the model's; it shows conversations to the model as its chat template has them.
        sampling: how tokens are drawn where a request says nothing. Its seed is not used: each key has its own.
        model: the name that requests have to give, unless `any_model` is set.
        host: the address to listen at; by default no other machine reaches it.
        port: the port; by default any that is free.
        requests: completions that may be under way at a time; whoever asks for more is told to wait (429).
        any_model: answer requests whatever model they name, as some programs name one of their own.

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

            app = application(self)
        except ImportError as error:
            raise EstuneError(f"an endpoint needs {error.name}: pip install 'estune[agents]'") from error
        self.encoder = encoder
        self.sampling = sampling
        self.model = model
        self.any_model = any_model
        self._most = requests
        self._under_way = 0
        self._batcher: Batcher | None = None
        self._clients: dict[bytes, Client] = {}
        self._lock = threading.Lock()
        self._encoding = ThreadPoolExecutor(1, "estune-endpoint-encode")
        self._encoded: dict[tuple[str, str, str], list[int]] = {}
        self._socket = _listen(host, port)
        shown = f"[{host}]" if ":" in host else host
        self.url = f"http://{shown}:{self._socket.getsockname()[1]}/v1"
        self._server = uvicorn.Server(
            uvicorn.Config(
                app, log_config=None, log_level="critical", access_log=False, lifespan="off", loop="auto", ws="none",
                timeout_graceful_shutdown=1, timeout_keep_alive=IDLE_SECONDS, backlog=BACKLOG, server_header=False,
            )
        )  # fmt: skip
        self._thread = threading.Thread(target=self._run, name="estune-endpoint", daemon=True)
        self._thread.start()

    def serve(self, batcher: Batcher | None) -> None:
        """Answer with these weights from now on. All keys so far are revoked.

        Args:
            batcher: completes prompts with them; None if nobody is to be answered.
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
            self._clients[_digest(key)] = Client(self._batcher, seed, told)
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

    def client(self, authorization: str) -> Client:
        """The client that has sent a request.

        Raises:
            Refusal: its key is not admitted.
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
        """Take room for `count` completions as long as they are under way; called in the loop's thread.

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
        key = json.dumps([asked, options]), begin, today
        if (known := self._encoded.get(key)) is not None:
            return known
        ids = await asyncio.get_running_loop().run_in_executor(self._encoding, self._encode, asked, options, begin)
        if len(key[0]) <= LONGEST_ENCODED:
            self._encoded[key] = ids
            if len(self._encoded) > ENCODED:
                del self._encoded[next(iter(self._encoded))]
        return ids

    def _encode(self, asked: Asked, options: dict[str, Any], begin: str) -> list[int]:
        if isinstance(asked, str):
            return self.encoder.encode([asked])[0]
        text = self.encoder.render(asked, options=options) + begin  # type: ignore[arg-type]
        ids: list[int] = self.encoder.tokenizer(text, add_special_tokens=False)["input_ids"]
        if not ids:
            raise EstuneError(f"messages: {asked!r:.80} encode to no token; give them text")
        return ids

    def _run(self) -> None:
        self._server.run(sockets=[self._socket])


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
