"""The report's page: its figures are the run's, nothing hostile gets out of its place, nothing is fetched."""

from __future__ import annotations

import math
import re
import shlex
import shutil
import statistics
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from scipy.stats import binomtest, norm

from estune.charts.chart import to_json
from estune.cli.options import overrides_of
from estune.config import load
from estune.errors import EstuneError
from estune.journal.journal import Journal
from estune.journal.records import EvaluationRecord, Header
from estune.run.graded import write_completions
from estune.run.trainer import Trainer
from estune.study.report import write_report
from estune.study.report.curves import DRAWN_ELSEWHERE, PARTS, RATIOS, TITLES
from tests.reports import HOSTILE, Parsed, evaluate, lines, make_run, report
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


def test_without_the_completions_no_interval_is_shown(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    shutil.rmtree(run / "completions")
    _, page = report(run)
    assert list(page.chart("accuracy-0")) == ["held-out accuracy"]
    assert page.all("p").count("Not shown: no completions were kept.") == 1


def test_every_chart_says_what_stands_along_it_and_upwards(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / "a"), make_run(tmp_path / "b", seed=1)]
    for given in (runs[:1], runs):
        _, page = report(*given)
        charts = len(page.all("figure"))
        upwards = page.all("span", **{"class": "axis"})
        assert len(upwards) == charts
        assert all(upwards)
        assert page.all("span", **{"class": "axis along"}) == ["step"] * charts


def completions(page: Parsed) -> list[tuple[str, str, str, float, int]]:
    """Table, prompt, answer, reward and member of all completions that the page of one run holds."""
    (kept,) = page.kept()
    return [
        (table["name"], kept["opening"] + kept["prompts"][p] + kept["ending"], kept["answers"][a], reward, member)
        for table in kept["tables"]
        for p, a, reward, _, member in table["rows"]
    ]


