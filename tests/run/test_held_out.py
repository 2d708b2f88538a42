"""Evaluations: pass@k against all subsets, several completions of a prompt, tasks watched on the way, gold answers."""

from __future__ import annotations

import json
import re
import shutil
from itertools import combinations
from pathlib import Path
from statistics import fmean
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from estune.completion import Completion
from estune.config import load
from estune.errors import EstuneError
from estune.grading.convention import Grades
from estune.journal.journal import Journal
from estune.run.evaluate import evaluate_model
from estune.run.graded import Graded
from estune.run.held_out import pass_metrics, solved
from estune.run.trainer import Trainer
from estune.tasks.base import Task
from tests.command_line import SMALL, estune
from tests.runs import PROMPTS, make_config, make_task, substance, variety

SAMPLED: dict[str, Any] = {"eval_samples": 4, "eval_temperature": 1.0}


def rich(completions: list[str], **_: Any) -> list[float]:
    """Full marks for many different characters."""
    return [float(len(set(text)) > 6) for text in completions]


def by_subsets(correct: list[list[bool]], k: int) -> float:
    """How often some of k completions of a prompt is correct, over all choices of k: all prompts have equally many."""
    return fmean(any(chosen) for of_prompt in correct for chosen in combinations(of_prompt, k))


def several(count: int) -> Any:
    return st.lists(st.lists(st.booleans(), min_size=count, max_size=count), min_size=1, max_size=5)


@given(st.integers(1, 9).flatmap(several))
def test_pass_at_k_is_what_all_subsets_say(correct: list[list[bool]]) -> None:
    count = len(correct[0])
    found = pass_metrics([c for of_prompt in correct for c in of_prompt], count)
    sizes = [k for k in (1, 2, 4, 8) if k <= count]
    expected = {f"eval_pass@{k}": by_subsets(correct, k) for k in sizes}
    assert found == pytest.approx({f"eval_mean@{count}": by_subsets(correct, 1), **expected})


def test_solved_asks_the_accuracy_that_applies_for_full_marks() -> None:
    def first(completions: list[str], **_: Any) -> Any: ...
    def second(completions: list[str], **_: Any) -> Any: ...
    def other(completions: list[str], **_: Any) -> Any: ...

    functions = [other, first, second]
    task = Task("t", [{"prompt": "a"}], [{"prompt": "b"}], functions, [1.0] * 3, ["first", "second"])
    scores: dict[str, list[float | None]] = {
        "other": [1.0] * 6,
        "first": [1.0, None, None, 0.9, float("nan"), None],
        "second": [0.0, 1.0, 0.5, 1.0, 1.0, None],
    }
    graded = Graded([{"prompt": "b"}] * 6, [Completion("", [1], True)] * 6, Grades([0.0] * 6, scores))
    assert solved(task, graded) == [True, True, False, False, False, False]


def train(output: Path, model: Path, *rewards: Any, **settings: Any) -> Journal:
    Trainer(make_config(output, model, **settings), task=make_task(*rewards or (rich,)), monitors=[]).train()
    return Journal.read(output)


