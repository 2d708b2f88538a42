"""Commands around a run: what they print, their exit codes, and what a mistake says."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow.parquet
import pytest

from estune.errors import EstuneError
from estune.run.evaluate import evaluate_model
from estune.run.held_out import pass_metrics
from estune.study.compare.plan import Plan
from estune.study.probe import Level, Probe
from estune.study.sweep import Trial
from estune.tasks import CountdownConfig, catalogue
from estune.tasks.preflight import FULL_MARKS
from tests.cli.test_commands import SMALL, estune, refused
from tests.warm import Closing

QUICK = [*SMALL, "--report_to", "none", "--max_new_tokens", 4]


def usage(capsys: pytest.CaptureFixture[str], *arguments: Any) -> str:
    """What a command line that cannot be read says: exit code 2 and one line."""
    capsys.readouterr()
    assert estune(*arguments) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    return line


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    assert estune("train", *QUICK, "--output-dir", folder) == 0
    return folder


@pytest.fixture(autouse=True)
def _wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "300")


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import sys; sys.argv = ['estune', '--help']\n"
        "from estune.cli import main\n"
        "try: main()\n"
        "except SystemExit as end: assert end.code == 0\n"
        "heavy = {'torch', 'transformers', 'pydantic', 'numba', 'numpy', 'pyarrow', 'wandb', 'ray'}\n"
        "assert not heavy & sys.modules.keys(), heavy & sys.modules.keys()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    for command in ("train", "eval", "replay", "report", "probe", "sweep", "compare", "estimate", "tasks", "settings"):
        assert f" {command} " in done.stdout


def test_no_command_is_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert estune() == 0
    assert "estune train" in capsys.readouterr().out


def test_tasks_are_listed_with_their_data(capsys: pytest.CaptureFixture[str]) -> None:
    assert estune("tasks") == 0
    out = capsys.readouterr().out
    for name, summary, data in catalogue():
        assert name in out
        assert summary in out
        assert data in out


def test_a_report_is_written(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert estune("report", run, "-o", tmp_path / "page.html") == 0
    assert "page.html" in capsys.readouterr().out
    assert "<html" in (tmp_path / "page.html").read_text()
    assert "this is no run" in refused(capsys, "report", tmp_path, "-o", tmp_path / "x.html")
    assert "Missing argument" in usage(capsys, "report")


def test_an_ensemble_is_a_table_and_a_file_from_which_it_is_had_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["tiny", "--prompts_per_step=8", "--task.train_size=40", "--task.eval_size=20", "--max_new_tokens", 4]
    assert estune("ensemble", *options, "--members", 3, "--top", 2, "--sigma", 0.02, "-o", tmp_path / "e.json") == 0
    first, said, _, head, *rows = capsys.readouterr().out.splitlines()
    assert first.endswith(": ensemble around tiny")
    assert said == "2 of 3 members, sigma 0.02, on countdown"
    assert head.split() == ["accuracy", "reward"]
    assert [row[:11].strip() for row in rows] == ["base", "best member", "vote of 2", "2 merged"]
    assert estune("ensemble", *options, "--from", tmp_path / "e.json") == 0
    assert capsys.readouterr().out.splitlines()[1:] == [said, "", head, *rows]
    assert "--top 5 of --members 2" in refused(capsys, "ensemble", "tiny", "--members", 2)


def test_probe(capsys: pytest.CaptureFixture[str]) -> None:
    options = [*QUICK, "--members", 2, "--prompts", 4, "--sigmas", "0.02, 0.001"]
    assert estune("probe", *options) == 0
    first, *lines = capsys.readouterr().out.splitlines()
    assert first.endswith(": probe tiny on countdown")
    assert lines[0].startswith("countdown with tiny: 2 members a sigma on 4 prompts; the base model's reward is 0.")
    assert lines[2].split()[:4] == ["sigma", "mean", "spread", "best"]
    assert [line.split()[0] for line in lines[3:5]] == ["0.001", "0.02"]
    assert estune("probe", *options, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert [level["sigma"] for level in found["levels"]] == [0.001, 0.02]
    assert (found["members"], found["prompts"]) == (2, 4)


def test_probe_says_what_it_recommends_and_warns_of(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: dict[str, Any] = {}
    level = Level(0.5, [1.0, 0.0], 0.5, 0.5, 1.0, 0.3, 1.0, 0.5, 0.0, collapsed=False)

    def fake(config: Any, **given: Any) -> Probe:
        asked.update(given, sigma=config.sigma)
        return Probe("m", "t", 9, 2, 0.25, 0.0, [level], 0.5, "because", ["mind the gap"])

    monkeypatch.setattr("estune.study.probe.probe", fake)
    assert estune("probe", "--sigma", 0.5) == 0
    out = capsys.readouterr().out
    assert "recommended: --sigma 0.5: because\nwarning: mind the gap\n" in out
    assert asked == {"members": 8, "prompts": 100, "sigmas": None, "sigma": 0.5}


def test_mistakes_of_a_probe_are_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert "--sigmas 'a,b': give numbers" in refused(capsys, "probe", "--sigmas", "a,b")
    assert "give numbers above 0" in refused(capsys, "probe", "--sigmas", "0")
    assert "give numbers above 0" in refused(capsys, "probe", "--sigmas", ",")
    assert "1 members" in refused(capsys, "probe", "--members", 1)
    assert "did you mean sigma?" in refused(capsys, "probe", "--sigm", 1)
    assert "--members" in usage(capsys, "probe", "--members", "few")


def test_a_sweep_of_two_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = [*QUICK, "--steps=1", "--sweep.sigma", "0.01,0.02", "--output-dir", tmp_path / "s"]
    assert estune("sweep", *options) == 0
    out = capsys.readouterr().out
    assert re.search(r"sigma=0.01: eval_accuracy \d+\.\d%\n", out)
    head = next(line for line in out.splitlines() if line.startswith("sigma "))
    assert head.split() == ["sigma", "eval_accuracy", "deviation", "least", "most", "runs"]
    assert (tmp_path / "s" / "effects.svg").stat().st_size > 1000
    assert (tmp_path / "s" / "sigma=0.02" / "journal.jsonl").is_file()
    assert estune("sweep", *options, "--metric", "eval_reward") == 0
    out = capsys.readouterr().out
    assert "eval_reward" in out
    assert "sigma=0.01:" not in out  # nothing ran again
    assert "no run has it; there are eval_accuracy, " in refused(capsys, "sweep", *options, "--metric", "eval_pass@9")


def test_a_sweep_with_failed_runs_ends_with_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trials = [Trial("a", {"sigma": "1"}, {"eval_accuracy": 0.5}), Trial("b", {"sigma": "2"}, {}, "error: burnt")]
    asked: dict[str, Any] = {}

    def fake(folder: Path, file: Path | None, overrides: list[str], **given: Any) -> list[Trial]:
        asked.update(given, folder=folder, file=file, overrides=overrides)
        for trial in trials:
            given["told"](trial)
        return trials

    def no_picture(*_: Any) -> None:
        raise EstuneError("no effect to draw")

    monkeypatch.setattr("estune.study.sweep.sweep", fake)
    monkeypatch.setattr("estune.study.sweep_report.draw_effects", no_picture)
    options = ["--sweep.sigma", "1,2", "--jobs", 2, "--search", "optuna", "--trials", 3, "--output_dir", tmp_path]
    assert estune("sweep", *options, "--seed", 4) == 1
    out = capsys.readouterr().out
    assert "b: failed: error: burnt\n" in out
    assert "b failed: error: burnt\nwarning: no effect to draw\n" in out
    del asked["told"]
    assert asked == {
        "folder": tmp_path,
        "file": None,
        "overrides": ["sweep.sigma=1,2", "seed=4"],
        "jobs": 2,
        "search": "optuna",
        "trials": 3,
        "metric": "eval_accuracy",
    }


def test_mistakes_of_a_sweep_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    there = ["--output-dir", tmp_path / "s"]
    assert "nothing is swept" in refused(capsys, "sweep", *there)
    assert "there is optuna alone" in refused(capsys, "sweep", *there, "--search", "luck")
    assert "go together" in refused(capsys, "sweep", *there, "--sweep.sigma", "1..2", "--search", "optuna")
    assert "--metric 'accuracy'" in refused(capsys, "sweep", *there, "--sweep.sigma", "1", "--metric", "accuracy")
    assert "did you mean sigma?" in refused(capsys, "sweep", *there, "--sweep.sigm", "1")
    assert "give 1 or more" in refused(capsys, "sweep", *there, "--sweep.sigma", "1", "--jobs", 0)
    assert not (tmp_path / "s").exists()


def result(method: str, seed: int, rate: float | None, *, trial: bool = False, **figures: Any) -> dict[str, Any]:
    return {"job": {"method": method, "seed": seed, "rate": rate, "trial": trial}, **figures}


FIGURES = {"base_accuracy": 0.1, "accuracy": 0.5, "reward": 0.6, "kl": 0.01, "tokens": 1_500_000}


@pytest.mark.parametrize(
    ("last", "code"),
    [
        (result("grpo", 0, 1e-6, **FIGURES), 0),
        (result("grpo", 0, 1e-6, error="burnt"), 1),
        (result("grpo", 1000, 1e-6, trial=True, error="burnt"), 0),  # a learning rate that does not work is a finding
    ],
)
def test_compare(
    last: dict[str, Any],
    code: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    asked = SimpleNamespace()

    def fake(plan: Plan, config: Any, folder: Path, told: Any) -> list[dict[str, Any]]:
        asked.plan, asked.config, asked.folder = plan, config, folder
        results = [result("es", 0, None, **FIGURES), last]
        for each in results:
            told(each)
        return results

    monkeypatch.setattr("estune.study.compare.run.compare", fake)
    options = ["--methods", "es, ppo,rloo", "--budget", "1e6", "--seeds", "0,3", "--rates", "3e-4,1e-3", "--sigma", 0.5]
    assert estune("compare", *options, "--output-dir", tmp_path) == code
    plan = Plan(methods=["es", "rloo"], budget=1_000_000, seeds=[0, 3], rates=[3e-4, 1e-3])
    assert (asked.plan, asked.config.sigma, asked.folder) == (plan, 0.5, tmp_path)
    out = capsys.readouterr().out
    assert out.startswith("note: TRL has no PPO trainer any more; its nearest kin, rloo, runs in ppo's place\n")
    assert "es-seed0: accuracy 50.0%\n" in out
    assert ("failed: burnt" in out) == ("error" in last)
    assert "\nover the budget, by the step that spent the last of it: ES 50.0%" in out
    assert out.rstrip().endswith("report.md")
    assert "| ES |" in (tmp_path / "report.md").read_text()


def test_compare_tells_its_defaults(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert estune("compare", "-h") == 0
    said = {line.split()[1]: line for line in capsys.readouterr().out.splitlines() if line.startswith("│ --")}
    plan = Plan()
    for name, default in (
        ("budget", plan.budget),
        ("batch", plan.batch),
        ("generations", plan.generations),
        ("rl-temperature", plan.rl_temperature),
        ("beta", plan.beta),
    ):
        assert float(re.search(r"; (\S+) by default", said[f"--{name}"])[1]) == default  # type: ignore[index]
    for name, defaults in (("seeds", plan.seeds), ("rates", plan.rates)):
        told = re.search(r"; (\S+) by default", said[f"--{name}"])
        assert told is not None
        assert [float(value) for value in told[1].split(",")] == defaults
    assert f"some of {','.join(plan.methods)}, all by default" in said["--methods"]


def test_a_comparison_of_its_own_kind_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = [*(o for o in QUICK if o not in ("--report_to", "none")), "--methods", "es", "--budget", 600]
    assert estune("compare", *options, "--seeds", 0, "--output-dir", tmp_path / "c") == 0
    assert re.search(r"es-seed0: accuracy \d+\.\d%\n", capsys.readouterr().out)
    assert (tmp_path / "c" / "results.jsonl").read_text().count("\n") == 1


def test_mistakes_of_a_comparison_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def complaint(*options: Any) -> str:
        return refused(capsys, "compare", "--output-dir", tmp_path / "c", *options)

    line = complaint("--methods", "es,sft", "--budget", 0.5)
    assert "--methods: Input should be 'es', 'grpo'" in line
    assert "found 'sft'; --budget: " in line
    assert "--budget: " in complaint("--budget", "inf")
    assert "--seeds: " in complaint("--seeds", "one")
    assert "--seeds: " in complaint("--seeds", ",")
    assert "give learning rates above 0" in complaint("--rates", "0,1")
    assert "leave out engine and workers" in complaint("--workers", 2)
    assert "--budget" in usage(capsys, "compare", "--budget", "much")
    assert not (tmp_path / "c").exists()


def test_eval_draws_several_completions_and_watches_other_tasks(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "found.parquet"
    options = ["--eval_samples", 4, "--eval_temperature", 0.8, "--max_new_tokens", 6]
    assert estune("eval", run, *options, "--watch", "conciseness", "-o", file) == 0
    out = capsys.readouterr().out
    for name in ("accuracy", "mean@4", "pass@1", "pass@4", "watch/conciseness/accuracy", "watch/conciseness/pass@2"):
        assert f" {name} " in out
    assert "eval_" not in out
    rows = pyarrow.parquet.read_table(file).to_pylist()
    ours = [row for row in rows if row["task"] == "countdown"]
    assert len(ours) == 20 * 4
    assert {row["task"] for row in rows} == {"countdown", "conciseness"}
    assert len({row["completion"] for row in ours[:4]}) > 1
    metrics = evaluate_model(str(run), None, [f"{k[2:]}={v}" for k, v in zip(options[::2], options[1::2], strict=True)])
    (told,) = CountdownConfig(train_size=40, eval_size=20).build(0).accuracies
    assert metrics.items() >= pass_metrics([row[f"rewards/{told}"] >= FULL_MARKS for row in ours], 4).items()


def test_mistakes_of_eval_are_one_line(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "no task is called 'chess'" in refused(capsys, "eval", run, "--watch", "chess")
    assert "no such directory" in refused(capsys, "eval", "./nowhere")
    assert "Missing argument 'model'" in usage(capsys, "eval")
    assert "No such command 'trian'" in usage(capsys, "trian")
    assert "No such option" in usage(capsys, "tasks", "--wide")
    assert "no such file" in refused(capsys, "train", "-c", "nowhere.yaml")


def test_a_file_that_cannot_be_written_is_one_line(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    assert "file" in refused(capsys, "report", run, "-o", tmp_path / "file" / "page.html")


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_tracker_that_is_missing_is_said_before_anything_is_written(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("estune.run.monitors.trackers.find_spec", lambda _: None)
    line = refused(capsys, "train", *SMALL, "--report_to", name, "--output-dir", tmp_path / "r")
    assert f"pip install 'estune[{name}]'" in line
    assert not (tmp_path / "r").exists()
    assert name in refused(capsys, "train", "--dry-run", *SMALL, "--report_to", name)


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="looks for processes in /proc")
@pytest.mark.parametrize(
    ("command", "journal", "code"),
    [
        (["train", "--replicas=2"], "journal.jsonl", -signal.SIGTERM),
        (["sweep", "--replicas=1", "--sweep.seed=0,1"], "seed=0/journal.jsonl", 128 + signal.SIGTERM),
        (["compare", "--methods=es", "--seeds=0"], "es-seed0/run/journal.jsonl", 128 + signal.SIGTERM),
    ],
)
def test_sigterm_leaves_nothing_running(command: list[str], journal: str, code: int, tmp_path: Path) -> None:
    name, *options = command
    steps = [] if name == "compare" else ["--steps=100000"]
    given = [*map(str, QUICK), *steps, *options, f"--output-dir={tmp_path / 'r'}"]
    process = subprocess.Popen([sys.executable, "-m", "estune.cli", name, *given], stdout=subprocess.DEVNULL)
    children: set[int] = set()
    try:
        while not (tmp_path / "r" / journal).is_file():
            assert process.poll() is None
            time.sleep(0.05)
        children = descendants(process.pid)
        assert children
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == code
        deadline = time.monotonic() + 20
        while children & parents().keys() and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not children & parents().keys()
    finally:
        for pid in {process.pid, *children} & parents().keys():
            os.kill(pid, signal.SIGKILL)


def parents() -> dict[int, int]:
    """The parent of each process that runs."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent, *_ = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if state != "Z":
            found[int(path.parent.name)] = int(parent)
    return found


