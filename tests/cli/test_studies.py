"""`estune probe`, `sweep` and `compare`: what they print, their exit codes, and what a mistake says."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from estune.errors import EstuneError
from estune.study.compare.plan import Plan
from estune.study.probed import Level, Probe
from estune.study.sweep import Trial
from tests.command_line import QUICK, estune, refused, usage


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


def test_probe_of_parts(capsys: pytest.CaptureFixture[str]) -> None:
    options = [*QUICK, "--members", 2, "--prompts", 4, "--sigmas", "0.02", "--parts", "*embed* ; *.mlp.*"]
    assert estune("probe", *options) == 0
    out = capsys.readouterr().out
    titles = ["--train_parameters '*embed*'", "--train_parameters '*.mlp.*'"]
    assert [line for line in out.splitlines() if line.startswith("--train")] == titles
    summary = [line.split()[:2] for line in out[out.index("\npart ") :].strip().splitlines()[:3]]
    assert summary[0] == ["part", "sigma"]
    assert [name for name, _ in summary[1:]] == ["*embed*", "*.mlp.*"]
    assert estune("probe", *options, "--json") == 0
    assert list(json.loads(capsys.readouterr().out)) == ["*embed*", "*.mlp.*"]


def test_mistakes_of_a_probe_are_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert "--sigmas 'a,b': give numbers" in refused(capsys, "probe", "--sigmas", "a,b")
    assert "give numbers above 0" in refused(capsys, "probe", "--sigmas", "0")
    assert "give numbers above 0" in refused(capsys, "probe", "--sigmas", ",")
    assert "1 member, " in refused(capsys, "probe", "--members", 1)
    assert "--parts ' ;': give patterns" in refused(capsys, "probe", "--parts", " ;")
    assert "fits the pattern '*head*'" in refused(capsys, "probe", "--parts", "*; *head*")
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
    unknown = refused(capsys, "sweep", *options, "--metric", "eval_pass@9")
    assert "no metric can be called 'eval_pass@9'; there are eval_accuracy, " in unknown


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
