"""A server as the crew sees it: a worker that nobody here has started, whose calls have deadlines."""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import httpx
from pydantic import ValidationError

from estune.completion import Completion
from estune.errors import EstuneError, first_line
from estune.pool.base import Description, Evaluated
from estune.pool.deadlines import Deadlines, Lost
from estune.pool.remote.wire import ARGUMENTS, GREETING, HEARTBEAT, LEASE_SECONDS, PATH, RESULTS, Terms, name_of
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
_PROMPTS = {"evaluate": 3, "generate": 1, "compare": 1}  # the argument of a call that is prompts


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
            texts = self._tokenizer.batch_decode(token_ids, skip_special_tokens=True)
        return [
            Completion(text, ids, finished=ids[-1] in self._ends) for text, ids in zip(texts, token_ids, strict=True)
        ]


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
            answer = self._client.get(PATH, timeout=GREET_SECONDS)
        except httpx.HTTPError as error:
            self._wait(f"no answer ({first_line(error)})", began + seconds)
            return None
        if answer.status_code >= 500:
            self._wait(f"it answers {answer.status_code}", began + seconds)
            return None
        if answer.status_code != 200:
            raise EstuneError(f"{self.url}: {_refusal(answer.status_code)}")
        try:
            said = GREETING.validate_json(answer.content)
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
                opened = self._post("open", [self._terms], self._deadlines.of("open"))
                self._held = True
                self._check_base(opened.description)
                return opened.description, opened.done
            except _Taken as error:
                if time.monotonic() > until:
                    raise EstuneError(f"{self.url}: {error}: end that run, or take another server") from None
                self._wait(str(error), time.monotonic() + 1.0)

    def _check_base(self, found: Description) -> None:
        for key, ours in self._base.items():
            if (theirs := getattr(found, key)) != ours:
                raise EstuneError(
                    f"{self.url}: it serves another model than the run's: {key} {str(theirs)[:60]}, here "
                    f"{str(ours)[:60]}; serve the run's, the same files"
                )

    def call(self, kind: str, *arguments: Any, units: int = 1) -> Any:
        """As `Handle.call`. Prompts are sent where the server does not know them by their name."""
        limit = self._deadlines.of(kind, units)
        began = time.monotonic()
        said = list(arguments[:1] if kind == "rebuild" else arguments)  # not the checkpoint: it lies here
        prompts: Named | None = None
        if (place := _PROMPTS.get(kind)) is not None:
            prompts = said[place] if isinstance(said[place], Named) else named(said[place])
            said[place] = prompts.name
        try:
            found = self._post(kind, said, limit)
        except _UnknownPrompts:
            assert prompts is not None
            self._post("prompts", [prompts.name, prompts.ids], limit)
            found = self._post(kind, said, limit)
        self._deadlines.took(kind, time.monotonic() - began)
        if kind == "generate":
            assert self._reader is not None
            return self._reader.read(found)
        if kind == "evaluate":
            assert self._reader is not None
            completions = self._reader.read(found.token_ids)
            return Evaluated(completions, found.perturb_time, found.generate_time, found.updates)
        return found

    def end(self) -> None:
        """As `Handle.end`: drop what is under way, and leave the server to others."""
        self._client.close()
        with self._ending:
            if self._held:
                self._held = False
                # It may be gone.
                with suppress(Lost, StaleWeights, EstuneError), self._connected() as client:
                    self._post("release", [], RELEASE_SECONDS, client)

    def _connected(self) -> httpx.Client:
        return httpx.Client(
            base_url=self.url,
            headers={"authorization": f"Bearer {self._key}"} if self._key else {},
            timeout=httpx.Timeout(SILENT_SECONDS, connect=CONNECT_SECONDS),
            limits=httpx.Limits(keepalive_expiry=KEPT_SECONDS),
        )

    def _post(self, kind: str, arguments: Sequence[Any], limit: float, client: httpx.Client | None = None) -> Any:
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
                line = self._line(client, kind, body, until)
            except httpx.RemoteProtocolError:  # a connection that the server had given up; each call may be repeated
                line = self._line(client, kind, body, until)
        except (httpx.HTTPError, httpx.StreamError, RuntimeError) as error:
            raise Lost(f"the connection broke off ({first_line(error)})") from error
        if line is None:
            raise Lost(f"no answer for {limit:.0f} s (worker_timeout)")
        said = json.loads(line)
        why = str(said.get("why"))
        match said.get("failure"):
            case None:
                return RESULTS[kind].validate_python(said["result"])
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

    def _line(self, client: httpx.Client, kind: str, body: bytes, until: float) -> str | None:
        """The line with the answer; None if it is not there in time. Empty lines are signs of life."""
        with client.stream("POST", f"{PATH}/{kind}", content=body) as answer:
            if answer.status_code >= 500:
                raise Lost(f"it answered {answer.status_code}")
            if answer.status_code != 200:
                raise EstuneError(f"{self.url}: {_refusal(answer.status_code)}")
            for line in answer.iter_lines():
                if line.strip():
                    return line
                if time.monotonic() > until:
                    return None
        raise Lost("the connection broke off")


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
        case 401 | 403:
            return f"it refuses the key ({status}): set {KEY} here to its --api-key"
        case 404 | 405:
            return (
                f"it does not know {PATH} ({status}): it is no vLLM server, or was started without estune; start it as "
                "docs/scale.md says (VLLM_PLUGINS=estune, --weight-transfer-config)"
            )
    return f"it answers {status} to estune {packages()['estune']}: make it the same version"
