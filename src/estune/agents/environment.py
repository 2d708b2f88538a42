"""Environments in this process: the engine decodes the turns of all rollouts together, without a network."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from estune.agents.play import Limits, Player, Run, TooLong, Turns
from estune.completion import Prompt, Sampling
from estune.engines.continuous import Batcher
from estune.engines.prompts import PromptEncoder
from estune.errors import EstuneError
from estune.grading.rollout import environment_of, outcome_of


class EnvironmentPlayer(Player):
    """As `Player`, for environments, turn by turn."""

    def __init__(self, encoder: PromptEncoder, limits: Limits) -> None:
        super().__init__(encoder, limits)
        self._encoding = threading.Lock()  # tokenizers are not for two threads at a time
        self._sampling = Sampling(1)

    def open(self, batcher: Batcher, sampling: Sampling) -> None:
        """As `Player.open`."""
        self._sampling = sampling

    def play(self, run: Run) -> Turns:
        """As `Player.play`."""
        rollout = run.opening.rollout
        game = environment_of(rollout.target)
        said: Any = game.reset(dict(run.opening.row))
        if isinstance(said, str) and rollout.chat and self._encoder.has_template:
            said = [{"role": "user", "content": said}]
        if not isinstance(said, str | list) or not said:
            raise EstuneError(f"reset gave {said!r:.60}: give it messages, or a text, that the model is shown")
        text = said if isinstance(said, str) else None
        run.transcript = [{"role": "text", "content": said}] if isinstance(said, str) else list(said)
        for _ in range(self._limits.turns):
            completion = yield self._asked(run.transcript if text is None else text)
            answer = completion.text
            run.transcript.append({"role": "assistant", "content": answer})
            text = None if text is None else text + answer
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

    def _asked(self, prompt: Prompt) -> tuple[list[int], Sampling]:
        """Token ids of what was said so far, and how the answer is drawn: as far as the model's positions reach."""
        with self._encoding:
            (ids,) = self._encoder.encode([prompt])
        reach = self._encoder.positions
        sampling = self._sampling
        if reach is None:
            return ids, sampling
        if len(ids) >= reach:
            raise TooLong(f"has come to {len(ids)} tokens, and the model reaches {reach}")
        return ids, replace(sampling, max_new_tokens=min(sampling.max_new_tokens, reach - len(ids)))
