"""What a CPU is fastest with, by trying."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from estune.journal.journal import Journal
from estune.pool import fastest as module
from estune.pool import open as opening
from estune.pool.fastest import Way, fastest, ways
from estune.pool.open import comparable_dtype, with_resources
from estune.run.trainer import Trainer
from tests.models import build_model, save_model
from tests.runs import make_config, make_task, variety


@pytest.mark.parametrize(
    ("cores", "most", "given", "expected"),
    [
        (1, 30, {}, [(1, 1)]),
        (2, 30, {}, [(2, 1), (1, 2)]),
        (6, 30, {}, [(6, 1), (3, 2), (1, 4), (1, 6)]),
        (6, 2, {}, [(2, 1), (2, 2), (1, 4), (1, 6)]),
        (6, 30, {"replicas": 3}, [(3, 1), (3, 2)]),
        (2, 30, {"replicas": 3}, [(3, 1)]),
        (6, 30, {"threads": 4}, [(1, 4)]),
        (6, 30, {"replicas": 2, "threads": 5}, [(2, 5)]),
    ],
)
def test_cores_are_shared_out_as_the_settings_leave_open(
    cores: int, most: int, given: dict[str, int], expected: list[tuple[int, int]]
) -> None:
    found = ways(["float32"], cores, most, **{"replicas": None, "threads": None, **given})
    assert [(way.replicas, way.threads) for way in found] == expected


def test_all_types_are_tried() -> None:
    assert [str(way) for way in ways(["float32", "bfloat16"], 1, 1, replicas=None, threads=2)] == [
        "float32 by one engine of 2 threads",
        "bfloat16 by one engine of 2 threads",
    ]


@pytest.mark.parametrize("own", [True, False])
def test_work_that_takes_longer_is_found_slower(own: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_OF_ONE", 1 << 14)
    one, more = Way("float32", 1, 1), Way("float32", 2, 1)
    speeds = {one: 100.0, more: 96.0}
    monkeypatch.setattr(module, "speed_of", lambda way, *rest, **own: speeds[way])
    assert fastest([(64, 32)], 3, [more, one], own=own) == more  # as good as alike, and the first
    speeds[more] = 94.0
    assert fastest([(64, 32)], 3, [more, one], own=own) == one
    monkeypatch.undo()
    monkeypatch.setattr(module, "MOST_OF_ONE", 1 << 14)
    before = torch.get_num_threads()
    assert fastest([(64, 32), (1000, 48)], 3, ways(["float32", "bfloat16"], 2, 2, replicas=None, threads=None), own=own)
    assert torch.get_num_threads() == before


def test_prompts_that_cost_little_are_advised(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    (way,) = ways(["float32"], 1, 1, replicas=None, threads=1)
    each = {24: 100.0, 48: 160.0, 96: 170.0}
    monkeypatch.setattr(module, "speed_of", lambda way, shapes, rows, **named: each[rows])
    fastest([(64, 32)], 24, [way], own=True)
    assert "prompts_per_step=48 would cost 1.2 times what 24 do" in caplog.text
    caplog.clear()
    fastest([(64, 32)], 48, [way], own=True)
    fastest([(64, 32)], 24, [way], own=True, together=True)  # rows of several members
    assert not caplog.text


def test_without_matrices_the_first_way_is_taken() -> None:
    choices = ways(["float32"], 2, 2, replicas=None, threads=None)
    assert fastest([], 3, choices, own=False) == choices[0]


def test_a_run_keeps_what_was_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[list[Way], bool]] = []

    def last(shapes: Any, rows: int, choices: list[Way], *, own: bool, together: bool) -> Way:
        asked.append((choices, own))
        assert (48, 96) in shapes
        assert rows == (5 * 2 if together else 5)  # of two of four members, on each of two cores
        return choices[-1]

    monkeypatch.setattr(opening, "LEAST_TRIED", 1)
    monkeypatch.setattr(opening, "fastest", last)
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    model = build_model("llama").to(torch.bfloat16)
    model.save_pretrained(tmp_path / "bfloat16")
    config = make_config(tmp_path / "run", tmp_path / "bfloat16", replicas=None, threads=None, prompts_per_step=5)
    found = with_resources(config)
    assert (found.dtype, found.replicas, found.threads) == ("bfloat16", 1, 2)
    ((choices, own),) = asked
    assert own
    assert [(w.dtype, w.replicas, w.threads) for w in choices] == [
        ("float32", 2, 1), ("float32", 1, 2), ("bfloat16", 2, 1), ("bfloat16", 1, 2),
    ]  # fmt: skip
    assert with_resources(found) == found  # nothing is left to try
    assert len(asked) == 1
    with_resources(config, "float32")  # of a run from before there were trials, which goes on
    assert {way.dtype for way in asked[-1][0]} == {"float32"}
    one = with_resources(config.model_copy(update={"replicas": 1, "dtype": comparable_dtype(config)}))
    assert (one.dtype, one.replicas, one.threads, len(asked)) == ("float32", 1, 1, 2)  # nothing is left to try
    alone = with_resources(config.model_copy(update={"weights": "inplace"}))
    assert (alone.replicas, alone.threads) == (1, 2)
    with_resources(config.model_copy(update={"noise": "rank1", "dtype": "bfloat16"}))
    build_model("llama").save_pretrained(tmp_path / "float32")
    exact = with_resources(config.model_copy(update={"model": str(tmp_path / "float32")}))
    assert (exact.dtype, {way.dtype for way in asked[-1][0]}) == ("float32", {"float32"})


def test_noise_that_members_are_decoded_together_with_is_taken_where_it_pays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = {kind: save_model(tmp_path / kind, kind) for kind in ("llama", "qwen3", "gpt2")}

    def noise(kind: str = "llama", *, alone: bool = False, **changes: Any) -> str:
        given = {"noise": "auto", "prompts_per_step": 8, "threads": 1, **changes}
        return with_resources(make_config(tmp_path / "run", models[kind], **given), alone=alone).noise

    assert noise() == "iid"  # so small a model stays in the caches
    monkeypatch.setattr(opening, "LEAST_TRIED", 1)
    assert noise() == "rank1"
    assert noise(samples_per_prompt=7, temperature=1.0) == "rank1"
    assert noise(noise="correlated") == "correlated"
    for changes in (
        {"samples_per_prompt": 8, "temperature": 1.0},
        {"prompts_per_step": 64},
        {"weights": "inplace"},
        {"weights": "int8"},
        {"guided_share": 0.5},
        {"adapter": {"rank": 2}},
        {"kind": "qwen3"},
        {"kind": "gpt2"},
        {"alone": True},
    ):
        assert noise(**changes) == "iid", changes


def test_a_run_that_goes_on_keeps_its_type(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One from before there were trials has left `dtype` open."""
    base = save_model(tmp_path / "base", "llama")
    build_model("llama").to(torch.bfloat16).save_pretrained(base)
    config = make_config(tmp_path / "run", base, steps=1, replicas=1, threads=1)
    Trainer(config, task=make_task(variety), monitors=[]).train()
    before = Journal.read(tmp_path / "run")
    assert before.settings["dtype"] == "auto"
    monkeypatch.setattr(opening, "LEAST_TRIED", 1)
    monkeypatch.setattr(opening, "fastest", lambda shapes, rows, choices, own: choices[-1])
    Trainer.resume(tmp_path / "run", task=make_task(variety), monitors=[], steps=2).train()
    after = Journal.read(tmp_path / "run")
    assert (len(after.steps), after.settings["dtype"]) == (2, before.header.live_dtype)
