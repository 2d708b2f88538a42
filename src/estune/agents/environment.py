"""Environments in this process: the engine decodes the turns of all rollouts together, without a network."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from estune.agents.play import Limits, Run, Stopped, TooLong, ask
from estune.completion import Message, Sampling
from estune.engines.continuous import Batcher
from estune.engines.prompts import PromptEncoder
from estune.errors import EstuneError
from estune.grading.rollout import Outcome, environment_of, outcome_of


class EnvironmentPlayer:
    """As `Player`, for environments.

    Args:
        encoder: makes token ids of what the model is shown.
        limits: how many turns a rollout may take.
    """

    def __init__(self, encoder: PromptEncoder, limits: Limits) -> None:
        self._encoder = encoder
        self._limits = limits
        self._encoding = threading.Lock()  # tokenizers are not for two threads at a time
        self._batcher: Batcher | None = None
        self._sampling = Sampling(1)

    def open(self, batcher: Batcher, sampling: Sampling) -> None:
        """As `Player.open`."""
        self._batcher = batcher
        self._sampling = sampling

    def shut(self) -> None:
        """As `Player.shut`."""
        self._batcher = None

    def close(self) -> None:
        """As `Player.close`."""

    def play(self, run: Run) -> Outcome:
        """As `Player.play`."""
        rollout = run.opening.rollout
        run.turn = time.monotonic()
        game = environment_of(rollout.target)
        said: Any = game.reset(dict(run.opening.row))
        if isinstance(said, str) and rollout.chat and self._encoder.has_template:
            said = [{"role": "user", "content": said}]
        if not isinstance(said, str | list) or not said:
            raise EstuneError(f"reset gave {said!r:.60}: give it messages, or a text, that the model is shown")
        text = said if isinstance(said, str) else None
        run.transcript = [{"role": "text", "content": said}] if isinstance(said, str) else list(said)
        for _ in range(self._limits.turns):
            run.turn = None
            answer = self._ask(run, text)
            text = None if text is None else text + answer
            run.turn = time.monotonic()
            said = game.step(answer)
            if not isinstance(said, str | list):
                if said is None:
                    raise EstuneError("step gave None: give it messages or text to go on with, or the reward")
                return outcome_of(said)
            if isinstance(said, str):
                text = None if text is None else text + said
                said = [{"role": "user" if text is None else "text", "content": said}]
            elif text is not None:
                raise EstuneError("step gave messages after a text: give text on, or begin with messages")
            if not all(isinstance(message, Mapping) for message in said):
                raise EstuneError(f"step gave {said!r:.60}: give it messages, text, or the reward")
            run.transcript.extend(dict(message) for message in said)
        raise TooLong(f"goes on after {self._limits.turns} turns (max_turns)")

    def _ask(self, run: Run, text: str | None) -> str:
        """The model's answer to what was said so far."""
        batcher = self._batcher
        if batcher is None:
            raise Stopped("was ended")
        prompt: str | list[Message] = run.transcript if text is None else text
        with self._encoding:
            (ids,) = self._encoder.encode([prompt])
        sampling = self._sampling
        reach = self._encoder.positions
        if reach is not None:
            if len(ids) >= reach:
                raise TooLong(f"has come to {len(ids)} tokens, and the model reaches {reach}")
            sampling = replace(sampling, max_new_tokens=min(sampling.max_new_tokens, reach - len(ids)))
        answer = ask(batcher, run, ids, sampling).text
        run.transcript.append({"role": "assistant", "content": answer})
        return answer
