"""The journal: what is written is read back, and no damage goes unseen."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from estune.errors import EstuneError
from estune.es.evolution import EvolutionStrategy
from estune.es.strategy import Member, Update
from estune.journal.journal import FILE, TEMPORARY, Journal
from estune.journal.records import EvaluationRecord, Header, StepRecord, rank
from estune.journal.replay import replay
from estune.journal.shares import is_share
from estune.run.directory import refuse_used


def header(**changes: Any) -> Header:
    values: dict[str, Any] = {
        "model": "tiny",
        "base_hash": "ab" * 16,
        "policy": "master",
        "rounding": "nearest",
        "noise": "iid",
        "dtype": "float32",
        "live_dtype": "float32",
        "tensors": {"model.embed_tokens.weight": ["lm_head.weight"]},
        "fingerprint": "0" * 16,
        "task": "countdown",
        "data_hash": "cd" * 16,
        "config": {"steps": 3},
        "packages": {"estune": "0.1.0"},
        "created": "2026-01-01T00:00:00+00:00",
    }
    return Header(**{**values, **changes})


def test_a_journal_that_does_not_say_it_has_checkpoints_in_the_live_type() -> None:
    found = [header(live_dtype="bfloat16", config=config).save_dtype for config in ({}, {"save_dtype": ["auto"]})]
    assert found == ["bfloat16", "bfloat16"]
    assert header(live_dtype="bfloat16", config={"save_dtype": "float32"}).save_dtype == "float32"


def steps(count: int) -> list[StepRecord]:
    strategy = EvolutionStrategy(population=4, weight_decay=0.1, seed=9)
    records = []
    for step in range(count):
        rewards: list[float | None] = [0.1 * step, math.pi / 7, None, 1e-300]
        update = strategy.tell(rewards)
        records.append(StepRecord(update, 0.0005, rewards, [5, 0, step], f"{step:016x}", {"step": 1.25}))
    return records


@pytest.fixture
def run(tmp_path: Path) -> Path:
    journal = Journal.create(tmp_path, header())
    journal.append_evaluation(EvaluationRecord(0, {"eval_accuracy": 1 / 3}))
    for record in steps(3):
        journal.append_step(record)
    journal.append_evaluation(EvaluationRecord(3, {"eval_accuracy": 2 / 3}))
    journal.close()
    return tmp_path


def test_what_is_written_is_read_back(run: Path) -> None:
    journal = Journal.read(run)
    assert journal.header == header()
    assert journal.steps == steps(3)
    assert journal.evaluations == [
        EvaluationRecord(0, {"eval_accuracy": 1 / 3}),
        EvaluationRecord(3, {"eval_accuracy": 2 / 3}),
    ]
    assert journal.fingerprint() == steps(3)[-1].fingerprint


@given(
    st.lists(
        st.tuples(
            st.integers(0, 2**64 - 1),
            st.sampled_from([1, -1]),
            st.floats(width=32, allow_nan=False, allow_infinity=False),
        )
    ),
    st.floats(allow_nan=False, allow_infinity=False),
)
@settings(max_examples=50)
def test_seeds_and_coefficients_are_exact(
    tmp_path_factory: pytest.TempPathFactory, members: Any, reward: float
) -> None:
    run = tmp_path_factory.mktemp("run")
    coefficients = tuple(c for _, _, c in members)
    update = Update(0, tuple(Member(s, g) for s, g, _ in members), coefficients, 0.0, 2**64 - 1, sigma=0.1)
    record = StepRecord(update, reward, [reward] * len(members), [], "f", {})
    journal = Journal.create(run, header())
    journal.append_step(record)
    journal.close()
    assert Journal.read(run).steps == [record]


def test_changed_settings_are_kept(run: Path) -> None:
    journal = Journal.resume(run)
    journal.append_settings({"steps": 8})
    journal.append_step(steps(4)[3])
    journal.close()
    assert Journal.read(run).settings == {"steps": 8}
    assert Journal.read(run).header.config == {"steps": 3}
    assert Journal.read(run).steps == steps(4)


def test_every_line_is_plain_json(run: Path) -> None:
    lines = [json.loads(line) for line in (run / FILE).read_text().splitlines()]
    assert [line["kind"] for line in lines] == ["header", "evaluation", "step", "step", "step", "evaluation"]


def test_a_cut_last_line_is_dropped_wherever_it_is_cut(run: Path) -> None:
    content = (run / FILE).read_bytes()
    start = content[:-1].rfind(b"\n") + 1
    for end in range(start, len(content)):
        (run / FILE).write_bytes(content[:end])
        journal = Journal.read(run)
        assert (len(journal.steps), len(journal.evaluations)) == (3, 1)
    journal = Journal.resume(run)
    journal.append_evaluation(EvaluationRecord(3, {"eval_accuracy": 2 / 3}))
    journal.close()
    assert (run / FILE).read_bytes() == content


def test_any_changed_byte_is_refused_and_named(run: Path) -> None:
    content = (run / FILE).read_bytes()
    line_of = [content[:i].count(b"\n") for i in range(len(content))]
    for i in range(len(content)):
        if content[i : i + 1] == b"\n":
            continue
        changed = bytearray(content)
        changed[i] ^= 1 << i % 8
        (run / FILE).write_bytes(bytes(changed))
        with pytest.raises(EstuneError) as caught:
            Journal.read(run)
        where = ["header", "before step 1", "before step 1", "after step 1", "after step 2", "after step 3"][line_of[i]]
        assert where in str(caught.value), i
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("order", [[0, 1, 3, 4, 5], [0, 1, 3, 2, 4, 5], [0, 1, 2, 2, 3, 4, 5]])
def test_lost_moved_and_repeated_lines_are_refused(run: Path, order: list[int]) -> None:
    lines = (run / FILE).read_bytes().splitlines(keepends=True)
    (run / FILE).write_bytes(b"".join(lines[i] for i in order))
    with pytest.raises(EstuneError, match="does not match its checksum"):
        Journal.read(run)


@pytest.mark.parametrize(("name", "reads"), [("format", "1 and 2"), ("noise_version", "1")])
def test_other_versions_are_refused(tmp_path: Path, name: str, reads: str) -> None:
    Journal.create(tmp_path, header(**{name: 7})).close()
    with pytest.raises(EstuneError, match=rf"{name.replace('_', ' ')} 7, this estune reads {reads}; .*0\.1\.0"):
        Journal.read(tmp_path)


def test_the_end_of_a_run_is_recorded_and_gone_beyond(run: Path) -> None:
    assert Journal.read(run).ended is None
    journal = Journal.resume(run)
    journal.append_end("finished")
    assert journal.ended == "finished"
    journal.close()
    journal = Journal.resume(run)
    assert journal.ended == "finished"
    journal.append_settings({"steps": 8})
    assert journal.ended is None
    journal.close()
    assert Journal.read(run).ended is None


@pytest.mark.parametrize(
    "line", [{"kind": "step", "step": 3}, {"kind": "evaluation"}, {"kind": "song"}, {"kind": "end"}]
)
def test_a_line_with_other_fields_is_refused_in_one_line(run: Path, line: dict[str, Any]) -> None:
    journal = Journal.resume(run)
    journal.write(line.pop("kind"), line)
    journal.close()
    with pytest.raises(EstuneError, match=r"line 7, after step 3: .*: no line that estune wrote; restore it"):
        Journal.read(run)


def test_shares_are_accuracies_that_are_declared_or_always_were_in_0_to_1() -> None:
    journal = Journal.read(Path(__file__).parents[1] / "data" / "format-1")
    assert is_share(journal, "eval_accuracy")
    assert not is_share(journal, "eval_completions/clipped_ratio")  # in 0 to 1 too, and no accuracy
    own = "watch/data/accuracy/own.py/accuracy"
    journal.header = replace(journal.header, shares=[own])
    assert [is_share(journal, key) for key in (own, f"{own}/hard", "eval_accuracy")] == [True, True, False]


def test_format_1_is_read_replayed_and_gone_on_with(tmp_path: Path) -> None:
    """A journal of three steps as format 1 wrote it; it stays in that format, which cannot say that the run ended."""
    run = shutil.copytree(Path(__file__).parents[1] / "data" / "format-1", tmp_path / "run")
    content = (run / FILE).read_bytes()
    fingerprints = ["05c2fd84b802fae9", "6b1871b091b39b90", "033809fb929f7a97"]
    journal = Journal.resume(run)
    assert (journal.header.format, [r.fingerprint for r in journal.steps]) == (1, fingerprints)
    assert [e.step for e in journal.evaluations] == [0, 2, 3]
    assert (journal.header.config["steps"], journal.settings["steps"], journal.ended) == (2, 3, None)
    assert replay(run, tmp_path / "out") == fingerprints[-1]
    journal.append_end("finished")
    journal.append_settings({"steps": 4})
    journal.close()
    assert (run / FILE).read_bytes().startswith(content)
    assert Journal.read(run).settings["steps"] == 4


def test_no_run(tmp_path: Path) -> None:
    with pytest.raises(EstuneError, match="this is no run"):
        Journal.read(tmp_path)
    (tmp_path / FILE).write_bytes(b'{"kind":"hea')
    with pytest.raises(EstuneError, match="before its header was written, so nothing is lost: remove .* and start it"):
        Journal.read(tmp_path)


def test_what_a_killed_start_left_is_not_in_the_way(tmp_path: Path) -> None:
    (tmp_path / TEMPORARY).write_bytes(b'{"kind":"hea')
    refuse_used(tmp_path)
    Journal.create(tmp_path, header()).close()
    assert Journal.read(tmp_path).header == header()
    with pytest.raises(EstuneError, match="already holds a run"):
        Journal.create(tmp_path, header())
    assert [path.name for path in tmp_path.iterdir()] == [FILE]


def test_one_writer_at_a_time(run: Path) -> None:
    journal = Journal.resume(run)
    with pytest.raises(EstuneError, match="written by another process"):
        Journal.resume(run)
    journal.close()
    Journal.resume(run).close()


FULL_DISK = """
import resource, signal, sys
from estune.journal import Journal
from tests.journal.test_journal import header, steps
from pathlib import Path
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
run = Path(sys.argv[1])
journal = Journal.resume(run)
limit = (run / "journal.jsonl").stat().st_size + 100  # the next line does not fit
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
try:
    journal.append_step(steps(4)[3])
