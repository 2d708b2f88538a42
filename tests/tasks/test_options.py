"""What all tasks share: how one is named and its options are checked, the catalogue, splits and evaluation sets."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from estune.config import Config, load, parse
from estune.errors import EstuneError
from estune.tasks import KINDS, catalogue, options_of
from estune.tasks.options import HELD_OUT_FRACTION, DataOptions, identity, is_held_out


def test_the_catalogue() -> None:
    rows = catalogue()
    assert [name for name, *_ in rows] == list(KINDS)
    assert all(summary and data for _, summary, data in rows)


@pytest.mark.parametrize("kind", list(KINDS))
def test_every_option_is_described(kind: str) -> None:
    assert all(field.description for field in KINDS[kind].model_fields.values())


@pytest.mark.parametrize(
    ("name", "kind"),
    [("math", "math"), ("gym:sudoku", "gym:NAME"), ("a/b.py", "FILE.py"), ("custom", "custom"), ("mix", "mix")],
)
def test_a_name_chooses_the_options(name: str, kind: str) -> None:
    more = ["task.tasks.math.train_size=3"] if name == "mix" else []
    config = load(None, [f"task={name}", *more])
    assert type(config.task) is KINDS[kind] is options_of(name)
    assert config.task.name == name
    assert parse(json.loads(config.model_dump_json())).task == config.task


def test_another_task_does_not_inherit_options() -> None:
    assert load(None, ["task=math", "task.levels=3-5"]).task.levels == "3-5"  # type: ignore[union-attr]
    assert load(None, ["task=conciseness"]).steps == 25
    assert Config(model="other", task="conciseness").steps == 500


@pytest.mark.parametrize(
    ("overrides", "complaint"),
    [
        (["task=maths"], "task: no task is called 'maths'; did you mean math"),
        (["task=math", "task.levls=3"], r"unknown setting task\.levls; did you mean task\.levels\?"),
        (["task.name=gym:sudoku", "task.optoins.x=3"], r"unknown setting task\.optoins; did you mean task\.options\?"),
        (
            ["task=mix", "task.tasks.countdown.coun=3"],
            r"unknown setting task\.tasks\.countdown\.coun; did you mean .*count\?",
        ),
        (["task=math", "task.levels=9"], r"task\.levels: .*found '9'"),
        (["task=math", "task.chat=maybe"], r"task\.chat: .*found 'maybe'"),
        (["task=math", "task.data"], r"task\.data: data is no switch"),
        (["task=gym:Sudoku!"], r"task\.name: "),
    ],
)
def test_mistakes(overrides: list[str], complaint: str) -> None:
    with pytest.raises(EstuneError, match=complaint) as caught:
        load(None, overrides)
    assert "<" not in str(caught.value)


def test_importing_all_options_loads_nothing_heavy() -> None:
    heavy = {"torch", "datasets", "transformers", "sympy", "reasoning_gym", "math_verify", "numpy", "pyarrow"}
    code = f"import sys, estune.tasks; estune.tasks.catalogue(); print(sorted({heavy!r} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


class Plain(DataOptions):
    name: str = "plain"

    def sets(self) -> tuple[list[str], list[str]]:
        train, evaluation = self.read(lambda source, records: ({"prompt": str(r["q"])} for r in records))
        return [row["prompt"] for row in train], [row["prompt"] for row in evaluation]


def write(path: Path, questions: Any) -> str:
    path.write_text("".join(json.dumps({"q": question}) + "\n" for question in questions))
    return str(path)


def test_an_eighth_is_held_out_the_same_for_any_sizes(tmp_path: Path) -> None:
    source = write(tmp_path / "x.jsonl", [f"q{n}" for n in range(2000)])
    train, evaluation = Plain(data=source).sets()
    assert sorted([*train, *evaluation]) == sorted(f"q{n}" for n in range(2000))
    assert len(evaluation) / 2000 == pytest.approx(HELD_OUT_FRACTION, rel=0.2)
    assert all(map(is_held_out, evaluation))
    assert Plain(data=source, train_size=9, eval_size=4).sets() == (train[:9], evaluation[:4])


def test_few_rows_of_which_none_or_all_are_held_out(tmp_path: Path) -> None:
    for questions, said in (
        ("q1 q2", "evaluation set is empty: .* of 2 rows none is"),
        ("q0", "of 1 row every one is"),
    ):
        source = write(tmp_path / "x.jsonl", questions.split())
        with pytest.raises(EstuneError, match=rf"^task plain: the .*{said}; give more rows, or task\.eval_data"):
            Plain(data=source).sets()


def test_which_rows_are_held_out_never_changes() -> None:
    assert [n for n in range(40) if is_held_out(f"q{n}")] == [0, 5, 30, 33]


def test_what_tells_rows_apart() -> None:
    def turns(*texts: str) -> dict[str, Any]:
        roles = ("system", "user", "assistant", "user")
        return {"prompt": [{"role": r, "content": t} for r, t in zip(roles, texts, strict=False) if t]}

    assert identity({"prompt": " One\n two"}) == identity(turns("", "one  TWO")) == identity(turns("a", "one two"))
    assert identity(turns("", "What is 2+2?", "It is")) != identity(turns("", "What is 2+3?", "It is"))
    assert identity(turns("a", "Is it red?", "No. Big?", "Yes")) == "is it red?\nno. big?\nyes"
    assert identity(turns("a", "one", "two")) != identity(turns("a", "one two"))


def test_sizes_of_several_evaluation_sets(tmp_path: Path) -> None:
    source = write(tmp_path / "x.jsonl", "abcdef")
    sets = f"{write(tmp_path / 'y.jsonl', 'ghi')}, {write(tmp_path / 'z.jsonl', 'jkl')}"
    assert Plain(data=source, eval_data=sets, eval_size=2, train_size=3).sets() == (list("abc"), list("ghjk"))


def test_overlap(tmp_path: Path) -> None:
    source, other = write(tmp_path / "x.jsonl", ["one two", "b"]), write(tmp_path / "y.jsonl", ["One  Two", "c"])
    with pytest.raises(EstuneError, match=r"1 of 2 evaluation examples .* the first: one two"):
        Plain(data=source, eval_data=other).sets()
    assert Plain(data=source, eval_data=other, drop_overlap=True).sets() == (["b"], ["One  Two", "c"])


def test_a_configuration_of_a_hubs_data_set(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked: list[Any] = []

    def load_dataset(*names: str, split: str) -> Any:
        asked.append((*names, split))
        return datasets.Dataset.from_list([{"q": f"{split}{n}"} for n in range(3)])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    Plain(data="openai/gsm8k:main", eval_data="a/b", eval_split="dev").sets()
    assert asked == [("openai/gsm8k", "main", "train"), ("a/b", "dev")]
