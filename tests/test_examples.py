"""What is shipped to be used as it is: notebooks run, recipes load, what is for clusters and Docker can be parsed."""

from __future__ import annotations

import json
import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import dockerfile
import nbformat
import pytest
import yaml
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient
from simple_slurm import Slurm

from estune.cli.options import overrides_of
from estune.completion import Completion
from estune.config import Config, load
from estune.grading.grading import grade
from estune.journal.journal import Journal
from estune.run.trainer import Trainer
from tests.judges import serving
from tests.test_docs import command_lines, complaint, opened

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
CLUSTER = EXAMPLES / "cluster"
TINY = {
    **{"steps": 2, "population": 2, "prompts_per_step": 2, "max_new_tokens": 8, "eval_steps": 2},
    **{"replicas": 1, "threads": 1, "task": {"name": "countdown", "train_size": 8, "eval_size": 4}},
}
GPUS = [1, 8, 64]


def executed(name: str, folder: Path, **settings: Any) -> list[str]:
    """What each cell of a notebook prints, run by this Python with settings in place of the notebook's."""
    notebook = nbformat.read(EXAMPLES / name, as_version=4)
    (parameters,) = (cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ()))
    parameters.source = f"settings = {settings!r}"
    kernel = AsyncKernelManager(kernel_spec_manager=KernelSpecManager(kernel_dirs=[]))  # ipykernel's, beside this one
    client = NotebookClient(notebook, km=kernel, timeout=120, resources={"metadata": {"path": folder}})
    client.execute(cleanup_kc=True)
    outputs = (cell.outputs for cell in notebook.cells if cell.cell_type == "code")
    return ["".join(each.text for each in cell if each.get("name") == "stdout") for cell in outputs]


def test_the_quickstart_trains_looks_and_replays(tmp_path: Path) -> None:
    *_, answers, replayed = executed("quickstart.ipynb", tmp_path, **TINY)
    assert answers.count("before:") == answers.count("after:") == 4
    assert "step 2, " in replayed
    assert replayed.rstrip().endswith("bits: True")


def test_your_data_trains_on_rows_and_a_reward_of_the_notebook(tmp_path: Path) -> None:
    *_, told = executed("your_data.ipynb", tmp_path, **TINY)
    assert re.fullmatch(r"(.+ -> .+\n){5}held-out accuracy [\d.]+% -> [\d.]+%\n", told)


def test_the_real_models_example_shows_answers_before_and_after(tmp_path: Path) -> None:
    small = ["steps=1", "population=2", "prompts_per_step=2", "max_new_tokens=4", "replicas=1", "threads=1"]
    told = subprocess.run(
        [sys.executable, str(EXAMPLES / "real.py"), "model=tiny", f"output_dir={tmp_path / 'run'}", *small],
        check=True, cwd=ROOT, capture_output=True, text=True,
    ).stdout  # fmt: skip
    assert "after step 0" in told
    assert "after step 1" in told
    assert "the answer is right: " in told


@pytest.mark.parametrize("name", ["own_task", "countdown"])
def test_examples_of_training_from_python_tell_what_came_of_it(name: str, tmp_path: Path) -> None:
    small = ["steps=1", "population=2", "prompts_per_step=2", "max_new_tokens=8", "replicas=1", "threads=1"]
    told = subprocess.run(
        [sys.executable, f"examples/{name}.py", f"output_dir={tmp_path / 'run'}", "task.eval_size=8", *small],
        check=True, cwd=ROOT, capture_output=True, text=True,
    ).stdout  # fmt: skip
    assert re.search(r"accuracy [\d.]+% -> [\d.]+%", told)


def test_a_policy_learns_to_balance_a_pole() -> None:
    told = subprocess.run(
        [sys.executable, "examples/policy.py"], check=True, cwd=ROOT, capture_output=True, text=True
    ).stdout
    before, after = map(int, re.findall(r"(\d+) -> (\d+)", told)[0])
    assert before < 30
    assert after > 100


def test_the_function_of_cmaes_readme_is_made_small_by_both_and_what_is_not_installed_is_left_out() -> None:
    told = subprocess.run(
        [sys.executable, "examples/ask_and_tell.py"], check=True, cwd=ROOT, capture_output=True, text=True
    ).stdout
    found = {name: float(value) for name, value in re.findall(r"(\S+) +(\S+) after 960 evaluations", told)}
    assert found["cmaes"] < 1e-9
    assert found["estune.es"] < 0.01  # at the start it is 409
    assert "evosax" in found or "evosax     No module named" in told


def test_islands_learn_and_go_on_from_the_better_one(tmp_path: Path) -> None:
    told = subprocess.run(
        [sys.executable, "examples/islands.py", str(tmp_path)], check=True, cwd=ROOT, capture_output=True, text=True
    ).stdout
    base, one, other, heir = map(float, re.findall(r"\d\.\d+", told))
    assert base < min(one, other)
    assert heir > base + 0.15
    assert (tmp_path / "model" / "model.safetensors").is_file()


