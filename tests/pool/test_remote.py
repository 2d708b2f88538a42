"""Workers behind HTTP: the same run, servers that are killed or are not what they should be, and what a newcomer meets.

Servers here answer over our own engine; `tests/vllm/test_served.py` has vLLM's.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest

from estune.completion import Sampling
from estune.config import Config, parse
from estune.errors import EstuneError
from estune.es.strategy import Member, Update
from estune.journal.journal import Journal
from estune.journal.replay import replay
from estune.pool.deadlines import Deadlines, Lost
from estune.pool.local import LocalPool
from estune.pool.remote.handle import KEY, RemoteHandle
from estune.pool.remote.pool import RemotePool, Servers
from estune.pool.remote.service import Asked, Failed, Service, _lines
from estune.pool.remote.wire import Terms
from estune.pool.replica import Replica
from estune.pool.worker import StaleWeights
from estune.run.trainer import Trainer
from tests.models import save_model
from tests.rays import until
from tests.runs import assert_same_run, make_config, make_task, slow_variety
from tests.servers import Served, free_port, serve_replica

SECRET = "a key of tests"
PROMPTS = [[10, 20, 30], [40, 50], [60, 70, 80, 90]]
SAMPLING = Sampling(8)


@pytest.fixture(scope="module")
def servers(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Served]]:
    folder = tmp_path_factory.mktemp("servers")
    found = [serve_replica(model, folder, SECRET) for _ in range(2)]
    for server in found:
        server.wait(key=SECRET)
    yield found
    for server in found:
        server.kill()


@pytest.fixture(autouse=True)
def _key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY, SECRET)


def remote(folder: Path, model: Path, *urls: str, **changes: Any) -> Config:
    return make_config(folder, model, **{"steps": 6, "replicas": None, "workers_at": list(urls), **changes})


def trainer(folder: Path, model: Path, *urls: str, monitors: Any = (), **changes: Any) -> Trainer:
    return Trainer(remote(folder, model, *urls, **changes), task=make_task(slow_variety), monitors=list(monitors))


def handle(model: Path, url: str, **changes: Any) -> RemoteHandle:
    """A server as another run's worker."""
    return Servers(remote(Path("unused"), model, url, **changes)).hire(0, Deadlines(30.0))


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


def test_prompts_are_sent_once(servers: list[Served], model: Path) -> None:
    one = handle(model, servers[1].url)
    one.open()
    sent: list[str] = []
    ports = set()

    def note(answer: Any) -> None:
        sent.append(answer.request.url.path.rpartition("/")[2])
        ports.add(answer.extensions["network_stream"].get_extra_info("client_addr"))

    one._client.event_hooks["response"].append(note)
    one.call("rebuild", [], None)
    prompts = [[*range(50, 60)], [7]]
    for seed in range(3):
        one.call("evaluate", 0, Member(seed), 0.1, prompts, SAMPLING)
    assert sent == ["rebuild", "evaluate", "prompts", "evaluate", "evaluate", "evaluate"]
    assert len(ports) == 1  # the same connection
    one.end()


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


class Elsewhere(BaseHTTPRequestHandler):
    """Some server, which has never heard of estune."""

    def do_GET(self) -> None:
        code = 200 if "known" in self.path else 404
        self.send_response(code)
        self.end_headers()
        self.wfile.write(b"<html>")

    def log_message(self, *_: Any) -> None:
        pass


def test_what_is_no_server_of_ours_is_said_at_once(model: Path, tmp_path: Path) -> None:
    with HTTPServer(("127.0.0.1", 0), Elsewhere) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        with pytest.raises(EstuneError, match=r"it does not know /v1/estune \(404\): .* started without estune"):
            trainer(tmp_path / "run", model, url)
        with pytest.raises(EstuneError, match="what answers is not estune .*: give a server's address"):
            trainer(tmp_path / "run", model, f"{url}/known")
        server.shutdown()


