"""Which engine generates, for which lengths, and what happens where vLLM is not there or fails."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from estune.config import Config
from estune.journal.journal import Journal
from estune.pool.open import open_pool, open_to_generate, with_engine, with_length
from estune.run.make import make_sampling
from estune.run.trainer import Trainer
from tests.runs import make_config, make_task

NO_VLLM = ("no-such-package-as-this",)
PACKAGES = "estune.engines.vllm.internals.PACKAGES"


def with_vllm(monkeypatch: pytest.MonkeyPatch, version: str | None) -> None:
    """A machine on which this version of vLLM is installed, as far as asking for it goes."""
    monkeypatch.setattr("estune.engines.vllm.internals.installed", lambda package: version)


@pytest.mark.parametrize(
    ("settings", "device", "version", "expected", "said"),
    [
        ({}, "cpu", "0.32.0", "transformers", ""),
        ({}, "mps", "0.32.0", "transformers", ""),
        ({}, "cuda", "0.32.0", "auto", ""),  # opening tries
        ({}, "cuda", None, "transformers", "engine=auto takes transformers: engine=vllm: vLLM is not installed"),
        ({}, "cuda", "0.9.0", "transformers", "vLLM 0.9.0 is installed, estune knows"),
        ({"replicas": 2}, "cuda", "0.32.0", "transformers", ""),
        ({"workers": 2}, "cuda", None, "transformers", "vLLM is not installed"),
        ({"workers": 2, "ray_address": "auto"}, "cuda", None, "auto", ""),  # other machines may have it
        ({"engine": "vllm"}, "cpu", None, "vllm", ""),
        ({"engine": "transformers"}, "cuda", "0.32.0", "transformers", ""),
        ({"gpus_per_worker": 2}, "cpu", None, "vllm", ""),
        ({"vllm_max_model_length": 512}, "cpu", None, "vllm", ""),
        ({"vllm_gpu_memory_utilization": 0.5}, "cuda", None, "vllm", ""),
    ],
)
def test_which_engine_auto_is(
    settings: dict[str, Any],
    device: str,
    version: str | None,
    expected: str,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with_vllm(monkeypatch, version)
    assert with_engine(Config(**settings), device).engine == expected
    assert said in caplog.text
    assert len(caplog.messages) == bool(said)


@pytest.mark.parametrize(
    ("settings", "longest", "expected"),
    [
        ({"engine": "vllm"}, 155, 256),
        ({"engine": "vllm"}, 156, 512),  # room for one token more, to score what is 256 long
        ({"engine": "auto"}, 0, 256),
        ({"engine": "vllm"}, None, None),
        ({"engine": "transformers"}, 155, None),
        ({"engine": "vllm", "vllm_max_model_length": 101}, 155, 101),
    ],
)
def test_length_that_prompts_need(settings: dict[str, Any], longest: int | None, expected: int | None) -> None:
    config = Config(max_new_tokens=100, **settings)
    assert with_length(config, longest).vllm_max_model_length == expected


def test_where_vllm_fails_transformers_generates_and_says_why(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(PACKAGES, NO_VLLM)
    config = make_config(tmp_path / "run", model, device="cpu", engine="auto")
    pool = open_pool(config, 3)
    try:
        assert pool.describe().engine == "transformers"
        expected = pool.generate([[1, 2, 3]], make_sampling(config))
    finally:
        pool.close()
    generators = open_to_generate(config, 3)
    try:
        assert generators.generate([[1, 2, 3]], make_sampling(config)) == expected
    finally:
        generators.close()
    assert [message.partition("pip")[0] for message in caplog.messages] == [
        "engine=auto takes transformers: engine=vllm: vLLM is not installed; "
    ] * 2


def test_the_journal_names_the_engine_that_was_taken(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("estune.pool.open.with_engine", lambda config, device: config)  # as on a GPU
    monkeypatch.setattr(PACKAGES, NO_VLLM)
    Trainer(make_config(tmp_path / "run", model, steps=0), task=make_task(), monitors=[]).close()
    settings = Journal.read(tmp_path / "run").settings
    assert settings["engine"] == "transformers"
    assert settings["vllm_max_model_length"] is None  # a run that goes on finds it anew: it may have other prompts
