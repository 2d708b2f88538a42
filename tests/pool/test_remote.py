"""Workers behind HTTP: the same run, servers that are killed or stopped, and what a newcomer meets.

Servers here answer over our own engine; `tests/vllm/test_served.py` has vLLM's.
"""

from __future__ import annotations

import asyncio
import functools
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from estune.completion import Picture, Pictured
from estune.errors import EstuneError
from estune.es.strategy import Member, Update
from estune.journal.journal import Journal
from estune.journal.replay import replay
from estune.pool.deadlines import Lost
from estune.pool.local import LocalPool
from estune.pool.remote.handle import KEY, RemoteHandle
from estune.pool.remote.pool import RemotePool
from estune.pool.remote.service import Asked, Failed, Service, answer_lines
from estune.pool.remote.wire import ARGUMENTS, Sighted, Terms, as_sent, name_of, to_send
from estune.pool.replica import Replica
from estune.pool.worker import StaleWeights
from estune.run.trainer import Trainer
from tests.models import save_model
from tests.pool.far import PROMPTS, SAMPLING, SECRET, handle, remote, trainer
from tests.processes import until
from tests.runs import assert_same_run, make_config, make_task, slow_variety
from tests.servers import Served, serve_replica
from tests.visions import picture, png

pytestmark = pytest.mark.usefixtures("key")


@pytest.fixture(scope="module")
def servers(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Served]]:
    folder = tmp_path_factory.mktemp("servers")
    found = [serve_replica(model, folder, SECRET) for _ in range(2)]
    for server in found:
        server.wait(key=SECRET)
    yield found
    for server in found:
        server.kill()


def test_two_servers_make_the_run_of_one_process(
    servers: list[Served], model: Path, tmp_path: Path, undisturbed: Path
) -> None:
    run = tmp_path / "run"
    training = trainer(run, model, *(server.url for server in servers))
    training.pool.wait_for_workers(60)  # type: ignore[attr-defined]
    training.train()
    assert_same_run(run, undisturbed)
    assert replay(run, tmp_path / "replayed") == Journal.read(undisturbed).fingerprint()


