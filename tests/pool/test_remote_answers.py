"""Servers that are not what they should be: what answers in their place is said in a line."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from estune.config import parse
from estune.errors import EstuneError
from estune.es.strategy import Member
from estune.pool.deadlines import Lost
from estune.pool.remote.handle import KEY, RemoteHandle
from tests.pool.far import PROMPTS, SAMPLING, handle, trainer
from tests.servers import free_port

pytestmark = pytest.mark.usefixtures("key")


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
        self.rfile.read(int(self.headers.get("Content-Length", 0)))  # what is left unread breaks the connection off
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


def test_an_answer_without_end_is_given_up(liar: RemoteHandle, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Liar, "says", ())
    monkeypatch.setattr(Liar, "endless", b"x" * 10_000)
    with pytest.raises(EstuneError, match="an answer of more than 100,000 bytes"):
        liar.call("generate", 0, PROMPTS, SAMPLING)
    with pytest.raises(EstuneError, match="an answer of more than 100,000 bytes"):
        liar.look(0.0)
    monkeypatch.setattr(Liar, "endless", b"x")
    hurried = handle(model, liar.url, seconds=0.3)
    with pytest.raises(Lost, match="no answer for 0 s"):
        hurried.call("generate", 0, PROMPTS, SAMPLING)
    hurried.end()


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
