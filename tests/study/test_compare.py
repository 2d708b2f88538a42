"""Comparisons: the plan, one real run of a method each, what is measured, what is kept, what is refused."""

from __future__ import annotations

import json
import math
from contextlib import closing
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from transformers import AutoModelForCausalLM

from estune.completion import Completion
from estune.config import Config, load
from estune.engines.transformers import TransformersEngine
from estune.errors import EstuneError
from estune.files import locked
from estune.grading.convention import Grades
from estune.journal.journal import Journal
from estune.run.graded import Graded
from estune.run.make import make_grading, make_sampling
from estune.study.compare.measure import measure, short_but_wrong
from estune.study.compare.plan import Job, Plan, best_rate, read_results
from estune.study.compare.report import by_method, charts, table, trials_table, write_report
from estune.study.compare.run import compare, record, run_job
from estune.study.compare.train import TaskReward, run, trl_arguments
from estune.study.jobs import LOCK
from estune.weights.locate import locate
from tests.models import FUSABLE, save_model, save_own_code
from tests.runs import make_config, make_task

needs_trl = pytest.mark.skipif(find_spec("trl") is None, reason="needs TRL")


def result(
    method: str, seed: int = 0, rate: float | None = None, trial: bool = False, **figures: Any
) -> dict[str, Any]:
    job = {"method": method, "seed": seed, "rate": rate, "trial": trial}
    common = {"tokens": 1e6, "steps": 5, "seconds": 10.0, "memory": 5e8, "accuracy": 0.5, "reward": 0.6}
    return {"job": job, **common, "length": 9.0, "clipped": 0.0, "short_but_wrong": 0.0, "kl": 0.1, **figures}


def test_rates_are_chosen_by_trials_and_runs_use_the_best() -> None:
    plan = Plan(methods=["es", "grpo", "rloo"], seeds=[0, 1], rates=[1e-3, 1e-2])
    assert [job.name for job in plan.trials()] == [
        f"{method}-{rate}-seed1000-trial" for method in ("grpo", "rloo") for rate in ("0.001", "0.01")
    ]
    trials = [
        result("grpo", 1000, 1e-3, True, reward=0.2),
        result("grpo", 1000, 1e-2, True, reward=0.4),
        result("grpo", 0, 1e-3, reward=0.9),  # no trial: does not choose
        result("rloo", 1000, 1e-3, True, accuracy=0.2, reward=0.3),
        result("rloo", 1000, 1e-2, True, accuracy=0.3, reward=0.2),  # what was trained is the reward
    ]
    runs = [(job.method, job.seed, job.rate) for job in plan.runs(trials)]
    assert runs == [
        ("es", 0, None), ("es", 1, None), ("grpo", 0, 1e-2), ("grpo", 1, 1e-2), ("rloo", 0, 1e-3), ("rloo", 1, 1e-3)
    ]  # fmt: skip
    failed = [{"job": job.model_dump(), "error": "out of memory"} for job in plan.trials()]
    assert {job.method for job in plan.runs(failed)} == {"es"}
    assert best_rate("grpo", [1e-5], []) == 1e-5
    assert Plan(methods=["grpo"], rates=[1e-5]).trials() == []


