"""Rollouts of environments, played with the engine itself."""

from __future__ import annotations

import itertools
import pickle
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from estune.agents.play import Limits
from estune.completion import Message, Sampling
from estune.engines.transformers import TransformersEngine
from estune.errors import EstuneError
from estune.grading.grading import Grading
from estune.grading.modules import load_file
from estune.grading.rollout import FromRollout, Opening, Rollout, outcome_of, outcome_of_line
from estune.tasks.countdown_turns import CountdownGame
from tests.agents.conftest import SAMPLING, Play, played


class Echo:
    """Shows back what was said, as many turns as the row says."""

    def reset(self, row: dict[str, Any]) -> Any:
        self.row = row
        self.said: list[str] = []
        return row["prompt"]

    def step(self, completion: str) -> Any:
        self.said.append(completion)
        if len(self.said) == self.row["turns"]:
            return {"reward": float(len(completion)), "solved": len(set(self.said)) > 1}
        return self.row["next"]


def test_turns_go_on_from_one_another_as_each_alone_would(engine: TransformersEngine, play: Play) -> None:
    rows = [{"prompt": f"Say {n}", "turns": 1 + n % 3, "next": f" and {n}"} for n in range(7)]
    for row, found in zip(rows, play("environment", Echo, rows, chat=False), strict=True):
        text = row["prompt"]
        tokens: list[int] = []
        for _ in range(row["turns"]):
            (done,) = engine.generate(engine.encode([text]), SAMPLING)
            tokens += done.token_ids
            text += done.text + row["next"]
        assert (found.text, found.token_ids) == (done.text, tokens)
        assert (played(found).reward, played(found).turns) == (len(done.text), row["turns"])
        assert "".join(m["content"] for m in played(found).transcript) + row["next"] == text


def test_conversations_go_through_the_chat_template(engine: TransformersEngine, play: Play) -> None:
    (found,) = play(
        "environment", Echo, [{"prompt": "Hello", "turns": 2, "next": [{"role": "user", "content": "Again"}]}]
    )
    messages: list[Message] = played(found).transcript
    assert [m["role"] for m in messages] == ["user", "assistant", "user", "assistant"]
    (first,) = engine.generate(engine.encode([messages[:1]]), SAMPLING)
    (second,) = engine.generate(engine.encode([messages[:3]]), SAMPLING)
    assert [messages[1]["content"], messages[3]["content"]] == [first.text, second.text]
    assert played(found).first == (engine.encode([messages[:1]])[0], first.token_ids)


def test_rollouts_that_are_drawn_differ_and_can_be_drawn_again(play: Play) -> None:
    rows = [{"prompt": "Hello", "turns": 2, "next": " and"}] * 3
    hot = Sampling(6, temperature=1.5, seed=1)
    texts = [[m["content"] for m in played(done).transcript] for done in play("environment", Echo, rows, sampling=hot)]
    assert len({text[1] for text in texts}) == 3
    assert all(text[1] != text[3] for text in texts)
    again = play("environment", Echo, rows, sampling=hot)
    assert [[m["content"] for m in played(done).transcript] for done in again] == texts
    other = play("environment", Echo, rows, sampling=Sampling(6, temperature=1.5, seed=2))
    assert [[m["content"] for m in played(done).transcript] for done in other] != texts


@pytest.mark.parametrize(
    ("end", "failure", "why"),
    [
        (None, "errors", "step gave None"),
        ("raise", "errors", r"raised KeyError: 'what' \(.*test_play.py"),
        ({"score": 1}, "errors", "a mapping without reward"),
        ({"reward": "high"}, "errors", r"gave 'high' \(str\) as reward"),
        ({"reward": 1, "step": 2}, "errors", "estune's own metrics are called so"),
        ([], "too_long", "goes on after 3 turns"),
        ({"reward": None}, "", ""),
    ],
)
def test_an_end_that_is_no_reward_says_so(end: Any, failure: str, why: str, play: Play) -> None:
    import re

    class Bad(Echo):
        def step(self, completion: str) -> Any:
            if end == "raise":
                raise KeyError("what")
            return end

    (found,) = play("environment", Bad, [{"prompt": "Hello"}], Limits(turns=3))
    assert (played(found).failure, played(found).reward) == (failure, None)
    assert re.search(why, played(found).why)


def test_a_conversation_longer_than_the_model_reaches_ends(play: Play) -> None:
    (found,) = play("environment", Echo, [{"prompt": "Hello", "turns": 9, "next": "word " * 60}], chat=False)
    assert played(found).failure == "too_long"
    assert "and the model reaches 256" in played(found).why


