"""What rollouts are played with: a tiny model, and a function that plays them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest

from estune.agents.play import Limits, Players
from estune.completion import Completion, Played, Sampling
from estune.engines.transformers import TransformersEngine
from estune.grading.rollout import Kind, Opening, Rollout
from tests.models import save_model

SAMPLING = Sampling(6)
Play = Callable[..., list[Completion]]


def played(completion: Completion) -> Played:
    """What became of a rollout."""
    assert completion.played is not None
    return completion.played


@pytest.fixture(scope="session")
def engine(tmp_path_factory: pytest.TempPathFactory) -> TransformersEngine:
    return TransformersEngine(save_model(tmp_path_factory.mktemp("model"), "llama", hidden_size=64, head_dim=32))


@pytest.fixture
def play(engine: TransformersEngine) -> Iterator[Play]:
    """Plays one rollout for each row."""
    made: list[Players] = []

    def play(
        kind: Kind,
        target: Any,
        rows: Sequence[dict[str, Any]],
        limits: Limits = Limits(),  # noqa: B008
        sampling: Sampling = SAMPLING,
        **how: Any,
    ) -> list[Completion]:
        made.append(Players(engine, engine, limits))
        rollout = Rollout(kind, target, **how)
        return made[-1].play([Opening(engine.encode([row["prompt"]])[0], rollout, row) for row in rows], sampling)

    yield play
    for players in made:
        players.close()