def test_all_completions_are_on_the_page(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    for name, more in (("step-00002", {"member": 3}), ("watch-math-00004", {})):
        rows = [{"prompt": f"{name} {i}", "completion": f"answer {i % 2}", "reward": i / 8, **more} for i in range(3)]
        write_completions(run / "completions" / f"{name}.parquet", rows)
    (run / "completions" / "step-00003.parquet").write_bytes(b"torn")
    _, page = report(run)
    safe = HOSTILE.replace("\x00", "\u2400").replace("\u202e", "\ufffd")
    expected = []
    for step in (0, 2, 4, 6):
        for i in range(8):
            score = float(i == 1 or (i == 0 and step == 0) or (1 < i <= step))
            expected.append((f"held out, after step {step}", f"p{i} {safe}", f"c{i} at {step} {safe}", score + 0.1, -1))
    expected += [("training, step 2", f"step-00002 {i}", f"answer {i % 2}", i / 8, 3) for i in range(3)]
    expected += [("math, after step 4", f"watch-math-00004 {i}", f"answer {i % 2}", i / 8, -1) for i in range(3)]
    assert completions(page) == expected
    assert any(text.startswith("38 completions") and "step-00003.parquet" in text for text in page.all("p"))


def test_what_has_no_room_is_left_out_by_prompt_and_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(tmp_path / "run")
    rows = [{"prompt": "p", "completion": "c" * 4000, "reward": 0.0}]
    write_completions(run / "completions" / "step-00001.parquet", rows)
    monkeypatch.setattr("estune.study.report.page.MOST_TEXT", 2400)  # a prompt and its four answers take 600
    _, page = report(run)
    shown = completions(page)
    steps: dict[str, list[str]] = {}
    for name, prompt, *_ in shown:
        steps.setdefault(prompt, []).append(name)
    assert len(steps) == 3
    assert all(names == [f"held out, after step {step}" for step in (0, 2, 4, 6)] for names in steps.values())
    assert any("12 completions" in text and "Another 21 are there and left out" in text for text in page.all("p"))
    monkeypatch.setattr("estune.study.report.page.MOST_TEXT", 10)
    assert "Not shown: the page has no room for its completions." in report(run)[1].all("p")


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


def counts(page: Parsed) -> dict[str, int]:
    """How many prompts turned, stayed, gained or lost."""
    texts = [
        text for text in page.all("li") if re.fullmatch(r"((turned|stayed) \w+|gained|lost|unchanged, \w+) \d+", text)
    ]
    return {name: int(count) for name, count in (text.rsplit(" ", 1) for text in texts)}


@pytest.mark.parametrize(
    ("before", "after", "found"),
    [
        ([0.0] * 3, [0.0] * 3, {"stayed wrong": 3}),
        ([1.0] * 3, [1.0] * 3, {"stayed right": 3}),
        ([0.0, 1.0, 0.0], [0.0, 1.0, 1.0], {"stayed wrong": 1, "stayed right": 1, "turned right": 1}),
        ([0.0, 0.0, 0.0], [0.0, 0.0, 0.1], {"unchanged, low": 2, "gained": 1}),
        ([0.0, 0.0, 0.1, 1.0], [0.0, 0.0, 0.0, 1.0], {"unchanged, low": 2, "lost": 1, "unchanged, high": 1}),
        ([-1.0, -1.0, 1.0], [-1.0, -1.0, 1.0], {"unchanged, low": 2, "unchanged, high": 1}),
    ],
)
def test_only_full_marks_are_right(
    before: list[float], after: list[float], found: dict[str, int], tmp_path: Path
) -> None:
    _, page = report(make_run(tmp_path / "run", scores=lambda step: after if step else before))
    assert {name: count for name, count in counts(page).items() if count} == found


def test_completions_are_compared_prompt_by_prompt(tmp_path: Path) -> None:
    _, page = report(make_run(tmp_path / "run"))
    assert counts(page) == {"turned right": 5, "stayed right": 1, "stayed wrong": 1, "turned wrong": 1}
    shown = " ".join(page.all("pre"))
    assert "c0 at 0" in shown
    assert "c0 at 6" in shown  # the best evaluation
    assert "c0 at 4" not in shown


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


@pytest.mark.parametrize("kept", ["best", "final"])
def test_change_of_layers_is_that_of_the_checkpoints(kept: str, tmp_path: Path, model: Path) -> None:
    run = make_run(tmp_path / "run", model)
    base = load_file(model / "model.safetensors")
    changed = {n: t + 0.01 * (i + 1) for i, (n, t) in enumerate(base.items())}
    (run / kept).mkdir()
    (run / kept / "config.json").write_text("{}")
    save_file(changed, run / kept / "model.safetensors")
    _, page = report(run)
    (table,) = [text for tag, a, text in page.elements if tag == "table" and a.get("class") == "layers"]
    for prefix, label in (("model.layers.0.", "0"), ("model.layers.1.", "1")):
        names = [n for n in base if n.startswith(prefix)]
        change = math.sqrt(sum(((changed[n] - base[n]).double() ** 2).sum().item() for n in names))
        norm = math.sqrt(sum((base[n].double() ** 2).sum().item() for n in names))
        assert re.search(rf"\s{label}\s+{100 * change / norm:.3g}%", table)
    name = "model.layers.1.mlp.up_proj.weight"
    assert f"{100 * ((changed[name] - base[name]).norm() / base[name].norm()).item():.3g}%" in table


def test_a_run_that_never_was_better_shows_where_it_led(tmp_path: Path, model: Path) -> None:
    run = make_run(tmp_path / "run", model, scores=lambda step: [1.0, 1.0] if step in (0, 2) else [0.0, 1.0])
    base = load_file(model / "model.safetensors")
    shutil.copytree(model, run / "best")
    _, page = report(run)
    assert "Not shown: the best checkpoint so far is the base model, and there is no final one yet." in page.all("p")
    shutil.copytree(model, run / "final")
    save_file({n: 1.5 * t for n, t in base.items()}, run / "final" / "model.safetensors")
    _, page = report(run)
    (text,) = (text for text in page.all("p") if "all trained weights together" in text)
    assert "to final/, the weights after step 6 (" in text
    assert "moved by 50%" in text
    assert any("beside those of step 6," in text for text in page.all("p"))


def test_weights_of_another_step_than_the_completions_say_so(tmp_path: Path, model: Path) -> None:
    run = make_run(tmp_path / "run", model, scores=lambda step: [0.0, 1.0] if step != 2 else [1.0, 1.0])
    for kept in ("best", "final"):
        shutil.copytree(model, run / kept)
    _, page = report(run)
    (text,) = (text for text in page.all("p") if "all trained weights together" in text)
    assert "the weights after step 6 (stored as F32), while the completions above are of step 2;" in text


def test_what_is_missing_is_a_line_on_the_page(tmp_path: Path, model: Path) -> None:
    run = make_run(tmp_path / "run", model)
    assert "Not shown: no checkpoint yet." in report(run)[1].all("p")
    (run / "best").mkdir()
    known = Journal.read(run)
    gone = tmp_path / "gone"
    (run / "journal.jsonl").unlink()
    journal = Journal.create(run, Header(**{**vars(known.header), "model": str(gone)}))
    evaluate(run, journal, 0)
    for record in known.steps[:2]:
        journal.append_step(record)
    evaluate(run, journal, 2)
    journal.close()
    (run / "completions" / "evaluation-00002.parquet").write_bytes(b"torn")
    texts = report(run)[1].all("p")
    assert f"Not shown: base model {gone} is not on this machine." in texts
    assert "Not shown: evaluation-00002.parquet cannot be read." in texts


def test_hostile_text_stays_text_and_nothing_is_fetched(tmp_path: Path) -> None:
    name = "<script>alert(2)<" + "\N{DIVISION SLASH}script>"
    runs = [
        make_run(tmp_path / name, trained_on=HOSTILE, train_parameters=HOSTILE, more={"eval_</script><b>": 1.0}),
        make_run(tmp_path / "other", seed=1, trained_on=HOSTILE),
    ]
    for given in ([runs[0]], runs):
        page, parsed = report(*given)
        scripts = [(a, text) for tag, a, text in parsed.elements if tag == "script"]
        assert [text for a, text in scripts if a.get("type") != "application/json"] == [scripts[-1][1]]
        assert scripts[-1][1].startswith('"use strict"')
        assert "\x00" not in page
        assert not [a for tag, a, _ in parsed.elements if tag in ("img", "iframe", "object", "base", "form")]
        ids = [a["id"] for _, a, _ in parsed.elements if "id" in a]
        assert len(ids) == len(set(ids))
        for _, attributes, _ in parsed.elements:
            assert not any(key.startswith("on") for key in attributes)
            address = attributes.get("href", "data:,")
            assert address == "data:," or address[1:] in ids
            assert "src" not in attributes
        style = "".join(parsed.all("style"))
        assert "url(" not in style
        assert "@import" not in style
        visible = HOSTILE.replace("\x00", "\u2400").replace("\u202e", "\ufffd")
        assert any(visible in text for text in parsed.all("pre"))
        assert any(visible in text for kept in parsed.kept() for text in kept["answers"])


def test_the_training_command_gives_the_same_settings(tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "sigma": 0.02,
        "task": {"name": "countdown", "numbers": "2-9", "eval_size": 20},
        "mirrored": True,
        "population": 6,
        "report_to": [],
    }
    run = make_run(tmp_path / "a run", **settings)
    _, page = report(run)
    command = next(text for text in page.all("pre", **{"class": "command"}) if "estune train" in text)
    words = shlex.split(command.replace("\\\n", " "))
    assert words[:2] == ["estune", "train"]
    found = load(None, overrides_of(words[2:])).model_dump(mode="json")
    recorded = lines(run, "header")[0]["config"]
    assert found.pop("output_dir") == "a run-again"
    recorded.pop("output_dir")
    assert found == recorded
    changed = next(text for tag, a, text in page.elements if tag == "table" and a.get("class") == "settings")
    assert "0.02" in changed
    assert "max_new_tokens" not in changed


def test_settings_that_no_option_can_say_are_given_as_a_file(tmp_path: Path) -> None:
    _, page = report(make_run(tmp_path / "run", train_parameters="--x"))
    (command,) = (text for text in page.all("pre", **{"class": "command"}) if "estune train" in text)
    assert "train_parameters: --x" in command
    assert "--config settings.yaml" in command


def test_a_task_of_ones_own_and_ancestors_are_named(tmp_path: Path) -> None:
    _, page = report(make_run(tmp_path / "run", trained_on="mine", ancestors=3))
    text = " ".join([*page.all("p"), *page.all("dd")])
    assert "Its task, mine, is the author's own" in text
    assert "1 earlier run of 3 steps" in text
    assert not [c for c in page.all("pre", **{"class": "command"}) if "estune train" in c]


def test_runs_are_grouped_by_all_but_the_seed(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / f"a{seed}", seed=seed) for seed in range(3)]
    runs.append(make_run(tmp_path / "b", population=8))
    _, page = report(*runs)
    chart = page.chart("all-reward")
    for step in range(6):
        means = []
        for run in runs[:3]:
            rewards = lines(run, "step")[step]["rewards"]
            means.append(statistics.fmean(r for r in rewards if r is not None))
        mean, deviation = statistics.fmean(means), statistics.stdev(means)
        assert chart["population 5, mean"][step + 1] == f"{mean:.4g}"
        assert chart["population 5, ± deviation"][step + 1] == f"{mean - deviation:.4g} to {mean + deviation:.4g}"
        assert chart["a1"][step + 1] == f"{means[1]:.4g}"
    assert "population 8" in chart
    (results,) = [text for tag, a, text in page.elements if tag == "table" and a.get("class") == "results"]
    assert "mean of 3 runs" in results
    assert "75.0 ± 0.0%" in results


