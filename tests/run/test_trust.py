"""A run that someone else made is data: the code that its journal names runs only where the user says so."""

from __future__ import annotations

import re
import shlex
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from estune.config import parse
from estune.errors import EstuneError
from estune.journal.journal import Journal
from estune.run.dry_run import describe_rest
from estune.run.evaluate import evaluate_model
from estune.run.trainer import Trainer
from tests.command_line import estune, refused
from tests.models import FUSABLE, save_model, save_own_code
from tests.runs import make_config, make_task

CODE = """
from pathlib import Path
Path({marker!r}).touch()
def brief(completions, **_):
    return [-len(text) / 100 for text in completions]
train = [{{"prompt": f"{{n}} and "}} for n in range(60)]
rewards = [brief]
"""
DATA = '{"prompt": "%d and "}\n'


def state(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another user, or another machine: nothing is known to have been run."""
    monkeypatch.setenv("XDG_STATE_HOME", str(folder))


@pytest.fixture(params=["file", "function", "module", "reward model", "mix", "watch"])
def foreign(request: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """Somebody's run with a task that leaves a marker where it is run, and the marker."""
    marker, run = tmp_path / "was-run", tmp_path / "run"
    name = f"evil_{request.node.callspec.id.replace(' ', '_').replace('-', '_')}"
    source = tmp_path / f"{name}.py"
    source.write_text(CODE.format(marker=str(marker)))
    data = tmp_path / "data.jsonl"
    data.write_text("".join(DATA % n for n in range(60)))
    custom = {"name": "custom", "data": str(data)}
    task: Any = {
        "file": str(source),
        "function": {**custom, "rewards": f"{source}:brief"},
        "module": {**custom, "rewards": f"{name}.brief"},
        "reward model": {"name": "preference", "data": str(data), "chat": False, "reward_model": f"{source}:brief"},
        "mix": {"name": "mix", "tasks": {"a": {**custom, "chat": False, "rewards": f"{source}:brief"}}},
        "watch": {"name": "countdown", "train_size": 20, "eval_size": 5, "chat": False},
    }[request.param]
    if "rewards" in task:
        task["chat"] = False
    if request.param == "watch":
        del task["chat"]
    monkeypatch.chdir(tmp_path)
    model = save_model(tmp_path / "model", max_position_embeddings=1024, **FUSABLE)
    settings = {"task": task, "steps": 1, "watch": [str(source)] if request.param == "watch" else []}
    state(tmp_path / "theirs", monkeypatch)
    Trainer(parse({**make_config(run, model).model_dump(), **settings}), monitors=[]).train()
    assert marker.exists()
    marker.unlink()
    state(tmp_path / "ours", monkeypatch)
    for module in [m for m in sys.modules if name in m]:
        monkeypatch.delitem(sys.modules, module)
    return run, marker


def test_nothing_that_a_foreign_journal_names_is_run(
    foreign: tuple[Path, Path], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    run, marker = foreign
    for command in (
        ["eval", run],
        ["eval", run, "--task.eval_size", 5],
        ["train", "--resume", run, "--steps", 2],
        ["train", "--resume", run, "--steps", 2, "--dry-run"],
        ["train", "--resume", run, "--steps", 2, "--accept-changes"],
    ):
        said = refused(capsys, *command)
        assert "which you have not run from there before; read it, and let it run by --trust-task" in said
        assert "evil_" in said
    assert estune("report", run, "-o", tmp_path / "report.html") == 0
    assert estune("replay", run, "-o", tmp_path / "out") == 0
    assert not marker.exists()
    assert len(Journal.read(run).steps) == 1
    evaluate_model(str(run), trust_task=True)
    assert marker.exists()
    describe_rest(run, {"steps": 2})  # from here on it is known


def describe_or_error(run: Path) -> str:
    with pytest.raises(EstuneError) as caught:
        describe_rest(run, {"steps": 2})
    return str(caught.value)


def test_what_the_user_names_himself_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    marker, source = tmp_path / "was-run", tmp_path / "own_and_named.py"
    source.write_text(CODE.format(marker=str(marker)))
    model = save_model(tmp_path / "model", **FUSABLE)
    config = {**make_config(tmp_path / "run", model).model_dump(), "task": str(source), "steps": 1}
    Trainer(parse(config), monitors=[]).train()
    Trainer.resume(tmp_path / "run", steps=2, monitors=[]).train()
    state(tmp_path / "elsewhere", monkeypatch)
    evaluate_model(str(tmp_path / "run"), overrides=[f"task={source}"])
    evaluate_model(str(tmp_path / "run"))  # it has been run by now


def test_one_place_known_does_not_make_another_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same content elsewhere, and other content at the same place, are asked about."""
    marker, source = tmp_path / "was-run", tmp_path / "own_and_moved.py"
    source.write_text(CODE.format(marker=str(marker)))
    model = save_model(tmp_path / "model", **FUSABLE)
    config = {**make_config(tmp_path / "run", model).model_dump(), "task": str(source), "steps": 1}
    Trainer(parse(config), monitors=[]).train()
    (tmp_path / "mail").mkdir()
    shutil.copy(source, tmp_path / "mail" / "task_by_mail.py")
    moved = {**config, "task": str(tmp_path / "mail" / "task_by_mail.py"), "output_dir": tmp_path / "mail" / "run"}
    state(tmp_path / "theirs", monkeypatch)
    Trainer(parse(moved), monitors=[]).train()
    monkeypatch.undo()
    assert "not run from there before" in describe_or_error(tmp_path / "mail" / "run")
    source.write_text(CODE.format(marker=str(marker)) + "\n")
    assert "has changed since you last ran it" in describe_or_error(tmp_path / "run")


def test_a_file_that_is_known_here_is_not_the_foreign_one_of_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a task of the user's own, too, what is watched is looked for where it would be run from."""
    model = save_model(tmp_path / "model", max_position_embeddings=1024, **FUSABLE)
    for whose in ("theirs", "ours"):
        (tmp_path / whose).mkdir()
        monkeypatch.chdir(tmp_path / whose)
        Path("watched_by_name.py").write_text(CODE.format(marker=str(tmp_path / whose / "was-run")))
        state(tmp_path / f"state of {whose}", monkeypatch)
        config = make_config(tmp_path / whose / "run", model, steps=1)
        watch = parse({**config.model_dump(), "watch": ["watched_by_name.py"]})
        Trainer(watch, task=make_task(), monitors=[]).train()
        Path("was-run").unlink()
    with pytest.raises(EstuneError, match=r"watched_by_name\.py .* not run from there before"):
        evaluate_model(str(tmp_path / "theirs" / "run"), task=make_task())
    assert not (tmp_path / "theirs" / "was-run").exists()
    monkeypatch.chdir(tmp_path)
    assert "watch/watched_by_name.py/reward" in evaluate_model(str(tmp_path / "ours" / "run"), task=make_task())


def test_code_of_a_model_runs_only_where_the_user_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    marker, run, trust = tmp_path / "was-run", tmp_path / "a run", "--trust_remote_code"
    model = save_own_code(tmp_path / "model", marker)
    task = {"name": "countdown", "train_size": 20, "eval_size": 5}
    settings = {**make_config(run, model, steps=1, prompts_per_step=2).model_dump(), "task": task}
    with pytest.raises(EstuneError, match=r"needs code that .* if you trust them, set trust_remote_code to true"):
        Trainer(parse(settings), monitors=[])
    assert not run.exists()
    assert not marker.exists()
    Trainer(parse({**settings, "trust_remote_code": True}), monitors=[]).train()
    assert marker.exists()
    marker.unlink()
    for name in [name for name in sys.modules if name.startswith("transformers_modules")]:
        monkeypatch.delitem(sys.modules, name)
    assert Journal.read(run).header.config["trust_remote_code"] is True
    for command in (
        ["eval", run],
        ["eval", run, "--trust-task"],
        ["train", "--resume", run, "--steps", 2],
        ["train", "--resume", run, "--steps", 2, "--dry-run", "--trust-task", "--accept-changes"],
    ):
        assert f"only you can say; read it, and let it run by {trust} true" in refused(capsys, *command)
    assert "set trust_remote_code to true" in refused(capsys, "train", "--resume", run, "--steps", 2, trust, "false")
    assert not marker.exists()
    assert estune("replay", run, "-o", tmp_path / "out") == 0  # runs no code, and needs no word
    assert not marker.exists()
    evaluate_model(str(run), overrides=["trust_remote_code=true"])
    assert marker.exists()
    with pytest.raises(EstuneError) as told:
        Trainer(parse({**settings, "trust_remote_code": True}), monitors=[])
    how = re.search("go on with `estune (.*?)`", str(told.value))
    assert how is not None
    assert estune(*shlex.split(how[1]), "--steps", 2) == 0
    assert len(Journal.read(run).steps) == 2


def test_a_cluster_that_a_journal_names_is_not_joined(tmp_path: Path, model: Path) -> None:
    config = make_config(tmp_path / "run", model, steps=1)
    Trainer(config, task=make_task(), monitors=[]).close()
    journal = Journal.read(tmp_path / "run")
    from estune.run.trust import refuse_foreign, remember

    there = parse({**journal.settings, "replicas": None, "workers": 2, "ray_address": "203.0.113.5:6379"})
    with pytest.raises(EstuneError, match=r"names a Ray cluster, 203\.0\.113\.5:6379, .*--trust-task"):
        refuse_foreign("run", there, {})
    refuse_foreign("run", there, {"ray_address": "203.0.113.5:6379"})
    refuse_foreign("run", there, {}, trust=True)
    refuse_foreign("run", there.model_copy(update={"workers": None}), {})
    remember(there)
    refuse_foreign("run", there, {})
