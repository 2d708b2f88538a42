"""The compact form: a run's journals in one small file, which gives them back byte for byte.

A line of text, `estune journal, compact form 1`, then two xz streams: the lines as text without what follows from the
rest or is shorter in binary, and these columns. Of a step, seeds that the run's formula gives are left out, others take
8 bytes; a coefficient takes 4, and a sign one, of which xz leaves next to nothing. Whatever a line holds beside comes
through as it is, so that a field that is added to journals needs no new form. `docs/journal.md` describes it.
"""

from __future__ import annotations

import hashlib
import json
import lzma
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from estune.errors import EstuneError
from estune.es.strategy import member_seed

SUFFIX = ".estune"
FILE = f"journal{SUFFIX}"
VERSION = 1
FIRST_WORDS = b"estune journal, compact form "
LARGEST = 1 << 28  # bytes that a file may unfold to
BASE = 1 << 22  # index among a step's members of the base itself, whose sign is 0
_TURNS = 2**64


def pack(texts: Sequence[bytes]) -> bytes:
    """Journals, those of a run's ancestors before its own, as one compact file's content."""
    lines: list[str] = []
    columns = bytearray()
    counts = []
    for text in texts:
        line_of = _Lines(_origin(text))
        own = text.split(b"\n")[:-1]
        counts.append([len(own), line_of.origin])
        for line in own:
            rest, column = line_of.packed(line)
            lines.append(json.dumps(rest, separators=(",", ":")))
            columns += column
    written = "\n".join([json.dumps(counts), *lines]).encode()
    streams = b"".join(lzma.compress(part, preset=9) for part in (written + b"\n\n", bytes(columns)))
    return FIRST_WORDS + b"%d\n" % VERSION + streams


def unpack(content: bytes, where: Path) -> list[bytes]:
    """The journals of a compact file; `where` is for the message.

    Raises:
        EstuneError: it is none, of a version to come, or damaged. Whether its journals are whole is for who reads them.
    """
    head, _, streams = content.partition(b"\n")
    if not head.startswith(FIRST_WORDS):
        raise EstuneError(
            f"{where} is no journal in the compact form; give a run's directory or what `estune pack` wrote"
        )
    if head != FIRST_WORDS + b"%d" % VERSION:
        raise EstuneError(
            f"{where}: compact form {head[len(FIRST_WORDS) :].decode(errors='replace')!r:.20}, this estune reads "
            f"{VERSION}; take a newer estune"
        )
    try:
        written, _, columns = _unfolded(streams, where).partition(b"\n\n")
        first, *lines = written.decode().split("\n")
        texts = []
        column = _Column(columns)
        for count, origin in json.loads(first):
            if not 0 < count <= len(lines):
                raise ValueError("too few lines")
            line_of = _Lines(origin)
            texts.append(b"".join(line_of.unpacked(json.loads(line), column) + b"\n" for line in lines[:count]))
            lines = lines[count:]
        if lines or column.left or not texts:
            raise ValueError("more than it says, or nothing")
    except (ValueError, TypeError, KeyError, AttributeError, IndexError, RecursionError, lzma.LZMAError) as error:
        if isinstance(error, EstuneError):
            raise
        raise EstuneError(
            f"{where} is damaged: it cannot be unfolded; get it again, or restore it from a copy"
        ) from error
    return texts


