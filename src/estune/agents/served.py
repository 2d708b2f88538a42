"""What rollouts that talk to the endpoint have in common: the endpoint, a key for each, and what was said under it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from estune.agents.clients import Turn
from estune.agents.endpoint import Endpoint
from estune.agents.play import Limits, Player, Run, Stopped
from estune.completion import Sampling
from estune.engines.continuous import Batcher
from estune.engines.prompts import PromptEncoder


class ServedPlayer(Player):
    """As `Player`, but for `play`. The endpoint starts when it is first needed, and is kept from member to member."""

    def __init__(self, encoder: PromptEncoder, limits: Limits) -> None:
        super().__init__(encoder, limits)
        self._endpoint: Endpoint | None = None

    def open(self, batcher: Batcher, sampling: Sampling) -> None:
        """As `Player.open`."""
        if self._endpoint is None:
            self._endpoint = Endpoint(self._encoder, sampling, model=self._encoder.name, any_model=True)
        self._endpoint.sampling = sampling
        self._endpoint.serve(batcher)

    def shut(self) -> None:
        """As `Player.shut`: whoever still asks is refused."""
        if self._endpoint is not None:
            self._endpoint.serve(None)

    def close(self) -> None:
        """As `Player.close`."""
        if self._endpoint is not None:
            self._endpoint.close()
            self._endpoint = None

    @contextmanager
    def admitted(self, run: Run) -> Iterator[tuple[str, str]]:
        """The endpoint's URL and a key for a rollout, which is good as long as this lasts.

        Raises:
            Stopped: the member is served no longer.
        """
        endpoint = self._endpoint
        if endpoint is None:
            raise Stopped("was ended")

        def told(turn: Turn) -> None:
            if run.over:
                return
            for completion in turn.completions:
                run.note(turn.prompt_ids, completion)
            asked = turn.messages
            before = [dict(m) for m in asked if isinstance(m, dict)] or [{"role": "text", "content": str(asked)}]
            run.transcript = [*before, dict(turn.answer)]

        key = endpoint.admit(run.seed, told)
        run.on_abort(lambda: endpoint.revoke(key))
        try:
            yield endpoint.url, key
        finally:
            endpoint.revoke(key)
