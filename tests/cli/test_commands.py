"""The command line as a user meets it, on the embedded model."""

from __future__ import annotations

import ast
import importlib
import importlib.metadata
import json
import logging
import os
import re
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
import torch
import yaml
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from estune import cli
from estune.config import parse
from estune.errors import EstuneError
from estune.journal.journal import Journal
from estune.run.directory import default_path
from estune.run.trainer import Trainer
from tests.journal.test_journal import header
from tests.models import build_model, build_tokenizer, save_model
from tests.runs import make_config, make_task

ROOT = Path(__file__).parents[2]
SMALL = ["--steps=2", "--population=4", "--prompts_per_step=8", "--task.train_size=40", "--task.eval_size=20"]


def estune(*arguments: Any) -> int:
    """Run a command in this process; its exit code."""
    before = sys.argv
    sys.argv = ["estune", *map(str, arguments)]
    try:
        cli.main()
    except SystemExit as end:
        return int(end.code or 0)
    finally:
        sys.argv = before
    return 0


def refused(capsys: pytest.CaptureFixture[str], *arguments: Any) -> str:
    """What a refused command says: exit code 1 and one line."""
    capsys.readouterr()
    assert estune(*arguments) == 1
    error = capsys.readouterr().err.strip()
    (line,) = [text for text in error.splitlines() if text.startswith("error: ")]
    assert "Traceback" not in error
    return line


def of_training(run: Path, metrics: dict[str, float], step: int | None = None) -> Any:
    """What the run recorded of these metrics, at its best evaluation or the one after `step`."""
    evaluations = Journal.read(run).evaluations
    chosen = max(evaluations, key=lambda e: e.metrics["eval_accuracy"] if step is None else e.step == step)
    assert {"eval_accuracy", "eval_reward", "eval_completions/mean_length"} <= metrics.keys()
    return pytest.approx({key: chosen.metrics[key] for key in metrics})


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    assert estune("train", *SMALL, "--output-dir", folder) == 0
    return folder


