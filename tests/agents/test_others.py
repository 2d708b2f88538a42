"""Other people's environments: real packages, where they are installed."""

from __future__ import annotations

import importlib.util
import os
import re
from pathlib import Path
from typing import Any

import pytest

from estune.agents.play import Limits
from estune.completion import Completion
from estune.engines.transformers import TransformersEngine
from estune.errors import EstuneError
from estune.tasks import options_of
from estune.tasks.base import Task
from tests.agents.conftest import SAMPLING, Play, played, python_with

SCRIPTS = Path(__file__).parent / "clients"


def task_of(name: str, **options: Any) -> Task:
    return options_of(name).model_validate({"name": name, **options}).build(0)


@pytest.fixture
def capitals(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setenv("PYTHONPATH", str(SCRIPTS), prepend=os.pathsep)
    return {"name": "verifiers:estune-capitals", "python": python_with("verifiers")}


def play_task(play: Play, task: Task, limits: Limits = Limits()) -> list[Completion]:  # noqa: B008
    assert task.rollout is not None
    return play(task.rollout.kind, task.rollout.target, task.train, limits)


def test_verifiers_plays_its_own_environments(capitals: Any, engine: TransformersEngine, play: Play) -> None:
    options = {"taskset": {"countries": ["France", "Japan"], "system": "Be brief."}}
    task = task_of(**capitals, options=options, eval_options={"taskset": {"countries": '["Italy"]'}}, accuracy="right")
    assert [row["prompt"] for row in task.train] == ["Name the capital of France.", "Name the capital of Japan."]
    assert [row["prompt"] for row in task.evaluation] == ["Name the capital of Italy."]
    assert task.accuracies == ["right"]
    for row, done in zip(task.train, play_task(play, task), strict=True):
        messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": row["prompt"]}]
        (alone,) = engine.generate(engine.encode([messages]), SAMPLING)
        assert done.text == alone.text
        result = played(done)
        assert (result.reward, result.turns, result.why) == (0.0, 1, "")
        assert result.metrics == {"right": 0.0, "characters": len(alone.text.strip())}
        assert result.transcript == [*messages, {"role": "assistant", "content": alone.text}]


@pytest.mark.parametrize(
    ("options", "failure", "why"),
    [
        ({"fault": "raise"}, "errors", "estune-capitals: .*no luck"),
        ({"fault": "hang"}, "timeouts", "took more than 20 s"),
        ({"fault": "kill"}, "crashes", "its program ended with code -9"),
        ({"system": "word " * 200}, "too_long", "context_length_exceeded"),
    ],
)
def test_what_goes_wrong_in_verifiers_is_its_rollouts(
    options: dict[str, Any], failure: str, why: str, capitals: Any, play: Play
) -> None:
    task = task_of(**capitals, options={"taskset": options}, train_size=2)
    found = [played(done) for done in play_task(play, task, Limits(seconds=20))]
    assert [(one.failure, one.reward) for one in found] == [(failure, None)] * 2
    assert re.search(why, found[0].why)


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"name": "verifiers:nothing-of-this-name"}, "taskset 'nothing-of-this-name' not found"),
        ({"options": {"taskset": {"countrys": []}}}, "countrys"),
        ({"options": {"taskset": {"countries": ["Atlantis"]}}}, "KeyError: 'Atlantis'"),
        ({"python": "/nowhere/python"}, "task.python /nowhere/python: there is no such program"),
    ],
)
def test_what_verifiers_cannot_play_is_said_at_once(options: dict[str, Any], why: str, capitals: Any) -> None:
    with pytest.raises(EstuneError, match=why) as caught:
        task_of(**{**capitals, **options})
    assert "\n" not in str(caught.value)


def test_a_python_without_verifiers_is_said() -> None:
    if importlib.util.find_spec("verifiers") is not None:
        pytest.skip("it has verifiers")
    with pytest.raises(EstuneError, match=r"it needs verifiers 0.4; name its Python in task.python"):
        task_of("verifiers:anything")