def descendants(pid: int) -> set[int]:
    """Children of a process, theirs, and so on."""
    children = {child for child, parent in parents().items() if parent == pid}
    return children.union(*map(descendants, children))


@pytest.mark.parametrize(("seconds", "new"), [(0.2, True), (1.5, False)])
def test_ctrl_c_ends_with_one_line_and_130(seconds: float, new: bool, request: pytest.FixtureRequest) -> None:
    """So long after it began to load torch, which takes it longer than half a second, or when that is done."""
    if new:
        request.getfixturevalue("new_interpreters")
    command = [sys.executable, "-m", "estune.cli", "probe", "--members", "64", "--prompts", "200"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while "libtorch" not in Path(f"/proc/{process.pid}/maps").read_text():
        assert process.poll() is None
        time.sleep(0.01)
    time.sleep(seconds)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert (process.returncode, error.strip()) == (130, "error: interrupted")


@pytest.mark.parametrize(("seconds", "times"), [(2, 1), (600, 2)])
def test_ctrl_c_is_not_lost_in_an_import_which_a_second_one_ends(tmp_path: Path, seconds: int, times: int) -> None:
    (tmp_path / "slow.py").write_text(
        "import sys, time\nprint('importing', file=sys.stderr, flush=True)\n"
        f"try:\n    time.sleep({seconds})\nexcept KeyboardInterrupt:\n    {'pass' if times == 1 else 'raise'}\n"
        "train = [{'prompt': str(i)} for i in range(64)]\n"
        "def rewards(completions, **_): return [0.0] * len(completions)\n"
    )
    command = [sys.executable, "-m", "estune.cli", "probe", "--task", str(tmp_path / "slow.py"), "--prompts", "1"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    assert process.stderr.readline() == "importing\n"
    for _ in range(times):
        process.send_signal(signal.SIGINT)
        time.sleep(1)
    _, error = process.communicate(timeout=60)
    assert (process.returncode, error.strip()) == (130, "error: interrupted")


@pytest.mark.parametrize("stream", [0, 1, 2])
def test_closed_streams_and_a_narrow_encoding(stream: int, tmp_path: Path) -> None:
    """Two replicas: children inherit streams, and memory that must not have the number of one. All rewards equal."""
    task = tmp_path / "narrow.py"
    task.write_text(
        "def f(completions, **_): return [1.0] * len(completions)\n"
        "train = [{'prompt': f'é中{n}'} for n in range(40)]\nrewards = [f]\n"
    )
    small = "--steps=1 --population=2 --prompts_per_step=2 --max_new_tokens=3 --replicas=2 --task.eval_size=3"
    command = [sys.executable, "-m", "estune.cli", "train", *small.split()]
    command += ["--task", task, "--output-dir", tmp_path / "run"]
    done = subprocess.run(
        command,
        preexec_fn=Closing(stream),
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
        check=False,
    )
    assert (done.returncode, "Traceback" in done.stderr) == (0, False), done.stderr
    assert (tmp_path / "run" / "final").is_dir()