class Liar(BaseHTTPRequestHandler):
    """Answers what a test has put here, whatever is asked, and stops when nobody listens any more."""

    status = 200
    says: tuple[bytes, ...] = ()
    endless = b""

    def do_GET(self) -> None:
        self.send_response(self.status)
        self.send_header("location", "http://127.0.0.1:1/")
        self.end_headers()
        with contextlib.suppress(OSError):
            self.wfile.write(b"".join(self.says))
            while self.endless:
                self.wfile.write(self.endless)
                time.sleep(0.001)

    do_POST = do_GET

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def liar(model: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[RemoteHandle]:
    monkeypatch.setattr(Liar, "status", 200)
    monkeypatch.setattr(Liar, "endless", b"")
    monkeypatch.setattr("estune.pool.remote.handle.MOST_BYTES", 100_000)
    with HTTPServer(("127.0.0.1", 0), Liar) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        found = handle(model, f"http://127.0.0.1:{server.server_port}")
        yield found
        found.end()
        server.shutdown()


@pytest.mark.parametrize(
    ("said", "told"),
    [
        (b"<html>", "its answer to generate is not estune's"),
        (b"7", "not estune's"),
        (b"{}", "not estune's"),
        (b"[" * 100_000, "not estune's"),
        (b'{"result":{"a":[1]}}', "not estune's"),
        (b'{"result":[[1],[2],[]]}', "not estune's"),
        (b'{"result":[[1],[2],[-3]]}', "not estune's"),
        (b'{"result":[[1],[2],[4294967296]]}', "not estune's"),
        (b'{"result":[[1],[2]]}', "it answered 2 completions of up to 1 tokens, where 3 of up to 8 were asked for"),
        (b'{"result":[[1],[2],[1,2,3,4,5,6,7,8,9]]}', "3 completions of up to 9 tokens"),
        (b'{"failure":"refused","why":"a\\nb%b"}' % (b"c" * 10_000), "a bc{497}$"),
        (b'{"failure":"a new one","why":"so"}', r"generate failed there \(so\)"),
    ],
)
def test_an_answer_that_is_none_is_said_in_a_line(said: bytes, told: str, liar: RemoteHandle) -> None:
    Liar.says = (b"\n\n", said, b"\n")
    with pytest.raises(EstuneError, match=rf"^http://127\.0\.0\.1:\d+: .*{told}") as raised:
        liar.call("generate", 0, PROMPTS, SAMPLING)
    assert len(str(raised.value)) < 700


def test_times_that_are_none_are_refused(liar: RemoteHandle) -> None:
    for seconds in (b"-1", b"1e999", b"NaN"):
        times = b'"perturb_time":0.5,"generate_time":' + seconds
        Liar.says = (b'{"result":{"token_ids":[[1],[2],[3]],' + times + b"}}",)
        with pytest.raises(EstuneError, match="its answer to evaluate is not estune's"):
            liar.call("evaluate", 0, Member(1), 0.1, PROMPTS, SAMPLING)


def test_an_answer_without_end_is_given_up(liar: RemoteHandle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Liar, "says", ())
    monkeypatch.setattr(Liar, "endless", b"x" * 10_000)
    with pytest.raises(EstuneError, match="an answer of more than 100,000 bytes"):
        liar.call("generate", 0, PROMPTS, SAMPLING)
    with pytest.raises(EstuneError, match="an answer of more than 100,000 bytes"):
        liar.look(0.0)
    monkeypatch.setattr(Liar, "endless", b"x")
    liar._deadlines = Deadlines(0.3)
    with pytest.raises(Lost, match="no answer for 0 s"):
        liar.call("generate", 0, PROMPTS, SAMPLING)


@pytest.mark.parametrize(
    ("status", "told"), [(308, r"it sends elsewhere \(308\), where no key follows"), (413, "no request of that size")]
)
def test_what_stands_before_a_server_is_said(status: int, told: str, liar: RemoteHandle) -> None:
    Liar.says = ()
    Liar.status = status
    with pytest.raises(EstuneError, match=told):
        liar.look(0.0)


@pytest.mark.parametrize("key", ["two\nlines", "a\0b", "sésame"])
def test_a_key_that_cannot_be_sent_is_not_told(
    key: str, model: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("os.environ", {**os.environ, KEY: key})
    with pytest.raises(EstuneError, match="VLLM_API_KEY holds what no key may") as raised:
        handle(model, "http://127.0.0.1:1")
    assert key not in f"{raised.value}{caplog.text}"


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


def test_a_server_that_is_not_there_is_waited_for(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("estune.pool.crew.PATIENCE", 1.5)
    url = f"http://127.0.0.1:{free_port()}"
    with pytest.raises(EstuneError, match=rf"for \d+ s no server has answered \({url}: no answer .*refused"):
        trainer(tmp_path / "run", model, url)
    assert [r.message for r in caplog.records if "waiting for it" in r.message] == [
        f"worker 0 at {url}: no answer ([Errno 111] Connection refused); waiting for it"
    ]


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


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"workers_at": "localhost:8000"}, "'localhost:8000' is no address of a server: write http://HOST:PORT"),
        ({"workers_at": "http://me:secret@a:1"}, "is no address of a server: .* its key in VLLM_API_KEY"),
        ({"workers_at": "http://[::1"}, r"'http://\[::1' is no address of a server"),
        ({"workers_at": "http://a:99999"}, "is no address of a server"),
        ({"workers_at": "http://:8000"}, "is no address of a server"),
        ({"workers_at": "http://a:1,http://a:1/v1/"}, "http://a:1 stands there twice"),
        ({"workers_at": "http://a:1", "workers": 2}, "leave out replicas, workers"),
        ({"workers_at": "http://a:1", "weights": "inplace"}, "leave out workers"),
    ],
)
def test_settings_that_do_not_fit(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(EstuneError, match=said):
        parse(settings)


def test_addresses_are_those_that_clients_of_openai_take() -> None:
    assert parse({"workers_at": "http://a:1/v1, https://b/x/"}).workers_at == ["http://a:1", "https://b/x"]
    assert parse({"workers_at": None}).workers_at == []
    assert parse({"workers_at": "http://a:1,http://[::1]"}).workers_at == ["http://a:1", "http://[::1]"]
    assert parse({"workers_at": "[http://[::1]:8000]"}).workers_at == ["http://[::1]:8000"]


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
        lines = _lines(service, "open", "lease", (Terms("lease", "master", "nearest", "iid", "*"),))
        assert await anext(lines) == b"\n"
        await lines.aclose()  # type: ignore[attr-defined]

    asyncio.run(leave())
    assert aborted.is_set()
