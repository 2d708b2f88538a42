"""A run that goes on on another day, in another folder or moved: it finds what it depends on, and its prompts stay."""

from __future__ import annotations

import json
import shutil
from contextlib import chdir
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import pytest

from estune.engines.tokenizer import load_tokenizer
from estune.errors import EstuneError
from estune.journal.journal import Journal
from estune.journal.replay import replay
from estune.pool.open import with_resources
from estune.run.dry_run import describe_rest
from estune.run.evaluate import evaluate_model
from estune.run.held_out import hash_of_prompts, token_ids
from estune.run.recorded import task_of
from estune.run.resume import refuse_changed_prompts, resumed
from estune.run.trainer import Trainer
from tests.models import FUSABLE, build_tokenizer, save_model
from tests.run.test_code import REWARD, TASK
from tests.runs import make_config, make_task


@pytest.fixture(scope="module")
def dated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model whose chat template asks for the date, and a run of a step over it, begun on a Friday."""
    folder = tmp_path_factory.mktemp("dated")
    tokenizer = build_tokenizer()
    tokenizer.chat_template = "{{ strftime_now('%d %b %Y') }}" + str(tokenizer.chat_template)
    model = save_model(folder / "model", tokenizer=tokenizer, **FUSABLE)
    config = make_config(folder / "run", model, steps=1, template_date="2024-07-26")
    Trainer(config, task=make_task(chat=True), monitors=[]).train()
    return folder


def test_a_run_that_goes_on_another_day_sees_the_prompts_that_it_began_with(dated: Path) -> None:
    run = Trainer.resume(dated / "run", task=make_task(chat=True), monitors=[], steps=2)
    try:
        (ids,) = token_ids(run.encoder, run.task, [{"prompt": "one"}])
    finally:
        run.close()
    assert run.encoder.tokenizer.decode(ids) == "26 Jul 2024<|user|>one<|end|><|assistant|>"
    told = run.state.rendering
    assert (told.date, told.options) == (date(2024, 7, 26), {})


def test_a_journal_that_names_no_date_is_of_the_day_on_which_it_was_created(dated: Path, tmp_path: Path) -> None:
    header = Journal.read(dated / "run").header
    old = {key: value for key, value in header.config.items() if key != "template_date"}
    for created, day in (("2023-05-04T23:59:59+00:00", "2023-05-04"), ("long ago", None)):
        folder = tmp_path / created[:4]
        folder.mkdir()
        Journal.create(folder, replace(header, created=created, config=old)).close()
        found = resumed(Journal.read(folder), {}).template_date
        assert (found and found.isoformat()) == day


def test_a_new_run_is_of_today(model: Path, tmp_path: Path) -> None:
    days = [date.today(), with_resources(make_config(tmp_path, model)).template_date, date.today()]
    assert days[0] <= days[1] <= days[2]  # type: ignore[operator]


def test_prompts_are_known_by_a_hash_of_what_the_model_sees(dated: Path, tmp_path: Path) -> None:
    """The first step's, and the evaluation set's; a journal without the hash says nothing against any."""
    task = make_task(chat=True)
    journal = Journal.read(dated / "run")
    tokenizer = load_tokenizer(dated / "model")
    shown = [
        [tokenizer(f"26 Jul 2024<|user|>{row['prompt']}<|end|><|assistant|>")["input_ids"] for row in rows]
        for rows in ([task.train[i] for i in journal.steps[0].prompts], task.evaluation)
    ]
    assert journal.prompts_hash == journal.header.prompts_hash == hash_of_prompts(*shown)
    assert journal.prompts_hash != hash_of_prompts(*reversed(shown))
    assert refuse_changed_prompts(journal, journal.prompts_hash, accept=False) is None
    with pytest.raises(EstuneError, match=r"its prompts come to other tokens here .* --accept-changes") as caught:
        refuse_changed_prompts(journal, "ab", accept=False)
    assert "\n" not in str(caught.value)
    assert refuse_changed_prompts(journal, "ab", accept=True) == "ab"
    (tmp_path / "old").mkdir()
    Journal.create(tmp_path / "old", replace(journal.header, prompts_hash="")).close()
    assert refuse_changed_prompts(Journal.read(tmp_path / "old"), "ab", accept=False) is None


def test_other_prompts_that_are_accepted_are_those_of_the_run_from_then_on(dated: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    journal = Journal.create(tmp_path / "run", Journal.read(dated / "run").header)
    journal.append_accepted(journal.files, journal.code, "ab")
    journal.append_accepted(journal.files, journal.code)
    journal.close()
    assert Journal.read(tmp_path / "run").prompts_hash == "ab"


def test_a_run_that_goes_on_with_other_prompts_says_so(dated: Path, tmp_path: Path) -> None:
    run = shutil.copytree(dated / "run", tmp_path / "run")
    journal = Journal.resume(run)
    shown = journal.prompts_hash
    journal.append_accepted(journal.files, journal.code, "ab")
    journal.close()
    options: dict[str, Any] = {"task": make_task(chat=True), "monitors": []}
    with pytest.raises(EstuneError, match="its prompts come to other tokens here"):
        Trainer.resume(run, steps=2, **options)
    Trainer.resume(run, steps=2, accept_changes=True, **options).close()
    assert Journal.read(run).prompts_hash == shown
    assert Trainer.resume(run, **options).train().steps == 2


@pytest.fixture(scope="module")
def relative(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, a task's file that names a file of rows, and a run that was begun there by such names."""
    folder = tmp_path_factory.mktemp("relative") / "project"
    save_model(folder / "models" / "m", **FUSABLE)
    rows = [{"prompt": f"{n} and "} for n in range(60)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "task.py").write_text(REWARD.format(10) + "train = 'rows.jsonl'\nrewards = [brief]\n")
    with chdir(folder):
        task = {"name": "task.py", "eval_size": 3}
        Trainer(
            make_config(Path("runs/x"), Path("models/m"), steps=1, task=task, watch=["task.py"]), monitors=[]
        ).train()
    return folder


