"""Rollouts, by which a row is played if one completion does not end it, and what comes of them.

A rollout is a program that talks to the model and ends with a number. There are three kinds:

- an environment in this process: `reset(row)` gives what the model is shown first, `step(completion)` what it is shown
  next, or the reward;
- a function `rollout(client, row)`, which may be `async`: the client is OpenAI's, at the model's endpoint;
- any program: the endpoint in its environment variables, the row as JSON on standard input, the reward on the last line
  of its output.

Environments of the library verifiers, which its own code plays, are a fourth.

The reward is a number, or a mapping with `reward` and, optionally, `metrics` and `transcript`.
"""

from __future__ import annotations

import functools
import inspect
import json
import shlex
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from estune.completion import Message, Played, Prompt
from estune.errors import EstuneError, printable
from estune.grading.convention import Log, RewardFunction, Row, bounded, reward_name
from estune.grading.modules import Place, place_of
from estune.grading.verdict import Verdict

Kind = Literal["environment", "function", "program", "verifiers"]
REWARD = "rollout"
"""The name of rollouts' rewards in metrics."""


class Environment(Protocol):
    """A game for one rollout. Each rollout has its own, used by one thread."""

    def reset(self, row: Row) -> Prompt:
        """What the model is shown first: messages, or text.

        Args:
            row: a row of the data, with all its columns.
        """
        ...

    def step(self, completion: str) -> Prompt | float | Mapping[str, Any]:
        """What comes after an answer.

        Args:
            completion: the model's answer, as text.

        Returns:
            Messages that follow the answer; or text, which is a user's message in a conversation and otherwise
            continues right after the answer; or, at the end, the reward: a number, or a mapping with `reward`.
        """
        ...


@dataclass(frozen=True)
class Rollout:
    """How the rows of a task are played.

    Attributes:
        kind: what `target` is.
        target: a class or function that makes an environment, a function `rollout(client, row)`, a command, or
            an environment of verifiers.
        chat: whether a text that opens an environment is shown as a user's message, where there is a chat template.
    """

    kind: Kind
    target: Any
    chat: bool = True

    def refuse_unreachable(self) -> None:
        """Refuse a target that other processes cannot import, if rollouts are played in several.

        Raises:
            EstuneError: it cannot be imported; the message says what to change.
        """
        target = self.target
        while isinstance(target, functools.partial):
            target = target.func
        name = getattr(target, "__qualname__", "")
        ours = self.kind in ("environment", "function")
        if ours and (getattr(target, "__module__", "") == "__main__" or "<" in name):
            raise EstuneError(
                f"rollout {name}: other processes play it too, and cannot import it: define it at the top level of a "
                "file of its own, and import it from there; or set replicas=1"
            )

    def __reduce__(self) -> tuple[Callable[..., Rollout], tuple[Any, ...]]:
        """Pickle it for another process, which gets the target from the place where this one has it."""
        target: Any = self.target
        given = None
        if isinstance(target, functools.partial):
            given = target.args, target.keywords
            target = target.func
        module = sys.modules.get(getattr(target, "__module__", None) or "")
        if self.kind == "program" or module is None or not hasattr(target, "__qualname__"):
            return Rollout, (self.kind, self.target, self.chat)
        return _found, (self.kind, place_of(module), target.__qualname__, given, self.chat)


def _found(kind: Kind, place: Place, name: str, given: tuple[Any, Any] | None, chat: bool) -> Rollout:
    target: Any = place.load()
    for part in name.split("."):
        target = getattr(target, part)
    return Rollout(kind, functools.partial(target, *given[0], **given[1]) if given else target, chat)


class Opening(list[int]):
    """What a model is shown first, as token ids, and the rollout that begins with it.

    Args:
        ids: the token ids of the row's prompt.
        rollout: how the row is played.
        row: the row.
    """

    def __init__(self, ids: Sequence[int], rollout: Rollout, row: Row) -> None:
        super().__init__(ids)
        self.rollout = rollout
        self.row = row

    def __reduce__(self) -> tuple[type, tuple[list[int], Rollout, Row]]:
        return Opening, (list(self), self.rollout, self.row)


def is_played(prompt_ids: Sequence[Sequence[int]]) -> bool:
    """Whether these prompts open rollouts."""
    return any(isinstance(prompt, Opening) for prompt in prompt_ids)


