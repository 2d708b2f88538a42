"""Sweeps of real runs of the embedded model: grids, what is cut off, what fails, what is refused."""

from __future__ import annotations

import signal
import subprocess
import sys
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import psutil
import pytest

from estune.errors import EstuneError
from estune.files import locked
from estune.journal.journal import FILE, Journal
from estune.study.jobs import LOCK
from estune.study.sweep import Space, Trial, name_of, split, sweep
from estune.study.sweep_report import draw_effects, effect_chart, effects, groups, rows
from tests.processes import until


def settings(**changes: object) -> list[str]:
    given = {
        "steps": 2,
        "population": 4,
        "prompts_per_step": 4,
        "max_new_tokens": 4,
        "eval_steps": 0,
        "replicas": 1,
        "report_to": "none",
        "task.train_size": 8,
        "task.eval_size": 4,
        **changes,
    }
    return [f"{key}={value}" for key, value in given.items()]


def test_swept_settings_are_told_from_shared_ones() -> None:
    shared, space = split(["steps=3", "sweep.sigma=0.01, 0.02", "sweep.task.eval-size=4,8"])
    assert shared == ["steps=3"]
    assert space.points() == [
        {"sigma": sigma, "task.eval_size": size} for sigma in ("0.01", "0.02") for size in ("4", "8")
    ]
    _, space = split(["sweep.sigma=1e-3..1e-1", "sweep.population=4..16"])
    assert space.ranges == {"sigma": (0.001, 0.1), "population": (4, 16)}
    assert [type(low) for low, _ in space.ranges.values()] == [float, int]
    _, space = split(["sweep.model=../m1,../m2", "sweep.start_from=../run"])
    assert space == Space({"model": ["../m1", "../m2"], "start_from": ["../run"]}, {})


@pytest.mark.parametrize(
    ("overrides", "complaint"),
    [
        (["steps=3"], "nothing is swept"),
        (["sweep.sigma=0.1,0.1"], "list different values"),
        (["sweep.sigma="], "list different values"),
        (["sweep.sigma=2..1"], "the lower one first"),
        (["sweep.sigma=a..b"], "two numbers"),
        (["sweep.sigma=1..x"], "two numbers"),
        (["sweep.sigma=0.1..0.2"], "a range, which a grid cannot take"),
        (["sweep.sigmo=0.1,0.2"], "did you mean sigma"),
        (["sweep.sigma=0.1,-1"], "greater than 0"),
        (["sweep.seed=1,2", "output_dir=x"], "output_dir is the sweep's own"),
    ],
)
def test_what_cannot_be_swept_is_refused_before_anything_runs(
    tmp_path: Path, overrides: list[str], complaint: str
) -> None:
    with pytest.raises(EstuneError, match=complaint):
        sweep(tmp_path / "sweep", None, overrides)
    assert not (tmp_path / "sweep").exists()


def test_a_grid_is_run_once_and_cut_runs_are_resumed(tmp_path: Path) -> None:
    folder, given = tmp_path / "sweep", [*settings(), "trust_remote_code=true", "sweep.seed=0,1"]
    whole = sweep(folder, None, given)
    assert [t.name for t in whole] == ["seed=0", "seed=1"]
    assert all(t.error is None and 0 <= t.metrics["eval_accuracy"] <= 1 for t in whole)
    assert [Journal.read(folder / t.name).settings["seed"] for t in whole] == [0, 1]
    types = {(found["device"], found["dtype"]) for found in (Journal.read(folder / t.name).settings for t in whole)}
    assert types <= {("cpu", "float32"), ("cuda", "auto")}  # one for all, whatever would be the fastest for each

    # As a sweep leaves it that was killed in the second step of its second run.
    before = (folder / "seed=0" / FILE).read_bytes()
    (folder / "seed=1").rename(tmp_path / "whole")
    (folder / "seed=1").mkdir()
    (folder / "seed=1" / "completions").mkdir()
    lines = (tmp_path / "whole" / FILE).read_bytes().splitlines(keepends=True)
    kept = next(i for i, line in enumerate(lines) if line.startswith(b'{"kind":"step","step":1,'))
    (folder / "seed=1" / FILE).write_bytes(b"".join(lines[:kept]) + lines[kept][:50])
    told: list[Trial] = []
    again = sweep(folder, None, given, told=told.append)
    assert again == whole
    assert [t.name for t in told] == ["seed=1"]
    assert (folder / "seed=0" / FILE).read_bytes() == before
    one, other = Journal.read(folder / "seed=1"), Journal.read(tmp_path / "whole")
    assert one.fingerprint() == other.fingerprint()
    assert one.header.created == other.header.created  # resumed, not run anew

    with pytest.raises(EstuneError, match="other settings"):
        sweep(folder, None, [*settings(steps=3), "sweep.seed=0,1"])
    with pytest.raises(EstuneError, match="other settings"):
        sweep(folder, None, [*settings(), "sweep.sigma=0.1,0.2"])


