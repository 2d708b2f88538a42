"""A server as the crew sees it: a worker that nobody here has started, whose calls have deadlines."""

from __future__ import annotations

import json
import logging
import os
import secrets
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, cast

import httpx
from pydantic import ValidationError

from estune.completion import Completion, Sampling
from estune.engines.prompts import completions_of
from estune.errors import EstuneError, first_line
from estune.grading.rollout import Opening, is_played
from estune.pool.base import Description, Evaluated
from estune.pool.deadlines import Deadlines, Lost
from estune.pool.remote.turns import Stage
from estune.pool.remote.wire import (
    ARGUMENTS,
    GREETING,
    HEARTBEAT,
    LEASE_SECONDS,
    PATH,
    RESULTS,
    Ended,
    Joined,
    Terms,
    name_of,
    to_send,
)
from estune.pool.worker import Place, StaleWeights
from estune.versions import packages

log = logging.getLogger(__name__)

KEY = "VLLM_API_KEY"
"""The environment variable with the servers' key, on both sides."""
CONNECT_SECONDS = 10.0
SILENT_SECONDS = 4 * HEARTBEAT  # without a sign of life
GREET_SECONDS = 20.0
RELEASE_SECONDS = 3.0
KEPT_SECONDS = 4.0  # that a connection is kept without a call: vLLM closes one after 5
SPARE_SECONDS = 15.0  # beyond a lease that has to end
MOST_TOLD = 500  # characters of a server's reason
MOST_BYTES = 1 << 28  # of an answer: token ids of 200 completions of 100,000 tokens are 140 MB
_PROMPTS = {"evaluate": 3, "generate": 1, "compare": 1}  # the argument of a call that is prompts


def key_of_environment() -> str | None:
    """The servers' key, if there is one.

    Raises:
        EstuneError: it cannot be sent. What refuses it later would tell it.
    """
    key = os.environ.get(KEY, "").rstrip()  # a file's last line ends
    if not (key.isascii() and key.isprintable()):
        raise EstuneError(f"{KEY} holds what no key may: set it to the server's --api-key, printable ASCII in one line")
    return key or None


@dataclass(frozen=True, slots=True)
class Named:
    """Prompts, and the name that they go by once a server has them."""

    name: str
    ids: Sequence[Sequence[int]]