@pytest.mark.parametrize(
    ("plan", "settings", "complaint"),
    [
        ({"rates": [0.0, 1.0]}, [], "learning rates above 0"),
        ({"batch": 30, "generations": 8}, [], "no multiple"),
        ({"seeds": [1, 1]}, [], "given twice"),
        ({"seeds": [1000]}, [], "chooses the learning rates"),
        ({}, ["workers=2"], "one process"),
        ({}, ["adapter.rank=4"], "leave out adapter"),
        ({}, ["train_parameters=*elsewhere*"], "no parameter's name fits"),
    ],
)
def test_what_cannot_be_compared_is_refused(
    tmp_path: Path, plan: dict[str, Any], settings: list[str], complaint: str
) -> None:
    with pytest.raises(EstuneError, match=complaint):
        compare(Plan(**plan), load(None, settings), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("source", "complaint"),
    [
        ("CHAT, [{'prompt': 'b'}], [brief], [1.0], 'brief'", "prompts that end with the assistant's words"),
        ("TEXT, [{'prompt': 'b'}], [brief], [1.0], 'brief', stages=[Stage([0])]", "it has stages"),
        ("TEXT, [], [brief], [1.0], None", "no evaluation set"),
        ("TEXT, [{'prompt': 'b'}], [brief], [1.0], 'brief', gold=str", "gold answer of training row 0 should get 1"),
    ],
)
def test_tasks_that_cannot_be_compared_are_refused(tmp_path: Path, source: str, complaint: str) -> None:
    task = tmp_path / "own.py"
    task.write_text(
        "from estune.tasks.base import Stage, Task\n\n"
        "TEXT, CHAT = [{'prompt': 'a'}], [{'prompt': [{'role': 'assistant', 'content': 'So'}]}]\n\n"
        "def brief(completions, **_):\n    return [-float(len(c)) for c in completions]\n\n"
        f"def task(seed):\n    return Task('x', {source})\n"
    )
    with pytest.raises(EstuneError, match=complaint):
        compare(Plan(methods=["es"]), load(None, [f"task.name={task}"]), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_two_comparisons_do_not_share_a_folder(tmp_path: Path) -> None:
    plan, config = small(methods=["es"], seeds=[0])
    held = closing(locked(tmp_path / LOCK, "ab"))
    with held, pytest.raises(EstuneError, match="in use by another comparison"):
        compare(plan, config, tmp_path)


@pytest.mark.parametrize("damaged", ["", "{", "[]", "{}", '{"plan": {}}'])
def test_a_folder_whose_plan_is_damaged_is_refused(damaged: str, tmp_path: Path) -> None:
    plan, config = small(methods=["es"], seeds=[0])
    (tmp_path / "compare.json").write_text(damaged)
    with pytest.raises(EstuneError, match=r"compare\.json is damaged; put it back"):
        compare(plan, config, tmp_path)
    assert (tmp_path / "compare.json").read_text() == damaged


def test_a_damaged_result_is_named_by_its_line(tmp_path: Path) -> None:
    (tmp_path / "results.jsonl").write_text(f"{json.dumps(result('es', 0))}\n\n{json.dumps(result('es', 1))[:30]}")
    with pytest.raises(EstuneError, match=r"results\.jsonl:2 is damaged; take that line out"):
        read_results(tmp_path)


def test_a_rate_at_an_end_of_those_tried_is_marked() -> None:
    tried = (1e-4, 1e-3, 1e-2)
    for best, shown in zip(tried, ("0.0001*", "0.001", "0.01*"), strict=True):
        trials = [result("grpo", 1000, rate, True, reward=float(rate == best)) for rate in tried]
        assert table([*trials, result("grpo", 0, best)])[1][1] == shown
    assert table([result("grpo", 0, 1e-4)])[1][1] == "0.0001"  # nothing was chosen


def test_a_budget_smaller_than_a_step_is_said() -> None:
    config = load(None, ["model=some/model", "population=4", "prompts_per_step=16", "max_new_tokens=10"])
    assert Plan(budget=640, batch=64).large_steps(config, rows=40) == []
    es, rl = Plan(budget=639, batch=64).large_steps(config, rows=40)
    assert es.startswith("budget 639: one step of es is 64 completions, which can take 640 tokens")
    assert rl.startswith("budget 639: one step of RL is 64 completions")
    assert rl.endswith("give a larger --budget or a smaller --batch")
    (rl,) = Plan(budget=639, batch=64).large_steps(config, rows=15)
    assert Plan(budget=639, methods=["es"]).large_steps(config, rows=15) == []


def test_short_answers_that_are_wrong_are_counted() -> None:
    task = make_task(evaluation=4)
    completions = [Completion("", list(range(n)), True) for n in (2, 2, 9, 9)]
    grades = Grades([0.0] * 4, {"variety": [1.0, 0.5, 0.5, 1.0]})
    assert short_but_wrong(task, Graded(task.evaluation, completions, grades), 2) == 0.25
    assert short_but_wrong(task, Graded(task.evaluation, completions, grades), 9) == 0.5
    assert short_but_wrong(task, Graded(task.evaluation, completions, grades), 1) == 0.0


def test_a_checkpoint_is_measured_against_its_base(tmp_path: Path, model: Path) -> None:
    config, task = make_config(tmp_path / "run", model, device="cpu", threads=1), make_task()
    same = measure(model, model, config, task, None)
    assert same["kl"] == 0.0
    assert same["base_accuracy"] == same["accuracy"]
    engine = TransformersEngine(model, device="cpu")
    made = engine.generate(engine.encode([row["prompt"] for row in task.evaluation]), make_sampling(config))
    assert same["length"] == sum(len(c.token_ids) for c in made) / len(made)
    assert same["accuracy"] == pytest.approx(sum(len(set(c.text)) / 10 for c in made) / len(made))
    other = measure(save_model(tmp_path / "other", **FUSABLE), model, config, task, 3)
    assert other["kl"] > 0.1
    assert other["base_accuracy"] == same["accuracy"] != other["accuracy"]
    assert other["short_tokens"] == 3


def test_a_model_with_code_of_its_own_is_measured_where_the_user_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    own = save_own_code(tmp_path / "own", tmp_path / "was-run")
    config = make_config(tmp_path / "run", own, device="cpu", threads=1)
    with pytest.raises(EstuneError, match="set trust_remote_code to true"):
        measure(own, own, config, make_task(), 3)
    assert not (tmp_path / "was-run").exists()
    assert measure(own, own, config.model_copy(update={"trust_remote_code": True}), make_task(), 3)["kl"] == 0.0


def small(**changes: Any) -> tuple[Plan, Config]:
    config = load(None, ["device=cpu", "threads=1", "replicas=1", "population=4", "prompts_per_step=16", "sigma=0.03"])
    task = config.task.model_copy(update={"train_size": 40, "eval_size": 8, "seed": 0})
    return Plan(**{"budget": 300, "batch": 8, "generations": 4, **changes}), config.model_copy(update={"task": task})


def test_es_stops_at_the_step_that_spends_the_budget(tmp_path: Path) -> None:
    plan, config = small()
    found = run(plan, Job(method="es", seed=3), config, tmp_path)
    assert found["tokens"] >= 300
    assert found["tokens"] <= 300 + 4 * 16 * config.max_new_tokens
    assert found["memory"] > 100e6
    assert found["kl"] > 0  # it has moved
    journal = Journal.read(tmp_path / "run")
    tokens = [step.metrics["num_tokens"] for step in journal.steps]
    assert tokens[-1] == found["tokens"]
    assert all(before < 300 for before in tokens[:-1])
    assert journal.settings["seed"] == 3


@needs_trl
@pytest.mark.parametrize("method", ["grpo", "dr_grpo", "dapo", "rloo"])
def test_trl_is_told_what_the_plan_says(tmp_path: Path, method: Any) -> None:
    plan, config = small(rl_temperature=0.9, beta=0.02, batch=80)
    config = config.model_copy(update={"trust_remote_code": method == "rloo"})
    arguments, trainer = trl_arguments(plan, Job(method=method, seed=5, rate=1e-4), config, tmp_path)
    assert (arguments.learning_rate, arguments.seed, arguments.temperature, arguments.beta) == (1e-4, 5, 0.9, 0.02)
    assert (arguments.num_generations, arguments.generation_batch_size) == (4, 80)
    assert (arguments.per_device_train_batch_size, arguments.gradient_accumulation_steps) == (20, 4)
    less, _ = trl_arguments(
        plan.model_copy(update={"micro_batch": 6}), Job(method=method, seed=5, rate=1e-4), config, tmp_path
    )
    assert (less.per_device_train_batch_size, less.gradient_accumulation_steps) == (5, 16)
    assert arguments.model_init_kwargs == {"dtype": "float32"}
    assert arguments.trust_remote_code == (method == "rloo")
    assert arguments.max_completion_length == config.max_new_tokens
    if method == "rloo":
        assert trainer.__name__ == "RLOOTrainer"
    else:
        assert trainer.__name__ == "GRPOTrainer"
        assert arguments.loss_type == method
        assert arguments.scale_rewards == ("none" if method == "dr_grpo" else "group")


def test_trl_gets_the_rewards_that_es_gets() -> None:
    task = load(None, ["task.train_size=20", "task.eval_size=5"]).task.build(0)
    numbers, target = task.train[3]["numbers"], task.train[3]["target"]
    right = f"</think>\n<answer>{' + '.join(map(str, numbers))}</answer>"
    with make_grading(Config(), task) as grading:
        reward = TaskReward(task, grading)
        total = reward(completions=[right, "no"], completion_ids=[[1, 2, 3], [1]], row=[3, 3], trainer_state=None)
    assert total == [1.1 if sum(numbers) == target else 0.1, 0.0]
    assert reward.tokens == 4


@needs_trl
def test_reinforcement_learning_ends_with_its_last_step_whatever_is_left_of_the_budget(tmp_path: Path) -> None:
    plan, config = small(methods=["grpo"], seeds=[0], rates=[1e-3], budget=2_000, rl_steps=2, points=1)
    [result] = compare(plan, config, tmp_path)
    assert result["steps"] == 2
    assert [point["tokens"] for point in result["curve"]] == [0, result["tokens"]]
    assert result["curve"][1]["accuracy"] == result["accuracy"]


@needs_trl
def test_a_comparison_runs_both_kinds_and_goes_on_where_it_was(tmp_path: Path) -> None:
    plan, config = small(methods=["es", "grpo"], seeds=[0], rates=[1e-3], points=2)
    config = config.model_copy(update={"train_parameters": "*embed*, *.mlp.*"})
    folder, told = tmp_path / "out", []
    first = compare(plan, config, folder, told.append)
    assert [r["job"]["method"] for r in first] == ["es", "grpo"]
    assert told == first == read_results(folder)
    grpo = first[1]
    assert 300 <= grpo["tokens"] < 300 + 8 * config.max_new_tokens
    for result in first:  # from the base to what the run came to, and the clock stands while points are kept
        curve = result["curve"]
        assert (curve[0]["tokens"], curve[0]["accuracy"]) == (0, result["base_accuracy"])
        assert [curve[-1][key] for key in ("tokens", "accuracy", "reward")] == [
            result[key] for key in ("tokens", "accuracy", "reward")
        ]
        seconds = [point["seconds"] for point in curve]
        assert sorted(seconds) == seconds
        assert seconds[-1] <= result["seconds"]
    assert not list(folder.glob("*/point*"))
    before = AutoModelForCausalLM.from_pretrained(locate("tiny")).state_dict()
    for final in ("es-seed0/run/final", "grpo-0.001-seed0/final"):  # both leave what they are told to leave
        after = AutoModelForCausalLM.from_pretrained(folder / final).state_dict()
        changed = {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}
        assert {name.split(".")[-2] for name in changed} == {
            "embed_tokens", "lm_head", "gate_proj", "up_proj", "down_proj",
        }  # fmt: skip

    told.clear()
    assert compare(plan, config, folder, told.append) == first  # nothing is left to do
    assert told == []
    (folder / "results.jsonl").write_text(json.dumps(first[0]) + "\n" + json.dumps(first[1])[:40])  # cut off
    assert [r["job"]["method"] for r in compare(plan, config, folder, told.append)] == ["es", "grpo"]
    assert [r["job"]["method"] for r in told] == ["grpo"]
    with pytest.raises(EstuneError, match="other budget"):
        compare(plan.model_copy(update={"budget": 500}), config, folder)
    with pytest.raises(EstuneError, match="other sigma"):
        compare(plan, config.model_copy(update={"sigma": 0.5}), folder)
    claim = folder / "compare.json"
    began = json.loads(claim.read_text())  # by a version that knew none of these
    del began["plan"]["micro_batch"], began["config"]["back_to_best"], began["config"]["task"]["rational"]
    claim.write_text(json.dumps(began))
    assert len(compare(plan, config, folder)) == 2
    claim.write_text(json.dumps(began))
    with pytest.raises(EstuneError, match="other micro_batch;"):
        compare(plan.model_copy(update={"micro_batch": 8}), config, folder)
    with pytest.raises(EstuneError, match=r"learning rates 0\.001; give those as well"):
        compare(plan.model_copy(update={"rates": [1e-4]}), config, folder)
    told.clear()
    found = compare(plan.model_copy(update={"rates": [1e-3, 1e-30]}), config, folder, told.append)
    assert [(r["job"]["rate"], r["job"]["trial"]) for r in told[:2]] == [(1e-3, True), (1e-30, True)]
    best = max(told[:2], key=lambda r: (r["reward"], r["accuracy"]))["job"]["rate"]
    assert [r["job"]["rate"] for r in by_method(found)["grpo"]] == [best]


def test_a_run_that_fails_is_recorded_and_tried_again(tmp_path: Path) -> None:
    plan, config = small()
    job = Job(method="es", seed=0)
    broken = config.model_copy(update={"model": str(tmp_path / "missing")})
    failed = run_job(plan, job, broken, tmp_path / job.name)
    assert str(tmp_path / "missing") in failed["error"]
    record(tmp_path, failed)
    record(tmp_path, result("es", 0))
    assert read_results(tmp_path) == [result("es", 0)]


def test_runs_at_a_rate_that_is_no_longer_the_best_are_left_out() -> None:
    found = [result("grpo", 1000, 1e-3, True, reward=0.3), result("grpo", 0, 1e-3), result("es", 0)]
    assert [len(runs) for runs in by_method(found).values()] == [1, 1]
    found += [result("grpo", 1000, 1e-4, True, reward=0.4)]
    assert list(by_method(found)) == ["es"]
    found += [result("grpo", 0, 1e-4, accuracy=0.8)]
    assert table(found)[2][:5] == ["GRPO", "0.0001*", "1", "", "80.0"]
    assert [row[1] for row in trials_table(found)[1:]] == ["0.0001", "0.001"]


def test_the_report_has_means_deviations_and_trials(tmp_path: Path) -> None:
    found = [
        result("grpo", 1000, 1e-3, True, accuracy=0.3),
        {"job": {"method": "grpo", "seed": 1000, "rate": 1e-2, "trial": True}, "error": "killed"},
        result("grpo", 0, 1e-3, accuracy=0.2),
        result("es", 0, accuracy=0.4),
        result("es", 1, accuracy=0.6),
    ]
    assert list(by_method(found)) == ["es", "grpo"]
    head, es, grpo = table(found)
    assert head[:5] == ["method", "rate", "seeds", "before %", "accuracy %"]
    assert es[:5] == ["ES", "", "2", "", "50.0 ± 14.1"]
    assert grpo[:5] == ["GRPO", "0.001*", "1", "", "20.0"]
    assert trials_table(found)[1:] == [
        ["GRPO", "0.001", "30.0", "0.600", "0.100"], ["GRPO", "0.01", "failed", "", ""]
    ]  # fmt: skip
    plan = Plan(budget=800_000, seeds=[0, 1], rates=[1e-3, 1e-2])
    config = load(None, ["model=some/model", "task=conciseness", "population=12", "sigma=0.02"])
    text = write_report(tmp_path, found, plan, config).read_text()
    for said in (
        "model some/model, task conciseness, completions of at most 1024 tokens",
        "budget: 800,000 generated tokens a run; seeds 0, 1",
        "ES: population 12, 200 prompts a step, sigma 0.02, learning rate 0.5sigma",
        "RL: 256 completions a step in groups of 8, temperature 1, weight of the KL penalty 0",
        "RLOO stands in for PPO",
        "over the budget, by the step that spent the last of it: ES 25.0%, GRPO 25.0%",
    ):
        assert said in text
    assert "50.0 ± 14.1" in text
    assert "killed" in text
    accuracy, kl = charts(by_method([*found, result("es", 2, kl=math.inf)]))
    assert [(s.name, s.kind, list(s.y)) for s in accuracy.series] == [
        ("ES", "points", [0.4, 0.6, 0.5]),
        ("ES", "line", [0.5, 0.5]),
        ("GRPO", "points", [0.2]),
        ("GRPO", "line", [0.2, 0.2]),
    ]
    assert [len(s.x) for s in kl.series] == [2, 1]
    assert ElementTree.fromstring((tmp_path / "report.svg").read_text()).get("role") == "img"
    alone = write_report(tmp_path, found[:2], Plan(methods=["es"]), config).read_text()
    assert "![" not in alone  # nothing to draw
    assert "RL" not in alone.split("Learning rates")[0]
