"""The endpoint of those rollouts that talk to it: a key for each, and what was said under it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from estune.agents.endpoint import Endpoint, Turn
from estune.agents.play import Run, Stopped
from estune.completion import Sampling
from estune.engines.continuous import Batcher
from estune.engines.prompts import PromptEncoder


class Served:
    """Starts an endpoint when it is first needed, and keeps it from member to member.

    Args:
        encoder: makes token ids of what it is asked.
    """

    def __init__(self, encoder: PromptEncoder) -> None:
        self._encoder = encoder
        self._endpoint: Endpoint | None = None

    @property
    def model(self) -> str:
        """What the endpoint calls the model."""
        return self._encoder.name

    def open(self, batcher: Batcher, sampling: Sampling) -> None:
        """Serve a member."""
        if self._endpoint is None:
            self._endpoint = Endpoint(self._encoder, sampling, model=self.model, any_model=True)
        self._endpoint.sampling = sampling
        self._endpoint.serve(batcher)

    def shut(self) -> None:
        """Serve nobody: who still asks is refused."""
        if self._endpoint is not None:
            self._endpoint.serve(None)

    def close(self) -> None:
        """End the endpoint."""
        if self._endpoint is not None:
            self._endpoint.close()
            self._endpoint = None

    @contextmanager
    def admitted(self, run: Run) -> Iterator[tuple[str, str]]:
        """The endpoint's URL and a key for a rollout, which is refused from the end of this on.

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
                run.note((), completion)
            asked = turn.messages
            before = [dict(m) for m in asked if isinstance(m, dict)] or [{"role": "text", "content": str(asked)}]
            run.transcript = [*before, dict(turn.answer)]

        key = endpoint.admit(run.seed, told)
        run.on_abort(lambda: endpoint.revoke(key))
        try:
            yield endpoint.url, key
        finally:
            endpoint.revoke(key)
