"""Journals whose bits are flipped and whose ends are cut off: is wrong content ever taken for right?

    python -m bench.faults.flips [--bits 8]

Of each golden journal among the tests' data, in either form, every byte has `--bits` of its bits flipped, one at a
time, and the file is cut at every byte. What is then read is refused, or is compared with what was written: header,
steps, evaluations, settings, and how the run ended. Where the last line's newline is gone, the line is dropped, as
after a crash, and the journal says that lines are missing; cut where a run had ended and then was resumed, it is that
run. Records how many were refused, changed nothing, or were such a beginning, and how many were accepted with other
content: the bar is none.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

from bench.common import options, settings, write_result

from estune.errors import EstuneError
from estune.journal import compact
from estune.journal.journal import Journal

DATA = Path(__file__).parents[2] / "tests" / "data"
RUNS = ("format-1", "format-2", "format-2-inplace", "format-2-parts")
PACKED = ("compact-1.estune", "compact-1-of-format-1.estune")


def content(journal: Journal) -> Any:
    """All that a journal says."""
    return journal.header, journal.inherited, journal.steps, journal.evaluations, journal.settings, journal.ended


def what_becomes(run: Path, file: Path, changed: bytes, whole: Any) -> str:
    """What reading makes of a run one of whose files holds something else."""
    file.write_bytes(changed)
    try:
        journal = Journal.read(run)
    except EstuneError:
        return "refused"
    if content(journal) == whole:
        return "changed nothing"
    header, inherited, steps, *_ = whole
    is_beginning = (journal.header, journal.inherited) == (header, inherited) and steps[
        : len(journal.steps)
    ] == journal.steps
    if not is_beginning:
        return "wrong"
    return "a beginning that says so" if journal.ended is None else "the run as it had ended before it went on"


def attack(run: Path, file: Path, bits: int) -> dict[str, dict[str, int]]:
    """Flip and cut one file of a run."""
    right = file.read_bytes()
    whole = content(Journal.read(run))
    flips: Counter[str] = Counter()
    for i in range(len(right)):
        for bit in range(bits):
            changed = bytearray(right)
            changed[i] ^= 1 << bit
            flips[what_becomes(run, file, bytes(changed), whole)] += 1
    cuts = Counter(what_becomes(run, file, right[:end], whole) for end in range(len(right)))
    file.write_bytes(right)
    return {"flips": dict(flips), "cuts": dict(cuts)}


def main() -> None:
    """Measure, print and write the result."""
    parser = options(__doc__)
    parser.add_argument("--bits", type=int, default=8)
    args: argparse.Namespace = parser.parse_args()
    result = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in RUNS:
            run = shutil.copytree(DATA / name, Path(folder) / name)
            for file in sorted(run.glob("*.jsonl")):
                result[f"{name}/{file.name}"] = attack(run, file, args.bits)
        for name in PACKED:
            run = Path(folder) / name.removesuffix(compact.SUFFIX)
            run.mkdir()
            result[name] = attack(run, Path(shutil.copy(DATA / name, run / compact.FILE)), args.bits)
    wrong = sum(kinds.get("wrong", 0) for each in result.values() for kinds in each.values())
    write_result(
        "flips", {"settings": settings(args), "accepted with other content": wrong, "files": result}, args.results
    )


if __name__ == "__main__":
    main()
