"""What answers a run's calls in a server: a `Worker` with one caller at a time, and its routes.

A call is a POST with {"lease": ..., "arguments": [...]}. The answer is lines: empty ones as long as it is at work, then
{"result": ...} or {"failure": ..., "why": ...}.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import platform
import threading
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

from estune.completion import Sampling
from estune.errors import EstuneError, first_line
from estune.es.strategy import Member, Update
from estune.pool.base import Description
from estune.pool.remote.turns import Held
from estune.pool.remote.wire import (
    ARGUMENTS,
    GREETING,
    HEARTBEAT,
    LEASE_SECONDS,
    PATH,
    PROMPTS_KEPT,
    RESULTS,
    Answers,
    Ended,
    Failure,
    Greeting,
    Ids,
    Joined,
    Opened,
    Sighted,
    Swapped,
    Terms,
    as_sent,
)
from estune.pool.replica import Trained
from estune.pool.worker import StaleWeights, Worker, software

log = logging.getLogger(__name__)


class Failed(Exception):
    """A call that did not do what it should; `kind` says to the caller what to do."""

    def __init__(self, kind: Failure, why: str) -> None:
        super().__init__(why)
        self.kind = kind


@dataclass(eq=False)
class Asked:
    """A call that somebody waits for, until it is dropped."""

    dropped: bool = False


class Service:
    """A worker that its run's process does not own, and which outlives the run.

    Args:
        model: what it says it serves.
        make: makes the replica for what a run wants.
        settle: called after each call, however it ended.
        abort: ends a generation that nobody waits for any more.
    """

    def __init__(
        self,
        model: str,
        make: Callable[[Terms], Trained],
        settle: Callable[[], object] = lambda: None,
        abort: Callable[[], object] = lambda: None,
    ) -> None:
        self._model = model
        self._make = make
        self._settle = settle
        self._abort = abort
        self._asked: Asked | None = None  # what is at work
        self._one_at_a_time = threading.Lock()
        self._worker = Worker()
        self._terms: Terms | None = None
        self._description: Description | None = None
        self._free = True  # nobody has it
        self._called = 0.0  # when the last call ended
        self._prompts: dict[str, Ids] = {}
        self._served: tuple[list[Update], str] | None = None  # updates and fingerprint of a base that a swap has made
        self._held: Held | None = None  # weights that rollouts are played with
        self._calls: dict[str, Callable[..., Any]] = {
            "open": self._open,
            "prompts": self._keep,
            "evaluate": self._evaluate,
            "generate": self._generate,
            "hold": self._hold,
            "turns": self._turns,
            "compare": self._compare,
            "apply": self._apply,
            "rebuild": self._rebuild,
            "swap": self._swap,
            "release": self._release,
        }

    def greet(self) -> Greeting:
        """What it says of itself."""
        return Greeting(self._model, platform.node(), os.getpid(), software())

    def run(self, kind: str, lease: str, arguments: Any, asked: Asked | None = None) -> Any:
        """Do a call, once those before it are done.

        Raises:
            Failed: it cannot be done.
        """
        with self._one_at_a_time:
            try:
                self._asked = asked
                if asked is not None and asked.dropped:
                    raise Failed("gone", "nobody waits for it any more")
                if kind != "open" and (self._terms is None or self._terms.lease != lease):
                    raise Failed("gone", "it was started anew, or another run has had it since")
                if kind not in ("turns", "open"):
                    self._let_go()
                return self._calls[kind](*arguments)
            except StaleWeights as error:
                raise Failed("stale", "its weights have had other updates") from error
            except EstuneError as error:
                raise Failed("refused", str(error)) from error
            except Failed:
                raise
            except Exception as error:
                log.exception("%s failed", kind)
                raise Failed("failed", first_line(error)) from error
            finally:
                if self._terms is not None and self._terms.lease == lease:
                    self._called = time.monotonic()
                self._settle()

    def drop(self, asked: Asked) -> None:
        """End a call for which nobody waits any more, or do not begin it."""
        asked.dropped = True
        if self._asked is asked:
            self._abort()

    def _open(self, terms: Terms) -> Opened:
        """Let a run have the server, and make the replica that it wants, unless there is one like it."""
        known = self._terms is not None and self._terms.lease == terms.lease
        ago = time.monotonic() - self._called
        if not (known or self._free or ago > LEASE_SECONDS):
            raise Failed("taken", f"it is at work for another run, which called {ago:.0f} s ago")
        self._let_go()
        if self._terms is None or replace(self._terms, lease="") != replace(terms, lease=""):
            self._terms = None
            self._worker.done = -1
            self._worker.replica = self._make(terms)
            self._description = self._worker.replica.describe()
            self._worker.done = 0
            self._served = [], self._description.fingerprint
        self._terms = terms
        self._free = False
        assert self._description is not None
        done = self._worker.done
        return Opened(self._description, done if done == 0 or (known and done > 0) else None)

    def _release(self) -> None:
        """Serve the base, as far as it has come, and be there for others."""
        self._worker.replica.weights.restore()
        self._free = True

    def _keep(self, name: str, prompts: list[list[int] | Sighted]) -> None:
        prompt_ids = [as_sent(prompt) for prompt in prompts]
        while len(self._prompts) >= PROMPTS_KEPT:
            del self._prompts[next(iter(self._prompts))]
        self._prompts[name] = prompt_ids

    def _named(self, name: str) -> Ids:
        if name not in self._prompts:
            raise Failed("unknown prompts", name)
        return self._prompts[name]

    def _apply(self, done: int, update: Update) -> str:
        self._served = None
        return self._worker.apply(done, update)

    def _rebuild(self, updates: list[Update]) -> str:
        self._served = None
        return self._worker.rebuild(updates, None)

    def _swap(self, updates: list[Update], fingerprint: str, keep: int) -> Swapped:
        """Serve what these updates lead to, while until the end what was served before goes on.

        Args:
            updates: all that the base model is to have had.
            fingerprint: what they lead to.
            keep: bases that may be kept in memory, for who comes back to them.
        """
        began = time.perf_counter()
        replica = self._worker.replica
        weights = replica.weights
        before = self._served
        self._served = None
        self._worker.done = -1  # a run that comes makes its own
        if before is not None:
            weights.keep(before[1], keep)
        how: Literal["kept", "advanced", "rebuilt"] = "kept"
        found = weights.fingerprint() if weights.bring(fingerprint) else ""
        made = 0
        if not found and before is not None and updates[: len(before[0])] == before[0]:
            how = "advanced"
            made = len(updates) - len(before[0])
            replica.advance(updates[len(before[0]) :])
            found = weights.fingerprint()
        if found != fingerprint:
            how = "rebuilt"
            made = len(updates)
            found = replica.rebuild(updates)
        if found != fingerprint:
            raise EstuneError(f"the run's updates give fingerprint {found} here, its journal says {fingerprint}")
        self._served = updates, found
        self._release()
        return Swapped(found, how, made, time.perf_counter() - began)

    def _evaluate(self, done: int, member: Member, sigma: float, prompts: str, sampling: Sampling) -> Answers:
        found = self._worker.evaluate(done, member, sigma, self._named(prompts), sampling)
        ids = [completion.token_ids for completion in found.completions]
        return Answers(ids, found.perturb_time, found.generate_time)

    def _generate(self, done: int, prompts: str, sampling: Sampling) -> Ids:
        return [completion.token_ids for completion in self._worker.generate(done, self._named(prompts), sampling)]

    def _hold(self, done: int, play: str, member: Member | None, sigma: float) -> float:
        """Hold a member's weights, or the base's without one, for turns of rollouts that go by the name of `play`.

        Returns:
            Seconds that perturbing took.
        """
        began = time.perf_counter()
        self._worker.hold(done, member, sigma)
        taken = time.perf_counter() - began
        self._held = Held(play, self._worker.replica.engine)
        return taken

    def _turns(self, play: str, joined: list[Joined], left: list[int]) -> list[Ended]:
        """Take further turns in, and let some go; return those that have ended since, once there is one."""
        if self._held is None or self._held.play != play:
            raise Failed("gone", "it holds other weights than the rollouts are played with")
        return self._held.turns(joined, left)

    def _let_go(self) -> None:
        """End turns that are under way, before weights change."""
        if self._held is not None:
            held = self._held
            self._held = None
            held.close()

    def _compare(self, done: int, prompts: str, completion_ids: Ids) -> dict[str, float]:
        return self._worker.compare(done, self._named(prompts), completion_ids)


def add_routes(app: Any, service: Callable[[Any], Service]) -> None:
    """Answer at `PATH`.

    Args:
        app: of Starlette or FastAPI.
        service: finds the service that a request is for.
    """
    from starlette.requests import ClientDisconnect, Request
    from starlette.responses import JSONResponse, Response, StreamingResponse

    async def greet(request: Request) -> Response:
        return Response(GREETING.dump_json(service(request).greet()), media_type="application/json")

    async def call(request: Request) -> Response:
        kind = request.path_params["kind"]
        try:
            said = json.loads(await request.body())
            lease = str(said["lease"])
            arguments = ARGUMENTS[kind].validate_python(said["arguments"])
        except ClientDisconnect:
            return Response(status_code=400)  # which nobody reads
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            return JSONResponse({"failure": "failed", "why": first_line(error)}, 400)
        return StreamingResponse(
            answer_lines(service(request), kind, lease, arguments), media_type="application/x-ndjson"
        )

    app.add_route(PATH, greet, methods=["GET"])
    app.add_route(PATH + "/{kind}", call, methods=["POST"])


async def answer_lines(service: Service, kind: str, lease: str, arguments: Any) -> AsyncIterator[bytes]:
    """The answer to a call, with a sign of life now and then until it is there."""
    asked = Asked()
    task = asyncio.ensure_future(asyncio.to_thread(service.run, kind, lease, arguments, asked))
    try:
        while not (await asyncio.wait({task}, timeout=HEARTBEAT))[0]:
            yield b"\n"
        try:
            yield b'{"result":' + RESULTS[kind].dump_json(task.result()) + b"}\n"
        except Failed as failed:
            yield json.dumps({"failure": failed.kind, "why": str(failed)}).encode() + b"\n"
    finally:
        if not task.done():  # who asked has gone
            service.drop(asked)
