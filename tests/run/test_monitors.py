"""Trackers: what they are told, under which names, and that their runs are ended. The real libraries, offline."""

from __future__ import annotations

import io
import json
import re
import sqlite3
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from estune.config import Config
from estune.engines.progress import Progress
from estune.errors import EstuneError
from estune.journal.journal import Journal
from estune.run.directory import RunDirectory
from estune.run.monitors import check_trackers, default_monitors
from estune.run.monitors.base import Monitor, Plan, Sample, Summary, Work
from estune.run.monitors.console import ConsoleMonitor, sample_panel
from estune.run.monitors.pace import Pace, Stopwatch, duration, evaluations_left, outlook, too_long
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


def test_a_monitor_that_cannot_be_closed_costs_nothing_of_the_run(model: Path, tmp_path: Path) -> None:
    class Stuck(Monitor):
        def close(self) -> None:
            raise RuntimeError("disk on fire")

    run = tmp_path / "run"
    with pytest.raises(RuntimeError, match="disk on fire"):
        Trainer(make_config(run, model, steps=2), task=make_task(), monitors=[Stuck()]).train()
    assert Journal.read(run).ended == "finished"
    assert (run / "final" / "model.safetensors").is_file()


def test_a_run_that_a_monitor_does_not_let_begin_lets_go_of_all_it_has(model: Path, tmp_path: Path) -> None:
    class Unready(Monitor):
        closed = False

        def on_train_begin(self, plan: Plan) -> None:
            raise RuntimeError("disk on fire")

        def close(self) -> None:
            self.closed = True

    unready = Unready()
    with pytest.raises(RuntimeError, match="disk on fire"):
        Trainer(make_config(tmp_path / "run", model, steps=1), task=make_task(), monitors=[unready]).train()
    assert unready.closed
    assert Trainer.resume(tmp_path / "run", task=make_task(), monitors=[]).train().ended == "finished"


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
    from estune.run.monitors.base import Sample

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


@pytest.mark.parametrize("width", [40, 80])
def test_a_line_of_a_file_is_one_line(width: int, model: Path, tmp_path: Path) -> None:
    console = Console(file=io.StringIO(), width=width)
    config = make_config(tmp_path / "run", model, steps=2, eval_samples=2, eval_temperature=1.0)
    Trainer(config, task=make_task(), monitors=[ConsoleMonitor(console)]).train()
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert lines[0].endswith("sigma 0.02, engine transformers")
    assert lines[1].endswith(str(tmp_path / "run"))
    evaluations = [line for line in lines if "held-out accuracy" in line and line.startswith("step")]
    assert len(evaluations) == 2
    steps = [line for line in lines if re.match(r"step +\d/2  reward", line)]
    assert re.search(r"\d s  [\d,]+ tokens/s  [\d.]+ s left$", steps[0])
    assert re.search(r"\d s  [\d,]+ tokens/s$", steps[1])
    told = [line for line in lines if line.startswith("a step: at most 192 tokens, ")]  # 4 members x 6 prompts x 8
    assert 1 <= len(told) <= 2
    assert all(re.search(r"pass@2 [\d.]+%.*weights changed by [\d.]+%$", line) for line in evaluations)


def test_a_terminal_shows_the_run_and_what_is_under_way(model: Path, tmp_path: Path) -> None:
    console = Console(file=io.StringIO(), width=120, force_terminal=True)
    monitor = ConsoleMonitor(console)
    trainer = Trainer(make_config(tmp_path / "run", model, steps=1), task=make_task(), monitors=[monitor])
    monitor.on_train_begin(trainer.plan())
    monitor.on_generate_begin(make_work("members", done=Progress(read=10, settled=30, tokens=20, writing=1)))
    monitor.on_member_end(1, 4)
    monitor.close()  # which shows it once more
    trainer.close()
    shown = plain(console.file.getvalue())  # type: ignore[attr-defined]
    assert any(re.search(r"step 0/1 +━* +\S+ s", line) for line in shown)
    assert any(re.search(r"members +━+.* 1/4  20%  \S+ s  [\d,]+ tokens/s", line) for line in shown)