def table(run: Path, name: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = pq.read_table(run / "completions" / f"{name}.parquet").to_pylist()
    return found


@pytest.fixture(scope="module")
def plain(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that evaluates greedily, as by default."""
    folder = tmp_path_factory.mktemp("plain") / "run"
    train(folder, model, rich, variety)
    return folder


@pytest.fixture(scope="module")
def sampled(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with four completions of each held-out prompt."""
    folder = tmp_path_factory.mktemp("sampled") / "run"
    train(folder, model, rich, variety, **SAMPLED)
    return folder


def test_greedy_completions_of_a_prompt_are_all_that_one(plain: Path, model: Path, tmp_path: Path) -> None:
    journal = train(tmp_path / "run", model, rich, variety, steps=0, eval_samples=4)
    (found,), expected = journal.evaluations, Journal.read(plain).evaluations[0].metrics
    expected["eval_completions/distinct"] /= 4
    assert {key: found.metrics[key] for key in expected} == pytest.approx(
        expected | {"eval_completions/distinct": 0.25}
    )
    assert found.metrics["eval_mean@4"] == found.metrics["eval_pass@4"] == expected["eval_accuracy"]
    one, four = (table(folder, "evaluation-00000") for folder in (plain, tmp_path / "run"))
    assert four == [row for row in one for _ in range(4)]


def test_several_completions_of_a_prompt(sampled: Path) -> None:
    journal, seen = Journal.read(sampled), []
    for record in journal.evaluations:
        rows = table(sampled, f"evaluation-{record.step:05d}")
        assert [row["prompt"] for row in rows] == [prompt for prompt in PROMPTS[:4] for _ in range(4)]
        for i in range(0, 16, 4):
            assert len({row["completion"] for row in rows[i : i + 4]}) > 1
        correct = [[row["rewards/rich"] == 1 for row in rows[i : i + 4]] for i in range(0, 16, 4)]
        passes = {f"eval_pass@{k}": by_subsets(correct, k) for k in (1, 2, 4)}
        found = {key: value for key, value in record.metrics.items() if "@" in key}
        assert found == pytest.approx({"eval_mean@4": record.metrics["eval_accuracy"], **passes})
        seen.append(passes)
    assert any(0 < passes["eval_pass@1"] < passes["eval_pass@2"] < passes["eval_pass@4"] for passes in seen)


def test_sampled_evaluations_repeat_and_change_nothing_else(
    model: Path, tmp_path: Path, sampled: Path, plain: Path
) -> None:
    again = train(tmp_path / "again", model, rich, variety, **SAMPLED)
    assert again.evaluations == Journal.read(sampled).evaluations
    seeded = train(tmp_path / "seeded", model, rich, variety, steps=0, seed=9, **SAMPLED)
    assert seeded.evaluations == again.evaluations[:1]  # all runs are judged by the same draws
    warmer = train(tmp_path / "warmer", model, rich, variety, steps=0, **{**SAMPLED, "eval_temperature": 3.0})
    assert table(tmp_path / "warmer", "evaluation-00000") != table(sampled, "evaluation-00000")
    assert warmer.evaluations[0].metrics.keys() == again.evaluations[0].metrics.keys()
    greedy = Journal.read(plain)
    assert [substance(record) for record in greedy.steps] == [substance(record) for record in again.steps]
    assert not any("@" in key for record in greedy.evaluations for key in record.metrics)
    assert [row["prompt"] for row in table(plain, "evaluation-00000")] == PROMPTS[:4]


def test_a_temperature_alone_draws_one_completion(model: Path, tmp_path: Path, plain: Path) -> None:
    found = train(tmp_path / "run", model, rich, variety, steps=0, eval_temperature=1.0)
    assert not any("@" in key for key in found.evaluations[0].metrics)
    drawn, greedy = table(tmp_path / "run", "evaluation-00000"), table(plain, "evaluation-00000")
    assert [row["prompt"] for row in drawn] == [row["prompt"] for row in greedy]
    assert all(a["completion"] != b["completion"] for a, b in zip(drawn, greedy, strict=True))


def test_eval_of_a_run_draws_as_the_run_did(sampled: Path, tmp_path: Path) -> None:
    best = max(Journal.read(sampled).evaluations, key=lambda e: (e.metrics["eval_accuracy"], e.metrics["eval_reward"]))
    found = evaluate_model(str(sampled), output=tmp_path / "all.parquet", task=make_task(rich, variety))
    assert found == pytest.approx({key: best.metrics[key] for key in found})
    assert {"eval_pass@1", "eval_pass@4", "eval_mean@4"} <= found.keys()
    assert pq.read_table(tmp_path / "all.parquet").num_rows == 16


SOURCE = """
train = [{"prompt": f"{a} plus "} for a in range(4)]
evaluation = [{"prompt": f"{a} minus "} for a in range(3)]


def short(completions, **_):
    return [1.0 if len(text) < LIMIT else 0.25 for text in completions]


rewards = [short]
"""


@pytest.fixture
def others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, str]:
    """Two tasks in files, named as from the directory of the run."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tasks").mkdir()
    for name, limit in (("one.py", 8), ("tasks/two.py", 1000)):
        (tmp_path / name).write_text(SOURCE.replace("LIMIT", str(limit)))
    return "one.py", "tasks/two.py"


def test_watched_tasks_are_evaluated_by_their_own_rewards(
    model: Path, tmp_path: Path, others: tuple[str, str], plain: Path
) -> None:
    run = tmp_path / "run"
    found, without = train(run, model, rich, variety, watch=",".join(others)), Journal.read(plain)
    assert [substance(record) for record in found.steps] == [substance(record) for record in without.steps]
    for record, other in zip(found.evaluations, without.evaluations, strict=True):
        assert {k: v for k, v in record.metrics.items() if not k.startswith("watch/")} == other.metrics
        for name, limit in zip(others, (8, 1000), strict=True):
            rows = table(run, f"watch-{name.replace('/', '-')}-{record.step:05d}")
            assert [row["prompt"] for row in rows] == [f"{a} minus " for a in range(3)]
            scores = [1.0 if len(row["completion"]) < limit else 0.25 for row in rows]
            assert [row["rewards/short"] for row in rows] == scores
            assert record.metrics[f"watch/{name}/accuracy"] == pytest.approx(fmean(scores))
            assert record.metrics[f"watch/{name}/reward"] == pytest.approx(fmean(scores))
            assert f"watch/{name}/completions/distinct" in record.metrics
            assert not any(key.startswith((f"watch/{name}/kl", f"watch/{name}/weights")) for key in record.metrics)
    assert table(run, "watch-one.py-00000") != table(run, "watch-one.py-00004")


def test_watched_tasks_have_pass_at_k_too(model: Path, tmp_path: Path, others: tuple[str, str]) -> None:
    (only,) = train(tmp_path / "run", model, steps=0, watch=others[1], **SAMPLED).evaluations
    assert len(table(tmp_path / "run", "watch-tasks-two.py-00000")) == 12
    assert only.metrics["watch/tasks/two.py/pass@4"] == only.metrics["watch/tasks/two.py/mean@4"] == 1.0


def test_watch_is_written_with_commas_or_as_a_list(tmp_path: Path, others: tuple[str, str]) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text(yaml.safe_dump({"watch": [others[0], {"name": others[1], "eval_size": 2}]}))
    assert [(task.name, task.eval_size) for task in load(file).watch] == [(others[0], None), (others[1], 2)]
    for text in ("one.py,tasks/two.py", "[one.py, tasks/two.py]"):
        assert [task.name for task in load(None, [f"watch={text}"]).watch] == list(others)
    assert load(None, ["watch=none"]).watch == []
    with pytest.raises(EstuneError, match="watch: two tasks are called one.py; give one of them the data of both"):
        load(None, ["watch=one.py,one.py"])
    with pytest.raises(EstuneError, match="no task is called 'cuntdown'; did you mean countdown"):
        load(None, ["watch=cuntdown"])


def test_watch_on_the_command_line(tmp_path: Path, others: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    assert estune("train", *SMALL, "--watch", ",".join(others), "--output-dir", tmp_path / "run") == 0
    last = Journal.read(tmp_path / "run").evaluations[-1].metrics
    assert {f"watch/{name}/accuracy" for name in others} <= last.keys()
    assert re.search(r"tasks/two.py 1 -> 1", capsys.readouterr().out)


def test_a_watched_task_without_an_evaluation_set_is_refused(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("none.py").write_text(SOURCE.replace("LIMIT", "8").replace("range(3)", "range(0)"))
    with pytest.raises(EstuneError, match="none.py: the evaluation set is empty|watch: task none.py has no evaluation"):
        train(tmp_path / "run", model, watch="none.py")
    Path("one.py").write_text(SOURCE.replace("LIMIT", "8"))
    task = Task("blind", [{"prompt": "a"}], [], [rich], [1.0], None)
    with pytest.raises(EstuneError, match="watch: task blind has no evaluation set; give it one, or leave out watch"):
        Trainer(make_config(tmp_path / "run", model, watch="one.py"), task=task, monitors=[])
    assert not (tmp_path / "run").exists()


@pytest.fixture(scope="module")
def hollow(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with fewer layers in its file than in its configuration: whoever loads it fails."""
    folder = tmp_path_factory.mktemp("hollow") / "model"
    shutil.copytree(model, folder)
    config = json.loads((model / "config.json").read_text())
    layers = config["num_hidden_layers"] + 1
    changed = config | {"num_hidden_layers": layers, "layer_types": ["full_attention"] * layers}
    (folder / "config.json").write_text(json.dumps(changed))
    return folder


def right(completions: list[str], answer: list[str], **_: Any) -> list[float]:
    return [float(text == gold) for text, gold in zip(completions, answer, strict=True)]


def with_gold(wrong: str) -> Task:
    """A task that knows its answers; of one row, whose prompt is `wrong`, a wrong one."""
    rows = [{"prompt": prompt, "answer": prompt[::-1]} for prompt in PROMPTS]
    gold = {row["prompt"]: row["answer"] for row in rows} | {wrong: "gold?"}
    return Task("golden", rows[4:], rows[:4], [right], [1.0], "right", gold=lambda row: gold[row["prompt"]])


@pytest.mark.parametrize(("row", "where"), [(6, "training row 2"), (3, "evaluation row 3")])
def test_a_gold_answer_without_full_marks_is_refused_before_a_model_is_loaded(
    hollow: Path, tmp_path: Path, row: int, where: str
) -> None:
    settings = make_config(tmp_path / "run", hollow)
    with pytest.raises(EstuneError, match=f"the gold answer of {where} should get 1, but right gives 0: 'gold\\?'"):
        Trainer(settings, task=with_gold(PROMPTS[row]), monitors=[])
    with pytest.raises(Exception, match="^(?!.*gold answer)"):
        Trainer(settings, task=with_gold("none"), monitors=[])
    assert not (tmp_path / "run").exists()


def test_good_gold_answers_are_no_obstacle(model: Path, tmp_path: Path) -> None:
    trainer = Trainer(make_config(tmp_path / "run", model, steps=1), task=with_gold("none"), monitors=[])
    assert trainer.train().steps == 1