def test_no_country_is_trained_on_and_held_out() -> None:
    capitals = runpy.run_path(str(EXAMPLES / "capitals.py"))
    train, evaluation = ({row["prompt"] for row in capitals[side]} for side in ("train", "evaluation"))
    assert len(train) + len(evaluation) == len(capitals["CAPITALS"])
    assert not train & evaluation


def test_the_run_that_is_shipped_came_to_what_the_pages_say() -> None:
    """Replaying it takes minutes, as its base is a real model: `estune verify examples/briefly.estune`."""
    run = EXAMPLES / "briefly.estune"
    journal = Journal.read(run)
    first, last = journal.evaluations[0].metrics, journal.evaluations[-1].metrics
    length, right = "eval_completions/mean_length", "eval_accuracy"
    readme = (ROOT / "README.md").read_text()
    assert f"from {first[length]:.1f} to {last[length]:.1f} tokens an answer" in readme
    assert f"from {first[right]:.1%} to {last[right]:.1%} right of 71 in {len(journal.steps)} steps" in readme
    assert f"{run.stat().st_size / 1000:.0f} KB" in (ROOT / "docs" / "start.md").read_text()
    recipe = load(ROOT / "recipes" / "conciseness-smollm2.yaml").model_dump(mode="json")
    changed = {key for key, value in journal.header.config.items() if recipe[key] != value}
    assert changed <= {"model", "device", "engine", "replicas", "threads", "save_dtype", "report_to", "template_date"}


def test_answers_on_the_first_page_are_a_run_s() -> None:
    """Every row is a question of the results, with both answers and what is said of them."""
    readme = (ROOT / "README.md").read_text()
    file = re.search(r"\[all 39\]\((.+?)\)", readme)
    assert file is not None
    found = json.loads((ROOT / file[1]).read_text())
    assert f"{found['right before']} of {found['questions']} were right, {found['right after']} are" in readme
    lost = [answer for answer in found["answers"] if answer["right before"] and not answer["right after"]]
    assert len(lost) == 1
    _, _, *rows = re.search(r"\| the capital of .*?\n\n", readme, re.S)[0].split("\n")[:-2]  # type: ignore[index]
    said = {
        "right, and brief": (True, True),
        "right": (False, True),
        "still wrong": (False, False),
        "lost": (True, False),
    }
    for row in rows:
        country, before, after, remark = (cell.strip() for cell in row.strip("|").split("|"))
        (answer,) = (a for a in found["answers"] if f"capital of {country}?" in a["question"])
        assert (before, after) == (answer["before"], answer["after"])
        assert said[remark] == (answer["right before"], answer["right after"])
    assert len(rows) == 7


def python(page: str, part: str) -> str:
    """The block of Python on a page that has this in it."""
    (found,) = (block.text for block in opened(ROOT / page).blocks if block.language == "python" and part in block.text)
    return found


def test_python_on_the_pages_does_what_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run of one's own task, its evaluation, its report and its journal; settings of two steps go before theirs."""
    small = {"steps": 2, "population": 2, "prompts_per_step": 2, "max_new_tokens": 4, "replicas": 1, "threads": 1}
    monkeypatch.setattr("estune.Config", lambda **given: Config(**{**small, **given, "model": "tiny"}), raising=False)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"brief": lambda completions, **_: [-len(text) / 100 for text in completions]}
    exec(python("docs/rewards.md", "def correct"), names)
    assert names["correct"](completions=["It is 4.", "It is 5."], answer=["4", "4"]) == [1.0, 0.0]
    exec(python("docs/tasks.md", "Task(").replace(", ...]", "]"), names)
    exec(python("docs/tasks.md", "evaluate_model("), names)
    assert Path("completions.parquet").is_file()
    exec(
        python("docs/report.md", "write_report").replace("runs/seed0", "runs/brief").replace(', Path("runs/seed1")', "")
    )
    assert "<html" in Path("report.html").read_text()
    monkeypatch.chdir("runs/brief")
    check = python("docs/journal.md", "hashlib")
    exec(check)
    Path("journal.jsonl").write_bytes(Path("journal.jsonl").read_bytes().replace(b"brief", b"grief", 1))
    with pytest.raises(AssertionError, match="line 1"):
        exec(check)


