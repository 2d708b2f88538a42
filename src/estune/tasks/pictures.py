"""Pictures of a task's rows: in columns, as TRL names them, or in messages, as OpenAI's clients and transformers do."""

from __future__ import annotations

import base64
import warnings
from collections.abc import Iterator, Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

from estune.completion import Message, Picture, Prompt
from estune.errors import EstuneError, first_line

Row = dict[str, Any]

COLUMNS = ("images", "image")
"""Columns of pictures: a list of them, or one."""
MOST_BYTES = 256 << 20
"""Of a picture's file; more than a picture of as many pixels as Pillow takes has, saved as pictures are."""
KINDS = ("image", "image_url")
"""Types of the parts of a message that are pictures."""


def with_pictures(rows: Sequence[Row], where: str, folder: Path | None = None) -> list[Row]:
    """Rows with `Picture`s in their columns of pictures and their messages; of rows without, the rows themselves.

    Args:
        rows: any.
        where: what a row is called in messages, before its number.
        folder: that of the file which names the pictures, where they are looked for first.

    Raises:
        EstuneError: a picture cannot be read.
    """
    found = []
    for number, row in enumerate(rows):
        name = f"{where} {number}"
        columns: Row = {}
        for column in COLUMNS:
            value = row.get(column)
            if not _is_nothing(value):
                values = value if isinstance(value, list | tuple) else [value]
                read = [as_picture(each, f"{name}: {column}", folder) for each in values]
                columns[column] = read if values is value else read[0]
        prompt = row.get("prompt")
        if isinstance(prompt, list) and any(True for _ in _parts(prompt)):
            columns["prompt"] = read_messages(prompt, f"{name}: prompt", folder)
        found.append({**row, **columns} if columns else row)
    return found


def pictures_of(row: Row) -> list[Picture]:
    """The pictures of a row that `with_pictures` gave: those of its columns, then those of its messages."""
    values = [row.get(column) for column in COLUMNS]
    columns = [p for value in values for p in (value if isinstance(value, list | tuple) else [value])]
    prompt = row.get("prompt")
    parts = [part.get("image") for part in _parts(prompt)] if isinstance(prompt, list) else []
    return [p for p in (*columns, *parts) if isinstance(p, Picture)]


def shown_with(prompt: Prompt, pictures: Sequence[Picture]) -> list[Message]:
    """A conversation with pictures in it: at its marks, parts `{"type": "image"}`, or else before the first question.

    Args:
        prompt: text, which becomes a user's message, or a conversation.
        pictures: those of the row's columns.

    Raises:
        EstuneError: there are marks, but not one for each picture; or neither marks nor a question.
    """
    conversation = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    marks = sum(part["type"] == "image" and "image" not in part for part in _parts(conversation))
    if marks and marks != len(pictures):
        raise EstuneError(f"{marks} marks for pictures in the messages, but {len(pictures)} pictures; give one each")
    left = iter(pictures)
    messages: list[Message] = []
    begun = bool(marks)
    for message in conversation:
        content = message.get("content")
        if not begun and message.get("role") == "user":
            begun = True
            text = content if isinstance(content, list) else [{"type": "text", "text": content or ""}]
            content = [*({"type": "image", "image": p} for p in left), *text]
        elif isinstance(content, list):
            content = [
                {"type": "image", "image": next(left)} if _is_picture(part) and "image" not in part else part
                for part in content
            ]
        messages.append({**message, "content": content})
    if pictures and not begun:
        raise EstuneError('pictures, but no message of a user to show them in; put marks, {"type": "image"}, in others')
    return messages


def read_messages(conversation: Sequence[Message], where: str, folder: Path | None = None) -> list[Message]:
    """A conversation with a `Picture` in each part that holds a picture. Marks without one stay marks.

    Keys without a value are left out: parquet gives all parts the same keys, and templates ask whether one is there.

    Raises:
        EstuneError: one cannot be read.
    """

    def read(part: Any) -> Any:
        part = {k: v for k, v in part.items() if v is not None} if isinstance(part, Mapping) else part
        if not _is_picture(part):
            return part
        value = part.get("image", part.get("image_url", part.get("url", part.get("path"))))
        value = value.get("url") if isinstance(value, Mapping) and "url" in value else value
        return {"type": "image"} if value is None else {"type": "image", "image": as_picture(value, where, folder)}

    return [
        {**message, "content": [read(part) for part in message["content"]]}
        if isinstance(message, dict) and isinstance(message.get("content"), list)
        else message
        for message in conversation
    ]


