"""Runs that are killed at chosen file events, and whose power is cut: nothing is lost, and what is left is usable.

The event is told by its kind, its file, and the how manieth of its kind it is. `bench.faults.file_kills` and
`bench.faults.power_cuts` go through all of them.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from estune.config import Config
from estune.errors import EstuneError
from estune.journal.journal import Journal
from estune.journal.replay import replay
from estune.journal.share import pack
from estune.journal.verify import verify
from estune.run.branch import branch
from estune.run.trainer import Trainer
from tests.disks import Disk
from tests.kills import broken_promises, differences, killed_at, power_cut_at
from tests.models import FUSABLE, save_model
from tests.runs import make_config, make_task, substance


def config(output: Path, model: Path) -> Config:
    return make_config(output, model, steps=3, save_steps=2)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One whose later evaluation is the best again: `best` is replaced."""
    return save_model(tmp_path_factory.mktemp("models") / "base", seed=2, **FUSABLE)


@pytest.fixture(scope="module")
def whole(model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A run that was left alone, and its file events."""
    run = tmp_path_factory.mktemp("whole") / "run"
    events = killed_at(None, config(run, model))
    assert events is not None
    return run, events


def number(events: list[str], event: str, which: int = 0) -> int:
    return [i for i, each in enumerate(events) if each == event][which]


@pytest.mark.parametrize(
    ("event", "which"),
    [
        ("os.rename .journal.jsonl.tmp", 0),  # the header is whole, and nobody knows
        ("os.rename .config.yaml.tmp", 0),
        ("fsync journal.jsonl", 1),  # of the first step: its completions are there, and perhaps its line
        ("open .checkpoint-2.tmp/tokenizer.json", 0),
        ("open .best.tmp/config.json", 0),  # no evaluation is there before what was best in it
        ("open .best.tmp/config.json", 1),
        ("os.rmdir .best.tmp", 0),  # the new one has its name, the old one is being removed
        ("fsync journal.jsonl", -1),  # all is there but the line that says so
    ],
)
def test_killed_at(event: str, which: int, model: Path, whole: tuple[Path, list[str]], tmp_path: Path) -> None:
    left_alone, events = whole
    run = config(tmp_path / "run", model)
    assert killed_at(number(events, event, which), run) is None
    assert not broken_promises(tmp_path / "run")
    killed_at(None, run)
    assert not differences(tmp_path / "run", left_alone)


def test_killed_while_it_goes_on(model: Path, whole: tuple[Path, list[str]], tmp_path: Path) -> None:
    left_alone, events = whole
    run = config(tmp_path / "run", model)
    assert killed_at(number(events, "open .best.tmp/config.json", 1), run) is None
    assert (tmp_path / "run" / ".best.tmp").is_dir()
    for event in (0, 6):
        assert killed_at(event, run) is None
    killed_at(None, run)
    assert not differences(tmp_path / "run", left_alone)


def test_killed_with_weights_in_halves(model: Path, whole: tuple[Path, list[str]], tmp_path: Path) -> None:
    """What they are then follows from the journal, as with weights that keep a base."""
    options: Any = {"dtype": "bfloat16", "steps": 3, "save_steps": 2}
    killed_at(None, make_config(tmp_path / "whole" / "run", model, weights="master", **options))
    run = make_config(tmp_path / "run", model, weights="split_master", **options)
    assert killed_at(number(whole[1], "fsync journal.jsonl", -2), run) is None
    killed_at(None, run)
    one, other = (Journal.read(tmp_path / place) for place in ("whole/run", "run"))
    assert [substance(step) for step in one.steps] == [substance(step) for step in other.steps]
    assert len(one.steps) == 3
    assert verify(tmp_path / "run").fingerprints == 4


@pytest.fixture
def disk(synced_disks: None, tmp_path: Path) -> Iterator[Disk]:
    try:
        disk = Disk(tmp_path / "own", mib=16)
    except OSError as error:
        pytest.skip(str(error))
    yield disk
    disk.close()


def test_power_cut(model: Path, whole: tuple[Path, list[str]], disk: Disk) -> None:
    """Just before the line that says that the run ended: all else is promised by then, or about to be."""
    left_alone, events = whole
    run = config(disk.path / "run", model)
    power_cut_at(number(events, "fsync journal.jsonl", -1), run, disk)
    assert len(Journal.read(disk.path / "run").steps) == run.steps
    assert not broken_promises(disk.path / "run")
    killed_at(None, run)
    assert not differences(disk.path / "run", left_alone)


def test_what_is_damaged_or_gone_is_made_again(model: Path, whole: tuple[Path, list[str]], tmp_path: Path) -> None:
    """As after a power cut of a run that was written without syncs: files of no bytes, a directory that is gone."""
    left_alone = whole[0]
    run = config(shutil.copytree(left_alone, tmp_path / "run"), model)
    for damage in ("best/tokenizer.json", "checkpoint-2/model.safetensors", "final/config.json"):
        (tmp_path / "run" / damage).write_bytes(b"")
    assert broken_promises(tmp_path / "run")
    killed_at(None, run)
    assert not differences(tmp_path / "run", left_alone)


def test_a_run_on_a_disk_that_is_read_only_is_read_and_not_gone_on_with(
    model: Path, whole: tuple[Path, list[str]], disk: Disk, tmp_path: Path
) -> None:
    run = Path(shutil.copytree(whole[0], disk.path / "run"))
    disk.make_read_only()
    with pytest.raises(EstuneError, match=r"journal\.jsonl: Read-only file system while writing.*make it writable"):
        Trainer.resume(run, steps=9, task=make_task(), monitors=[])
    proof = verify(run)
    assert {"best", "final"} <= proof.checkpoints.keys()
    assert pack(run, tmp_path / "run.estune") > 0
    with pytest.raises(EstuneError, match=r"run\.estune: Read-only file system while writing"):
        pack(run, disk.path / "run.estune")
    with pytest.raises(EstuneError, match=r"out: Read-only file system while writing"):
        replay(run, disk.path / "out")
    changed = {"steps": 1, "output_dir": tmp_path / "branch"}
    branch(run, 1, task=make_task(), monitors=[], **changed).train()
    assert verify(tmp_path / "branch").steps == 2


@pytest.mark.parametrize("room", [6 << 10, 600 << 10])
def test_a_disk_that_is_full_loses_nothing(
    room: int, model: Path, whole: tuple[Path, list[str]], disk: Disk, tmp_path: Path
) -> None:
    """The disk has room for the run's first lines, or for its first checkpoint, and later for all."""
    run = config(disk.path / "run", model)
    filler = disk.path / "filler"
    with filler.open("wb", buffering=0) as file:
        with contextlib.suppress(OSError):
            while True:
                file.write(bytes(64 << 10))
        file.truncate(file.tell() - room)
        os.fsync(file.fileno())
    with pytest.raises(EstuneError, match="No space left on device") as told:
        Trainer(run, task=make_task(), monitors=None).train()
    assert "\n" not in str(told.value)
    assert not broken_promises(disk.path / "run")
    filler.unlink()
    killed_at(None, run)
    assert not differences(disk.path / "run", whole[0])


def test_a_clock_that_jumps_changes_nothing(
    model: Path, whole: tuple[Path, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jumps = itertools.cycle([4e9, 0.0, 1e9])
    monkeypatch.setattr("time.time", lambda: next(jumps))
    Trainer(config(tmp_path / "run", model), task=make_task(), monitors=None).train()
    monkeypatch.undo()
    assert not differences(tmp_path / "run", whole[0])