def test_the_judge_on_the_page_judges(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    names: dict[str, Any] = {}
    with serving() as judge:
        exec(python("docs/rewards.md", "Judge(").replace("http://localhost:8000/v1", judge.url), names)
        rows = [{"prompt": "Is it so?", "answer": "yes"}, {"prompt": "Is it?", "answer": "no"}]
        found = grade(names["rewards"], None, rows, [Completion(text, [1], True) for text in ("yes, yes", "no")])
    assert found.total == [pytest.approx(0.1), 0.0]
    assert (tmp_path / "estune" / "judge.sqlite").is_file()


def test_a_corpus_level_reward_is_learned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the page has it, in fewer steps."""
    monkeypatch.chdir(ROOT)
    line = next(line for line in command_lines(opened(ROOT / "docs/rewards.md")) if "micro_f1" in line)
    said = [
        *line.split()[2:],
        "--steps",
        "10",
        "--replicas",
        "1",
        "--threads",
        "1",
        "--output_dir",
        str(tmp_path / "run"),
    ]
    summary = Trainer(load(overrides=overrides_of(said)), monitors=[]).train()
    assert summary.before["eval_accuracy"] < 0.2
    assert summary.best["eval_accuracy"] > 2 * summary.before["eval_accuracy"]


def test_the_population_level_reward_on_the_page() -> None:
    names: dict[str, Any] = {}
    exec(python("docs/rewards.md", "def novelty"), names)
    assert names["novelty"](completions=[["a", "b"], ["a", "c"], ["d", "c"]]) == [0.5, 0.0, 0.5]


def test_the_first_lines_of_python_are_the_same_everywhere() -> None:
    """They are those of the quickstart, which runs."""
    first = "from estune import Config, Trainer\n\nsummary ="
    assert python("README.md", first) == python("docs/api.md", first)


@pytest.mark.parametrize("task", ["countdown", "conciseness"])
def test_recipes_of_the_embedded_model_are_the_settings_that_were_measured(task: str) -> None:
    """The figures that they tell are those of `estune train --task NAME`."""
    recipe = load(ROOT / "recipes" / f"{task}-tiny.yaml")
    measured = load(overrides=[f"task={task}"])
    assert recipe.model_copy(update={"output_dir": None}) == measured


@pytest.mark.parametrize("recipe", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda path: path.stem)
def test_recipes_say_what_to_expect(recipe: Path) -> None:
    head = re.match(r"(?:#.*\n)+", recipe.read_text())
    assert head
    said = head[0].splitlines()
    assert complaint(said[0].removeprefix("# "), whole=True) is None
    assert recipe.relative_to(ROOT).as_posix() in said[0]
    for word in ("What", "Machine", "Time", "Expected"):
        assert any(re.match(rf"# {word}: +\w", line) for line in said), word


def commands(script: str) -> list[str]:
    """Lines of a script that call estune, without what its user gives."""
    script = re.sub(r'"\$@"|\$ARGS', "", re.sub(r'"\$\(.*\):6379"', "HOST:6379", script))
    return re.findall(r"^ *(?:\S*/)?(estune .*)$", script, re.M)


def is_shell(script: str) -> bool:
    return subprocess.run(["bash", "-n"], input=script, text=True, check=False).returncode == 0


@pytest.mark.parametrize("gpus", GPUS)
def test_slurm_scripts(gpus: int) -> None:
    """By a list of `sbatch`'s options, as it comes with a system's packages alone.

    `sbatch --test-only` of SLURM 22.05.8 takes all three, and looks for a cluster.
    """
    script = (CLUSTER / f"slurm-{gpus}.sh").read_text()
    assert is_shell(script)
    options = dict(re.findall(r"^#SBATCH --([\w-]+)(?:=(.*))?$", script, re.M))
    assert len(options) == script.count("#SBATCH")
    Slurm(*[each for name, value in options.items() for each in (name.replace("-", "_"), value or True)])
    assert int(options["nodes"]) * int(options["gpus-per-node"]) == gpus
    check_commands(script, gpus)


@pytest.mark.parametrize("gpus", GPUS)
def test_sky_tasks(gpus: int) -> None:
    """By hand: SkyPilot's schema comes with fifty packages, of which some contradict ours.

    SkyPilot 0.14.1 takes all three, each with these accelerators and machines (`sky.Task.from_yaml`).
    """
    task = yaml.safe_load((CLUSTER / f"sky-{gpus}.yaml").read_text())
    known = {"name", "workdir", "num_nodes", "resources", "envs", "secrets", "setup", "run"}
    assert task.keys() <= known
    assert is_shell(task["setup"])
    assert is_shell(task["run"])
    kind, _, count = task["resources"]["accelerators"].partition(":")
    assert kind == "H100"
    assert task.get("num_nodes", 1) * int(count) == gpus
    check_commands(task["run"], gpus)


def check_commands(script: str, gpus: int) -> None:
    (line,) = commands(script)
    assert complaint(line, whole=True) is None
    workers = re.search(r"--workers (\d+)", line)
    assert int(workers[1] if workers else 1) == gpus
    assert ("--ray-address" in line) == (gpus == 64)


def test_the_dockerfile_parses() -> None:
    steps = dockerfile.parse_file(str(ROOT / "Dockerfile"))
    bases = [step.value for step in steps if step.cmd.upper() == "FROM"]
    assert [base[-1] for base in bases] == ["cuda", "cpu", "${DEVICE}"]
    assert steps[0].value == ("DEVICE=cuda",)
    kept = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copied = {source for step in steps if step.cmd.upper() == "COPY" for source in step.value[:-1]}
    assert copied == kept
    assert all((ROOT / source).exists() for source in copied)


def test_runs_of_the_container_go_where_the_pages_mount_a_folder() -> None:
    (place,) = (step.value[0] for step in dockerfile.parse_file(str(ROOT / "Dockerfile")) if step.cmd == "WORKDIR")
    for page in ("Dockerfile", "docs/start.md"):
        assert re.findall(r'-v "\$PWD:(.+?)"', (ROOT / page).read_text()) == [place], page
