"""All completions that a run has kept, for the page's script: to search them, and to follow a prompt.

If there is too little room, held-out prompts are left out with all their answers, and other tables as a whole, evenly.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

from estune.charts.chart import to_json
from estune.errors import EstuneError
from estune.study.report.runs import Run
from estune.study.report.samples import LONGEST, UNSEEN, readable, shared_ends
from estune.study.report.tables import Row, read_rows
from estune.study.report.turns import Turn, turns_of

Answer = str | tuple[Turn, ...]
"""What is shown of an answer: its text or, for a rollout, its turns."""
ROW_SIZE = 24  # characters that a row takes beside its texts, about


@dataclass(frozen=True)
class Kept:
    """Completions as the page holds them."""

    data: str  # JSON: prompts, answers as `Answer`, and tables of rows [prompt, answer, reward, finished, member]
    shown: int  # completions in it
    left_out: int
    unreadable: list[str]  # names of tables
    prompts: int  # that can be followed through several evaluations


class _Room:
    """The room on the page that is left for texts, each of which is held once."""

    def __init__(self, limit: int) -> None:
        self._left = limit
        self._texts: set[str] = set()

    def takes(self, rows: Sequence[Row]) -> bool:
        """Take room for all of these rows, if there is enough; return whether there was."""
        texts = {text for row in rows for text in (str(row["prompt"]), *_said(_answer(row)))}
        size = ROW_SIZE * len(rows) + sum(min(len(text), LONGEST) for text in texts - self._texts)
        if size > self._left:
            return False
        self._left -= size
        self._texts |= texts
        return True


def kept(run: Run, limit: int) -> Kept:
    """The run's completions, as many as have room.

    Args:
        run: the run.
        limit: characters of prompts and completions, about.

    Raises:
        EstuneError: none were kept, or none has room.
    """
    files = sorted((run.path / "completions").glob("*.parquet"), key=_order)
    tables = {run.directory.completions(f"evaluation-{step:05d}"): rows for step, rows in run.evaluated.items()}
    room = _Room(limit)
    followed = _followed(list(tables.values()), room)
    left_out = sum(str(row["prompt"]) not in followed for rows in tables.values() for row in rows)
    found = {path: [row for row in rows if str(row["prompt"]) in followed] for path, rows in tables.items()}
    others = [path for path in reversed(files) if path not in tables]
    unreadable = []
    for path in (others[i] for i in _evenly(len(others))):
        try:
            rows = read_rows(path)
        except EstuneError:
            unreadable.append(path.name)
            continue
        if room.takes(rows):
            found[path] = rows
        else:
            left_out += len(rows)
    shown = sum(map(len, found.values()))
    if not shown:
        raise EstuneError("the page has no room for its completions" if left_out else "no completions were kept")
    data = _data([(path, found[path]) for path in files if found.get(path)])
    return Kept(to_json(data), shown, left_out, sorted(unreadable), len(followed) if len(tables) > 1 else 0)


def _followed(tables: Sequence[Sequence[Row]], room: _Room) -> set[str]:
    """Held-out prompts that have room with all their answers, spread over all of them."""
    by_prompt: dict[str, list[Row]] = {}
    for rows in tables:
        for row in rows:
            by_prompt.setdefault(str(row["prompt"]), []).append(row)
    prompts = list(by_prompt)
    spread = (prompts[i] for i in _evenly(len(prompts)))
    return set(takewhile(lambda prompt: room.takes(by_prompt[prompt]), spread))


def _data(tables: Sequence[tuple[Path, Sequence[Row]]]) -> dict[str, Any]:
    """What the script reads: each prompt and each answer once, and tables of rows that name them by number."""
    prompts: dict[str, int] = {}
    answers: dict[Answer, int] = {}
    listed = []
    for path, rows in tables:
        kind, name, step = _named(path)
        cells = [
            [
                prompts.setdefault(str(row["prompt"]), len(prompts)),
                answers.setdefault(_answer(row), len(answers)),
                _number(row["reward"]),
                int(row.get("finished") is not False),
                row["member"] if isinstance(row.get("member"), int) else -1,
            ]
            for row in rows
        ]
        listed.append({"kind": kind, "name": name, "step": step, "rows": cells})
    opening, ending = shared_ends(list(prompts))
    return {
        "opening": _safe(opening),
        "ending": _safe(ending),
        "prompts": [_safe(prompt[len(opening) : len(prompt) - len(ending)]) for prompt in prompts],
        "answers": [
            _safe(answer) if isinstance(answer, str) else [[_safe(who), _safe(said)] for who, said in answer]
            for answer in answers
        ],
        "tables": listed,
    }


def _answer(row: Row) -> Answer:
    return tuple(turns_of(row)) or str(row["completion"])


def _said(answer: Answer) -> list[str]:
    return [answer] if isinstance(answer, str) else [said for _, said in answer]


def _evenly(count: int) -> list[int]:
    """0 .. count - 1 in an order of which every beginning is spread over all numbers: by their bits, reversed."""
    return sorted(range(count), key=lambda i: f"{i:032b}"[::-1])


def _order(path: Path) -> tuple[bool, str, int]:
    kind, step = _parts(path)
    return kind != "evaluation", kind, step


def _parts(path: Path) -> tuple[str, int]:
    kind, _, step = path.stem.rpartition("-")
    return (kind, int(step)) if kind and step.isdigit() else (path.stem, 0)


def _named(path: Path) -> tuple[str, str, int]:
    """Whose completions a table has, its name, and the step."""
    kind, step = _parts(path)
    if kind == "evaluation":
        return "held out", f"held out, after step {step}", step
    if kind == "step":
        return "training", f"training, step {step}", step
    task = kind.removeprefix("watch-")
    return task, f"{task}, after step {step}", step


def _number(value: Any) -> float | None:
    return float(f"{value:.6g}") if isinstance(value, (int, float)) and math.isfinite(value) else None


def _safe(text: str) -> str:
    return readable(text).translate(UNSEEN)
