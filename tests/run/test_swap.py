"""A run's weights in a server, in place: any step, there and back; `tests/vllm/test_served.py` has vLLM's servers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import estune
from estune.completion import Sampling
from estune.config import Config
from estune.errors import EstuneError
from estune.journal.journal import Journal
from estune.journal.replay import replay
from estune.pool.remote.handle import KEY
from estune.pool.remote.service import Service
from estune.pool.remote.wire import Terms
from estune.pool.replica import Replica
from estune.run.trainer import Trainer
from tests.models import save_model
from tests.runs import make_config, make_task
from tests.servers import Served, free_port, serve_replica

PROMPTS = [[10, 20, 30], [40, 50], [60, 70, 80, 90]]


@pytest.fixture(scope="module")
def server(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    found = serve_replica(model, tmp_path_factory.mktemp("server"), "its key")
    found.wait()
    yield found
    found.kill()


@pytest.fixture(autouse=True)
def _key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY, "its key")


@pytest.fixture(scope="module")
def run(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "run"
    Trainer(make_config(folder, model, steps=6), task=make_task(), monitors=[]).train()
    return folder


@pytest.fixture(scope="module")
def other(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another run, of other settings, anchored to the base model."""
    folder = tmp_path_factory.mktemp("other") / "run"
    changes: dict[str, Any] = {"seed": 5, "anchor_decay": 0.5, "steps": 2, "train_parameters": "*proj*"}
    Trainer(make_config(folder, model, **changes), task=make_task(), monitors=[]).train()
    return folder


def test_any_step_of_any_run_there_and_back(server: Served, run: Path, other: Path) -> None:
    steps = Journal.read(run).steps
    found = [estune.swap(server.url + "/v1", run, step) for step in (3, 6, 3, 0)]
    assert [(each.how, each.updates) for each in found] == [
        ("advanced", 3),
        ("advanced", 3),
        ("kept", 0),
        ("rebuilt", 0),
    ]
    expected = [steps[2].fingerprint, steps[5].fingerprint, steps[2].fingerprint]
    assert [each.fingerprint for each in found[:3]] == expected
    assert estune.swap(server.url, other).fingerprint == Journal.read(other).fingerprint()
    assert estune.swap(server.url, run, 6, keep=0).fingerprint == steps[5].fingerprint


def test_what_is_served_is_the_checkpoint_of_that_step(model: Path, run: Path, tmp_path: Path) -> None:
    config = Config(model=str(model), device="cpu", threads=1, dtype="float32")
    replicas: list[Replica] = []

    def make(terms: Terms) -> Replica:
        replicas.append(Replica(config))
        return replicas[-1]

    service = Service("tests", make)
    terms = Terms("lease", "master", "nearest", "iid", "*")
    journal = Journal.read(run, 4)
    asked = [record.update for record in journal.history], journal.fingerprint(), 2
    service.run("open", "lease", (terms,))
    service.run("swap", "lease", asked)
    replay(run, tmp_path / "replayed", 4)
    expected = Replica(config.model_copy(update={"model": str(tmp_path / "replayed")}))
    sampling = Sampling(12)
    assert replicas[0].complete(PROMPTS, sampling) == expected.complete(PROMPTS, sampling)
    wrong = (asked[0][:2], *asked[1:])
    with pytest.raises(Exception, match="updates give fingerprint [0-9a-f]+ here, its journal says"):
        service.run("swap", "lease", ([*wrong[0], *wrong[0]], "0" * 16, 2))


def test_what_cannot_be_swapped_is_said_in_a_line(
    server: Served, model: Path, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"http://127.0.0.1:{free_port()}"
    with pytest.raises(EstuneError, match=rf"{url}: no answer .*refused.*: start it, or mend the address"):
        estune.swap(url, run)
    for wrong in ("localhost:8000", "http://[::1", "http://me:secret@a:1"):
        with pytest.raises(EstuneError, match="is no address of a server: write http://HOST:PORT"):
            estune.swap(wrong, run)
    with pytest.raises(EstuneError, match="6 steps"):
        estune.swap(server.url, run, 7)
    elsewhere = tmp_path / "elsewhere"
    base = save_model(tmp_path / "another", "qwen2", vocab_size=331)
    Trainer(make_config(elsewhere, base, steps=1), task=make_task(), monitors=[]).train()
    with pytest.raises(EstuneError, match="it serves another model than the run's: base_hash"):
        estune.swap(server.url, elsewhere)
    service = Service(
        "tests", lambda terms: Replica(Config(model=str(model), device="cpu", threads=1, dtype="float32"))
    )
    vllm = SimpleNamespace(weight_transfer_config=SimpleNamespace(backend="estune"))
    here = SimpleNamespace(llm_engine=SimpleNamespace(vllm_config=vllm), _estune=service)
    with pytest.raises(EstuneError, match="LLM: it serves another model than the run's: base_hash"):
        estune.swap(here, elsewhere)
    assert estune.swap(here, run, 1).updates == 1  # it is left free
    monkeypatch.delenv(KEY)
    with pytest.raises(EstuneError, match="it refuses the key"):
        estune.swap(server.url, run)