def test_a_run_without_its_last_evaluation_goes_on(tmp_path: Path) -> None:
    """Interrupted, which leaves weights, then resumed, then killed between its last step and its last evaluation."""
    folder, given = tmp_path / "sweep", [*settings(), "sweep.seed=0"]
    whole = sweep(folder, None, given)
    journal = folder / "seed=0" / FILE
    text = journal.read_bytes()
    lines = text.splitlines(keepends=True)
    assert lines[-2].startswith(b'{"kind":"evaluation","step":2,')
    journal.write_bytes(b"".join(lines[:-2]))
    weights = folder / "seed=0" / "final" / "model.safetensors"
    expected = weights.read_bytes()
    weights.write_bytes(b"of the step before")
    assert sweep(folder, None, given) == whole
    assert [e.step for e in Journal.read(folder / "seed=0").evaluations] == [0, 2]
    assert weights.read_bytes() == expected


def test_a_run_that_fails_ends_no_other(tmp_path: Path) -> None:
    missing = tmp_path / "missing"
    good, bad = sweep(tmp_path / "sweep", None, [*settings(), f"sweep.model=tiny,{missing}"], jobs=2)
    assert good.error is None
    assert good.metrics
    assert str(missing) in (bad.error or "")
    assert not bad.metrics
    assert len(rows([good, bad])) == 2  # the heading, and the one that ran


def test_runs_without_an_evaluation_set_are_not_ranked(tmp_path: Path) -> None:
    task = tmp_path / "blind.py"
    task.write_text(
        "from estune.tasks.base import Task\n\n"
        "def brevity(completions, **_):\n    return [-float(len(c)) for c in completions]\n\n"
        "def task(seed):\n    return Task('blind', [{'prompt': 'a'}] * 8, [], [brevity], [1.0], None)\n"
    )
    given = [s for s in settings() if not s.startswith("task.")]
    (found,) = sweep(tmp_path / "sweep", None, [*given, f"task.name={task}", "sweep.seed=0"])
    assert found.metrics == {}
    assert found.error == "the task has no evaluation set to judge the run by"


def test_an_interrupted_sweep_leaves_nothing_running(tmp_path: Path) -> None:
    folder = tmp_path / "sweep"
    given = [*settings(steps=2000), "sweep.seed=0,1"]
    code = (
        f"from pathlib import Path; from estune.study.sweep import sweep; sweep(Path({str(folder)!r}), None, {given!r})"
    )
    process = subprocess.Popen([sys.executable, "-u", "-c", code], stderr=subprocess.DEVNULL)  # a warm one
    try:
        journal = folder / "seed=0" / FILE
        until(journal.is_file)
        process.send_signal(signal.SIGINT)
        process.wait(60)
        assert process.returncode != 0
        assert not (folder / "seed=1").exists()  # what had not begun does not begin
        assert not _running(folder / "seed=0")
    finally:
        process.kill()


def _running(run: Path) -> bool:
    """Whether a process still writes the run: it would be on its command line."""
    lines = [process.info["cmdline"] or [] for process in psutil.process_iter(["cmdline"])]
    return any(str(run) in line for line in lines)


def trial(value: float | None, **values: str) -> Trial:
    return Trial("x", values, {} if value is None else {"eval_accuracy": value}, None if value else "failed")


def test_seeds_are_averaged_and_settings_ranked(tmp_path: Path) -> None:
    found = [
        trial(0.2, sigma="0.01", seed="0"),
        trial(0.4, sigma="0.01", seed="1"),
        trial(0.5, sigma="0.1", seed="0"),
        trial(None, sigma="0.1", seed="1"),
    ]
    assert groups(found) == [({"sigma": "0.1"}, [0.5]), ({"sigma": "0.01"}, [0.2, 0.4])]
    assert rows(found)[1:] == [
        ["0.1", "0.5000", "", "0.5000", "0.5000", "1"],
        ["0.01", "0.3000", "0.1414", "0.2000", "0.4000", "2"],
    ]
    assert effects(found) == {"sigma": {"0.01": [0.2, 0.4], "0.1": [0.5]}, "seed": {"0": [0.2, 0.5], "1": [0.4]}}
    declared = [replace(t, shares=frozenset(["eval_accuracy"])) for t in found]
    assert rows(declared)[2] == ["0.01", "30.0%", "14.1%", "20.0%", "40.0%", "2"]
    draw_effects(found, tmp_path / "effects.svg")
    assert "%" not in (tmp_path / "effects.svg").read_text().partition("</style>")[2]
    draw_effects(declared, tmp_path / "effects.svg")
    assert ">20%</text>" in (tmp_path / "effects.svg").read_text()
    drawn = ElementTree.fromstring((tmp_path / "effects.svg").read_text())
    assert drawn.get("aria-label") == "eval_accuracy, % by sigma; eval_accuracy, % by seed"
    with pytest.raises(EstuneError, match="no effect to draw"):
        draw_effects(found[:1], tmp_path / "none.svg")


