"""A run or a model behind an endpoint."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import openai
import pytest

from estune.completion import Sampling
from estune.engines.transformers import TransformersEngine
from estune.run.serving import serving
from estune.run.trainer import Trainer
from tests.command_line import estune, refused
from tests.runs import make_config, make_task

HELLO: list[Any] = [{"role": "user", "content": "Hello"}]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    config = make_config(folder, model, steps=1, sigma=0.5, learning_rate=0.5, eval_on_start=False)
    Trainer(config, task=make_task()).train()
    return folder


def answered(model: Path, step: int | None = None) -> str | None:
    with serving(str(model), {"max_new_tokens": 6}, step, key="mine") as (endpoint, key):
        assert (endpoint.model, key) == (model.name, "mine")
        with openai.OpenAI(base_url=endpoint.url, api_key=key) as client:
            return client.chat.completions.create(model=model.name, messages=HELLO).choices[0].message.content


def generated(model: Path) -> str:
    engine = TransformersEngine(model)
    return engine.generate(engine.encode([HELLO]), Sampling(6))[0].text


def test_a_run_s_best_and_any_of_its_steps_are_served(run: Path, model: Path) -> None:
    assert answered(run) == generated(run / "best")
    assert answered(run, 0) == generated(model)
    assert answered(run, 1) == generated(run / "final") != generated(model)


def test_what_cannot_be_served_is_one_line(run: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "has 1 step, not 2: give --step from 0 to 1" in refused(capsys, "serve", run, "--step", 2)
    assert "is no run's directory: leave it out" in refused(capsys, "serve", model, "--step", 1)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert f"cannot listen at 127.0.0.1, port {port}" in refused(capsys, "serve", model, "--port", port)


def test_it_serves_until_ctrl_c(
    model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("estune.cli.serve.wait_for_ever", interrupted, raising=True)
    assert estune("serve", model, "--port", 0, "--key", "mine") == 0
    out = capsys.readouterr().out
    assert "OPENAI_BASE_URL=http://127.0.0.1:" in out
    assert "OPENAI_API_KEY=mine" in out