class Reader:
    """Makes completions of token ids, as the servers' own engine would.

    Args:
        tokenizer: the model's.
        end_ids: tokens that end a completion.
    """

    def __init__(self, tokenizer: Any, end_ids: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._ends = set(end_ids)
        self._lock = threading.Lock()  # of a tokenizer that several threads use

    def read(self, token_ids: list[list[int]]) -> list[Completion]:
        """A completion for each row."""
        with self._lock:
            return completions_of(self._tokenizer, self._ends, token_ids)


class RemoteHandle:
    """As `Handle`, of a server.

    Args:
        number: of the worker, from 0, for messages.
        url: the server's address.
        key: what it asks for, if it does.
        terms: what the run wants of it.
        base: what its description must say of the base model.
        reader: of its answers, if it is to give any.
        deadlines: shared by the workers of a run.
        stage: plays rollouts with it, if there are any.
    """

    def __init__(
        self,
        number: int,
        url: str,
        key: str | None,
        terms: Terms,
        base: Mapping[str, Any],
        reader: Reader | None,
        deadlines: Deadlines,
        stage: Stage | None = None,
    ) -> None:
        self.number = number
        self.url = url
        self.place: Place | None = None
        self.done: int | None = None
        self.absent = ""
        """Why the server has not answered yet."""
        self._terms = terms
        self._base = base
        self._reader = reader
        self._deadlines = deadlines
        self._stage = stage
        self._held = False
        self._ending = threading.Lock()  # the crew's thread and the trainer's may both end it
        self._key = key
        self._client = self._connected()

    def __str__(self) -> str:
        return f"worker {self.number} at {self.url}"

    def look(self, seconds: float) -> Place | None:
        """As `Handle.look`."""
        began = time.monotonic()
        try:
            answer = self._answer(self._client, "GET", PATH, b"", began + GREET_SECONDS)
        except httpx.HTTPError as error:
            self._wait(f"no answer ({first_line(error)})", began + seconds)
            return None
        except Lost as error:
            self._wait(str(error), began + seconds)
            return None
        try:
            said = GREETING.validate_json(answer or b"")
        except ValidationError as error:
            ours = packages()["estune"]
            raise EstuneError(f"{self.url}: what answers is not estune {ours}: give a server's address") from error
        self.place = Place(self.url, said.host, said.pid, said.software)
        return self.place

    def _wait(self, why: str, until: float) -> None:
        left = until - time.monotonic()
        if not self.absent and left > 0:
            log.warning("%s: %s; waiting for it", self, why)
        self.absent = why
        time.sleep(max(0.0, left))

    def open(self) -> tuple[Description, int | None]:
        """As `Handle.open`; a run that is gone keeps its servers for half a minute.

        Raises:
            EstuneError: the server cannot train what the run wants, or another run has it.
        """
        until = time.monotonic() + LEASE_SECONDS + SPARE_SECONDS
        while True:
            try:
                opened = self.post("open", [self._terms], self._deadlines.of("open"))
                self._held = True
                refuse_other_base(self.url, opened.description, self._base)
                return opened.description, opened.done
            except _Taken as error:
                if time.monotonic() > until:
                    raise EstuneError(f"{self.url}: {error}: end that run, or take another server") from None
                self._wait(str(error), time.monotonic() + 1.0)

    def call(self, kind: str, *arguments: Any, units: int = 1) -> Any:
        """As `Handle.call`. Prompts are sent where the server does not know them by their name."""
        limit = self._deadlines.of(kind, units)
        began = time.monotonic()
        said = list(arguments[:1] if kind == "rebuild" else arguments)  # not the checkpoint: it lies here
        prompts: Named | None = None
        if (place := _PROMPTS.get(kind)) is not None:
            prompts = said[place] if isinstance(said[place], Named) else named(said[place])
            said[place] = prompts.name
            if is_played(prompts.ids):
                return self._play(kind, said, prompts.ids)
        try:
            found = self.post(kind, said, limit)
        except _UnknownPrompts:
            assert prompts is not None
            self.post("prompts", [prompts.name, [to_send(ids) for ids in prompts.ids]], limit)
            found = self.post(kind, said, limit)
        self._deadlines.took(kind, time.monotonic() - began)
        if prompts is None or kind == "compare":
            return found
        completions = self._completions(found.token_ids if kind == "evaluate" else found, prompts, said[-1])
        if kind == "generate":
            return completions
        return Evaluated(completions, found.perturb_time, found.generate_time, updates=said[0])

    def _play(self, kind: str, said: Sequence[Any], openings: Sequence[Sequence[int]]) -> Any:
        """Play rollouts here, whose turns the server completes with the weights that it holds meanwhile."""
        done, member, sigma = said[:3] if kind == "evaluate" else (said[0], None, 0.0)
        play = secrets.token_hex(8)
        perturbed = self.post("hold", [done, play, member, sigma], self._deadlines.of("hold"))
        began = time.perf_counter()

        def turns(joined: Sequence[Joined], left: Sequence[int]) -> list[Ended]:
            asked = time.monotonic()
            found: list[Ended] = self.post("turns", [play, joined, left], self._deadlines.of("turns"))
            self._deadlines.took("turns", time.monotonic() - asked)
            return found

        assert self._stage is not None
        completions = self._stage.play(cast("Sequence[Opening]", openings), said[-1], turns)
        if kind == "generate":
            return completions
        return Evaluated(completions, perturbed, time.perf_counter() - began, updates=done)

    def _completions(self, token_ids: list[list[int]], prompts: Named, sampling: Sampling) -> list[Completion]:
        most = max(map(len, token_ids), default=0)
        if len(token_ids) != len(prompts.ids) or most > sampling.max_new_tokens:
            raise EstuneError(
                f"{self.url}: it answered {len(token_ids)} completions of up to {most} tokens, where "
                f"{len(prompts.ids)} of up to {sampling.max_new_tokens} were asked for: do without it"
            )
        assert self._reader is not None
        return self._reader.read(token_ids)

    def end(self) -> None:
        """As `Handle.end`: drop what is under way, and leave the server to others."""
        self._client.close()
        with self._ending:
            if self._stage is not None:
                self._stage.close()
            if self._held:
                self._held = False
                # It may be gone.
                with suppress(Lost, StaleWeights, EstuneError), self._connected() as client:
                    self.post("release", [], RELEASE_SECONDS, client)

    def _connected(self) -> httpx.Client:
        return httpx.Client(
            base_url=self.url,
            headers={"authorization": f"Bearer {self._key}"} if self._key else {},
            timeout=httpx.Timeout(SILENT_SECONDS, connect=CONNECT_SECONDS),
            limits=httpx.Limits(keepalive_expiry=KEPT_SECONDS),
        )

    def post(self, kind: str, arguments: Sequence[Any], limit: float, client: httpx.Client | None = None) -> Any:
        """Make a call, and return its result.

        Raises:
            Lost: no server answers, or not in time.
            StaleWeights: its weights are not the caller's.
            EstuneError: it refuses, or failed.
        """
        until = time.monotonic() + limit
        body = b'{"lease":"%b","arguments":%b}' % (
            self._terms.lease.encode(),
            ARGUMENTS[kind].dump_json(tuple(arguments)),
        )
        client = client or self._client
        try:
            try:
                answer = self._answer(client, "POST", f"{PATH}/{kind}", body, until)
            except httpx.RemoteProtocolError:  # a connection that the server had given up; each call may be repeated
                answer = self._answer(client, "POST", f"{PATH}/{kind}", body, until)
        except (httpx.HTTPError, httpx.StreamError, RuntimeError) as error:
            raise Lost(f"the connection broke off ({first_line(error)})") from error
        if answer is None:
            raise Lost(f"no answer for {limit:.0f} s (worker_timeout)")
        try:
            said = json.loads(answer)
            failure = said.get("failure")
            result = RESULTS[kind].validate_python(said["result"]) if failure is None else None
        except (ValueError, AttributeError, KeyError, RecursionError) as error:
            raise EstuneError(f"{self.url}: its answer to {kind} is not estune's ({first_line(error):.80})") from error
        why = " ".join(str(said.get("why")).split())[:MOST_TOLD]
        match failure:
            case None:
                return result
            case "refused":
                raise EstuneError(f"{self.url}: {why}")
            case "stale":
                raise StaleWeights
            case "gone":
                raise Lost(why)
            case "taken":
                raise _Taken(why)
            case "unknown prompts":
                raise _UnknownPrompts
        raise EstuneError(f"{self.url}: {kind} failed there ({why}); its log says more")

    def _answer(self, client: httpx.Client, method: str, path: str, body: bytes, until: float) -> bytes | None:
        """The whole answer, read to its end so that the connection is kept; None if it is not there in time.

        Empty lines before what is said are signs of life.
        """
        found = bytearray()
        with client.stream(method, path, content=body) as answer:
            if answer.status_code >= 500:
                raise Lost(f"it answers {answer.status_code}")
            if answer.status_code != 200:
                raise EstuneError(f"{self.url}: {_refusal(answer.status_code)}")
            for piece in answer.iter_bytes():
                found += piece
                if time.monotonic() > until:
                    return None
                if len(found) > MOST_BYTES:
                    raise EstuneError(f"{self.url}: an answer of more than {MOST_BYTES:,} bytes: it is not estune's")
        if not found.strip():
            raise Lost("the connection broke off")
        return bytes(found)


def refuse_other_base(where: str, found: Description, base: Mapping[str, Any]) -> None:
    """Refuse an engine that has another model than a run.

    Args:
        where: the engine, for the message.
        found: what it trains.
        base: what that has to be, by the names of a `Description`.
    """
    for key, ours in base.items():
        if (theirs := getattr(found, key)) != ours:
            raise EstuneError(
                f"{where}: it serves another model than the run's: {key} {str(theirs)[:60]}, here {str(ours)[:60]}; "
                "serve the run's, the same files"
            )


def named(prompt_ids: Sequence[Sequence[int]]) -> Named:
    """Prompts with their name."""
    return Named(name_of(prompt_ids), prompt_ids)


class _Taken(Exception):
    pass


class _UnknownPrompts(Exception):
    pass


def _refusal(status: int) -> str:
    """What a status stands for, and what to do."""
    match status:
        case 301 | 302 | 303 | 307 | 308:
            return f"it sends elsewhere ({status}), where no key follows: give the address itself, such as https://"
        case 413:
            return "something before it takes no request of that size (413), a step's prompts: raise that limit"
        case 401 | 403:
            return f"it refuses the key ({status}): set {KEY} here to its --api-key"
        case 404 | 405:
            return (
                f"it does not know {PATH} ({status}): it is no vLLM server, or was started without estune; start it as "
                "docs/scale.md says (VLLM_PLUGINS=estune, --weight-transfer-config)"
            )
    return f"it answers {status} to estune {packages()['estune']}: make it the same version"
