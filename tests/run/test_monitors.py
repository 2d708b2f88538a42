"""What a terminal and a file are shown of a run, what is left of it, and monitors that fail."""

from __future__ import annotations

import io
import re
from pathlib import Path

import pytest
from rich.console import Console

from estune.engines.progress import Progress
from estune.journal.journal import Journal
from estune.run.monitors.base import Monitor, Plan, Sample, Summary, Work
from estune.run.monitors.console import ConsoleMonitor, sample_panel
from estune.run.monitors.pace import Pace, Stopwatch, evaluations_left, outlook, too_long
from estune.run.trainer import Trainer
from tests.runs import make_config, make_task


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
    assert re.search(r"\d s  [\d,]+ tokens/s  [\d.]+ m?s left$", steps[0])
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
    assert any(re.search(r"step 0/1 +━* +\S+ m?s", line) for line in shown)
    assert any(re.search(r"members +━+.* 1/4  20%  \S+ m?s  [\d,]+ tokens/s", line) for line in shown)


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
