"""Journals of every version that there has been: each is read, and its steps give the very weights that they gave then.

A journal or a fingerprint here is never edited; a new version adds its own.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from estune.journal import compact
from estune.journal.journal import FORMATS, Journal
from estune.journal.replay import replay
from estune.journal.verify import verify

DATA = Path(__file__).parents[1] / "data"
OF_FORMAT_1 = ["0404838e2f29782a", "05c2fd84b802fae9", "6b1871b091b39b90", "033809fb929f7a97"]
OF_FORMAT_2 = ["acf8ea05c077c5aa", "a5155c1bc0bb0150", "3b7625c2a3048bf8", "716a5d5921852d82"]
GOLDEN = {
    # A float32 master of bfloat16 weights, with weight decay; resumed.
    "format-1": (1, OF_FORMAT_1),
    # bfloat16 weights, stochastically rounded, mirrored, stale members; a branch of another run, and resumed.
    "format-2": (2, OF_FORMAT_2),
    # The in-place policy, whose perturbations are part of the run, and correlated noise.
    "format-2-inplace": (2, ["3db4cd7264746657", "07301d5750c2006d", "890c7eaf4733b4d3"]),
    # What earlier steps add, the base as a member of sign 0, decay toward the base model.
    "format-2-parts": (2, ["0404838e2f29782a", "0404838e2f29782a", "1361418d302cc444", "6952120d9bc557ce"]),
    "compact-1.estune": (2, OF_FORMAT_2),
    "compact-1-of-format-1.estune": (1, OF_FORMAT_1),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_it_gives_the_weights_that_it_gave_when_it_was_written(name: str, tmp_path: Path) -> None:
    journal = Journal.read(DATA / name)
    expected = [journal.header.fingerprint, *(r.fingerprint for r in journal.steps)]
    assert (journal.header.format, expected) == GOLDEN[name]
    assert verify(DATA / name).fingerprints == len(journal.inherited) + len(expected)
    for step, fingerprint in enumerate(expected):
        assert replay(DATA / name, tmp_path / f"{step}", step) == fingerprint


def test_the_compact_form_gives_the_journals_that_were_packed() -> None:
    for packed, run in (("compact-1.estune", "format-2"), ("compact-1-of-format-1.estune", "format-1")):
        assert Journal.read(DATA / packed).texts() == Journal.read(DATA / run).texts()


def test_a_resumed_journal_goes_on_in_its_own_format(tmp_path: Path) -> None:
    for name, (number, _) in GOLDEN.items():
        if (DATA / name).is_dir():
            run = shutil.copytree(DATA / name, tmp_path / name)
            journal = Journal.resume(run)
            journal.append_settings({"steps": 9})
            journal.close()
            assert Journal.read(run).header.format == number


def test_every_version_is_here() -> None:
    assert {number for number, _ in GOLDEN.values()} == set(FORMATS)
    versions = {int(name.split("-")[1].split(".")[0]) for name in GOLDEN if name.startswith("compact-")}
    assert versions == set(range(1, compact.VERSION + 1))
