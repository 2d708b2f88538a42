"""No grader runs what a completion says, and each grades right answers as before when it has seen it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from estune.rewards.gym import EVALUATED, PARSED, GymReward, generator, generator_names, may_be_scored
from estune.tasks.gym import GymConfig
from tests.payloads import ODD, programs

pytest.importorskip("reasoning_gym")

CHEAP = {"arc_agi": {}, "knight_swap": {}}
"""Options with which a generator's first problem comes soon."""


def problem(name: str) -> tuple[GymReward, dict[str, list[Any]]]:
    """A generator's reward, and the columns of its first problem."""
    entry = generator(name, "{}", 0, 1)[0]
    row = GymConfig(name=f"gym:{name}")._row(entry)
    return GymReward(name), {key: [row[key]] for key in ("question", "answer", "metadata")}


@pytest.mark.skipif("not __import__('importlib').util.find_spec('reasoning_gym')")
def test_no_generator_of_reasoning_gym_runs_an_answer(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    texts = [*programs(str(canary)), *ODD]
    import time
    for name in generator_names():
        if name == "composite":
            continue
        t=time.time()
        reward, columns = problem(name)
        t1=time.time()
        for text in texts:
            (score,) = reward(prompts=[""], completions=[f"<answer>{text}</answer>"], **columns)
            assert score is not None
            assert not canary.exists(), (name, text)
            if score>0.5: print(name,repr(text)[:50],score)
        t2=time.time()
        if columns["answer"] != [None]:
            assert reward(prompts=[""], completions=[f"<answer>{columns['answer'][0]}</answer>"], **columns) == [1.0], name
        if t2-t>.3: print(name,t1-t,t2-t1)
