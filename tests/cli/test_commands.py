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

import pytest
import yaml
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from estune import cli
from estune.journal.journal import Journal
from estune.run.directory import default_path
from tests.command_line import SMALL, estune, refused, usage
from tests.journal.test_journal import header
from tests.models import FUSABLE, build_model, build_tokenizer, save_model
from tests.runs import make_config

ROOT = Path(__file__).parents[2]


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


def test_a_run_without_output_dir_is_named_after_its_task() -> None:
    assert default_path(make_config(Path(), Path("some/model")), "brief").name.startswith("brief-model-")


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


def test_resume_over_a_base_that_has_moved(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, model = tmp_path / "r", save_model(tmp_path / "model", max_position_embeddings=1024, **FUSABLE)
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
    assert "found sigma; `estune branch` goes on with" in refused(capsys, "train", "--resume", run, "--sigma", 1)
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
