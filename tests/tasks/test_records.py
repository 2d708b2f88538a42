"""Countdown's data from files, directories and the hub, and what is said of those that cannot be used."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from estune.errors import EstuneError
from estune.rewards.countdown import answer_reward
from estune.tasks import CountdownConfig, Task
from estune.tasks.records import load_records
from tests.rewards.test_countdown import PAPER_PROMPT

AUTHORS = [
    {"context": PAPER_PROMPT, "numbers": [44, 19, 35], "target": "98", "solution": "44+19+35"},
    {"context": PAPER_PROMPT.replace("98", "27.4"), "numbers": [44, 19, 35], "target": "27.4"},
    {"context": PAPER_PROMPT.replace("98", "60"), "numbers": [44, 19, 35], "target": 60},
]
TINYZERO = [{"nums": [44, 19, 35], "target": 98}, {"nums": [63, 95, 96], "target": 64}]


def write(path: Path, records: Any) -> str:
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
    elif path.suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), path)
    else:
        path.write_text(json.dumps(records))
    return str(path)


def from_files(folder: Path, train: Any, evaluation: Any, name: str = "x.json") -> Task:
    return CountdownConfig(
        data=write(folder / f"train-{name}", train), eval_data=write(folder / f"eval-{name}", evaluation)
    ).build(0)


@pytest.mark.parametrize("name", ["x.json", "x.jsonl"])
def test_files_in_the_authors_shape(tmp_path: Path, name: str) -> None:
    task = from_files(tmp_path, AUTHORS, TINYZERO[1:], name)
    assert [row["prompt"] for row in task.train] == [record["context"] for record in AUTHORS]
    assert [row["target"] for row in task.train] == ["98", "27.4", 60]
    assert set(task.train[0]) == {"prompt", "numbers", "target"}


@pytest.mark.parametrize("name", ["x.json", "x.jsonl", "x.parquet"])
def test_files_in_the_shape_of_tinyzero(tmp_path: Path, name: str) -> None:
    task = from_files(tmp_path, TINYZERO[:1], TINYZERO[1:], name)
    assert task.train == [{"prompt": PAPER_PROMPT, "numbers": [44, 19, 35], "target": 98}]


def test_json_lines_in_a_file_called_json(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text("".join(json.dumps(record) + "\n" for record in TINYZERO))
    assert load_records(str(path)) == TINYZERO


def test_directories(tmp_path: Path) -> None:
    import datasets

    data = datasets.Dataset.from_list(TINYZERO)
    data.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict({"train": data, "test": data.select([1])}).save_to_disk(str(tmp_path / "two"))
    assert load_records(str(tmp_path / "one")) == TINYZERO
    assert load_records(str(tmp_path / "two"), "test") == TINYZERO[1:]
    with pytest.raises(EstuneError, match="no split dev; there are train, test"):
        load_records(str(tmp_path / "two"), "dev")


def test_the_hub_is_asked_for_what_is_no_path(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked = []

    def load_dataset(name: str, split: str) -> Any:
        asked.append((name, split))
        return datasets.Dataset.from_list(TINYZERO)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert load_records("Jiayi-Pan/Countdown-Tasks-3to4") == TINYZERO
    assert asked == [("Jiayi-Pan/Countdown-Tasks-3to4", "train")]


def test_one_file_is_split_by_hash(tmp_path: Path) -> None:
    records = [{"nums": [a, b, 5], "target": a + b + 5} for a in range(1, 30) for b in range(1, 20)]
    path = write(tmp_path / "x.json", records)
    task = CountdownConfig(data=path).build(0)
    assert len(task.train) + len(task.evaluation) == len(records)
    assert 0.08 < len(task.evaluation) / len(records) < 0.18
    assert len(CountdownConfig(data=path, train_size=5, eval_size=3).build(0).evaluation) == 3


def test_few_problems_of_which_none_is_held_out(tmp_path: Path) -> None:
    with pytest.raises(EstuneError, match=r"countdown: the evaluation set is empty: .*or task\.eval_data"):
        CountdownConfig(data=write(tmp_path / "x.json", TINYZERO[1:])).build(0)


def expect_one_line(complaint: str) -> Any:
    return pytest.raises(EstuneError, match=rf"(?s)^[^\n]*{complaint}[^\n]*$")


@pytest.mark.parametrize(
    ("records", "complaint"),
    [
        ([], "empty"),
        ([{"target": 3}], "no column numbers or nums; there are target"),
        ([{"nums": [1]}], "no column target; there are nums"),
        ([TINYZERO[0], {"nums": [1, 2]}], "row 2: target is None"),
        ([TINYZERO[0], {"nums": [1, "2"], "target": 3}], r"row 2: nums is \[1, '2'\]"),
        ([{"nums": "1 2", "target": 3}], "row 1: nums is '1 2'"),
        ([{"nums": [], "target": 3}], "row 1: nums"),
        ([{"nums": [1, -2], "target": 3}], "row 1: nums"),
        ([{"nums": [1, 2], "target": "three"}], "row 1: target is 'three'"),
        ([{"nums": [1, 2], "target": 3, "context": 5}], "row 1: context"),
        ([TINYZERO[0], 5], "row 2 is int"),
        (TINYZERO, r"1 of 1 evaluation examples are in the training set too, the first: 63 95 96 -> 64"),
    ],
)
def test_bad_data_gets_one_line(tmp_path: Path, records: Any, complaint: str) -> None:
    with expect_one_line(complaint):
        from_files(tmp_path, records, TINYZERO[1:])


def test_the_same_problem_in_another_order_is_an_overlap(tmp_path: Path) -> None:
    with expect_one_line("overlap|too"):
        from_files(tmp_path, [{"nums": [19, 44, 35], "target": "98"}], TINYZERO[:1])


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("x.json", "[1,", "cannot be read"),
        ("x.jsonl", '{"nums": [1], "target": 1}\n{oops\n', "line 2"),
        ("x.json", b"\xff\xfe", "cannot be read"),
        ("x.json", "[" * 100_000, "cannot be read: RecursionError"),
        ("x.jsonl", '{"prompt": ' + "[" * 100_000, "cannot be read: RecursionError"),
        ("x.parquet", "no parquet", "cannot be read"),
        ("x.csv", "nums,target", "x.csv"),
    ],
)
def test_files_that_cannot_be_read(tmp_path: Path, name: str, content: str | bytes, complaint: str) -> None:
    path = tmp_path / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    with expect_one_line(complaint):
        load_records(str(path))


@pytest.mark.parametrize("name", ["x.json", "x.jsonl"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_lines_end_where_json_lines_says(tmp_path: Path, name: str, end: str, mark: str) -> None:
    """Separators of lines and paragraphs, and a next line, may stand in a text as they are."""
    records = [{"prompt": "a\u2028b\u2029c\u0085d"}, {"prompt": "f"}]
    lines = [json.dumps(record, ensure_ascii=False) for record in records]
    (tmp_path / name).write_bytes((mark + end.join(lines) + end).encode())
    assert load_records(str(tmp_path / name)) == records


def test_half_a_character_is_replaced_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text(r'{"prompt": "\ud83d\ude00"}' + "\n" + r'{"prompt": ["\ud83d", {"\udc00": 1}], "a": "x\ude00"}')
    assert load_records(str(path)) == [{"prompt": "😀"}, {"prompt": ["\ufffd", {"\ufffd": 1}], "a": "x\ufffd"}]
    (said,) = caplog.messages
    assert said.endswith("half a character, such as \\ud800, stands in rows (1, row 2 first): U+FFFD takes its place")


def test_a_task_holds_whole_characters_wherever_its_rows_come_from() -> None:
    rows: list[Any] = [{"prompt": "a\ud800", "x": (1, "\ud800")}]
    task = Task("mine", rows, [], [answer_reward], [1.0], None)
    assert task.train == [{"prompt": "a\ufffd", "x": (1, "\ufffd")}]
    assert len(task.data_hash()) == 32
    assert rows[0]["prompt"] == "a\ud800"


@pytest.mark.parametrize("name", ["x.jsonl", "x.parquet"])
def test_nan_is_nothing_where_others_are_text(tmp_path: Path, name: str) -> None:
    """As pandas writes a column of text with gaps; in a column of numbers it is a number."""
    path = tmp_path / name
    records = [{"answer": "1", "n": 1.0}, {"answer": None, "n": 2.0}]
    if name == "x.jsonl":
        path.write_text('{"answer": "1", "n": 1.0}\n{"answer": NaN, "n": 2.0}\n{"answer": "2", "n": NaN}\n')
    else:
        write(path, [*records, {"answer": "2", "n": math.nan}])
    *first, last = load_records(str(path))
    assert first == records
    assert last["answer"] == "2"
    assert math.isnan(last["n"])


def test_missing_files(tmp_path: Path) -> None:
    with expect_one_line("no such file"):
        load_records(str(tmp_path / "x.json"))
    with expect_one_line("no such file"):
        load_records("x.jsonl")
