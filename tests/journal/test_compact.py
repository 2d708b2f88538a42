"""The compact form: what it gives back, how small it is, and that nothing else is taken for it."""

from __future__ import annotations

import json
import lzma
import random
from pathlib import Path
from typing import Any

import pytest

from estune.errors import EstuneError
from estune.es.evolution import EvolutionStrategy
from estune.es.strategy import Update
from estune.journal import compact
from estune.journal.journal import Journal
from estune.journal.records import EvaluationRecord, StepRecord
from estune.journal.replay import replay
from estune.journal.share import pack
from tests.journal.histories import write_history
from tests.journal.test_journal import header

DATA = Path(__file__).parents[1] / "data"


@pytest.fixture(scope="module")
def run(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    write_history(folder, model)
    return folder


def written(folder: Path, *lines: bytes) -> Path:
    file = folder / "run.estune"
    file.write_bytes(compact.FIRST_WORDS + b"".join(lines))
    return file


def random_step(chance: random.Random, update: Update, metrics: int) -> StepRecord:
    """A step whose every number is as long as a number can be."""
    values = {"step": update.step + 1.0} | {f"metric/{i}": chance.random() for i in range(metrics)}
    rewards: list[float | None] = [chance.random() for _ in update.members]
    prompts = chance.sample(range(1000), 16)
    return StepRecord(update, 0.0005, rewards, prompts, f"{chance.getrandbits(64):016x}", values)


def test_it_gives_back_every_byte(run: Path) -> None:
    texts = [(DATA / "format-1" / "journal.jsonl").read_bytes(), (run / "journal.jsonl").read_bytes()]
    assert compact.unpack(compact.pack(texts), Path()) == texts


@pytest.mark.parametrize(
    "change",
    [
        {"seeds": ["00000000000000ff"] * 4},
        {"seeds": []},
        {"signs": [1, -1, 1, -1]},
        {"signs": [1, 1, 1, 0]},
        {"signs": [2, 0, 1, 1]},
        {"signs": [200, 0, 1, 1]},
        {"coefficients": [0.1, 0.2, 0.3, 1e300]},
        {"rounding_seed": "00000000000000ff"},
        {"metrics": {"a": 1, "b": None}},
        {"metrics": []},
        {"new field": {"nested": [1.0, "é"]}},
        {"kind": "new kind"},
        {"step": "one"},
    ],
    ids=str,
)
def test_lines_of_any_other_kind_come_through_as_they_are(run: Path, change: dict[str, Any]) -> None:
    lines = (run / "journal.jsonl").read_bytes().splitlines()
    for number in (2, 3):
        changed = {**json.loads(lines[number]), **change}
        lines[number] = json.dumps(changed, separators=(",", ":")).encode()
    text = b"\n".join(lines) + b"\n"
    assert compact.unpack(compact.pack([text]), Path()) == [text]


@pytest.mark.parametrize(("steps", "mirrored"), [(1000, False), (100, True)])
def test_a_step_is_small_whatever_its_numbers(tmp_path: Path, steps: int, mirrored: bool) -> None:
    chance = random.Random(0)
    strategy = EvolutionStrategy(seed=3, population=30, steps=steps, mirrored=mirrored)
    journal = Journal.create(tmp_path, header(config={"seed": 3}))
    for _ in range(steps):
        update = strategy.tell([chance.random() for _ in range(30)])
        journal.append_step(random_step(chance, update, metrics=30))
    journal.close()
    packed = compact.pack(journal.texts())
    assert len(packed) < 1000 + steps * (16 * 30 + 500)
    assert len(packed) < 1_000_000
    assert compact.unpack(packed, Path()) == journal.texts()


def test_a_file_is_a_run_to_what_reads_journals(run: Path, tmp_path: Path) -> None:
    file = tmp_path / "run.estune"
    assert pack(run, file) == file.stat().st_size
    journal = Journal.read(file)
    assert journal.steps == Journal.read(run).steps
    assert journal.shortfall() is None
    assert replay(file, tmp_path / "model") == journal.fingerprint()
    assert pack(file, tmp_path / "again.estune") == file.stat().st_size
    with pytest.raises(EstuneError, match="does not grow: go on from it in a new run, by `estune branch"):
        Journal.resume(file)
    with pytest.raises(EstuneError, match=r"run.estune has 3 steps, not 4: give --step from 0 to 3$"):
        Journal.read(file, 4)
    with pytest.raises(EstuneError, match=r"run.estune exists already"):
        pack(run, file)


def test_any_changed_byte_is_refused_or_changes_nothing(run: Path, tmp_path: Path) -> None:
    pack(run, tmp_path / "run.estune")
    content = bytearray((tmp_path / "run.estune").read_bytes())
    texts = [(run / "journal.jsonl").read_bytes()]
    refused = 0
    for position in range(len(content)):
        content[position] ^= 1 << position % 8
        (tmp_path / "run.estune").write_bytes(content)
        try:
            assert Journal.read(tmp_path / "run.estune").texts() == texts
        except EstuneError:
            refused += 1
        content[position] ^= 1 << position % 8
    assert refused > 0.95 * len(content)


def test_any_cut_is_refused(run: Path, tmp_path: Path) -> None:
    pack(run, tmp_path / "run.estune")
    content = (tmp_path / "run.estune").read_bytes()
    for end in range(len(content)):
        (tmp_path / "run.estune").write_bytes(content[:end])
        with pytest.raises(EstuneError):
            Journal.read(tmp_path / "run.estune")


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"[]\n\n",
        b"[[1,0]]\n\n",
        b"[[-1,0]]\n{}\n\n",
        b"[[1,0]]\n7\n\n",
        b'[[1,0]]\n{"kind":"step"}\n\n',
        b'[[1,0]]\n{"kind":"step","seeds":99999999,"signs":0,"metrics":[]}\n\n',
        b'[[1,"x"]]\n{"kind":"step","step":0,"seeds":0,"signs":1,"metrics":[]}\n\n',
        b"[[1,0]]\n" + b"[" * 100_000 + b"\n\n",
        b"\xff\n\n",
    ],
    ids=range(10),
)
def test_what_others_made_up_is_refused_in_one_line(tmp_path: Path, text: bytes) -> None:
    file = written(tmp_path, b"1\n", lzma.compress(text), lzma.compress(b""))
    with pytest.raises(EstuneError, match=r"^\S*run.estune\b[^\n]*$"):
        Journal.read(file)


def test_other_versions_and_other_files_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(EstuneError, match="compact form '2', this estune reads 1; take a newer estune"):
        Journal.read(written(tmp_path, b"2\n"))
    (tmp_path / "x").write_bytes(b"anything")
    with pytest.raises(EstuneError, match="x is no journal in the compact form"):
        Journal.read(tmp_path / "x")
    monkeypatch.setattr(compact, "LARGEST", 1000)
    with pytest.raises(EstuneError, match="unfolds to more than 1,000 bytes"):
        Journal.read(written(tmp_path, b"1\n", lzma.compress(b"0" * 2000)))


def test_evaluations_and_ends_are_kept(run: Path, tmp_path: Path) -> None:
    pack(run, tmp_path / "run.estune")
    journal = Journal.read(tmp_path / "run.estune")
    assert journal.ended == "finished"
    assert journal.evaluations == [EvaluationRecord(0, {"step": 0, "eval_accuracy": 0.25, "eval_reward": 0.5})]
