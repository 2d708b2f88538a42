"""What a run depends on beside its tensors: a change is named and refused, and goes on where the user insists."""

from __future__ import annotations

import functools
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from estune.config import parse
from estune.errors import EstuneError
from estune.journal.identity import model_files
from estune.journal.journal import Journal
from estune.journal.replay import refuse_changed_model, replay
from estune.pool.open import with_resources
from estune.rewards.load import load_reward
from estune.run.code import code_file, code_of, references
from estune.run.directory import default_path
from estune.run.dry_run import describe_rest
from estune.run.evaluate import evaluate_model
from estune.run.resume import resumed
from estune.run.trainer import Trainer
from estune.weights.checkpoint import Checkpoint
from estune.weights.locate import locate, pinned
from tests.models import FUSABLE, save_model
from tests.runs import make_config, make_task, variety

COMMIT = "0123456789abcdef0123456789abcdef01234567"
REWARD = "def brief(completions, **_):\n    return [-len(text) / {} for text in completions]\n"
TASK = REWARD + "train = [{{'prompt': f'{{n}} and '}} for n in range(60)]\nrewards = [brief]\n"


def change(file: Path, key: str, value: Any) -> None:
    content = json.loads(file.read_text())
    file.write_text(json.dumps({**content, key: value}))


def rewrite(file: Path, **_: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()), indent=7))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model and a run over it of two steps."""
    folder = tmp_path_factory.mktemp("identity")
    model = save_model(folder / "model", **FUSABLE)
    (model / "generation_config.json").write_text("{}")
    Trainer(make_config(folder / "run", model, steps=2), task=make_task(), monitors=[]).train()
    return folder


@pytest.fixture
def there(whole: Path, tmp_path: Path) -> Path:
    """The same, to be changed."""
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    return tmp_path


def resume(folder: Path, **options: Any) -> Trainer:
    given = {"task": make_task(), "steps": 3, "model": str(folder / "model"), **options}
    return Trainer.resume(folder / "run", monitors=[], **given)


@pytest.mark.parametrize(
    ("name", "spoil", "said"),
    [
        ("config.json", lambda f: change(f, "rms_norm_eps", 0.5), "changed since the run began (rms_norm_eps"),
        ("generation_config.json", lambda f: change(f, "eos_token_id", 3), "has changed since the run began"),
        ("tokenizer.json", lambda f: f.write_text(f.read_text() + " "), "has changed since the run began"),
        ("tokenizer_config.json", lambda f: change(f, "eos_token", "a"), "has changed since the run began"),
        ("chat_template.jinja", lambda f: f.unlink(), "is no longer there"),
        ("added_tokens.json", lambda f: f.write_text("{}"), "was not there when the run began"),
    ],
    ids=lambda v: v if isinstance(v, str) and "." in v else "",
)  # fmt: skip
def test_a_changed_file_of_the_model_is_named(there: Path, name: str, spoil: Any, said: str) -> None:
    spoil(there / "model" / name)
    journal = Journal.read(there / "run")
    with pytest.raises(EstuneError) as caught:
        refuse_changed_model(journal, there / "model", accept=False)
    assert f"{name} {said}" in str(caught.value) or f"{name} has {said}" in str(caught.value)
    assert "--accept-changes" in str(caught.value)
    assert refuse_changed_model(journal, there / "model", accept=True) == model_files(there / "model")


def test_another_layout_or_type_of_config_json_is_no_change(there: Path) -> None:
    file = there / "model" / "config.json"
    rewrite(file)
    change(file, "dtype", "bfloat16")
    (there / "model" / "LICENSE").write_text("another one")
    (there / "model" / "README.md").write_text("not the model's")
    assert refuse_changed_model(Journal.read(there / "run"), there / "model", accept=False) == {}


def test_whoever_insists_goes_on_and_is_not_asked_again(there: Path) -> None:
    change(there / "model" / "config.json", "rms_norm_eps", 0.5)
    for begin in (
        lambda: resume(there),
        lambda: replay(there / "run", there / "out", model=str(there / "model")),
        lambda: describe_rest(there / "run", {"model": str(there / "model")}),
    ):
        with pytest.raises(EstuneError, match=r"config.json has changed .*rms_norm_eps.*--accept-changes"):
            begin()
    assert len(Journal.read(there / "run").steps) == 2
    resume(there, accept_changes=True).train()
    journal = Journal.read(there / "run")
    assert journal.files == model_files(there / "model") != journal.header.files
    assert journal.code == journal.header.code
    resume(there, steps=4).train()
    replay(there / "run", there / "out", model=str(there / "model"))


def test_a_changed_tokenizer_of_the_best_checkpoint_is_not_evaluated_with(there: Path) -> None:
    run = str(there / "run")
    metrics = evaluate_model(run, task=make_task())
    (there / "run" / "best" / "chat_template.jinja").write_text("{{ 1 }}")
    with pytest.raises(EstuneError, match=r"model .*best: chat_template.jinja has changed"):
        evaluate_model(run, task=make_task())
    assert evaluate_model(run, task=make_task(), accept_changes=True) == metrics  # its prompts are plain text


def other(completions: list[str], **_: Any) -> list[float]:
    """Another reward."""
    return [0.5] * len(completions)


def test_another_function_of_the_same_name_is_refused(there: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(other, "__name__", "variety")
    with pytest.raises(EstuneError, match="run: reward variety has changed since the run began; .*accept_changes=True"):
        resume(there, task=make_task(other))
    resume(there, task=make_task(other), accept_changes=True).train()


def test_journals_of_format_1_say_nothing_and_nothing_is_refused(there: Path) -> None:
    journal = Journal.read(Path(__file__).parents[1] / "data" / "format-1")
    assert (journal.files, journal.code) == ({}, {})
    assert refuse_changed_model(journal, there / "model", accept=False) == {}


def test_a_mended_task_file_goes_on_with_one_flag(there: Path) -> None:
    file = there / "brief.py"
    file.write_text(TASK.format(100))
    settings = {"task": str(file), "output_dir": there / "own", "steps": 1}
    Trainer(parse({**make_config(there, there / "model").model_dump(), **settings}), monitors=[]).train()
    assert set(Journal.read(there / "own").header.code) == {str(file), "reward brief"}
    Trainer.resume(there / "own", steps=2, monitors=[]).train()  # not asked: it is as the user ran it

    import sys

    sys.modules.pop(next(name for name in sys.modules if name.startswith("estune_file_brief_")))  # a new process
    file.write_text(TASK.format(200))
    for begin in (
        lambda: Trainer.resume(there / "own", steps=3, monitors=[]),
        lambda: describe_rest(there / "own", {"steps": 3}),
        lambda: evaluate_model(str(there / "own")),
    ):
        with pytest.raises(
            EstuneError, match=r"brief\.py has changed since you last ran it; go on by --accept-changes"
        ):
            begin()
    Trainer.resume(there / "own", steps=3, accept_changes=True, monitors=[]).train()
    Trainer.resume(there / "own", steps=4, monitors=[]).train()
    evaluate_model(str(there / "own"))


def test_the_source_of_a_function_is_its_own_or_that_of_what_it_wraps(tmp_path: Path) -> None:
    from estune.rewards.countdown import answer_reward

    class Reward:
        """Called as a function."""

        def __call__(self, completions: list[str], **_: Any) -> list[float]:
            return [0.0] * len(completions)

    assert code_of([answer_reward]) == {}
    assert list(code_of([functools.partial(variety, scale=2)])) == list(code_of([variety])) == ["reward variety"]
    assert list(code_of([Reward()])) == ["reward Reward"]
    namespace: dict[str, Any] = {}
    exec("def typed(completions, **_): return [0.0]", namespace)
    assert code_of([namespace["typed"]]) == {}


def test_the_arguments_of_a_partial_are_hashed_by_what_they_hold() -> None:
    def of(*arguments: Any, **named: Any) -> dict[str, str]:
        return code_of([functools.partial(variety, *arguments, **named)])

    different = [
        {"scale": v} for v in (1, 2.5, "a", [1, 2], {"a": [1]}, {1, 2}, Path("b"), variety, other, max, object())
    ]
    assert len({str(of(**named)) for named in [{}, *different]}) == len(different) + 1
    assert of(1) != of(2) != of(scale=2)
    assert of(a=1, b=2) == of(b=2, a=1)
    assert of(scale=object()) == of(scale=object())  # by their type alone
    assert of({object()}) == of({object()})
    assert of({(1, 2): 3}, 1) != of({(1, 2): 3}, 2)
    assert of(functools.partial(other, 1)) != of(functools.partial(other, 2))


@pytest.mark.parametrize(
    ("task", "found"),
    [
        ("countdown", []),
        ("a/b.py", ["a/b.py"]),
        ({"name": "custom", "rewards": "a.py:f,b/model,c.f,estune.rewards.math.math_reward"}, ["a.py:f", "c.f"]),
        ({"name": "preference", "reward_model": "x.py:f"}, ["x.py:f"]),
        ({"name": "mix", "tasks": {"a": "countdown", "b": "own.py"}}, ["own.py"]),
    ],
)  # fmt: skip
def test_what_settings_name_that_is_code(task: Any, found: list[str]) -> None:
    assert references(parse({"task": task}).task) == found


def test_where_code_lies_is_found_without_running_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "package").mkdir()
    for name in ("package/__init__.py", "package/module.py", "own.py"):
        (tmp_path / name).write_text("raise SystemExit('was run')")
    assert code_file("package.module.f") == tmp_path / "package" / "module.py"
    assert code_file("package.f") == tmp_path / "package" / "__init__.py"
    assert code_file("own.py:f") == code_file("own.py") == code_file("own.f") == tmp_path / "own.py"
    assert code_file("none.py") is code_file("none.f") is code_file("package.none.f") is None


def test_no_file_in_the_working_directory_is_taken_for_a_library(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [*sys.path])
    monkeypatch.delitem(sys.modules, "colorsys", raising=False)
    (tmp_path / "colorsys.py").write_text("raise SystemExit('was run')")
    (tmp_path / "beside_colorsys.py").write_text("from colorsys import rgb_to_hsv")
    load_reward("estune.rewards.conciseness.correct_reward")
    assert str(tmp_path) not in sys.path
    load_reward("beside_colorsys.rgb_to_hsv")
    library = sys.modules["colorsys"].__file__
    assert library is not None
    assert code_file("colorsys.rgb_to_hsv") == Path(library).resolve() != tmp_path / "colorsys.py"


def test_a_hub_id_is_pinned_to_the_commit_that_was_found(
    there: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, str | None]] = []
    now = shutil.copytree(there / "model", tmp_path / "snapshots" / COMMIT)

    def snapshot_download(name: str, *, revision: str | None, **_: Any) -> str:
        asked.append((name, revision))
        return str(now)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    monkeypatch.chdir(tmp_path)
    assert pinned("owner/name") == pinned("owner/name@main") == f"owner/name@{COMMIT}"
    assert pinned("tiny") == "tiny"
    assert pinned(str(there / "model")) == str(there / "model")
    assert locate("owner/name@v1.0") == now
    assert asked == [("owner/name", None), ("owner/name", "main"), ("owner/name", "v1.0")]

    config = make_config(tmp_path / "pinned", Path("owner/name"), steps=1)
    assert with_resources(config).model == f"owner/name@{COMMIT}"
    assert default_path(with_resources(config), "t").name.startswith("t-name-")
    Trainer(config, task=make_task(), monitors=[]).train()
    journal = Journal.read(tmp_path / "pinned")
    assert journal.header.model == journal.header.config["model"] == f"owner/name@{COMMIT}"
    assert resumed(journal, {"model": "owner/name"}).model == f"owner/name@{COMMIT}"
    assert resumed(journal, {"model": "owner/name@v2"}).model == "owner/name@v2"
    asked.clear()
    replay(tmp_path / "pinned", tmp_path / "out")
    assert set(asked) == {("owner/name", COMMIT)}


def test_workers_whose_model_files_differ_are_told_apart(there: Path) -> None:
    """By `Description`, which all workers of a run must agree on."""
    from estune.pool.replica import Replica

    one = Replica(make_config(there / "x", there / "model", threads=1)).describe()
    change(there / "model" / "config.json", "rms_norm_eps", 0.5)
    two = Replica(make_config(there / "x", there / "model", threads=1)).describe()
    assert one.base_hash == two.base_hash == Checkpoint(there / "model").content_hash()
    assert one.files != two.files