def test_train_says_what_improved_and_where_everything_lies(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "r"
    assert estune("train", *SMALL, f"--output-dir={folder}") == 0
    out = capsys.readouterr().out
    assert "held-out accuracy" in out
    for name in ("best", "final", "journal.jsonl", "metrics.jsonl", "tensorboard", "completions"):
        assert (folder / name).exists()
        assert name in out
    assert yaml.safe_load((folder / "config.yaml").read_text())["steps"] == 2


def test_a_run_from_a_config_file(tmp_path: Path, run: Path) -> None:
    settings = Journal.read(run).header.config
    (tmp_path / "again.yaml").write_text(yaml.safe_dump(settings))
    assert estune("train", "--config", tmp_path / "again.yaml", "--output-dir", tmp_path / "again") == 0
    assert Journal.read(tmp_path / "again").fingerprint() == Journal.read(run).fingerprint()


def test_a_journal_s_words_cannot_move_the_cursor(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Journal.create(tmp_path, header(noise_version=99, packages={"estune": "\x1b[2J1.0"})).close()
    assert "use the estune that wrote it (?[2J1.0)" in refused(capsys, "replay", tmp_path, "-o", tmp_path / "final")


def test_resume_and_replay(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert estune("train", *SMALL, "--steps=1", "--output-dir", tmp_path / "short") == 0
    assert estune("train", "--resume", tmp_path / "short", "--steps", 2) == 0
    # The embedded model's schedule refers to the whole run, so only a run of the same length is the same run.
    assert len(Journal.read(tmp_path / "short").steps) == 2
    capsys.readouterr()
    assert estune("replay", run, "--step", 1, "-o", tmp_path / "one", "--dtype", "bfloat16") == 0
    assert "verified" in capsys.readouterr().out
    with safe_open(tmp_path / "one" / "model.safetensors", "pt") as f:
        assert {str(f.get_tensor(k).dtype) for k in f.keys()} == {"torch.bfloat16"}  # noqa: SIM118
    AutoModelForCausalLM.from_pretrained(tmp_path / "one")


def test_eval_of_a_run_and_of_a_model_agree_with_training(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from estune.run.evaluate import evaluate_model

    best = evaluate_model(str(run))
    assert best == of_training(run, best)
    before = evaluate_model("tiny", overrides=["task.train_size=40", "task.eval_size=20"])
    assert before == of_training(run, before, step=0)
    capsys.readouterr()
    assert estune("eval", run, "-o", tmp_path / "completions.parquet") == 0
    out = capsys.readouterr().out
    assert f"{best['eval_accuracy']:.4f}" in next(line for line in out.splitlines() if " accuracy " in line)
    assert (tmp_path / "completions.parquet").exists()


def test_eval_of_a_run_changes_what_it_is_told_and_no_more(run: Path, tmp_path: Path) -> None:
    from estune.run.evaluate import evaluate_model

    same = evaluate_model(str(run), overrides=["top_k=3"])  # which greedy decoding does not use
    assert same == of_training(run, same)
    (tmp_path / "more.yaml").write_text("top_p: 0.5\n")
    assert evaluate_model(str(run), tmp_path / "more.yaml") == same

    evaluate_model(str(run), overrides=["task.eval_size=10", "max_new_tokens=3"], output=tmp_path / "few.parquet")
    few = pyarrow.parquet.read_table(tmp_path / "few.parquet").to_pylist()
    whole = pyarrow.parquet.read_table(run / "completions" / "evaluation-00000.parquet").to_pylist()
    assert [row["prompt"] for row in few] == [row["prompt"] for row in whole[:10]]
    assert {row["tokens"] for row in few} == {3}


@pytest.mark.skipif(torch.backends.mps.is_available(), reason="evaluates a run of a device that is not here")
def test_eval_of_a_run_of_another_machine_takes_the_device_there_is(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from estune.run.evaluate import evaluate_model

    expected, read = evaluate_model(str(run)), Journal.read

    def elsewhere(path: Path) -> Journal:
        journal = read(path)
        journal.settings["device"] = "mps"
        return journal

    monkeypatch.setattr(Journal, "read", elsewhere)
    assert evaluate_model(str(run)) == expected
    with pytest.raises(EstuneError, match="device: 'mps' is not available"):
        evaluate_model(str(run), overrides=["device=mps"])


def test_eval_of_a_run_on_other_data_is_refused_unless_they_are_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"numbers": [a, a + b], "target": 2 * a + b} for a in range(1, 20) for b in range(5)]
    data = tmp_path / "data.json"
    data.write_text(json.dumps(rows))
    options = [o for o in SMALL if not o.startswith("--task")]
    assert estune("train", *options, "--task.data", data, "--steps=1", "--output-dir", tmp_path / "r") == 0
    assert estune("eval", tmp_path / "r") == 0
    assert estune("eval", tmp_path / "r", "--seed", 5) == 0
    data.write_text(json.dumps(rows[:-10]))
    assert "are not those that the run was trained on" in refused(capsys, "eval", tmp_path / "r")
    assert estune("eval", tmp_path / "r", "--task.data", data) == 0


def test_eval_of_a_run_on_generated_problems_takes_a_file(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    problems = [{"numbers": [101 + n, 200 + n], "target": 301 + 2 * n} for n in range(5)]
    data, output = tmp_path / "data.json", tmp_path / "completions.parquet"
    data.write_text(json.dumps(problems))
    assert estune("eval", run, "--temperature", 0.7, "--task.eval_data", data, "-o", output) == 0
    assert len(pyarrow.parquet.read_table(output)) == 5

    config = parse(Journal.read(run).settings)
    seen = config.task.build(config.seed).train[0]
    data.write_text(json.dumps([*problems, {key: seen[key] for key in ("numbers", "target")}]))
    assert "1 of 6 evaluation examples are in the training set too" in refused(
        capsys, "eval", run, "--task.eval_data", data
    )


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on a task of the user's own."""
    folder = tmp_path_factory.mktemp("own")
    Trainer(make_config(folder / "run", save_model(folder / "model"), steps=2), task=make_task(), monitors=[]).train()
    return folder / "run"


def test_a_run_on_a_task_of_ones_own_is_evaluated_from_python(own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from estune.run.evaluate import evaluate_model

    assert "the task variety, not countdown: if it is your own, evaluate it from Python" in refused(capsys, "eval", own)
    assert "the task variety, not countdown" in refused(capsys, "eval", own, "--task.eval_size", 5)
    metrics = evaluate_model(str(own), task=make_task())
    assert metrics == of_training(own, metrics)


def test_a_run_without_output_dir_is_named_after_its_task() -> None:
    assert default_path(make_config(Path(), Path("some/model")), "brief").name.startswith("brief-model-")


def test_dry_run_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert estune("train", "--dry-run", *SMALL, "--output-dir", tmp_path / "r") == 0
    out = capsys.readouterr().out
    assert "40 training and 20 held-out rows" in out
    assert "2 steps x 4 members x 8 prompts = 64 completions" in out
    assert re.search(r"\na step: at most [\d,]+ tokens, .*not measured", out)
    assert not list(tmp_path.iterdir())
    assert "no such directory" in refused(capsys, "train", "--dry-run", "--model", "./nowhere")


@pytest.mark.parametrize("options", [["--output-dir", "2026-01-01"], ["--report_to", "tensorboard"]])
def test_options_are_taken_as_they_are_typed(options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert estune("train", "--dry-run", *SMALL, *options) == 0
    assert options[1] in capsys.readouterr().out


def test_dry_run_refuses_what_training_would(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    short = save_model(tmp_path / "short", tokenizer=build_tokenizer(), max_position_embeddings=64)
    build_model("qwen2").save_pretrained(tmp_path / "mute")
    for options, message in [
        (["--output-dir", run], "already holds a run"),
        (["--output-dir", tmp_path], "exists and is not empty"),
        (["--device", "toaster"], "'toaster' is no device"),
        (["--device", "cuda:99"], "'cuda:99' is not available"),
        (["--train_parameters", "nothing.*"], "'nothing.*'"),
        (["--model", short, "--max_new_tokens", 60], "64 positions"),
        (["--model", tmp_path / "mute"], "tokenizer"),
    ]:
        dry = refused(capsys, "train", "--dry-run", *SMALL, "--output-dir", tmp_path / "r", *options)
        assert message in dry
        assert message in refused(capsys, "train", *SMALL, "--output-dir", tmp_path / "r", *options)
    assert not (tmp_path / "r").exists()


def test_the_model_s_name_is_checked_before_data_are_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = ["--task=math", "--task.data", tmp_path / "none.jsonl"]
    for command in (["train"], ["train", "--dry-run"], ["probe"], ["compare", "--methods=es"]):
        assert "model ./nowhere: no such directory" in refused(capsys, *command, *data, "--model=./nowhere")
    assert "model ./nowhere: no such directory" in refused(capsys, "eval", "./nowhere", *data)
    for given in (["--model", "tiny"], ["--model=tiny"], ["tiny", "--model", "tiny"]):
        assert "without --model: estune eval RUN" in refused(capsys, "eval", *given)


def test_warnings_of_the_hub_are_told_once() -> None:
    """Its library prints what it logs, and passes it on to whoever listens to everything."""
    library = importlib.import_module("huggingface_hub.utils.logging")
    library.get_logger("huggingface_hub").addHandler(logging.StreamHandler())
    assert estune("--help") == 0
    importlib.reload(library)  # as an import that comes later
    logger = logging.getLogger("huggingface_hub")
    assert (logger.handlers, logger.propagate) == ([], True)


GRADER = """
def right(prompts, completions, answer, **_):
    return [float(gold in text + prompt) for prompt, text, gold in zip(prompts, completions, answer, strict=True)]

def wrong(completions, **_):
    return [text["content"] for text in completions]
"""


@pytest.mark.parametrize("chat", [True, False])
def test_dry_run_shows_what_model_and_rewards_are_given(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], chat: bool
) -> None:
    (tmp_path / "rows.jsonl").write_text("".join(f'{{"prompt": "say {n}", "answer": "42"}}\n' for n in range(40)))
    (tmp_path / "grader_of_dry_runs.py").write_text(GRADER)
    data = ["--task", "custom", "--task.data", tmp_path / "rows.jsonl", "--task.rewards"]
    grader = tmp_path / "grader_of_dry_runs.py"
    settings = ["--task.chat", str(chat).lower(), "--prompts_per_step", 100]
    assert estune("train", "--dry-run", *data, f"{grader}:right", *settings) == 0
    out = capsys.readouterr().out
    _, _, shown = out.partition("as the model is shown it:\n")
    assert shown.startswith("  <|im_start|>user\n  say 0<|im_end|>\n  <|im_start|>assistant\n" if chat else "  say 0\n")
    assert "  prompts = ['say 0']\n  completions = ['The answer is 42.']\n" in shown
    assert "  right: 1.0\n  in all: 1.0\n" in shown
    assert "note: prompts_per_step is 100, and the training set has " in shown
    said = refused(capsys, "train", "--dry-run", *data, f"{grader}:wrong", *settings)
    assert "reward wrong raised TypeError" in said


def test_dry_run_refuses_an_engine_that_is_not_there(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("estune.engines.vllm.internals._PACKAGES", ("no-such-package-as-this",))
    assert "vLLM is not installed; pip install" in refused(capsys, "train", "--dry-run", *SMALL, "--engine", "vllm")


def test_dry_run_does_not_guess_what_a_cluster_has(capsys: pytest.CaptureFixture[str]) -> None:
    assert estune("train", "--dry-run", *SMALL, "--workers", 2, "--ray_address", "auto") == 0
    assert "\nengine vllm, if the cluster has GPUs" in capsys.readouterr().out


def test_dry_run_counts_positions_for_training_prompts_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    long = {"numbers": [1, 2], "target": 3, "context": "x" * 100}
    (tmp_path / "train.json").write_text(json.dumps([long]))
    (tmp_path / "eval.json").write_text(json.dumps([{**long, "target": 2, "context": "x"}]))
    model = save_model(tmp_path / "short", tokenizer=build_tokenizer(), max_position_embeddings=64)
    data = ["--task.data", tmp_path / "train.json", "--task.eval_data", tmp_path / "eval.json"]
    line = refused(capsys, "train", "--dry-run", "--model", model, "--max_new_tokens", 10, *data)
    assert "100 tokens and max_new_tokens 10 go beyond the 64 positions" in line


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_dry_run_of_resuming_tells_what_is_left_and_writes_nothing(
    own: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "r"
    assert estune("train", *SMALL, "--save_steps=1", "--output-dir", folder) == 0
    before = contents(folder)
    capsys.readouterr()
    assert estune("train", "--resume", folder, "--steps", 5, "--dry-run") == 0
    out = capsys.readouterr().out
    assert f"run {folder}: 2 of 5 steps done, 3 to go" in out
    assert "begins with checkpoint-2 and replays 0 steps" in out
    assert "40 training and 20 held-out rows" in out
    assert estune("train", "--resume", folder, "--dry-run") == 0
    assert "2 of 2 steps done, 0 to go" in capsys.readouterr().out
    assert contents(folder) == before
    assert "this is no run" in refused(capsys, "train", "--dry-run", "--resume", tmp_path)
    line = refused(capsys, "train", "--dry-run", "--resume", own)
    assert "the task variety, not countdown" in line
    assert "Trainer.resume(run, task=...), or with the ESTrainer that began it" in line


def test_resume_over_a_base_that_has_moved(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, model = tmp_path / "r", save_model(tmp_path / "model", max_position_embeddings=1024)
    options = ["--model", model, "--sigma=0.01", "--max_new_tokens=4", "--eval_steps=0"]
    assert estune("train", *SMALL, *options, "--steps=1", "--output-dir", folder) == 0
    (tmp_path / "model").rename(tmp_path / "moved")
    assert "no such directory" in refused(capsys, "train", "--resume", folder, "--steps", 2)
    assert "model is no switch" in refused(capsys, "train", "--resume", folder, "--model")
    assert "content hash" in refused(capsys, "train", "--resume", folder, "--model", "tiny", "--steps", 2)
    for more in (["--dry-run"], []):
        assert estune("train", "--resume", folder, "--model", tmp_path / "moved", "--steps", 2, *more) == 0
    assert len(Journal.read(folder).steps) == 2


def test_help_is_quick_and_names_every_command() -> None:
    done = subprocess.run([sys.executable, "-m", "estune.cli", "--help"], capture_output=True, text=True, check=True)
    for command in ("train", "eval", "replay", "settings"):
        assert command in done.stdout


@pytest.mark.parametrize(
    ("command", "option"),
    [
        (["settings"], "--task.eval_size "),
        (["settings", "--task=math"], "--task.levels "),
        (["train", "-h"], "--resume "),
    ],
)
def test_settings_are_listed_in_their_sections(
    command: list[str], option: str, capsys: pytest.CaptureFixture[str]
) -> None:
    from estune.config import SECTIONS

    assert estune(*command) == 0
    lines = capsys.readouterr().out.splitlines()
    for section in SECTIONS:
        first = next(i for i, line in enumerate(lines) if line.startswith(f"{section.__name__}: "))
        last = next(i for i, line in enumerate(lines) if i > first and not line.strip())
        named = [line.split()[0] for line in lines[first:last] if line.startswith("--")]
        assert named == [f"--{name}" for name in section.model_fields]
    assert any(option in line for line in lines)
    assert next(line.split()[1] for line in lines if line.startswith("--report_to ")) == "tensorboard"


def test_every_command_has_help_and_a_version(capsys: pytest.CaptureFixture[str]) -> None:
    commands = [[command.name] for command in cli.app.registered_commands]
    assert len(commands) == 23
    for command in [[], *commands]:
        assert estune(*command, "-h") == 0
        assert "Usage: " in capsys.readouterr().out
        assert estune(*command, "--version") == 0
        assert capsys.readouterr().out == f"estune {importlib.metadata.version('estune')}\n"


def test_mistakes_are_one_line(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "did you mean sigma?" in refused(capsys, "train", "--sigmas", 1)
    assert "found '0'" in refused(capsys, "train", "--sigma", 0)
    assert "found 'true'" in refused(capsys, "train", "--steps", "true")
    assert "model is no switch" in refused(capsys, "train", "--model", "--sigma", 1)
    assert "unexpected argument" in refused(capsys, "train", "sigma")
    assert "--resume keeps the run's settings" in refused(capsys, "train", "--resume", run, "--sigma", 1)
    assert "steps: Input should be a valid integer" in refused(capsys, "train", "--resume", run, "--steps", 2.5)
    assert "already holds a run" in refused(capsys, "train", *SMALL, "--output-dir", run)
    assert "this is no run" in refused(capsys, "train", "--resume", tmp_path)
    assert "this is no run" in refused(capsys, "replay", tmp_path, "-o", tmp_path / "x")
    assert "no such directory" in refused(capsys, "eval", tmp_path / "none")


def test_data_that_cannot_be_trained_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = tmp_path / "data.json"

    def complaint(rows: Any) -> str:
        data.write_text(rows if isinstance(rows, str) else json.dumps(rows))
        return refused(capsys, "train", "--task.data", data, "--task.eval_data", data, "--output-dir", tmp_path / "r")

    good = {"numbers": [1, 2, 3], "target": 6}
    assert "no such file" in refused(capsys, "train", "--task.data", tmp_path / "none.json")
    assert str(data) in complaint([])
    assert "target" in complaint([{"numbers": [1, 2]}])
    assert "row 2" in complaint([good, {**good, "target": "many"}])
    assert "training set too" in complaint([good])
    assert str(data) in complaint("{not json")
    assert not (tmp_path / "r").exists()


def test_models_that_cannot_be_trained(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def complaint(model: Path) -> str:
        return refused(capsys, "train", *SMALL, "--model", model, "--output-dir", tmp_path / "r")

    (tmp_path / "empty").mkdir()
    assert "without config.json" in complaint(tmp_path / "empty")
    (tmp_path / "text.txt").write_text("x")
    assert "is a file" in complaint(tmp_path / "text.txt")
    broken = save_model(tmp_path / "broken")
    (broken / "model.safetensors").write_bytes(b"not weights")
    assert "not a safetensors file" in complaint(broken)
    build_model("qwen2").save_pretrained(tmp_path / "mute")
    assert "tokenizer" in complaint(tmp_path / "mute")
    short = save_model(tmp_path / "short", tokenizer=build_tokenizer(), max_position_embeddings=64)
    assert "max_new_tokens" in complaint(short)
    assert not (tmp_path / "r").exists()


def test_the_whole_command_in_a_process_of_its_own(new_interpreters: None, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "estune.cli", "train", *SMALL, "--output-dir", "out"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path, env={**os.environ})
    assert "held-out accuracy" in done.stdout
    assert done.stderr == ""


def test_every_package_that_is_imported_is_declared() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [text for name, texts in project["optional-dependencies"].items() if name != "dev" for text in texts]
    declared = {
        re.split(r"[<>=~!; \[]", text)[0].lower().replace("_", "-") for text in [*project["dependencies"], *extras]
    }
    imported = {
        name.split(".")[0]
        for file in (ROOT / "src").rglob("*.py")
        if file.name != "verifiers_bridge.py"  # which runs in a Python of verifiers' own
        for node in ast.walk(ast.parse(file.read_text()))
        for name in (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [node.module or ""]
            if isinstance(node, ast.ImportFrom)
            else []
        )
    }
    # Triton comes with a torch for CUDA, without which nothing here asks for it.
    foreign = imported - sys.stdlib_module_names - {"estune", "triton"}
    packages = importlib.metadata.packages_distributions()
    needed = {packages.get(name, [name])[0].lower().replace("_", "-") for name in foreign}  # vLLM is not in this one
    assert needed <= declared


def test_a_second_ctrl_c_stops_at_once_and_leaves_a_whole_journal(tmp_path: Path) -> None:
    folder = tmp_path / "r"
    command = [sys.executable, "-m", "estune.cli", "train", *SMALL, "--steps=500", "--prompts_per_step=40"]
    process = subprocess.Popen([*command, "--output-dir", str(folder)], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    journal = folder / "journal.jsonl"
    while not journal.exists() or journal.read_text().count('"kind":"step"') < 2:
        assert process.poll() is None
        time.sleep(0.01)
    for _ in range(2):
        process.send_signal(signal.SIGINT)
        time.sleep(0.05)
    process.communicate(timeout=30)
    # Between two steps the first signal ends the run in good order, and the second meets a process about to exit.
    assert process.returncode in (130, 0, -signal.SIGINT)
    done = len(Journal.read(folder).steps)
    assert 2 <= done < 500
    assert estune("replay", folder, "-o", tmp_path / "rebuilt") == 0