def as_picture(value: Any, where: str, folder: Path | None = None) -> Picture:
    """A picture given as bytes of a file, a path, a data URL, a PIL image, or datasets' `{"bytes": ..., "path": ...}`.

    Args:
        value: the picture.
        where: where it stands, for messages.
        folder: where a path is looked for first.

    Raises:
        EstuneError: it is none of these, or cannot be read.
    """
    if isinstance(value, Picture):
        return value
    if isinstance(value, Mapping):
        value = value.get("bytes") or value.get("path")
    try:
        from PIL import Image

        if isinstance(value, Image.Image):
            return Picture(_as_png(value))
        data = value if isinstance(value, bytes) else _read(value, where, folder)
        with _opened(BytesIO(data), where) as image:
            image.verify()
    except ImportError as error:
        raise EstuneError(f"{where}: pictures need Pillow; pip install 'estune[vision]'") from error
    except EstuneError:
        raise
    except Exception as error:  # Pillow's readers raise what they come upon
        raise EstuneError(
            f"{where}: not a picture that Pillow can read ({first_line(error)}); save it again"
        ) from error
    return Picture(data)


def _opened(file: Any, where: str) -> Any:
    """A picture of which the header alone has been read, and which is not too large to be shown to a model.

    Raises:
        EstuneError: it has more pixels than Pillow's `Image.MAX_IMAGE_PIXELS`, which is there against files that are
            small until they are unpacked; or it is no picture.
    """
    from PIL import Image, UnidentifiedImageError

    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            return Image.open(file)
        except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
            raise EstuneError(
                f"{where}: a picture of more than {Image.MAX_IMAGE_PIXELS:,} pixels, which nothing is shown; save it "
                "smaller"
            ) from error
        except UnidentifiedImageError as error:
            raise EstuneError(f"{where}: not a picture that Pillow can read; save it again") from error


def _as_png(image: Any) -> bytes:
    """A PIL image as a file, upright, and in a mode that the file can have."""
    from PIL import ImageOps

    upright = ImageOps.exif_transpose(image)
    file = BytesIO()
    (upright if upright.mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16") else upright.convert("RGB")).save(
        file, "PNG"
    )
    return file.getvalue()


def _read(value: Any, where: str, folder: Path | None) -> bytes:
    """The bytes of a picture's file, given by a path or a data URL."""
    if not isinstance(value, str | Path):
        raise EstuneError(f"{where} is {type(value).__name__}; give a picture's path, its bytes or a PIL image")
    text = str(value)
    if text.startswith("data:"):
        try:
            return base64.b64decode(text.partition(",")[2], validate=True)
        except ValueError as error:
            raise EstuneError(f"{where}: a data URL that is not base64; give the picture's path") from error
    if "://" in text:
        raise EstuneError(f"{where}: {text:.80} is an address, and nothing is fetched; download it and give its path")
    try:
        path = Path(text).expanduser()
        if folder is not None and (folder / path).is_file():
            path = folder / path
        if not path.is_file():  # such as a device, whose bytes have no end
            raise OSError("no such file")
        if (size := path.stat().st_size) > MOST_BYTES:
            raise EstuneError(f"{where}: {text:.80} has {size:,} bytes, more than {MOST_BYTES:,}; save it smaller")
        with path.open("rb") as file:
            _opened(file, f"{where}: {text:.80}")  # by its header, before all of it is read
            file.seek(0)
            return file.read()
    except EstuneError:
        raise
    except (OSError, ValueError, RuntimeError) as error:
        raise EstuneError(f"{where}: {text:.80} cannot be read ({first_line(error)}); give a picture's path") from error


def _parts(conversation: Sequence[Message]) -> Iterator[dict[str, Any]]:
    """The parts of messages that are pictures, or marks for them."""
    for message in conversation:
        content = message.get("content") if isinstance(message, dict) else None
        if isinstance(content, list):
            yield from (part for part in content if _is_picture(part))


def _is_picture(part: Any) -> bool:
    return isinstance(part, Mapping) and part.get("type") in KINDS


def _is_nothing(value: Any) -> bool:
    return value is None or (isinstance(value, list | tuple) and all(map(_is_nothing, value)))
