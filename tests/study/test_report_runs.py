"""What the report's page says of runs: how to train so again, where they come from and led, and what is missing."""

from __future__ import annotations

import math
import re
import shlex
import shutil
import statistics
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from estune.cli.options import overrides_of
from estune.config import load
from estune.errors import EstuneError
from estune.journal.journal import Journal
from estune.journal.records import Header
from estune.study.report import write_report
from tests.reports import evaluate, lines, make_run, report


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


@pytest.mark.parametrize(
    "task", [{"name": "countdown", "numbers": "2-9", "eval_size": 20}, {"name": "conciseness", "eval_size": 20}]
)
def test_the_training_command_gives_the_same_settings(tmp_path: Path, task: dict[str, Any]) -> None:
    settings: dict[str, Any] = {
        "sigma": 0.018,
        "task": task,
        "mirrored": True,
        "population": 6,
        "report_to": [],
    }
    run = make_run(tmp_path / "a run", trained_on=task["name"], **settings)
    _, page = report(run)
    command = next(text for text in page.all("pre", **{"class": "command"}) if "estune train" in text)
    words = shlex.split(command.replace("\\\n", " "))
    assert words[:4] == ["estune", "train", "--task", task["name"]]
    found = load(None, overrides_of(words[2:])).model_dump(mode="json")
    recorded = lines(run, "header")[0]["config"]
    assert found.pop("output_dir") == "a run-again"
    recorded.pop("output_dir")
    assert found == recorded
    changed = next(text for tag, a, text in page.elements if tag == "table" and a.get("class") == "settings")
    assert "0.018" in changed
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