except ValueError as error:
    print(error)
resource.setrlimit(resource.RLIMIT_FSIZE, (100, limit))
try:
    Journal.create(run / "new", header())
except ValueError as error:
    print(error)
"""


def test_a_full_disk_loses_nothing(run: Path) -> None:
    """The system's own limit on a file's size stands in for a full disk: the write fails half-way in the same way."""
    content = (run / FILE).read_bytes()
    (run / "new").mkdir()
    command = [sys.executable, "-u", "-c", FULL_DISK, str(run)]  # a warm one
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "File too large while writing; the run is whole up to step 3" in done.stdout
    assert f"--resume {run}" in done.stdout
    assert f"{run / 'new' / FILE}: File too large while writing: make room, then start it again" in done.stdout
    assert not any((run / "new").iterdir())
    assert (run / FILE).read_bytes() == content
    journal = Journal.resume(run)
    journal.append_step(steps(4)[3])
    journal.close()
    assert Journal.read(run).steps == steps(4)


def test_what_was_cut_off_shows(run: Path) -> None:
    """All lines that are left match their checksums: only what the run set out to be, and `final`, tell."""
    journal = Journal.resume(run)
    ended = len((run / FILE).read_bytes())
    assert journal.shortfall() == (
        "the journal ends after 3 of 3 steps: the run goes on, or it or its journal was cut off"
    )
    journal.append_end("finished")
    assert journal.shortfall() == "ended after 3 of 3 steps, but final/ is missing"
    (run / "final").mkdir()
    assert journal.shortfall() is None
    journal.append_end("interrupted")
    assert journal.shortfall() == "interrupted after 3 of 3 steps"
    journal.close()
    lines = (run / FILE).read_bytes()[:ended].splitlines(keepends=True)
    for left, steps in ((6, 3), (5, 3), (4, 2), (3, 1), (2, 0)):
        (run / FILE).write_bytes(b"".join(lines[:left]))
        expected = f"the journal ends after {steps} of 3 steps, though final/ is there: lines are missing"
        assert Journal.read(run).shortfall() == expected


@pytest.mark.parametrize(("steps", "found"), [(3, None), (4, "its format does not say"), (0, None)])
def test_a_format_1_run_is_whole_with_all_its_steps(tmp_path: Path, steps: int, found: str | None) -> None:
    run = shutil.copytree(Path(__file__).parents[1] / "data" / "format-1", tmp_path / "run")
    (run / "final").mkdir()
    if steps != 3:
        journal = Journal.resume(run)
        journal.append_settings({"steps": steps})
        journal.close()
    missing = Journal.read(run).shortfall()
    assert missing is None if found is None else found in str(missing)


@pytest.mark.parametrize(
    ("best_by", "right"),
    [
        (["eval_accuracy", "eval_reward"], 2),
        (["eval_reward"], 3),
        (["-eval_reward"], 1),
        (["eval_length"], 0),  # that nobody has: the first stays
    ],
)
def test_the_best_evaluation_is_told_by_the_header(tmp_path: Path, best_by: list[str], right: int) -> None:
    journal = Journal.create(tmp_path, header(best_by=best_by))
    for number, (accuracy, reward) in enumerate([(0.1, 0.5), (0.2, 0.3), (0.2, 0.6), (0.1, 0.9)]):
        metrics = {"eval_accuracy": accuracy, "eval_reward": reward, "number": float(number)}
        journal.append_evaluation(EvaluationRecord(0, metrics))
    journal.close()
    best = Journal.read(tmp_path).best
    assert best is not None
    assert best.metrics["number"] == right


def test_what_is_no_number_is_never_the_best() -> None:
    assert rank({"a": math.nan}, ["a"]) == rank({"a": math.nan}, ["-a"]) == rank({}, ["a"]) < rank({"a": -1e9}, ["a"])
