"""Other people's environments: real packages, where they are installed."""

from __future__ import annotations

import importlib.util
import json
import os
import random
import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from estune.agents.endpoint import Endpoint
from estune.agents.play import Limits
from estune.completion import Completion
from estune.engines.transformers import TransformersEngine
from estune.errors import EstuneError
from estune.grading.rollout import environment_of
from estune.tasks import options_of
from estune.tasks.base import Task
from estune.tasks.verifiers import Bridge
from tests.agents.conftest import SAMPLING, Play, Scripted, mark, played, python_with

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


def test_tools_of_verifiers(capitals: Any, scripted: tuple[Scripted, Endpoint]) -> None:
    engine, endpoint = scripted
    mark(engine, "<tool_call>")
    engine.script = ['<tool_call>{"name": "lookup_capital", "arguments": {"country": "France"}}</tool_call>']
    engine.text = "It is Paris."
    asked = {"play": 1, "task": {"prompt": "What is the capital of France?"}, "url": endpoint.url, "model": "scripted"}
    bridge = Bridge(capitals["python"], "estune-lookups", "{}")
    with tempfile.TemporaryFile() as errors, bridge.start(errors) as program:
        assert program.stdin is not None
        assert program.stdout is not None
        program.stdin.write(bridge.first_line)
        program.stdin.write(json.dumps({**asked, "key": endpoint.admit(0, lambda turn: None)}) + "\n")
        program.stdin.flush()
        said = json.loads(program.stdout.readline())
        program.stdin.close()
    assert said == {"played": 1, "reward": 1.0, "metrics": {"told": 1.0}}
    assert "Gives the capital of a country." in engine.shown(0)


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


def test_games_of_textarena() -> None:
    pytest.importorskip("textarena")
    task = task_of("textarena:GuessTheNumber-v0", train_size=6, eval_size=3)
    assert task.rollout is not None
    assert len({row["prompt"] for row in (*task.train, *task.evaluation)}) == 9
    make = task.rollout.target
    ends = []
    for row in (task.train[0], task.train[0], *task.train[1:]):
        game = environment_of(make)
        said: Any = game.reset(row)
        assert "You are playing Guess The Number" in said
        low, high = 1, 20
        while isinstance(said, str):
            random.random()  # others are at work beside it
            guess = (low + high) // 2
            said = game.step(f"I think it is [{guess}]")
            if "lower" in said:
                high = guess - 1
            elif "higher" in said:
                low = guess + 1
        ends.append((guess, said))
    assert ends[0] == ends[1]
    assert {guess for guess, _ in ends} != {ends[0][0]}
    assert {said["reward"] for _, said in ends} == {1.0}
    assert ends[0][1] == {"reward": 1.0, "won": True, "invalid_move": False}


def test_a_game_draws_its_own_numbers(play: Play) -> None:
    """A game of 2048 draws a tile in each turn: from its own row's numbers."""
    pytest.importorskip("textarena")
    task = task_of("textarena:2048-v0-ultra-easy", train_size=2, eval_size=1)
    assert task.rollout is not None
    games = [environment_of(task.rollout.target) for _ in range(3)]
    for game in games:
        game.reset(task.train[0])
    boards = [[game.step(move) for move in ("[up]", "[left]", "[down]")] for game in games[:1]]
    woven = list(zip(*[[game.step(move) for game in games[1:]] for move in ("[up]", "[left]", "[down]")], strict=True))
    assert [boards[0], boards[0]] == [list(each) for each in woven]
    found = play("environment", task.rollout.target, task.train, Limits(turns=3))
    assert {played(done).failure for done in found} <= {"", "too_long"}
    assert {played(done).metrics.get("invalid_move", 1.0) for done in found} == {1.0}


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("GuesTheNumber-v0", "did you mean textarena:GuessTheNumber-v0"),
        ("TicTacToe-v0", "it is for several players"),
        ("QuantumTicTacToe-v0", "it is for several players"),
        ("TwentyQuestions-v0", "it cannot be played here: OpenRouter API key not found"),
    ],
)
def test_a_game_that_cannot_be_played_is_refused(name: str, why: str) -> None:
    pytest.importorskip("textarena")
    with pytest.raises(EstuneError, match=why):
        task_of(f"textarena:{name}")


def test_a_problem_of_reasoning_gym_in_several_tries(play: Play) -> None:
    task = task_of("gym:chain_sum", tries=2, instruction="In <answer> tags.", train_size=3, eval_size=2)
    assert task.rollout is not None
    assert task.accuracies == ["score"]
    row = task.train[0]
    right, wrong = (f"Thus <answer>{answer}</answer>" for answer in (row["answer"], "x"))
    for tries, first, last in (((right,), 1.0, 1.0), ((wrong, right), 0.0, 1.0), ((wrong, wrong), 0.0, 0.0)):
        game = environment_of(task.rollout.target)
        assert game.reset(row) == row["prompt"]
        *before, end = map(game.step, tries)
        assert all(isinstance(said, str) and said.startswith("That is not right.") for said in before)
        assert isinstance(end, dict)
        assert (end["first_try"] >= 1, end["reward"] >= 1) == (first >= 1, last >= 1)
    assert [played(done).turns for done in play_task(play, task)] == [2, 2, 2]
    one = task_of("gym:chain_sum", train_size=3, eval_size=2)
    assert (one.rollout, [row["question"] for row in one.train]) == (None, [row["question"] for row in task.train])


@pytest.fixture
def openenv(request: pytest.FixtureRequest) -> Iterator[str]:
    """The URL of a server that takes so many sessions."""
    pytest.importorskip("websockets")
    command = [python_with("openenv"), str(SCRIPTS / "serve_openenv.py"), str(request.param)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        yield f"http://127.0.0.1:{server.stdout.readline().strip()}"
        server.kill()


@pytest.mark.parametrize("openenv", [8], indirect=True)
def test_a_server_of_openenv(openenv: str, play: Play) -> None:
    task = task_of(f"openenv:{openenv}", train_size=5, eval_size=2, options={"most": "4"}, instruction="Say a number.")
    assert task.rollout is not None
    for row in task.train:
        game = environment_of(task.rollout.target)
        assert game.reset(row) == "Say a number.\n\nGuess my number from 1 to 4."
        number = 1 + row["seed"] % 4
        assert game.step("none") == "No."
        assert game.step(f"It is {number}") == {"reward": 0.75}
    found = [played(done) for done in play_task(play, task)]
    assert [(one.failure, one.reward, one.turns) for one in found] == [("", -0.75, 3)] * 5
    assert [m["content"] for m in found[0].transcript[2::2]] == ["No.", "No."]
    wrong = play_task(play, task_of(f"openenv:{openenv}", train_size=1, eval_size=1, action="words"))
    assert played(wrong[0]).failure == "errors"
    assert "step was refused" in played(wrong[0]).why


@pytest.mark.parametrize("openenv", [1], indirect=True)
def test_a_server_of_openenv_that_is_full(openenv: str, play: Play) -> None:
    task = task_of(f"openenv:{openenv}", train_size=4, eval_size=2)
    assert {played(done).failure for done in play_task(play, task, Limits(at_once=1))} == {""}
    failed = [played(done).why for done in play_task(play, task) if played(done).failure]
    assert failed
    assert all("set rollouts_at_once" in why for why in failed)


def test_no_server_of_openenv() -> None:
    pytest.importorskip("websockets")
    with pytest.raises(EstuneError, match="no server of OpenEnv answers at http://127.0.0.1:9/schema: .*start it"):
        task_of("openenv:http://127.0.0.1:9")
