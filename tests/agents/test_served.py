"""Rollouts that talk to the endpoint: functions with OpenAI's client, and programs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

from estune.agents.keeper import Keeper
from estune.agents.play import Limits
from estune.completion import Completion
from estune.engines.transformers import TransformersEngine
from tests.agents.conftest import SAMPLING, Play, played
from tests.processes import alive, until

ROWS = [{"prompt": f"Say {n}", "number": n} for n in range(5)]


def check_two_turns(engine: TransformersEngine, found: list[Completion]) -> None:
    """Each rollout asked about its row, and then once more after the answer."""
    for row, done in zip(ROWS, found, strict=True):
        messages: list[Any] = [{"role": "user", "content": row["prompt"]}]
        (first,) = engine.generate(engine.encode([messages]), SAMPLING)
        messages += [{"role": "assistant", "content": first.text}, {"role": "user", "content": "More"}]
        (second,) = engine.generate(engine.encode([messages]), SAMPLING)
        assert done.text == second.text
        assert done.token_ids == first.token_ids + second.token_ids
        result = played(done)
        assert result.first == (engine.encode([messages[:1]])[0], first.token_ids)
        assert (result.reward, result.metrics, result.turns) == (row["number"] + len(second.text), {"n": 1.0}, 2)
        assert [m["content"] for m in result.transcript] == [*(m["content"] for m in messages), second.text]


async def converse(client: Any, row: dict[str, Any]) -> dict[str, float]:
    messages = [{"role": "user", "content": row["prompt"]}]
    for _ in range(2):
        answer = await client.chat.completions.create(model="any", messages=messages)
        said = answer.choices[0].message.content
        messages += [{"role": "assistant", "content": said}, {"role": "user", "content": "More"}]
    return {"reward": row["number"] + len(said), "n": 1}


def test_a_function_asks_as_often_as_it_likes(engine: TransformersEngine, play: Play) -> None:
    check_two_turns(engine, play("function", converse, ROWS))


def test_a_plain_function_has_a_plain_client(engine: TransformersEngine, play: Play) -> None:
    def rollout(client: Any, row: dict[str, Any]) -> float:
        answer = client.completions.create(model=engine.name, prompt=row["prompt"])
        return len(answer.choices[0].text)

    for row, done in zip(ROWS, play("function", rollout, ROWS), strict=True):
        (alone,) = engine.generate(engine.encode([row["prompt"]]), SAMPLING)
        assert played(done).reward == len(alone.text)


def test_what_a_function_raises_is_its_rollouts(play: Play) -> None:
    async def rollout(client: Any, row: dict[str, Any]) -> Any:
        if row["number"] == 1:
            raise ValueError("no luck")
        if row["number"] == 2:
            return None
        if row["number"] == 3:
            import asyncio

            await asyncio.sleep(100)
        return 1.0

    found = [played(done) for done in play("function", rollout, ROWS, Limits(seconds=2.0))]
    assert [f.failure for f in found] == ["", "errors", "errors", "timeouts", ""]
    assert found[1].why.startswith("raised ValueError: no luck (")
    assert found[2].why == "gave None (NoneType) as the rollout's end, not a number"
    assert found[3].why == "took more than 2 s (rollout_timeout)"


def test_a_function_that_was_left_behind_is_answered_no_more(engine: TransformersEngine, play: Play) -> None:
    kept: list[Any] = []

    def rollout(client: Any, row: dict[str, Any]) -> float:
        kept.append(client)
        return 1.0

    play("function", rollout, ROWS)
    import openai

    for client in kept:
        with pytest.raises((openai.AuthenticationError, openai.APIConnectionError)):
            client.with_options(max_retries=0).completions.create(model=engine.name, prompt="x")


AGENT = """
    import json, os, sys, urllib.request
    row = json.loads(sys.stdin.readline())
    messages = [{"role": "user", "content": row["prompt"]}]
    for _ in range(2):
        request = urllib.request.Request(
            os.environ["OPENAI_BASE_URL"] + "/chat/completions",
            json.dumps({"model": os.environ["OPENAI_MODEL"], "messages": messages}).encode(),
            {"Authorization": "Bearer " + os.environ["OPENAI_API_KEY"], "Content-Type": "application/json"},
        )
        said = json.load(urllib.request.urlopen(request))["choices"][0]["message"]["content"]
        messages += [{"role": "assistant", "content": said}, {"role": "user", "content": "More"}]
    print("this is not the reward")
    print(json.dumps({"reward": row["number"] + len(said), "metrics": {"n": 1}}))