def test_few_numbers_are_labelled_and_many_are_not() -> None:
    rates = [f"{0.001 * 1.2**i:.4g}" for i in range(20)]
    found = [
        trial(0.1 + i / 40, sigma=rate, population=str(10 + i % 8), mirrored=("true", "false")[i % 2])
        for i, rate in enumerate(rates)
    ]
    by = effects(found)
    many, few, named = (effect_chart(name, by[name], "eval_accuracy") for name in ("sigma", "population", "mirrored"))
    assert [s.kind for s in many.series] == ["points"]
    assert len(many.series[0].x) == 20
    assert [tick.text for tick in many.x_ticks] == ["0.001", "0.003", "0.01", "0.03"]
    assert [[s.kind for s in chart.series] for chart in (few, named)] == [["points", "dots"]] * 2
    assert [tick.text for tick in few.x_ticks] == [str(10 + i) for i in range(8)]
    assert [tick.text for tick in named.x_ticks] == ["true", "false"]
    assert list(named.series[1].y) == pytest.approx([0.325, 0.35])  # means of every second of 0.1, 0.125, ...


def test_two_sweeps_do_not_share_a_folder(tmp_path: Path) -> None:
    folder = tmp_path / "sweep"
    folder.mkdir()
    held = closing(locked(folder / LOCK, "ab"))
    with held, pytest.raises(EstuneError, match=r"sweep is in use by another sweep; wait for it or stop it"):
        sweep(folder, None, [*settings(), "sweep.seed=0,1"])


@pytest.mark.parametrize("damaged", ["", "{", "[]", "{}", '{"settings": {}}'])
def test_a_folder_whose_sweep_is_damaged_is_refused(damaged: str, tmp_path: Path) -> None:
    (tmp_path / "sweep.json").write_text(damaged)
    with pytest.raises(EstuneError, match=r"sweep\.json is damaged; put it back"):
        sweep(tmp_path, None, [*settings(), "sweep.seed=0,1"])
    assert (tmp_path / "sweep.json").read_text() == damaged


def test_a_search_goes_on_with_the_trials_it_has(tmp_path: Path) -> None:
    pytest.importorskip("optuna")
    folder, given = (
        tmp_path / "sweep",
        [*settings(steps=1), "sweep.sigma=0.001..0.1", "sweep.mirrored=true,false"],
    )
    two = sweep(folder, None, given, search="optuna", trials=2)
    assert all(0.001 <= float(t.values["sigma"]) <= 0.1 and t.error is None for t in two)
    assert two[0].values != two[1].values
    told: list[Trial] = []
    three = sweep(folder, None, given, search="optuna", trials=3, told=told.append)
    assert three[:2] == two
    assert [t.name for t in told] == ["trial-002"]
    with pytest.raises(EstuneError, match="holds a search over other values of mirrored; give the same"):
        sweep(folder, None, [*given[:-1], "sweep.mirrored=true"], search="optuna", trials=4)
    assert sweep(folder, None, given, search="optuna", trials=3) == three


def fake_runs(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Runs whose accuracy follows from their sigma; the names of those that were asked for."""
    made: list[str] = []

    def run(_: object, name: str, values: dict[str, str]) -> Trial:
        made.append(name)
        return Trial(name, values, {"eval_accuracy": float(values.get("sigma", 0.5))})

    monkeypatch.setattr("estune.study.sweep._Runner.run", run)
    return made


def test_a_search_that_was_stopped_draws_what_it_would_have_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beyond the ten trials that Optuna draws by chance alone; the seed is one that fits no 32 bits."""
    pytest.importorskip("optuna")
    fake_runs(monkeypatch)
    given = [*settings(seed=2**40), "sweep.sigma=0.001..0.1", "sweep.population=4..60"]
    whole = sweep(tmp_path / "whole", None, given, search="optuna", trials=14)
    assert len({name_of(trial.values) for trial in whole}) == 14
    for trials in (3, 6, 12, 14):
        parts = sweep(tmp_path / "parts", None, given, search="optuna", trials=trials)
    assert parts == whole
    other = sweep(tmp_path / "other", None, [*given, "seed=1"], search="optuna", trials=3)
    assert not {name_of(trial.values) for trial in other} & {name_of(trial.values) for trial in whole}


def test_values_that_are_drawn_twice_are_run_once_and_are_no_replication(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("optuna")
    made = fake_runs(monkeypatch)
    given = [*settings(), "sweep.mirrored=true,false"]
    found = sweep(tmp_path / "s", None, given, search="optuna", trials=5)
    assert len(found) == 5
    assert len(made) == 2
    assert [row[2:] for row in rows(found)[1:]] == [["", "0.5000", "0.5000", "1"]] * 2
    assert effects(found) == {"mirrored": {"true": [0.5], "false": [0.5]}}


def test_ends_of_a_range_are_checked_as_they_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("optuna")
    fake_runs(monkeypatch)
    found = sweep(tmp_path / "s", None, [*settings(), "sweep.seed=7..1234567"], search="optuna", trials=1)
    assert 7 <= int(found[0].values["seed"]) <= 1234567


def test_a_search_needs_a_number_of_trials(tmp_path: Path) -> None:
    with pytest.raises(EstuneError, match="go together"):
        sweep(tmp_path / "s", None, ["sweep.sigma=0.1..0.2"], search="optuna")
