"""Pictures of rows: what they may be given as, and where the model is shown them."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest

from estune.completion import Picture
from estune.errors import EstuneError
from estune.tasks.base import Task
from estune.tasks.own import OwnConfig
from estune.tasks.pictures import as_picture, pictures_of, shown_with
from tests.runs import variety
from tests.visions import picture, png

DATA = png(picture(3))


def make(*rows: dict[str, Any]) -> Task:
    other = {key: "held out" if key == "prompt" else None for key in rows[0]}
    return Task("t", list(rows), [other], [variety], [1.0], "variety")


@pytest.mark.parametrize("given", ["path", "bytes", "pil", "datasets", "data"])
def test_a_picture_may_be_given_as(given: str, tmp_path: Path) -> None:
    file = tmp_path / "a.png"
    file.write_bytes(DATA)
    value = {
        "path": str(file),
        "bytes": DATA,
        "pil": picture(3),
        "datasets": {"bytes": DATA, "path": "lost.png"},
        "data": "data:image/png;base64," + base64.b64encode(DATA).decode(),
    }[given]
    found = as_picture(value, "row 0")
    assert isinstance(found, Picture)
    assert found.data == DATA
    (shown,) = make({"prompt": "How many?", "image": value}).train
    assert pictures_of(shown) == [found]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("https://example.org/a.png", r"image: https://example.org/a.png is an address, and nothing is fetched"),
        ("lost.png", r"image: lost.png cannot be read"),
        (b"GIF89a?", "image: not a picture that Pillow can read"),
        (7, "image is int; give a picture's path"),
        ("data:image/png;base64,?", "image: a data URL that is not base64"),
    ],
)
def test_what_is_no_picture_is_told(value: Any, message: str) -> None:
    with pytest.raises(EstuneError, match=f"task t: training row 1: {message}"):
        make({"prompt": "a", "image": DATA}, {"prompt": "b", "image": value})


def test_where_pictures_are_shown() -> None:
    one, two = Picture(DATA), Picture(png(picture(5)))
    image = {"type": "image", "image": one}
    text = {"type": "text", "text": "How many?"}
    assert shown_with("How many?", [one]) == [{"role": "user", "content": [image, text]}]
    system = {"role": "system", "content": "Count."}
    marked = {"role": "user", "content": [{"type": "image"}, text, {"type": "image"}]}
    assert shown_with([system, marked], [one, two]) == [
        system,
        {"role": "user", "content": [image, text, {"type": "image", "image": two}]},
    ]
    with pytest.raises(EstuneError, match="2 marks for pictures in the messages, but 1 pictures"):
        shown_with([marked], [one])
    messages = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": DATA}}, text]}]
    task = make({"prompt": messages})
    assert task.shown(task.train[0], template=True) == [{"role": "user", "content": [image, text]}]


def test_rows_that_differ_in_their_picture_are_others() -> None:
    rows = [{"prompt": "How many?", "image": png(picture(n))} for n in range(1, 5)]
    task = Task("t", rows[:3], rows[3:], [variety], [1.0], "variety")
    assert task.data_hash() == Task("t", rows[:3], rows[3:], [variety], [1.0], "variety").data_hash()
    assert task.data_hash() != Task("t", rows[1:3], rows[3:], [variety], [1.0], "variety").data_hash()
    with pytest.raises(EstuneError, match="1 of 1 evaluation examples are in the training set too"):
        Task("t", rows, rows[3:], [variety], [1.0], "variety")


def test_paths_are_found_beside_the_file_that_names_them(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    lines = []
    for n in range(1, 13):
        (tmp_path / "data" / f"{n}.png").write_bytes(png(picture(n % 5, n)))
        lines.append(json.dumps({"prompt": "How many?", "image": f"{n}.png"}))
    (tmp_path / "data" / "rows.jsonl").write_text("\n".join(lines))
    (tmp_path / "task.py").write_text(
        f"train = {str(tmp_path / 'data' / 'rows.jsonl')!r}\n"
        "def rewards(completions, image, **_): return [float(len(i.data)) for i in image]\n"
    )
    task = OwnConfig(name=str(tmp_path / "task.py")).build(0)
    assert len(task.train) + len(task.evaluation) == 12
    assert task.evaluation  # chosen by text and picture: the text alone is the same in all
    assert all(isinstance(row["image"], Picture) for row in task.train)