def test_a_step_that_hangs_costs_its_rollout_alone(play: Play) -> None:
    ever = threading.Event()

    class Hangs(Echo):
        def step(self, completion: str) -> Any:
            if self.row["hangs"]:
                ever.wait()
            return 1.0

    began = time.monotonic()
    rows = [{"prompt": "Hello", "hangs": n == 1} for n in range(4)]
    found = play("environment", Hangs, rows, Limits(turn_seconds=0.3, at_once=1))
    ever.set()
    assert [c.played and c.played.failure for c in found] == ["", "timeouts", "", ""]
    assert time.monotonic() - began < 60


def test_not_an_environment_is_said(play: Play) -> None:
    (found,) = play("environment", dict, [{"prompt": "Hello"}])
    assert played(found).why == "dict has no reset and no step: an environment needs both"


def test_what_rollouts_come_to_is_graded(play: Play) -> None:
    class Game(Echo):
        def step(self, completion: str) -> Any:
            return {"reward": self.row["worth"], "solved": 1, "metrics": {"moves": 3.0}}

    class Slow(Game):
        def step(self, completion: str) -> Any:
            return []

    rows = [{"prompt": "Hello", "worth": w} for w in (2.0, None)]
    found = [*play("environment", Game, rows), *play("environment", Slow, rows[:1], Limits(turns=1))]
    with Grading([FromRollout(), FromRollout("solved")], [1.0, 0.0]) as grading:
        grades = grading.grade([*rows, rows[0]], found)
    assert grades.total == [2.0, 0.0, 0.0]  # of the second only `solved` applies; the third did not come to an end
    assert grades.scores == {"rollout": [2.0, None, 0.0], "solved": [1.0, 1.0, None]}
    assert grades.logged == {"solved": [1.0, 1.0], "moves": [3.0, 3.0], "turns": [1.0, 1.0, 1.0]}
    assert grades.failures["rollout"]["too_long"] == 1
    assert grades.extras["turns"] == [1, 1, 1]
    assert '"role": "assistant"' in grades.extras["transcript"][0]


@pytest.mark.parametrize(
    ("line", "reward", "metrics"),
    [
        ("1", 1.0, {}),
        ("-0.5", -0.5, {}),
        ("1e-3", 0.001, {}),
        ('{"reward": 2, "metrics": {"a": 1}, "b": 3}', 2.0, {"a": 1.0, "b": 3.0}),
    ],
)
def test_a_programs_last_line_is_read(line: str, reward: float, metrics: dict[str, float]) -> None:
    outcome = outcome_of_line(line)
    assert (outcome.reward, outcome.metrics) == (reward, metrics)


@pytest.mark.parametrize("line", ["done", "[1]", '"1"', "true", "null", "{}", "score: 1"])
def test_a_programs_last_line_that_is_no_reward_is_refused(line: str) -> None:
    with pytest.raises(EstuneError, match="reward"):
        outcome_of_line(line)


def test_a_transcript_of_its_own_is_kept() -> None:
    assert outcome_of({"reward": 1, "transcript": [{"role": "user", "content": "x"}]}).transcript == [
        {"role": "user", "content": "x"}
    ]
    with pytest.raises(EstuneError, match="not a list of messages"):
        outcome_of({"reward": 1, "transcript": "x"})


def test_an_opening_travels_with_its_file(tmp_path: Path) -> None:
    file = tmp_path / "game.py"
    file.write_text("class Environment:\n    def reset(self, row): return 'x'\n    def step(self, text): return 1.0\n")
    target = load_file(file).Environment
    opening = pickle.loads(pickle.dumps(Opening([1, 2], Rollout("environment", target), {"a": 1})))
    assert list(opening) == [1, 2]
    assert (opening.row, opening.rollout.target) == ({"a": 1}, target)


def test_countdown_in_two_tries() -> None:
    row = {"prompt": "Using 1, 2 and 3 ... <think>", "numbers": [1, 2, 3], "target": 6}
    right, wrong = (f"x</think>\n<answer>{answer}</answer>" for answer in ("1+2+3", "1+2-3"))
    for tries in itertools.product((right, wrong), repeat=2):
        game = CountdownGame()
        game.reset(row)
        ends = [said for said in map(game.step, tries) if not isinstance(said, str)]
        assert ends[0] == {
            "reward": 1.1 if right in tries else 0.1,
            "solved": right in tries,
            "first_try": tries[0] == right,
        }
