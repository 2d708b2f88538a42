"""Environments behind a server of OpenEnv: `openenv:http://localhost:8000`.

They are spoken to as by OpenEnv's own clients, over a web socket for each rollout; OpenEnv itself is not needed. An
action is the model's answer, in one field. Actions of several parts, and servers of tools, are left out.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from typing import Any, ClassVar
from urllib.error import URLError
from urllib.request import urlopen

from pydantic import Field

from estune.errors import EstuneError, first_line
from estune.grading.convention import Row
from estune.grading.rollout import Rollout, with_rollout
from estune.tasks.base import Task
from estune.tasks.options import OwnOptions, TaskOptions

PREFIX = "openenv:"
SIZE = 200
SECONDS = 10.0  # to connect in

# A seed of a row, as of a board of TextArena.
SPAN = 1 << 20
SEEDS = 1 << 11


class OpenEnvSession:
    """An environment, as `grading.rollout.Environment`: a session with a server of OpenEnv.

    The reward is the sum of those of all steps.

    Args:
        url: the server's.
        action: the field of an action that the model's answer goes into.
        shown: the field of an observation that the model is shown.
        options: what else a session is reset with, as JSON.
        instruction: what the model is shown before the first observation.
    """

    def __init__(self, url: str, action: str, shown: str, options: str = "{}", instruction: str = "") -> None:
        from websockets.exceptions import WebSocketException
        from websockets.sync.client import connect

        self._where = f"openenv {url}"
        self._action = action
        self._shown = shown
        self._options = json.loads(options)
        self._instruction = instruction
        self._reward = 0.0
        self._open = ExitStack()
        self._failures: tuple[type[Exception], ...] = (OSError, TimeoutError, WebSocketException)
        try:
            self._link = self._open.enter_context(
                connect(f"ws{url.removeprefix('http')}/ws", open_timeout=SECONDS, max_size=None, proxy=None)
            )
        except self._failures as error:
            raise EstuneError(f"{self._where}: cannot be reached: {first_line(error)}") from error

    def __del__(self) -> None:
        """Close the session: a rollout can end before it has."""
        if hasattr(self, "_open"):
            self._open.close()

    def reset(self, row: Row) -> str:
        """As `Environment.reset`; the row's `seed` is the session's."""
        text = self._observed(self._told("reset", {"seed": row["seed"], **self._options}))
        return f"{self._instruction}\n\n{text}" if self._instruction else text

    def step(self, completion: str) -> str | Mapping[str, Any]:
        """As `Environment.step`."""
        said = self._told("step", {self._action: completion})
        self._reward += float(said.get("reward") or 0.0)
        if not said.get("done"):
            return self._observed(said)
        self._open.close()
        return {"reward": self._reward}

    def _observed(self, said: Mapping[str, Any]) -> str:
        found = said["observation"].get(self._shown)
        return found if isinstance(found, str) and found else json.dumps(found, ensure_ascii=False)

    def _told(self, kind: str, data: Mapping[str, Any]) -> Mapping[str, Any]:
        """The data of a server's answer."""
        try:
            with suppress(*self._failures):  # it may have said why it hangs up
                self._link.send(json.dumps({"type": kind, "data": data}))
            said = json.loads(self._link.recv())
        except self._failures as error:
            raise EstuneError(f"{self._where}: was lost: {first_line(error)}") from error
        if said.get("type") != "observation":
            told = said.get("data") or said
            full = told.get("code") == "CAPACITY_REACHED"
            remedy = "; it takes no more sessions side by side: set rollouts_at_once" if full else ""
            raise EstuneError(f"{self._where}: {kind} was refused: {json.dumps(told)[:300]}{remedy}")
        found: Mapping[str, Any] = said["data"]
        return found


class OpenEnvConfig(TaskOptions):
    """Options of a task behind a server of OpenEnv."""

    summary: ClassVar[str] = "environments behind a server of OpenEnv"
    usual_data: ClassVar[str] = "the server's"

    name: str = Field(
        PREFIX,
        description="the task: openenv: and the server's URL",
        pattern=r"^openenv:https?://.+$",
        validate_default=False,
    )
    train_size: int | None = Field(None, ge=1, le=SPAN, description="seeds to train on; 200 if not given")
    eval_size: int | None = Field(None, ge=1, le=SPAN, description="held-out seeds; 200 if not given")
    action: str | None = Field(
        None, description="field of an action that the answer goes into; the one that is text, if not given"
    )
    observation: str | None = Field(
        None, description="field of an observation that is shown; the one that is text, if not given"
    )
    instruction: str = Field("", description="what is shown before the first observation")
    options: OwnOptions = Field(
        default_factory=dict, description="what a session is reset with beside a seed, as task.options.KEY=VALUE"
    )
    chat: bool = Field(True, description="as a conversation, for the chat template; false: as plain text")

    def build(self, seed: int) -> Task:
        """Both sets, each row a seed, played by `OpenEnvSession`.

        Raises:
            EstuneError: websockets is not installed, the server cannot be reached, or its actions are no text.
        """
        url = self.name.removeprefix(PREFIX).rstrip("/")
        schema = self._schema(url)
        action = self.action or self._text_field(schema, "action")
        shown = self.observation or self._text_field(schema, "observation")
        make = functools.partial(
            OpenEnvSession, url, action, shown, json.dumps(self.options, sort_keys=True), self.instruction
        )
        make().reset({"seed": 0})
        functions, weights, accuracy = with_rollout([], [], None)
        return Task(
            name=self.name,
            train=self._rows((1 + seed % SEEDS) * SPAN, self.train_size or SIZE),
            evaluation=self._rows(0, self.eval_size or SIZE),
            reward_funcs=functions,
            reward_weights=weights,
            accuracy=accuracy,
            rollout=Rollout("environment", make, chat=self.chat),
        )

    def _schema(self, url: str) -> Mapping[str, Any]:
        try:
            import websockets  # noqa: F401
        except ImportError as error:
            raise EstuneError("openenv needs the package websockets: pip install 'estune[openenv]'") from error
        try:
            with urlopen(f"{url}/schema", timeout=SECONDS) as answer:
                found: Mapping[str, Any] = json.load(answer)
        except (URLError, OSError, ValueError) as error:
            raise EstuneError(
                f"task {self.name}: no server of OpenEnv answers at {url}/schema: {first_line(error)}; start it first"
            ) from error
        return found

    def _text_field(self, schema: Mapping[str, Any], part: str) -> str:
        fields = schema.get(part, {}).get("properties", {})
        texts = [name for name, kind in fields.items() if kind.get("type") == "string"]
        if len(texts) != 1:
            raise EstuneError(
                f"task {self.name}: of the fields {', '.join(fields) or 'none'} of its {part} {len(texts)} are text; "
                f"name one in task.{part}"
            )
        return str(texts[0])

    def _rows(self, first_seed: int, size: int) -> list[Row]:
        return [{"prompt": f"[seed {seed}]", "seed": seed} for seed in range(first_seed, first_seed + size)]
