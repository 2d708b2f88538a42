"""Pictures of rows: what they may be given as, and where the model is shown them."""

from __future__ import annotations

import base64
import json
import struct
import zlib
from io import BytesIO
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset
from PIL import Image

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
        ("data:image/png;base64,é", "image: a data URL that is not base64"),
        ("/dev/zero", "image: /dev/zero cannot be read"),
        ("~nobody-here/a.png", "image: ~nobody-here/a.png cannot be read"),
    ],
)
def test_what_is_no_picture_is_told(value: Any, message: str) -> None:
    with pytest.raises(EstuneError, match=f"task t: training row 1: {message}"):
        make({"prompt": "a", "image": DATA}, {"prompt": "b", "image": value})


def header(width: int, height: int) -> bytes:
    """A PNG file of a header and no pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    size = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size) + chunk(b"IDAT", b"")


@pytest.mark.parametrize("width", [10_000, 1_000_000])  # of which Pillow itself would warn, and refuse
@pytest.mark.parametrize("given", ["path", "bytes", "data"])
def test_a_picture_too_large_to_show_is_refused_by_its_header(given: str, width: int, tmp_path: Path) -> None:
    data = header(width, 9000)
    file = tmp_path / "a.png"
    file.write_bytes(data)
    value = {"path": str(file), "bytes": data, "data": "data:image/png;base64," + base64.b64encode(data).decode()}
    with pytest.raises(EstuneError, match=r"^row 0: .*a picture of more than 89,478,485 pixels"):
        as_picture(value[given], "row 0")


@pytest.mark.parametrize(
    ("start", "message"),
    [
        (b"", "has 1,099,511,627,776 bytes, more than 268,435,456; save it smaller"),
        (header(10_000, 9000), "has 1,099,511,627,776 bytes"),
    ],
)
def test_a_huge_file_is_not_read(start: bytes, message: str, tmp_path: Path) -> None:
    file = tmp_path / "a.png"
    with file.open("wb") as opened:
        opened.write(start)
        opened.truncate(1 << 40)  # which takes no room on the disk, and more than there is in memory
    with pytest.raises(EstuneError, match=message):
        as_picture(file, "row 0")


def test_a_file_that_is_no_picture_is_refused_by_its_beginning(tmp_path: Path) -> None:
    file = tmp_path / "a.png"
    file.write_text("no picture")
    with pytest.raises(EstuneError, match=r"^row 0: .*a\.png: not a picture that Pillow can read; save it again$"):
        as_picture(file, "row 0")


@pytest.mark.parametrize("mode", ["CMYK", "YCbCr", "F", "I", "RGBA", "1"])
def test_a_pil_image_may_have_any_mode(mode: str) -> None:
    given = picture(3).convert("L").convert(mode) if mode in "FI" else picture(3).convert(mode)
    found = Image.open(BytesIO(as_picture(given, "row 0").data))
    assert found.size == given.size
    assert found.mode == {"RGBA": "RGBA", "1": "1"}.get(mode, "RGB")


def test_a_photograph_given_as_a_pil_image_is_upright() -> None:
    file = BytesIO()
    turned = Image.Exif()
    turned[0x112] = 6  # its top is on the right
    Image.new("RGB", (4, 8)).save(file, "JPEG", exif=turned)
    assert Image.open(BytesIO(as_picture(Image.open(file), "row 0").data)).size == (8, 4)


def test_parts_as_parquet_has_them() -> None:
    """All with the same keys, and nothing in those that a part has no use for."""
    parts = [
        {"type": "image_url", "text": None, "image": None, "image_url": {"url": DATA, "detail": None}},
        {"type": "text", "text": "How many?", "image": None, "image_url": None},
    ]
    task = make({"prompt": [{"role": "user", "content": parts}]})
    content = [{"type": "image", "image": Picture(DATA)}, {"type": "text", "text": "How many?"}]
    assert task.shown(task.train[0], template=True) == [{"role": "user", "content": content}]


def test_pictures_without_a_place_to_be_shown_are_refused() -> None:
    with pytest.raises(EstuneError, match="no message of a user to show them in"):
        shown_with([{"role": "system", "content": "Count."}], [Picture(DATA)])


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


def in_column(name: str) -> dict[str, Any]:
    return {"prompt": "How many?", "image": name}


def in_datasets(name: str) -> dict[str, Any]:
    return {"prompt": "How many?", "image": {"bytes": None, "path": name}}


def in_message(name: str) -> dict[str, Any]:
    parts = [{"type": "image", "image": name}, {"type": "text", "text": "1.png"}]
    return {"prompt": [{"role": "user", "content": parts}]}


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "directory"])
@pytest.mark.parametrize("row", [in_column, in_datasets, in_message])
def test_paths_are_found_beside_the_file_that_names_them(row: Any, kind: str, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    rows = []
    for n in range(1, 33):
        (tmp_path / "data" / f"{n}.png").write_bytes(png(picture(n % 5, n)))
        rows.append(row(f"{n}.png"))
    source = tmp_path / "data" / f"rows.{'parquet' if kind == 'parquet' else 'jsonl'}"
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), source)
    else:
        source.write_text("\n".join(map(json.dumps, rows)))
    if kind == "directory":
        Dataset.from_list(rows).save_to_disk(tmp_path / "data")
        source = source.parent
    (tmp_path / "task.py").write_text(
        f"train = {str(source)!r}\ndef rewards(completions, **_): return [1.0 for _ in completions]\n"
    )
    task = OwnConfig(name=str(tmp_path / "task.py")).build(0)
    assert len(task.train) + len(task.evaluation) == 32
    assert task.evaluation  # chosen by text and picture: the text alone is the same in all
    assert all(len(pictures_of(row)) == 1 for row in task.train)
