"""Rollouts whose turns are completed by servers: the run of one process to the bit, also where a server is killed."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from estune.completion import Sampling
from estune.config import Config
from estune.engines.continuous import Request
from estune.engines.tokenizer import open_encoder
from estune.errors import EstuneError
from estune.es.strategy import Member
from estune.grading.rollout import Rollout, with_rollout
from estune.pool.deadlines import Deadlines, Lost
from estune.pool.local import LocalPool
from estune.pool.remote.handle import RemoteHandle
from estune.pool.remote.pool import RemotePool, Servers
from estune.pool.remote.service import Failed, Service
from estune.pool.remote.turns import FarRows, Held
from estune.pool.remote.wire import LEASE_SECONDS, Terms
from estune.pool.replica import Replica
from estune.run.held_out import token_ids
from estune.run.trainer import Trainer
from estune.tasks.base import Task
from tests.runs import PROMPTS, assert_same_run, make_config
from tests.servers import Served, serve_replica


class Talk:
    """Says what was answered back, until there were as many turns as the first prompt has digits to give."""

    def __init__(self) -> None:
        self._said: list[str] = []
        self._turns = 0

    def reset(self, row: Mapping[str, Any]) -> str:
        self._turns = 1 + int(row["prompt"][0]) % 3
        return str(row["prompt"])

    def step(self, completion: str) -> Any:
        self._said.append(completion)
        if len(self._said) < self._turns:
            return f" and {completion} "
        return {"reward": len(set("".join(self._said))) / 10, "metrics": {"said": float(len(self._said))}}


def ask(client: Any, row: Mapping[str, Any]) -> float:
    """The same by a client of the endpoint, two questions long."""
    first = client.completions.create(model="any", prompt=row["prompt"], max_tokens=8).choices[0].text
    second = client.completions.create(model="any", prompt=first + " and ", max_tokens=8).choices[0].text
    return len(set(first + second)) / 10


@pytest.fixture(scope="module")
def servers(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Served]]:
    folder = tmp_path_factory.mktemp("servers")
    found = [serve_replica(model, folder) for _ in range(2)]
    for server in found:
        server.wait()
    yield found
    for server in found:
        server.kill()


def played(kind: Any = "environment", target: Any = Talk) -> Task:
    functions, weights, accuracy = with_rollout([], [], None)
    rows = [{"prompt": prompt} for prompt in PROMPTS]
    return Task("talk", rows[4:], rows[:4], functions, weights, accuracy, rollout=Rollout(kind, target, chat=False))


def remote(folder: Path, model: Path, *urls: str, **changes: Any) -> Config:
    return make_config(folder, model, **{"replicas": None, "workers_at": list(urls), **changes})


def ready(training: Trainer) -> None:
    """Wait for both servers."""
    crew = training.pool.crew  # type: ignore[attr-defined]
    crew.wait(lambda: len(crew.ready()) == 2 or None)


@pytest.mark.parametrize(("kind", "target", "temperature"), [("environment", Talk, 0.7), ("function", ask, 0.0)])
def test_two_servers_make_the_run_of_one_process(
    kind: str, target: Any, temperature: float, servers: list[Served], model: Path, tmp_path: Path
) -> None:
    changes = {"temperature": temperature, "steps": 2}
    Trainer(make_config(tmp_path / "near", model, **changes), task=played(kind, target)).train()
    config = remote(tmp_path / "far", model, *(server.url for server in servers), **changes)
    training = Trainer(config, task=played(kind, target))
    ready(training)
    training.train()
    assert_same_run(tmp_path / "near", tmp_path / "far")


def test_a_server_that_is_killed_between_turns(
    servers: list[Served], model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Trainer(make_config(tmp_path / "near", model, steps=2), task=played()).train()
    training = Trainer(remote(tmp_path / "far", model, *(server.url for server in servers), steps=2), task=played())
    ready(training)
    turns: list[str] = []
    post = RemoteHandle.post

    def killing(self: RemoteHandle, kind: str, *arguments: Any) -> Any:
        if kind == "turns" and self.url == servers[0].url:
            turns.append(kind)
            if len(turns) == 3:
                os.kill(servers[0].process.pid, signal.SIGKILL)
                threading.Timer(0.2, servers[0].again).start()
        return post(self, kind, *arguments)

    monkeypatch.setattr(RemoteHandle, "post", killing)
    training.train()
    assert len(turns) >= 3
    assert_same_run(tmp_path / "near", tmp_path / "far")


def test_members_and_the_base_play_as_in_this_process(servers: list[Served], model: Path) -> None:
    alone = LocalPool(Replica(make_config(Path("unused"), model, threads=1, device="cpu")))
    pool = RemotePool(remote(Path("unused"), model, servers[1].url))
    task = played()
    try:
        prompts = token_ids(open_encoder(make_config(Path("unused"), model)), task, task.train[:6])
        sampling = Sampling(8, temperature=1.0, seed=3)
        members = [Member(1), Member(1, -1)]
        found = dict(pool.evaluate(members, 0.02, prompts, sampling))
        expected = dict(alone.evaluate(members, 0.02, prompts, sampling))
        assert [found[i].completions for i in range(2)] == [expected[i].completions for i in range(2)]
        assert pool.generate(prompts, sampling) == alone.generate(prompts, sampling)
    finally:
        pool.close()
        alone.close()


def test_what_is_held_is_lost_with_another_call_of_the_run_alone(
    servers: list[Served], model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("estune.pool.remote.handle.LEASE_SECONDS", 0.0)
    monkeypatch.setattr("estune.pool.remote.handle.SPARE_SECONDS", 0.0)
    one, another = (Servers(remote(Path("unused"), model, servers[1].url)).hire(0, Deadlines(30.0)) for _ in range(2))
    one.open()
    one.call("rebuild", [], None)
    sampling = Sampling(4)
    assert one.post("hold", [0, "mine", Member(1), 0.02], 30) >= 0
    with pytest.raises(EstuneError, match="at work for another run"):
        another.open()
    ended: list[Any] = []
    asked = [(number, [10, 20 + number], sampling) for number in range(3)]
    while len(ended) < 2:  # of which nobody waits for the third
        ended = one.post("turns", ["mine", asked, [2]], 30)
        asked = []
    assert sorted(number for number, _ in ended) == [0, 1]
    one.call("generate", 0, [[1, 2]], sampling)
    with pytest.raises(Lost, match="it holds other weights"):
        one.post("turns", ["mine", [], []], 30)
    one.end()
    another.end()


def test_turns_keep_the_server_for_as_long_as_a_member_is_played(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However long ago its last call of another kind was; without one for a lease's time it is anybody's."""
    now = [0.0]
    clock = SimpleNamespace(monotonic=lambda: now[0], perf_counter=lambda: now[0])
    monkeypatch.setattr("estune.pool.remote.service.time", clock)
    service = Service("tests", lambda terms: Replica(make_config(Path("unused"), model, threads=1, device="cpu")))
    mine, anothers = (Terms(lease, "master", "nearest", "iid", "*") for lease in ("mine", "another's"))
    service.run("open", "mine", (mine,))
    service.run("rebuild", "mine", ([],))
    service.run("hold", "mine", (0, "play", Member(1), 0.02))
    with pytest.raises(Failed, match="it holds other weights"):
        service.run("turns", "mine", ("an earlier play", [], []))
    for _ in range(3):
        now[0] += 0.9 * LEASE_SECONDS
        assert service.run("turns", "mine", ("play", [], [])) == []
        with pytest.raises(Failed, match="at work for another run"):
            service.run("open", "another's", (anothers,))
    now[0] += 1.1 * LEASE_SECONDS
    service.run("open", "another's", (anothers,))
    with pytest.raises(Failed, match="another run has had it since"):
        service.run("turns", "mine", ("play", [], []))
    with pytest.raises(Failed, match="it holds other weights"):
        service.run("turns", "another's", ("play", [], []))