"""


def program(tmp_path: Path, text: str) -> str:
    file = tmp_path / "agent.py"
    file.write_text(textwrap.dedent(text))
    return f"{sys.executable} -I -S {file}"


def test_any_program_can_play(engine: TransformersEngine, play: Play, tmp_path: Path) -> None:
    check_two_turns(engine, play("program", program(tmp_path, AGENT), ROWS))


def test_a_program_that_is_killed_is_played_again(engine: TransformersEngine, play: Play, tmp_path: Path) -> None:
    """At its second turn, once; what it had been answered is forgotten, and so is its key."""
    hit = AGENT.replace(
        '    messages += [{"role": "assistant"',
        f"""    with open(r"{tmp_path}/keys", "a") as keys:
            print(row["number"], os.environ["OPENAI_API_KEY"], file=keys)
        if not os.path.exists(r"{tmp_path}/hit" + str(row["number"])):
            open(r"{tmp_path}/hit" + str(row["number"]), "x").close()
            os.kill(os.getpid(), 9)
        messages += [{{"role": "assistant\"""",
    )
    check_two_turns(engine, play("program", program(tmp_path, hit), ROWS))
    keys = (tmp_path / "keys").read_text().split("\n")[:-1]
    assert len(set(keys)) == 2 * len(ROWS)
    assert len(keys) == 3 * len(ROWS)


def test_how_a_program_fails_is_said(play: Play, tmp_path: Path) -> None:
    command = program(
        tmp_path,
        """
        import json, os, signal, sys, time
        number = json.loads(sys.stdin.readline())["number"]
        if number == 0:
            print("ready")
        if number == 1:
            sys.exit("out of paper")
        if number == 2:
            os.kill(os.getpid(), signal.SIGSEGV)
        if number == 3:
            time.sleep(100)
        """,
    )
    found = [played(done) for done in play("program", command, ROWS, Limits(seconds=3.0))]
    assert [f.failure for f in found] == ["errors", "errors", "crashes", "timeouts", "errors"]
    assert found[0].why == "printed 'ready' last, neither a number nor JSON: print the reward on the last line"
    assert found[1].why.endswith("ended with code 1: out of paper")
    assert found[2].why == "was killed by SIGSEGV, 3 times"
    assert found[4].why.endswith("printed nothing: print the reward on the last line")
    (none,) = play("program", "/no/such/program", ROWS[:1])
    assert "cannot be started" in played(none).why


def test_what_a_program_started_ends_with_it(play: Play, tmp_path: Path) -> None:
    command = program(
        tmp_path,
        f"""
        import subprocess, sys
        sys.stdin.readline()
        for new in (False, True):
            child = subprocess.Popen(
                [sys.executable, "-c", "import time; time.sleep(100)"], stdout=open(r"{tmp_path}/out", "a"),
                start_new_session=new,
            )
            print(child.pid, file=open(r"{tmp_path}/children", "a"), flush=True)
        print(1)
        """,
    )
    (done,) = play("program", command, ROWS[:1])
    assert played(done).reward == 1.0
    children = [int(pid) for pid in (tmp_path / "children").read_text().split()]
    assert len(children) == 2
    until(lambda: not any(map(alive, children)), 20)


def test_programs_end_with_the_process_that_started_them() -> None:
    """A keeper learns that it is gone when its own standard input ends."""
    keeper = Keeper()
    keeper.tell("one")
    environments = ({"OPENAI_API_KEY": "one"}, {"OPENAI_API_KEY": "other"})
    kept, other = (
        subprocess.Popen(["sleep", "100"], env={**os.environ, **each}, start_new_session=True) for each in environments
    )
    assert kept.poll() is None
    keeper.close()
    try:
        assert kept.wait(20) == -signal.SIGKILL
        assert other.poll() is None
    finally:
        other.kill()
        other.wait()