def test_a_run_still_going_on(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", steps=6)
    journal = run / "journal.jsonl"
    whole = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join(whole[:5]) + whole[5][:40])
    _, page = report(run)
    assert "the journal ends after 2 of 6 steps: the run goes on, or it or its journal was cut off" in page.all("dd")
    assert set(page.chart("reward-0")["mean of the population"]) == {1, 2}
    journal.write_bytes(b"".join(whole[:2]))  # nothing but the evaluation of the base
    assert page.chart("accuracy-0")
    report(run)


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


def test_refusals_are_one_line(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    empty = tmp_path / "empty"
    empty.mkdir()
    begun = make_run(tmp_path / "begun")
    whole = (begun / "journal.jsonl").read_bytes().splitlines(keepends=True)
    (begun / "journal.jsonl").write_bytes(whole[0])
    blank = tmp_path / "blank"
    blank.mkdir()
    (blank / "journal.jsonl").touch()
    output = tmp_path / "report.html"
    for runs, target, message in (
        ([], output, "no run to report"),
        ([tmp_path / "none"], output, "so this is no run"),
        ([empty], output, "so this is no run"),
        ([blank], output, "before its header was written"),
        ([begun], output, "no step and no evaluation"),
        ([run, run], output, "given twice"),
        ([run], tmp_path, "is a directory"),
    ):
        with pytest.raises(EstuneError, match=message) as caught:
            write_report(runs, target)
        assert "\n" not in str(caught.value)
    assert not output.exists()