@pytest.mark.parametrize("lost", [False, True])
def test_rollouts_that_compute_for_long_keep_the_server_or_learn_that_it_is_gone(
    lost: bool, servers: list[Served], model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FarRows, "most_idle", 0.02)
    go_on = threading.Event()
    idle: list[Any] = []
    post = RemoteHandle.post

    class Thinks(Talk):
        def step(self, completion: str) -> Any:
            go_on.wait()
            return 1.0

    def counting(self: RemoteHandle, kind: str, arguments: Any, *others: Any) -> Any:
        if kind == "turns" and not arguments[1]:
            idle.append(arguments)
            if len(idle) == 12:
                if lost:
                    raise Lost("gone")
                go_on.set()
        return post(self, kind, arguments, *others)

    monkeypatch.setattr(RemoteHandle, "post", counting)
    config = remote(Path("unused"), model, servers[1].url)
    handle = Servers(config).hire(0, Deadlines(30.0))
    task = played(target=Thinks)
    prompts = token_ids(open_encoder(config), task, task.train[:2])
    handle.open()
    handle.call("rebuild", [], None)
    try:
        if lost:
            with pytest.raises(Lost, match="gone"):
                handle.call("generate", 0, prompts, Sampling(4))
        else:
            found = handle.call("generate", 0, prompts, Sampling(4))
            assert [done.played.reward for done in found] == [1.0, 1.0]
    finally:
        go_on.set()
        handle.end()


def test_turns_asked_for_twice_are_made_once(model: Path) -> None:
    """As a call is where its connection broke off before the answer."""
    engine = Replica(make_config(Path("unused"), model, threads=1, device="cpu")).engine
    (alone,) = engine.generate([[10, 20, 30]], Sampling(4))
    before = set(threading.enumerate())
    held = Held("any", engine)
    asked = [(7, [10, 20, 30], Sampling(4))] * 2
    found: list[Any] = []
    while not found:
        found += held.turns(asked, [])
        asked = []
    assert found == [(7, alone.token_ids)]
    assert held.turns([], []) == found, "its answer may have been lost on its way"
    assert held.turns([], [7]) == held.turns([], [7]) == []
    held.close()
    assert set(threading.enumerate()) <= before


@pytest.mark.parametrize("ids", [[1], [1, 2, 3, 4, 5], [9, 1]], ids=["too few", "too many", "after its end"])
def test_turns_of_another_length_than_was_asked_for_are_refused(ids: list[int]) -> None:
    rows = FarRows(lambda joined, left: [(number, ids) for number, *_ in joined], [9])
    rows.join(Request([10], Sampling(4)))
    with pytest.raises(EstuneError, match=f"turn 0 has {len(ids)} tokens, neither 4 nor an end"):
        rows.step()