def test_a_run_is_replayed_evaluated_and_gone_on_with_from_anywhere(
    relative: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = relative / "runs" / "x"
    journal = Journal.read(run)
    assert (journal.header.model, journal.header.task) == (str(relative / "models" / "m"), "task.py")
    monkeypatch.chdir(tmp_path)
    assert replay(run, tmp_path / "out") == journal.fingerprint()
    found = evaluate_model(str(run))
    assert journal.best is not None
    assert {key: journal.best.metrics[key] for key in found} == found
    assert "watch/task.py/accuracy" in found
    Trainer.resume(run, monitors=[], steps=2).close()
    assert Path.cwd() == tmp_path


def test_a_run_that_is_moved_with_what_it_depends_on_finds_it(
    relative: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moved = tmp_path / "elsewhere" / "project"
    shutil.copytree(relative, moved)
    hidden = relative.rename(relative.with_name("gone"))
    try:
        monkeypatch.chdir(tmp_path)
        assert replay(moved / "runs" / "x", tmp_path / "out")
        assert "as the run began" in describe_rest(moved / "runs" / "x", {"steps": 2}, trust_task=True)
        shutil.rmtree(moved / "models")
        with pytest.raises(EstuneError, match=r"base model .*models/m is not there; say where it is now with --model"):
            replay(moved / "runs" / "x", tmp_path / "out-2")
        replay(moved / "runs" / "x", tmp_path / "out-2", model=str(hidden / "models" / "m"))
    finally:
        hidden.rename(relative)


def test_text_of_a_run_from_before_it_was_made_a_conversation_stays_as_it_was(dated: Path, tmp_path: Path) -> None:
    file = tmp_path / "task.py"
    file.write_text(TASK.format(10))
    config = make_config(tmp_path / "run", Path("tiny"), task={"name": str(file), "chat": False})
    task = config.task.build(0)
    settings = config.model_dump(mode="json")
    del settings["task"]["chat"]
    (tmp_path / "run").mkdir()
    header = replace(
        Journal.read(dated / "run").header,
        **{"task": str(file), "data_hash": task.data_hash(), "config": settings, "prompts_hash": "", "code": {}},
    )
    Journal.create(tmp_path / "run", header).close()
    journal = Journal.read(tmp_path / "run")
    found, _ = task_of(journal, resumed(journal, {}), {}, "", trust_task=True)
    assert found.shown(found.train[0], template=True) == found.train[0]["prompt"]