class FromRollout:
    """A reward function that returns a rollout's reward or, by name, one of its metrics.

    Args:
        name: the metric's name; by default, that of the reward itself.
        share: whether the values lie in 0 to 1: as accuracy they are then shown in percent.
    """

    def __init__(self, name: str = REWARD, *, share: bool = False) -> None:
        self.__name__ = name
        self.share = share

    def __call__(self, completions: Sequence[Any], **columns: Any) -> list[float | None]:
        """None for each: a text that was not played has no such value."""
        return [None] * len(completions)

    def verdict(self, played: Played | None) -> Verdict:
        """The verdict on a rollout, for grading."""
        if played is None:
            return Verdict("score")
        if self.__name__ != REWARD:
            return Verdict("score", played.metrics.get(self.__name__))
        extras: dict[str, list[Any]] = {
            "transcript": [json.dumps(played.transcript, ensure_ascii=False)],
            "turns": [played.turns],
        }
        metrics = {name: [value] for name, value in played.metrics.items()} | {"turns": [float(played.turns)]}
        if played.failure:
            return Verdict(played.failure, None, played.why, extras, metrics)  # type: ignore[arg-type]
        return Verdict("score", played.reward, "", extras, metrics)


def by_program(command: str, *, chat: bool = True) -> Rollout:
    """A rollout by a command, which is split into words as by a shell.

    Raises:
        EstuneError: there is no such program.
    """
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise EstuneError(f"task.program {command!r:.80}: {error}; write it as in a shell") from error
    if not words or shutil.which(words[0]) is None:
        raise EstuneError(
            f"task.program {command!r:.80}: there is no such program; give a command that can be run here"
        )
    return Rollout("program", command, chat=chat)


def with_rollout(
    functions: Sequence[RewardFunction], weights: Sequence[float], accuracy: str | None
) -> tuple[list[RewardFunction], list[float], str]:
    """Reward functions of a task whose rows are played, their weights, and which of them tells accuracy.

    Args:
        functions: further reward functions, which grade the last answer.
        weights: one for each of these.
        accuracy: the name of one of these, or a metric of the rollouts; their reward if None.
    """
    known = {REWARD, *map(reward_name, functions)}
    metric = [FromRollout(accuracy)] if accuracy is not None and accuracy not in known else []
    return [FromRollout(), *functions, *metric], [1.0, *weights, *(0.0 for _ in metric)], accuracy or REWARD


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a rollout ended with; a transcript if it gave its own."""

    reward: float | None
    metrics: dict[str, float]
    transcript: list[Message] | None = None


def outcome_of(given: Any) -> Outcome:
    """The outcome of a rollout, from what it returned.

    Args:
        given: a number, or a mapping with `reward` (None: does not apply) and, where there are any, `metrics`, a
            mapping of numbers, and `transcript`, a list of messages; other numbers in it are metrics too.

    Raises:
        EstuneError: it is something else.
    """
    if not isinstance(given, Mapping):
        return Outcome(_number("the rollout's end", given), {})
    if "reward" not in given:
        raise EstuneError(f"gave {_shown(given)}, a mapping without reward: give it a number under that name")
    reward = None if given["reward"] is None else _number("reward", given["reward"])
    metrics = dict(given.get("metrics") or {})
    transcript = given.get("transcript")
    if transcript is not None and not (
        isinstance(transcript, list) and all(isinstance(message, Mapping) for message in transcript)
    ):
        raise EstuneError(f"gave {_shown(transcript)} as transcript, not a list of messages")
    metrics |= {name: v for name, v in given.items() if name not in ("reward", "metrics", "transcript")}
    log = Log(1)
    for name, value in metrics.items():
        log.metric(str(name), _number(f"metric {name}", value))
    plain = None if transcript is None else json.loads(json.dumps(transcript, default=str))
    return Outcome(reward, {name: values[0] for name, values in log.metrics.items()}, plain)


def outcome_of_line(line: str) -> Outcome:
    """The outcome of a program, from the last line that it printed: a number, or JSON.

    Raises:
        EstuneError: it is neither.
    """
    try:
        found = json.loads(line)
    except ValueError:
        found = line.strip()
        try:
            found = float(found)
        except ValueError:
            raise EstuneError(
                f"printed {_shown(line)} last, neither a number nor JSON: print the reward on the last line"
            ) from None
    if isinstance(found, str | list | bool) or found is None:
        raise EstuneError(f"printed {_shown(line)} last: print a number, or a mapping with reward")
    return outcome_of(found)


def environment_of(target: Any) -> Environment:
    """An environment, made by calling what makes one.

    Raises:
        EstuneError: it has no `reset` and `step`.
    """
    made = target()
    missing = [name for name in ("reset", "step") if not callable(getattr(made, name, None))]
    if missing:
        raise EstuneError(f"{type(made).__name__} has no {' and no '.join(missing)}: an environment needs both")
    if inspect.iscoroutinefunction(made.step) or inspect.iscoroutinefunction(made.reset):
        raise EstuneError(f"{type(made).__name__} is async: write it plain, or as a function rollout(client, row)")
    found: Environment = made
    return found


def _number(what: str, value: Any) -> float:
    try:
        if isinstance(value, str | bytes) or value is None or getattr(value, "ndim", False):
            raise TypeError
        return bounded(value)
    except (TypeError, ValueError):
        raise EstuneError(f"gave {_shown(value)} ({type(value).__name__}) as {what}, not a number") from None


def _shown(value: Any) -> str:
    return printable(repr(value)[:60])
