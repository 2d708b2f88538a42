"""Trackers: what they are told, under which names, and that their runs are ended. The real libraries, offline."""

from __future__ import annotations

import json
import sqlite3
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from estune.config import Config
from estune.errors import EstuneError
from estune.run.directory import RunDirectory
from estune.run.monitors import check_trackers, default_monitors
from estune.run.monitors.base import Monitor, Sample
from estune.run.monitors.trackers import ROWS, WandbMonitor
from estune.run.trainer import Trainer
from tests.runs import make_config, make_task

BLOCK = 32768  # of LevelDB's log format, in which wandb keeps the records of a run


@pytest.fixture
def _offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))


def records(path: Path) -> Iterator[Any]:
    """What wandb wrote of a run: whole records, put together from the pieces in the file's blocks."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, place, whole = path.read_bytes(), 7, b""
    while place + 7 <= len(data):
        if BLOCK - place % BLOCK < 7:
            place += BLOCK - place % BLOCK
            continue
        length, kind = int.from_bytes(data[place + 4 : place + 6], "little"), data[place + 6]
        whole += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # all of it, or its last piece
            yield Record.FromString(whole)
            whole = b""


def offline_runs(folder: Path) -> list[list[Any]]:
    import wandb

    wandb.teardown()  # which waits for its service: a run that is finished may not be written yet
    return [list(records(path)) for path in sorted(folder.glob("wandb/offline-run-*/*.wandb"))]


def history(found: list[Any]) -> dict[int, dict[str, Any]]:
    """Everything that was logged, by step."""
    logged: dict[int, dict[str, Any]] = {}
    for record in found:
        if record.WhichOneof("record_type") == "history":
            items = {i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in record.history.item}
            logged.setdefault(items["_step"], {}).update(items)
    return logged


def exit_codes(found: list[Any]) -> list[int]:
    return [r.exit.exit_code for r in found if r.WhichOneof("record_type") == "exit"]


@pytest.mark.usefixtures("_offline")
def test_wandb_has_a_run_under_its_name_with_settings_metrics_and_completions(model: Path, tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    config = make_config(tmp_path / "my-run", model, steps=2, report_to=["wandb"])
    trainer = Trainer(config, task=make_task())
    trainer.train()
    (found,) = offline_runs(tmp_path / "my-run")
    (run,) = {r.run.run_id: r.run for r in found if r.WhichOneof("record_type") == "run"}.values()
    assert (run.display_name, run.project) == ("my-run", "mine")
    settings = {item.key: json.loads(item.value_json) for item in run.config.update}
    assert settings["sigma"] == 0.02
    assert settings["task"]["name"] == "countdown"
    logged = history(found)
    assert sorted(logged) == [0, 1, 2]
    for metrics in (json.loads(line) for line in (tmp_path / "my-run" / "metrics.jsonl").read_text().splitlines()):
        step = metrics.pop("step")
        assert metrics.items() <= logged[step].items()
    assert {"reward", "reward_std", "rewards/variety/mean", "eval_reward", "num_tokens"} <= logged[2].keys()
    assert logged[2]["completions/_type"] == "table-file"
    assert "completions/_type" not in logged[1]
    _, last = sorted((tmp_path / "my-run").glob("wandb/offline-run-*/files/media/table/*.json"))
    table = json.loads(last.read_text())
    assert table["columns"] == ["prompt", "completion", "reward", "rewards/variety", "tokens"]
    assert [row[0] for row in table["data"]] == [row["prompt"] for row in make_task().evaluation]
    assert exit_codes(found) == [0]


@pytest.mark.usefixtures("_offline")
def test_wandb_is_told_of_a_run_that_failed_and_goes_on_with_one_that_is_resumed(model: Path, tmp_path: Path) -> None:
    pytest.importorskip("wandb")

    class Failing(Monitor):
        def on_step_end(self, *_: Any) -> None:
            raise RuntimeError("disk on fire")

    trainer = Trainer(make_config(tmp_path / "run", model, steps=2, report_to=["wandb"]), task=make_task())
    trainer.monitors.append(Failing())
    with pytest.raises(RuntimeError, match="disk on fire"):
        trainer.train()
    Trainer.resume(tmp_path / "run", task=make_task()).train()
    first, second = offline_runs(tmp_path / "run")
    assert (exit_codes(first), exit_codes(second)) == ([1], [0])
    one, two = ({r.run.run_id for r in found if r.WhichOneof("record_type") == "run"} for found in (first, second))
    assert one == two
    assert max(history(first)) == 1
    assert max(history(second)) == 2


@pytest.mark.usefixtures("_offline")
def test_long_evaluations_are_cut(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    from estune.run.graded import write_completions

    run = RunDirectory.create(tmp_path / "run")
    write_completions(run.completions("evaluation-00003"), [{"prompt": str(i), "secret": i} for i in range(ROWS + 9)])
    monitor = WandbMonitor(run, Config())
    monitor.on_evaluate({"step": 3, "eval_reward": 0.5}, Sample("p", "c", 0.5))
    monitor.close()
    monitor.close()
    (path,) = (tmp_path / "run").glob("wandb/offline-run-*/files/media/table/*.json")
    table = json.loads(path.read_text())
    assert (table["columns"], len(table["data"])) == (["prompt"], ROWS)


@pytest.mark.usefixtures("_offline")
def test_trackio_has_the_same_on_this_machine(model: Path, tmp_path: Path) -> None:
    pytest.importorskip("trackio")
    Trainer(make_config(tmp_path / "my-run", model, steps=2, report_to=["trackio"]), task=make_task()).train()
    with sqlite3.connect(tmp_path / "trackio" / "estune.db") as database:
        rows = database.execute("SELECT run_name, step, metrics FROM metrics").fetchall()
        ((settings,),) = database.execute("SELECT config FROM configs").fetchall()
    database.close()
    assert {name for name, *_ in rows} == {"my-run"}
    assert json.loads(settings)["sigma"] == 0.02
    logged: dict[int, dict[str, Any]] = {}
    for _, step, metrics in rows:
        logged.setdefault(step, {}).update(json.loads(metrics))
    assert {"reward", "eval_reward", "completions"} <= logged[2].keys()
    assert len(logged[2]["completions"]["_value"]) == 4


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_tracker_that_is_not_there_is_one_line(
    name: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = find_spec
    monkeypatch.setattr("estune.run.monitors.trackers.find_spec", lambda asked: None if asked == name else known(asked))
    config = make_config(tmp_path / "run", model, report_to=["tensorboard", name])
    message = rf"report_to={name} needs its library: pip install 'estune\[{name}\]'"
    with pytest.raises(EstuneError, match=message):
        check_trackers(config)
    with pytest.raises(EstuneError, match=message):
        default_monitors(RunDirectory.create(tmp_path / "run"), config)


@pytest.mark.usefixtures("_offline")
def test_a_tracker_that_cannot_begin_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb")

    def refuse(**_: Any) -> None:
        raise wandb.errors.UsageError("No API key configured.\nUse `wandb login`.")

    monkeypatch.setattr(wandb, "init", refuse)
    run = RunDirectory.create(tmp_path / "run")
    with pytest.raises(EstuneError, match="report_to=wandb: it cannot begin a run: No API key configured. Use `wandb"):
        default_monitors(run, Config(report_to=["wandb"]))


def test_a_run_whose_tracker_cannot_begin_can_be_begun_again(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb").teardown()  # it remembers the environment of its first run
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))  # where a key may be kept
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_SILENT", "true")
    folder = tmp_path / "run"
    tracked = make_config(folder, model, report_to=["wandb"])
    with pytest.raises(EstuneError, match="report_to=wandb: it cannot begin a run"):
        Trainer(tracked, task=make_task())
    assert not folder.exists()
    base = folder / "base" / "config.json"  # a model that was given in memory is there before its run
    base.parent.mkdir(parents=True)
    base.touch()
    with pytest.raises(EstuneError, match="report_to=wandb: it cannot begin a run"):
        Trainer(tracked, task=make_task())
    assert sorted(folder.rglob("*")) == [base.parent, base]
    Trainer(make_config(folder, model, steps=1), task=make_task()).train()
    before = (folder / "journal.jsonl").read_bytes()
    with pytest.raises(EstuneError, match="report_to=wandb: it cannot begin a run"):
        Trainer.resume(folder, steps=2, report_to=["wandb"], task=make_task())
    assert (folder / "journal.jsonl").read_bytes() == before
    Trainer.resume(folder, steps=2, report_to="tensorboard", task=make_task()).train()
    assert any((folder / "tensorboard").iterdir())


def test_trackers_are_loaded_by_nobody_else(tmp_path: Path) -> None:
    before = {"wandb", "trackio"} & sys.modules.keys()
    for monitor in default_monitors(RunDirectory.create(tmp_path / "run"), Config(report_to=[])):
        monitor.close()
    assert {"wandb", "trackio"} & sys.modules.keys() == before