def test_killed_in_the_middle_and_started_again(
    servers: list[Served], model: Path, tmp_path: Path, undisturbed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once while it evaluates and once while it updates: it comes back with the base alone, and replays the updates."""
    left = {"evaluate": 2, "apply": 4}  # at which step
    pids = set()
    call = RemoteHandle.call

    def killing(self: RemoteHandle, kind: str, *arguments: Any, **options: Any) -> Any:
        assert self.place is not None
        pids.add(self.place.pid)
        if self.url == servers[0].url and arguments[0] == left.get(kind, -1):
            del left[kind]
            os.kill(servers[0].process.pid, signal.SIGSTOP)  # it has not begun when it is killed
            threading.Timer(0.2, servers[0].again).start()
        return call(self, kind, *arguments, **options)

    monkeypatch.setattr(RemoteHandle, "call", killing)
    run = tmp_path / "run"
    training = trainer(run, model, *(server.url for server in servers))
    evaluate = training.pool.evaluate

    def with_both(*arguments: Any) -> Any:
        crew = training.pool.crew  # type: ignore[attr-defined]
        crew.wait(lambda: len(crew.ready()) == 2 or None)
        return evaluate(*arguments)

    monkeypatch.setattr(training.pool, "evaluate", with_both)
    training.train()
    assert not left
    assert len(pids) == 4
    assert_same_run(run, undisturbed)


def test_a_server_does_what_a_replica_does(servers: list[Served], model: Path) -> None:
    alone = LocalPool(Replica(make_config(Path("unused"), model, threads=1, device="cpu")))
    pool = RemotePool(remote(Path("unused"), model, servers[1].url))
    try:
        assert pool.describe() == alone.describe()
        members = [Member(seed, sign) for seed in range(3) for sign in (1, -1)]
        for sampling in (SAMPLING, replace(SAMPLING, temperature=1.0, seed=5)):
            found = dict(pool.evaluate(members, 0.02, PROMPTS, sampling))
            expected = dict(alone.evaluate(members, 0.02, PROMPTS, sampling))
            assert [found[i].completions for i in range(6)] == [expected[i].completions for i in range(6)]
        update = Update(0, (Member(3), Member(99)), (0.25, -0.5), decay=-0.01, earlier=((7, 0.125),))
        assert pool.apply(update) == alone.apply(update)
        assert pool.generate(PROMPTS, SAMPLING) == alone.generate(PROMPTS, SAMPLING)
        answers = [[5, 6, 7]] * len(PROMPTS)
        assert pool.compare(PROMPTS, answers) == alone.compare(PROMPTS, answers)
        assert pool.progress().tokens > 0
    finally:
        pool.close()
        alone.close()


def test_a_run_has_its_server_alone_and_leaves_it_to_the_next(
    servers: list[Served], model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("estune.pool.remote.handle.LEASE_SECONDS", 0.5)
    monkeypatch.setattr("estune.pool.remote.handle.SPARE_SECONDS", 0.5)
    first, second = handle(model, servers[1].url), handle(model, servers[1].url)
    first.open()
    fingerprint = first.call("rebuild", [], None)
    with pytest.raises(EstuneError, match=r"it is at work for another run, .* s ago: end that run"):
        second.open()
    with pytest.raises(Lost, match="another run has had it"):
        second.call("generate", 0, PROMPTS, SAMPLING)
    update = Update(0, (Member(1),), (0.5,))
    changed = first.call("apply", 0, update)
    assert changed != fingerprint
    assert first.call("apply", 0, update) == changed  # asked for twice, it is made once
    with pytest.raises(StaleWeights):
        first.call("evaluate", 0, Member(1), 0.1, PROMPTS, SAMPLING)
    assert first.open()[1] == 1  # as after a connection that broke off
    first.end()
    assert second.open()[1] is None  # whose updates are none of its own
    assert second.call("rebuild", [], None) == fingerprint
    second.end()


def test_prompts_are_sent_once(servers: list[Served], model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[str] = []
    ports = set()

    def note(answer: Any) -> None:
        sent.append(answer.request.url.path.rpartition("/")[2])
        ports.add(answer.extensions["network_stream"].get_extra_info("client_addr"))

    monkeypatch.setattr(httpx, "Client", functools.partial(httpx.Client, event_hooks={"response": [note]}))
    one = handle(model, servers[1].url)
    one.open()
    one.call("rebuild", [], None)
    prompts = [[*range(50, 60)], [7]]
    for seed in range(3):
        one.call("evaluate", 0, Member(seed), 0.1, prompts, SAMPLING)
    assert sent == ["open", "rebuild", "evaluate", "prompts", "evaluate", "evaluate", "evaluate"]
    assert len(ports) == 1  # the same connection
    one.end()


def test_pictures_go_with_their_prompts() -> None:
    first, second = (Pictured([1, 2, 2, 3], "<image>", (Picture(png(picture(count))),), [1, 2, 3]) for count in (3, 4))
    said = ARGUMENTS["prompts"].dump_json(("name", [to_send(prompt) for prompt in (first, [7])]))
    found, text = map(as_sent, ARGUMENTS["prompts"].validate_python(json.loads(said))[1])
    assert isinstance(found, Pictured)
    assert (found, found.text, found.pictures, found.marked) == (first, first.text, first.pictures, first.marked)
    assert found.pictures[0].data == first.pictures[0].data
    assert (text, type(text)) == ([7], list)
    assert len({name_of([first]), name_of([second]), name_of([[*first]])}) == 3
    with pytest.raises(EstuneError, match="a prompt: not a picture that Pillow can read"):
        as_sent(Sighted([1], "<image>", [b"none"], [1]))


def test_another_key_is_refused(
    servers: list[Served], model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for key in ("another", None):
        if key is None:
            monkeypatch.delenv(KEY)
        else:
            monkeypatch.setenv(KEY, key)
        with pytest.raises(EstuneError, match=rf"{servers[0].url}: it refuses the key \(401\): set VLLM_API_KEY here"):
            trainer(tmp_path / "run", model, servers[0].url)
    assert not (tmp_path / "run").exists()


def test_another_base_model_is_refused(servers: list[Served], model: Path, tmp_path: Path) -> None:
    other = save_model(tmp_path / "other", "qwen2", vocab_size=331)
    with pytest.raises(EstuneError, match=r"it serves another model than the run's: base_hash [0-9a-f]+, here "):
        trainer(tmp_path / "run", other, servers[0].url)
    assert not (tmp_path / "run").exists()


def test_another_version_is_refused(model: Path, tmp_path: Path) -> None:
    server = serve_replica(model, tmp_path, SECRET, version="0.0.9")
    try:
        server.wait(key=SECRET)
        with pytest.raises(EstuneError, match=r"worker 0 at .* its estune is 0\.0\.9, theirs \d"):
            trainer(tmp_path / "run", model, server.url)
    finally:
        server.kill()


def test_the_end_of_a_line_is_no_part_of_a_key(
    servers: list[Served], model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(KEY, f"{SECRET}\n")
    one = handle(model, servers[1].url)
    assert one.look(0.0)
    one.end()


@pytest.mark.parametrize("body", [b"[" * 100_000, b"{", b"[]", b'"a"', b'{"lease":"a","arguments":{"a":1}}'])
def test_a_request_that_is_none_is_refused(body: bytes, servers: list[Served]) -> None:
    headers = {"authorization": f"Bearer {SECRET}"}
    assert httpx.post(f"{servers[1].url}/v1/estune/open", content=body, headers=headers).status_code == 400


def test_a_server_that_is_stopped_is_lost(servers: list[Served], model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("estune.pool.remote.handle.SILENT_SECONDS", 0.5)
    one = handle(model, servers[1].url)
    one.open()
    os.kill(servers[1].process.pid, signal.SIGSTOP)
    try:
        with pytest.raises(Lost, match="the connection broke off"):
            one.call("rebuild", [], None)
    finally:
        os.kill(servers[1].process.pid, signal.SIGCONT)
    one.end()


def test_a_strangers_journal_sends_nothing_to_the_servers_it_names(
    servers: list[Served], model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    trainer(run, model, servers[1].url, steps=1).train()
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "another user's"))
    given: dict[str, Any] = {"task": make_task(slow_variety), "monitors": []}
    with pytest.raises(EstuneError, match=r"its journal names a server, http://127\.0\.0\.1:\d+, which would be sent"):
        Trainer.resume(run, steps=2, **given)
    assert Trainer.resume(run, steps=2, workers_at=f"{servers[1].url}/v1", **given).train().steps == 2


def test_ctrl_c_twice_loses_the_step_in_hand_alone(
    servers: list[Served], model: Path, tmp_path: Path, undisturbed: Path
) -> None:
    run = tmp_path / "run"
    changes = {"steps": 6, "replicas": None, "workers_at": [servers[1].url], "max_new_tokens": 8}
    code = "import runpy; runpy.run_module('tests.runs', run_name='__main__')"
    process = subprocess.Popen(
        [sys.executable, "-u", "-c", code, str(run), str(model), json.dumps(changes)],  # a warm one
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    journal = run / "journal.jsonl"
    until(lambda: journal.exists() and journal.read_text().count('"kind":"step"') >= 2)
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    Trainer.resume(run, task=make_task(slow_variety), monitors=[]).train()
    assert_same_run(run, undisturbed)


def test_who_goes_away_ends_his_own_call_alone(model: Path) -> None:
    aborted: list[str] = []
    mine, anothers = Asked(), Asked()

    def make(terms: Terms) -> Replica:
        service.drop(anothers)  # who waits for his turn
        assert not aborted
        service.drop(mine)
        return Replica(make_config(Path("unused"), model, threads=1, device="cpu"))

    service = Service("tests", make, abort=lambda: aborted.append("aborted"))
    service.run("open", "lease", (Terms("lease", "master", "nearest", "iid", "*"),), mine)
    assert aborted == ["aborted"]
    with pytest.raises(Failed, match="nobody waits for it any more"):
        service.run("release", "lease", (), anothers)
    service.run("release", "lease", (), Asked())


def test_a_connection_that_breaks_off_ends_its_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("estune.pool.remote.service.HEARTBEAT", 0.01)
    aborted = threading.Event()

    def make(terms: Terms) -> Replica:
        aborted.wait(5)
        raise EstuneError("nobody waits for this")

    service = Service("tests", make, abort=aborted.set)

    async def leave() -> None:
        lines = answer_lines(service, "open", "lease", (Terms("lease", "master", "nearest", "iid", "*"),))
        assert await anext(lines) == b"\n"
        await lines.aclose()  # type: ignore[attr-defined]

    asyncio.run(leave())
    assert aborted.is_set()