def make_work(name: str = "members", pieces: int = 4, engines: int = 2, done: Progress | None = None) -> Work:
    """Twenty completions, of prompts of four tokens, of at most six."""
    return Work(name, pieces, 80, 20, 120, engines, lambda: done or Progress())


def test_what_is_left_follows_from_what_was_counted() -> None:
    done = Progress(read=20, reading=4 * 10**9, settled=30, tokens=30, writing=6 * 10**9)
    pace = Pace.of(done)
    assert pace == Pace(reading=0.2, writing=0.2, most=True)
    assert pace.seconds(make_work(engines=1), Progress()) == pytest.approx(40)
    assert pace.seconds(make_work(engines=2), done) == pytest.approx(15)
    assert pace.seconds(make_work(engines=3), Progress()) == pytest.approx(20)  # one takes two of the four pieces
    shorter = Pace.of(done._replace(settled=60))
    assert shorter == Pace(reading=0.2, writing=0.1, most=False)
    assert Pace.of(Progress(read=20, reading=4)) is None


def test_the_outlook_is_measured_as_soon_as_it_can_be(model: Path, tmp_path: Path) -> None:
    trainer = Trainer(make_config(tmp_path / "run", model, eval_samples=1), task=make_task(), monitors=[])
    plan = trainer.plan()
    trainer.close()
    now = 100.0
    watch = Stopwatch(plan, lambda: now)
    done = Progress()
    watch.begin(Work("evaluation", 1, 80, 20, 120, 1, lambda: done))
    now = 130.0
    look = watch.look()
    assert look is not None
    assert (look.seconds, look.left, look.run_left) == (30, None, None)
    done = Progress(read=80, reading=10**9, settled=20, tokens=20, writing=30 * 10**9)  # with what is compiled
    watch.look()
    done = done._replace(settled=40, tokens=40, writing=34 * 10**9)
    look = watch.look()
    assert look is not None
    assert look.left == pytest.approx(80 * 0.2)
    assert watch.most
    assert watch.step_seconds == pytest.approx(4 * (plan.prompt_tokens / 80 + 6 * 8 * 0.2))
    evaluation = 4 * (plan.prompt_tokens / 6 / 80 + 8 * 0.2)
    assert look.run_left == pytest.approx(look.left + 4 * watch.step_seconds + 2 * evaluation, rel=0.01)
    watch.evaluated()
    watch.step_done({"step": 1, "step_time": 3.0})
    assert watch.step_seconds == 3.0
    assert watch.run_left == 3 * 3.0 + 2 * 30.0


def test_rollouts_that_ask_for_more_than_was_planned_are_followed_by_what_the_last_ones_asked_for(
    model: Path, tmp_path: Path
) -> None:
    """The second work takes twice what was planned, as the first did, and half of that is done."""
    trainer = Trainer(make_config(tmp_path / "run", model), task=make_task(), monitors=None)
    trainer.close()
    watch = Stopwatch(trainer.plan(), lambda: 0.0)
    done = Progress(read=160, reading=10**9, settled=240, tokens=240, writing=24 * 10**9)
    watch.begin(Work("evaluation", 1, 80, 20, 120, 1, lambda: done))
    look = watch.look()
    assert look is not None
    assert (look.share, look.left) == (1.0, None)  # nobody knows yet
    watch.evaluated()
    done = done._replace(read=80, settled=120)
    watch.begin(Work("evaluation", 1, 80, 20, 120, 1, lambda: done))
    look = watch.look()
    assert look is not None
    assert look.share == 0.5
    assert look.left is not None
    plan = trainer.plan()
    assert watch.step_tokens == 2 * plan.population * plan.prompts_per_step * plan.config["max_new_tokens"]


@pytest.mark.parametrize("every", [0, 1, 2, 5, 9])
def test_evaluations_that_are_left(every: int) -> None:
    due = [step for step in range(1, 8) if step == 7 or (every and step % every == 0)]
    assert [evaluations_left(7, every, done) for done in range(8)] == [
        sum(step > done for step in due) for done in range(8)
    ]


