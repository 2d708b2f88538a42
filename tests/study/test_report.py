"""The report's page: its figures and charts are those of the run."""

from __future__ import annotations

import math
import re
import statistics
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from scipy.stats import binomtest, norm

from estune.charts.chart import to_json
from estune.journal.journal import Journal
from estune.journal.records import EvaluationRecord
from estune.run.trainer import Trainer
from estune.study.report.curves import DRAWN_ELSEWHERE, PARTS, RATIOS, TITLES
from tests.reports import lines, make_run, report
from tests.runs import make_config, make_task


def test_learning_curves_are_the_journals(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    _, page = report(run)
    chart = page.chart("reward-0")
    for record in lines(run, "step"):
        rewards = [r for r in record["rewards"] if r is not None]
        x = record["step"] + 1
        mean, std = statistics.fmean(rewards), statistics.pstdev(rewards)
        assert chart["mean of the population"][x] == f"{mean:.4g}"
        assert chart["standard deviation"][x] == f"{std:.4g}"
        assert chart["± standard deviation"][x] == f"{mean - std:.4g} to {mean + std:.4g}"
        assert chart["worst to best member"][x] == f"{min(rewards):.4g} to {max(rewards):.4g}"
    evaluations = lines(run, "evaluation")
    assert chart["held out, unperturbed"] == {e["step"]: f"{e['metrics']['eval_reward']:.4g}" for e in evaluations}
    accuracy = page.chart("accuracy-0")["held-out accuracy"]
    assert accuracy == {e["step"]: f"{e['metrics']['eval_accuracy']:.1%}" for e in evaluations}
    assert "25.0% → 75.0%" in page.all("b")


def test_the_drawing_is_of_the_same_values(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    page, _ = report(run)
    start = page.index('<figure data-chart="accuracy-0"')
    figure = page[start : page.index("</figure>", start)]
    path = re.search(r'<path class="dots c1"[^>]* d="M([^"]*)"', figure)
    assert path is not None
    points = [tuple(map(float, p.split())) for p in path[1].split("L")]
    ticks = {
        float(t[:-1]) / 100: float(at) for at, t in re.findall(r'class="y" style="bottom:([\d.]+)%">([\d.]+%)', figure)
    }
    (low, low_at), (high, high_at) = min(ticks.items()), max(ticks.items())
    for (x, y), e in zip(points, lines(run, "evaluation"), strict=True):
        value = low + (high - low) * ((1000 - y) / 10 - low_at) / (high_at - low_at)
        assert value == pytest.approx(e["metrics"]["eval_accuracy"], abs=2e-3)
        assert x == pytest.approx(1000 * e["step"] / 6, abs=0.1)


@pytest.mark.parametrize("samples", [1, 2])
def test_intervals_are_those_of_so_many_prompts(tmp_path: Path, samples: int) -> None:
    _, page = report(make_run(tmp_path / "run", eval_samples=samples))
    scores = [float(i == 1 or 1 < i <= 4) for i in range(8)]  # at step 4
    means = [statistics.fmean(scores[i : i + samples]) for i in range(0, 8, samples)]
    ends = binomtest(int(sum(scores)) // samples, 8 // samples).proportion_ci(0.95, method="wilson")
    shown = page.chart("accuracy-0")["95% interval, held-out accuracy"]
    assert shown[4] == f"{ends.low:.1%} to {ends.high:.1%}"
    assert set(shown) == {0, 2, 4, 6}
    half = norm.ppf(0.975) * statistics.stdev(means) / math.sqrt(len(means))
    reward = statistics.fmean(scores) + 0.1
    shown = page.chart("reward-0")["95% interval, held out, unperturbed"]
    assert shown[4] == f"{reward - half:.4g} to {reward + half:.4g}"


def test_every_chart_says_what_stands_along_it_and_upwards(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / "a"), make_run(tmp_path / "b", seed=1)]
    for given in (runs[:1], runs):
        _, page = report(*given)
        charts = len(page.all("figure"))
        upwards = page.all("span", **{"class": "axis"})
        assert len(upwards) == charts
        assert all(upwards)
        assert page.all("span", **{"class": "axis along"}) == ["step"] * charts


def test_contents_lead_to_every_part(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / "a"), make_run(tmp_path / "b", seed=1)]
    for given in (runs[:1], runs):
        _, page = report(*given)
        linked = {a["href"][1:]: text for tag, a, text in page.elements if tag == "a"}
        parts = {a["id"]: text for tag, a, text in page.elements if tag in ("h2", "h3") and "id" in a}
        assert len(parts) >= 8 * len(given)
        assert parts.items() <= linked.items()


def test_machine_and_speed_are_shown(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    machine = '{"processor": "<b>fast", "cores": 2, "memory": 23500000000, "device": null, "other": 1}'
    (run / "machine.json").write_text(machine)
    _, page = report(run)
    assert "<b>fast, 2 cores, 23.5 GB of memory" in page.all("dd")
    assert page.chart("speed-0")["tokens a second"] == dict.fromkeys(range(1, 7), "50")
    assert "50 tokens/s" in page.all("b")
    for torn in ("[1]", "{", "{}"):
        (run / "machine.json").write_text(torn)
        assert "machine" not in report(run)[1].all("dt")
    journal = Journal.resume(run)
    record = journal.steps[-1]
    update = replace(record.update, step=len(journal.steps))
    journal.append_step(replace(record, update=update, metrics={**record.metrics, "tokens_per_second": 75.0}))
    journal.close()
    assert report(run)[1].chart("speed-0")["tokens a second"][7] == "75"


def test_distribution_shows_every_member(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    page, parsed = report(run)
    chart = parsed.chart("distribution-0")
    for record in lines(run, "step"):
        rewards = [r for r in record["rewards"] if r is not None]
        x = record["step"] + 1
        assert chart["lowest"][x] == f"{min(rewards):.4g}"
        assert chart["highest"][x] == f"{max(rewards):.4g}"
        assert chart["median"][x] == f"{statistics.median(rewards):.4g}"
    assert page.count('class="heat ') >= 1


def test_metrics_are_shown_where_they_are(tmp_path: Path) -> None:
    more = {"eval_kl": 0.5, "eval_weights/change": 2.0, "eval_new": 1.0, "watch/math/accuracy": 0.25}
    _, page = report(make_run(tmp_path / "run", more=more))
    assert page.chart("watch-math-accuracy-0")["held out"][2] == "2.25"  # beyond 1, it is no share
    assert page.chart("kl-0")["held out"][4] == "4.5"
    assert page.chart("weights-change-0")["held out"][6] == "8"
    assert page.chart("new-0")["held out"][2] == "3"
    assert page.chart("completions-mean-length-0")["training"][6] == "15"
    titles = page.all("h3")
    assert "KL divergence to the base model" in titles
    assert "Cut off at the longest length" not in titles


def test_every_metric_with_a_title_or_a_place_of_its_own_is_recorded(model: Path, tmp_path: Path) -> None:
    config = make_config(tmp_path / "run", model, steps=2, eval_samples=2, eval_temperature=1.0)
    Trainer(config, task=make_task(), monitors=[]).train()
    records = [*lines(tmp_path / "run", "step"), *lines(tmp_path / "run", "evaluation")]
    recorded = {key.removeprefix("eval_") for record in records for key in record["metrics"]}
    assert TITLES.keys() | DRAWN_ELSEWHERE | {f"time/{part}" for part in PARTS} <= recorded
    assert all(any(key.startswith(ratio) for key in recorded) for ratio in RATIOS)
    _, page = report(tmp_path / "run")
    distinct = records[0]["metrics"]["completions/distinct"]
    assert page.chart("completions-distinct-0")["training"][1] == f"{distinct:.1%}"
    change = records[-1]["metrics"]["eval_weights/relative_change"]
    shown = page.chart("weights-relative-change-0")["held out"][2]
    assert shown.endswith("%")
    assert float(shown[:-1]) / 100 == pytest.approx(change, rel=0.05)


def test_metrics_beyond_those_drawn_are_named(tmp_path: Path) -> None:
    more = {f"eval_metric{i:02d}": 1.0 for i in range(30)}
    runs = [make_run(tmp_path / str(i), seed=i, more=more) for i in range(2)]
    for given, times in (runs[:1], 1), (runs, 3):
        _, page = report(*given)
        drawn = [title for title in page.all("figcaption") if "metric" in title]
        texts = [text for text in page.all("details", **{"class": "figures"}) if "more metrics, not drawn" in text]
        assert len(texts) == times
        for text in texts:
            named = re.findall(r"metric\d\d", text)
            assert text.startswith(f"{len(named)} more metrics")
            assert len(set(named)) + len(set(drawn)) == 30


@pytest.mark.parametrize("huge", [1.7e308, -1.7e308, 5e-324])
def test_numbers_that_no_sum_can_hold(tmp_path: Path, huge: float) -> None:
    runs = [make_run(tmp_path / name, more={"other": huge}) for name in ("a", "b")]
    for run in runs:
        journal = Journal.resume(run)
        for record in journal.steps[:4]:
            update = replace(record.update, step=len(journal.steps))
            metrics = dict.fromkeys(record.metrics, huge)
            journal.append_step(replace(record, update=update, rewards=[huge, -huge, None, huge, 0.0], metrics=metrics))
        journal.append_evaluation(EvaluationRecord(4, {"eval_accuracy": huge, "eval_reward": huge}))
        journal.close()
    report(*runs)


def test_headings_go_down_one_level_at_a_time(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / "a"), make_run(tmp_path / "b", seed=1)]
    for given in (runs[:1], runs):
        _, page = report(*given)
        levels = [int(tag[1]) for tag, *_ in page.elements if re.fullmatch(r"h\d", tag)]
        assert levels[0] == 1
        assert max(levels) >= 4
        assert all(after <= before + 1 for before, after in pairwise(levels))


def test_time_adds_up_to_the_steps(tmp_path: Path) -> None:
    _, page = report(make_run(tmp_path / "run", replicas=2))
    chart = page.chart("time-0")
    parts = {"perturb": "0.125", "generate": "0.5", "grade": "0.125", "update": "0.125", "rest": "1.125"}
    assert {name: values[3] for name, values in chart.items()} == parts


def test_pages_of_long_runs_stay_small_and_true(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / "long", steps=600, population=50)]
    page, parsed = report(*runs)
    assert len(page) - len(to_json(parsed.kept())) < 300_000
    chart = parsed.chart("reward-0")
    assert len(chart["mean of the population"]) == 200
    pooled = [r for record in lines(runs[0], "step")[3:6] for r in record["rewards"] if r is not None]
    assert chart["mean of the population"][6] == f"{statistics.fmean(pooled):.4g}"
    assert chart["worst to best member"][6] == f"{min(pooled):.4g} to {max(pooled):.4g}"
    runs += [make_run(tmp_path / f"{i}", steps=100, population=10, seed=i) for i in range(7)]
    assert len(report(*runs)[0]) < 2_000_000
