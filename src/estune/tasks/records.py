"""Records of a data set: from a JSON or parquet file, a directory, or the hub."""

import json
import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from estune.errors import EstuneError

log = logging.getLogger(__name__)

Record = dict[str, Any]

SUFFIXES = (".json", ".jsonl", ".parquet")


def load_records(source: str, split: str = "train") -> list[Record]:
    """All records of a data set, in order.

    Args:
        source: a `.json` file (a list, or one object a line), a `.jsonl` or `.parquet` file, a directory written by
            `save_to_disk` or holding such files, or the id of a data set on the hub,
            with `:CONFIG` after it where it has several configurations.
        split: which split of a directory or a hub data set. A single file has none.

    Raises:
        EstuneError: there is nothing there, it cannot be read, or it is empty.
    """
    path = Path(source).expanduser()
    if path.is_file():
        records = _read_file(path)
    elif path.is_dir():
        records = _read_directory(path, split)
    elif path.suffix in SUFFIXES or source.startswith(("/", ".", "~")):
        raise EstuneError(f"data {source}: no such file; give a file, a directory or a hub id")
    else:
        records = _read_hub(source, split)
    if not records:
        raise EstuneError(f"data {source}: the set is empty; give it at least one row")
    return _without_gaps(records)


def folder_of(source: str) -> Path | None:
    """Where files that a data set names are looked for first: its directory; None for the hub's."""
    path = Path(source).expanduser()
    if path.is_file():
        return path.parent
    return path if path.is_dir() else None


def require_columns(
    source: str, records: Sequence[Record], *choices: tuple[str, ...], remedy: str = "rename one"
) -> list[str]:
    """The name of each group of names that the records have.

    Args:
        source: where the records are from, for errors.
        records: one at least.
        *choices: the names that each column may have.
        remedy: what to do where there is none.

    Raises:
        EstuneError: none of a group is there; the message has the names that are.
    """
    there = records[0].keys()
    chosen = []
    for names in choices:
        name = next((name for name in names if name in there), None)
        if name is None:
            raise EstuneError(
                f"data {source}: no column {' or '.join(names)}; there are {', '.join(sorted(there)) or 'none'}; "
                f"{remedy}"
            )
        chosen.append(name)
    return chosen


def _read_file(path: Path) -> list[Record]:
    if path.suffix not in SUFFIXES:
        raise EstuneError(
            f"data {path}: a file ending in {path.suffix or 'nothing'}; give one of {', '.join(SUFFIXES)}"
        )
    try:
        if path.suffix == ".parquet":
            return _read_parquet(path)
        records = _read_json(path.read_bytes().decode("utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise EstuneError(f"data {path} cannot be read: {_one_line(error)}; check the file") from error
    for number, record in enumerate(records, 1):
        if not isinstance(record, dict):
            raise EstuneError(f"data {path}: row {number} is {type(record).__name__}, not an object; write one a row")
    return whole_rows(records, f"data {path}")


def _read_json(text: str) -> list[Any]:
    """A list of objects, or one object a line: the first character tells which."""
    if text.lstrip().startswith("["):
        return list(json.loads(text))
    records = []
    for number, line in enumerate(text.split("\n"), 1):  # what else Python takes for a line's end may stand in a text
        if line.strip():
            try:
                records.append(json.loads(line))
            except ValueError as error:
                raise ValueError(f"line {number}: {error}") from error
    return records


def whole_rows(rows: Sequence[Record], what: str) -> list[Record]:
    """Rows with U+FFFD in the place of halves of characters, which JSON and Python can write; a warning says so.

    Args:
        rows: any.
        what: whose rows they are.
    """
    found = list(rows)
    broken = [number for number, row in enumerate(rows) if not _is_whole(row)]
    for number in broken:
        found[number] = _whole(rows[number])
    if broken:
        log.warning(
            "%s: half a character, such as \\ud800, stands in rows (%d, row %d first): U+FFFD takes its place",
            *(what, len(broken), broken[0] + 1),
        )
    return found


def _is_whole(row: Record) -> bool:
    try:
        json.dumps(row, ensure_ascii=False, default=str).encode()
    except UnicodeEncodeError:
        return False
    except (TypeError, ValueError, RecursionError):  # keys that JSON does not know, a list in itself
        return True
    return True


def _whole(value: Any) -> Any:
    if isinstance(value, str):
        return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if isinstance(value, dict):
        return {_whole(key): _whole(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(_whole, value))
    return value


def _without_gaps(records: list[Record]) -> list[Record]:
    """Records with None for NaN, pandas' sign for nothing, in columns that hold text or lists."""
    gaps = {key for record in records for key, value in record.items() if is_nan(value)}
    filled = {key for key in gaps if any(isinstance(record.get(key), str | list | tuple | dict) for record in records)}
    for record in records if filled else ():
        record.update({key: None for key in filled if is_nan(record.get(key))})
    return records


def is_nan(value: Any) -> bool:
    """Whether a value is NaN."""
    return isinstance(value, float) and math.isnan(value)


def _read_parquet(path: Path) -> list[Record]:
    import pyarrow.parquet

    # ArrowInvalid is a ValueError.
    return list(pyarrow.parquet.read_table(path).to_pylist())


def _read_directory(path: Path, split: str) -> list[Record]:
    import datasets

    try:
        if (path / "state.json").exists() or (path / "dataset_dict.json").exists():
            found = datasets.load_from_disk(str(path))
            data = found[split] if isinstance(found, datasets.DatasetDict) else found
        else:
            data = datasets.load_dataset(str(path), split=split)
    except KeyError as error:
        raise EstuneError(f"data {path}: no split {split}; there are {', '.join(found)}") from error
    except Exception as error:  # datasets raises whatever its readers raise
        raise EstuneError(
            f"data {path} cannot be read: {_one_line(error)}; check the directory and the split"
        ) from error
    return list(data.to_list())


def _read_hub(source: str, split: str) -> list[Record]:
    import datasets

    try:
        return list(datasets.load_dataset(*source.split(":", 1), split=split).to_list())
    except Exception as error:  # the network's, the hub's and the readers' own
        raise EstuneError(
            f"data {source}: neither here nor readable from the hub ({_one_line(error)}); check the name, the split "
            f"{split} and the connection"
        ) from error


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}"