def is_compact(path: Path) -> bool:
    """Whether this is a file that begins as a journal in the compact form does."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(len(FIRST_WORDS)) == FIRST_WORDS


class _Column:
    """Bytes that are taken off one after another."""

    def __init__(self, content: bytes) -> None:
        self._content = content
        self._taken = 0

    @property
    def left(self) -> int:
        return len(self._content) - self._taken

    def take(self, count: int) -> bytes:
        if not 0 <= count <= self.left:
            raise ValueError("too few bytes")
        self._taken += count
        return self._content[self._taken - count : self._taken]


class _Lines:
    """A journal's lines one after another, each by what came before.

    Args:
        origin: what the seeds of the run's members follow from.
    """

    def __init__(self, origin: int | None) -> None:
        self.origin = origin
        self._check = b""
        self._metrics: list[str] = []  # of the step before

    def packed(self, line: bytes) -> tuple[Any, bytes]:
        """What stands for a line in the text, and in the columns; the line itself where it could not be given back."""
        before = (self._check, self._metrics)
        try:
            rest, column = self._taken_apart(json.loads(line))
            self._check, self._metrics = before
            if self.unpacked(json.loads(json.dumps(rest)), _Column(column)) == line:
                return rest, column
        except (ValueError, TypeError, KeyError, AttributeError, IndexError, OverflowError, struct.error):
            pass
        self._check, self._metrics = before
        as_it_is = line.decode()
        self.unpacked(as_it_is, _Column(b""))
        return as_it_is, b""

    def unpacked(self, rest: Any, column: _Column) -> bytes:
        """The line again."""
        if isinstance(rest, str):
            line = rest.encode()
            self._check = line.rpartition(b'"check":"')[2][:-2]
            return line
        if rest.get("kind") == "step":
            self._put_together(rest, column)
        body = json.dumps(rest, separators=(",", ":"))[:-1].encode()
        self._check = hashlib.blake2b(self._check + body, digest_size=8).hexdigest().encode()
        return body + b',"check":"' + self._check + b'"}'

    def _taken_apart(self, payload: dict[str, Any]) -> tuple[dict[str, Any], bytes]:
        del payload["check"]
        if payload["kind"] != "step":
            return payload, b""
        seeds = [int(seed, 16) for seed in payload["seeds"]]
        signs = payload["signs"]
        count = len(seeds)
        derived = self._derived(payload["step"], signs) == (seeds, int(payload["rounding_seed"], 16))
        payload["seeds"] = count
        payload["signs"] = int(derived)
        column = np.array(signs, np.int8).tobytes()
        column += struct.pack(f"<{count}f", *payload["coefficients"])
        payload["coefficients"] = 0
        if derived:
            payload["rounding_seed"] = 0
        else:
            column += struct.pack(f"<{count}Q", *seeds)
        metrics = list(payload["metrics"])
        if metrics == self._metrics:
            payload["metrics"] = list(payload["metrics"].values())
        return payload, column

    def _put_together(self, rest: dict[str, Any], column: _Column) -> None:
        count = rest["seeds"]
        signs = np.frombuffer(column.take(count), np.int8).tolist()
        rest["coefficients"] = [*struct.unpack(f"<{count}f", column.take(4 * count))]
        if rest["signs"]:
            seeds, rounding = self._derived(rest["step"], signs)
            rest["rounding_seed"] = f"{rounding:016x}"
        else:
            seeds = [*struct.unpack(f"<{count}Q", column.take(8 * count))]
        rest["seeds"] = [f"{seed:016x}" for seed in seeds]
        rest["signs"] = signs
        if isinstance(rest["metrics"], list):
            rest["metrics"] = dict(zip(self._metrics, rest["metrics"], strict=True))
        self._metrics = list(rest["metrics"])

    def _derived(self, step: int, signs: list[int]) -> tuple[list[int], int]:
        """The seeds that the run's formula gives to the members of a step, and to its rounding."""
        if self.origin is None:
            return [], -1
        mirrored = -1 in signs
        numbers = [BASE if sign == 0 else i // 2 if mirrored else i for i, sign in enumerate(signs)]
        population = len(signs) - signs.count(0)
        return [member_seed(self.origin, step, i) for i in numbers], member_seed(self.origin, step, population)


def _origin(text: bytes) -> int | None:
    """What the seeds of a run's members follow from, as its header has it; None where that cannot be read."""
    try:
        header = json.loads(text.partition(b"\n")[0])
        seed = int(header["config"]["seed"])
        return (seed ^ int(header["fingerprint"], 16) >> 1 if header["ancestors"] else seed) % _TURNS
    except (ValueError, TypeError, KeyError):
        return None


def _unfolded(streams: bytes, where: Path) -> bytes:
    """All that xz streams hold, one after another."""
    found = b""
    while streams:
        one = lzma.LZMADecompressor(lzma.FORMAT_XZ)
        found += one.decompress(streams, max(1, LARGEST - len(found)))
        if not one.eof:
            if len(found) >= LARGEST:
                raise EstuneError(f"{where} unfolds to more than {LARGEST:,} bytes, which no run's journal has")
            raise ValueError("cut short")
        streams = one.unused_data
    return found