def test_a_run_of_more_than_a_day_is_warned_of() -> None:
    assert outlook(6_144_000, 5400, 30 * 3600, most=True, how="measured") == (
        "a step: at most 6,144,000 tokens, at most 1.5 h; the run: at most 30 h (measured)"
    )
    assert too_long(24 * 3600) is None
    assert "this takes 1.5 days at this pace: fewer steps" in str(too_long(36 * 3600))
    assert [duration(s) for s in (0.25, 9.7, 89, 90, 5000)] == ["0.25 s", "9.7 s", "89 s", "1.5 min", "83.3 min"]


def test_a_completion_cannot_move_the_cursor() -> None:
    text = io.StringIO()
    console = Console(file=text, width=80, force_terminal=True)
    console.print(sample_panel(Sample("a\n\tb\x1b[2J", "c\r\nd\x1b]0;title\x07\r", 1.0)))
    assert not re.search(r"\x1b(?!\[[\d;]*m)|[\r\x07]", text.getvalue())  # colours alone
    assert [line.strip("│ ") for line in plain(text.getvalue())[1:-1]] == ["a", "b?[2Jc", "d?]0;title??"]


def test_a_summary_of_evaluations_with_accuracy_alone(tmp_path: Path) -> None:
    console = Console(file=io.StringIO(), width=120)
    only = {"eval_accuracy": 0.5, "watch/a\x1b[2J/accuracy": 1.0}
    ConsoleMonitor(console).on_train_end(Summary(tmp_path, 1, 1.0, only, only, only, "finished", shares=list(only)))
    said = console.file.getvalue()  # type: ignore[attr-defined]
    assert "held-out accuracy 50.0% -> 50.0%" in said
    assert "a?[2J 100.0% -> 100.0%" in said


def test_a_score_that_happens_to_lie_in_0_to_1_is_no_percentage(tmp_path: Path) -> None:
    console = Console(file=io.StringIO(), width=120)
    only = {"eval_accuracy": 0.3}
    ConsoleMonitor(console).on_train_end(Summary(tmp_path, 1, 1.0, only, only, only, "finished"))
    assert "held-out accuracy 0.3 -> 0.3 at" in console.file.getvalue()  # type: ignore[attr-defined]


def test_a_score_without_bounds_is_no_percentage(tmp_path: Path) -> None:
    console = Console(file=io.StringIO(), width=120)
    before, after = {"eval_accuracy": -0.11}, {"eval_accuracy": 2.5}
    ConsoleMonitor(console).on_train_end(Summary(tmp_path, 1, 1.0, before, after, after, "finished"))
    assert "held-out accuracy -0.11 -> 2.5 at" in console.file.getvalue()  # type: ignore[attr-defined]


def test_a_summary_tells_how_often_a_run_went_back(tmp_path: Path) -> None:
    for gone, said in (
        ({}, None),
        ({"taken_back": 3}, "steps the guard took back: 3"),
        ({"taken_back": 1, "back": 2}, "steps the guard took back: 1, times it went back to the best: 2"),
    ):
        console = Console(file=io.StringIO(), width=120)
        ConsoleMonitor(console).on_train_end(Summary(tmp_path, 9, 1.0, {}, {}, {}, "finished", **gone))
        lines = [line.strip("│ ") for line in plain(console.file.getvalue())]  # type: ignore[attr-defined]
        assert [line for line in lines if "back" in line] == ([said] if said else [])


def plain(text: str) -> list[str]:
    return re.sub(r"\x1b\[[\d;]*m", "", text).splitlines()


def test_trackers_are_loaded_by_nobody_else(tmp_path: Path) -> None:
    before = {"wandb", "trackio"} & sys.modules.keys()
    for monitor in default_monitors(RunDirectory.create(tmp_path / "run"), Config(report_to=[])):
        monitor.close()
    assert {"wandb", "trackio"} & sys.modules.keys() == before
