"""Journals of which somebody changed a field and made all checksums anew: one line that names line and field."""

from __future__ import annotations

import copy
import hashlib
import json
import math
from pathlib import Path
from typing import Any

import pytest

from estune.errors import EstuneError
from estune.journal.base import base_checkpoint
from estune.journal.journal import FILE, Journal
from estune.journal.records import EvaluationRecord, StepRecord
from tests.journal.test_journal import header, steps

DEEP = "[" * 100_000 + "]" * 100_000
WRONG: list[Any] = [None, -1, 2.5, "x", [], {}, [None], {"a": None}, True, 10**30, math.nan]
WHERE = ["its header", "line 2, before step 1", "line 3, before step 1", "line 4, after step 1", "line 5, after step 1"]


@pytest.fixture
def lines(tmp_path: Path) -> list[dict[str, Any]]:
    """The lines of a journal with one of each kind, in `tmp_path`."""
    journal = Journal.create(tmp_path, header())
    journal.append_evaluation(EvaluationRecord(0, {"eval_accuracy": 0.5}))
    journal.append_step(steps(1)[0])
    journal.append_accepted({"config.json": "ab"}, {})
    journal.append_end("finished")
    journal.close()
    found = [json.loads(line) for line in (tmp_path / FILE).read_text().splitlines()]
    for line in found:
        del line["check"]
    return found


def reseal(run: Path, lines: list[Any]) -> None:
    """Write a journal of these lines, with the checksums that belong to them."""
    check, text = "", b""
    for line in lines:
        body = line if isinstance(line, bytes) else json.dumps(line, separators=(",", ":"))[:-1].encode()
        check = hashlib.blake2b(check.encode() + body, digest_size=8).hexdigest()
        text += body + b',"check":"' + check.encode() + b'"}\n'
    (run / FILE).write_bytes(text)


def complaint(run: Path) -> str | None:
    try:
        journal = Journal.read(run)
    except EstuneError as error:
        return str(error)
    assert all(isinstance(record, StepRecord) for record in journal.history)
    journal.shortfall()
    return None


def test_the_lines_as_they_are_can_be_read(tmp_path: Path, lines: list[Any]) -> None:
    reseal(tmp_path, lines)
    assert Journal.read(tmp_path).steps == steps(1)


def test_every_field_of_another_type_is_refused_by_name_or_does_no_harm(tmp_path: Path, lines: list[Any]) -> None:
    refused = 0
    for number, line in enumerate(lines):
        for key in line:
            for value in WRONG:
                changed = copy.deepcopy(lines)
                changed[number][key] = value
                reseal(tmp_path, changed)
                said = complaint(tmp_path)
                if said is None:  # text that is not looked into, any finite number, what may be empty or unknown
                    assert isinstance(value, str | list | dict | float | int) or key == "shares"
                    continue
                assert "\n" not in said
                assert key.replace("_", " ") in said.replace("_", " ")
                assert WHERE[number] in said or key in ("format", "noise_version")
                refused += 1
    assert refused > 350


@pytest.mark.parametrize(
    ("number", "key", "value", "said"),
    [
        (
            0,
            "policy",
            "other",
            "policy: Input should be 'master', 'copy', 'inplace', 'exact_inplace', 'split_master', 'int8' or 'int4', "
            "found 'other'",
        ),
        (0, "tensors", {"a": [3]}, "tensors.a.0: Input should be a valid string, found 3"),
        (0, "fingerprint", "xyz", "fingerprint: String should match"),
        (0, "config", {"steps": "many"}, "config.steps: Input should be a valid integer, found 'many'"),
        (0, "kind", "step", "kind is 'step'"),
        (2, "kind", "header", "kind is 'header'"),
        (2, "step", 5, "step is 5, after 0 steps"),
        (2, "seeds", ["g" * 16] * 4, "seeds.0: String should match"),
        (2, "signs", [1, 1, 1, 2], "signs.3: Input should be 1, 0 or -1, found 2"),
        (2, "signs", [1], "seeds, signs, rewards, coefficients, staleness and fitness are not equally many"),
        (2, "staleness", [1], "seeds, signs, rewards, coefficients, staleness and fitness are not equally many"),
        (2, "staleness", [2] * 4, "staleness.0: Input should be 0 or 1, found 2"),
        (2, "fitness", [1.0], "seeds, signs, rewards, coefficients, staleness and fitness are not equally many"),
        (2, "earlier", [0.5], "earlier names 1 step before step 0"),
        (2, "anchor", -0.5, "anchor: Input should be greater than or equal to 0, found -0.5"),
        (2, "coefficients", [math.inf] * 4, "coefficients.0: Input should be a finite number, found inf"),
        (2, "sigma", 0.0, "sigma: Input should be greater than 0, found 0.0"),
        (2, "extra", 1, "extra: Extra inputs are not permitted, found 1"),
        (1, "step", 9, "step is 9, after 0 steps"),
        (1, "back", 0, "back is 0, which is not before step 0"),
        (1, "metrics", {"x": 1.0}, "metrics have no eval_accuracy"),
        (1, "metrics", {"eval_accuracy": "1"}, "metrics.eval_accuracy: Input should be a valid number, found '1'"),
    ],
)
def test_a_wrong_value_is_named(tmp_path: Path, lines: list[Any], number: int, key: str, value: Any, said: str) -> None:
    lines[number][key] = value
    reseal(tmp_path, lines)
    with pytest.raises(EstuneError) as caught:
        Journal.read(tmp_path)
    assert f"{tmp_path / FILE}: {WHERE[number]}: {said}" in str(caught.value)


@pytest.mark.parametrize("line", [b'{"kind":' + DEEP.encode(), b'["kind"', b"", b'{"kind":"step",', b"\xff\xfe{"])
def test_what_is_no_object_is_one_line(tmp_path: Path, lines: list[Any], line: bytes) -> None:
    for number in (0, 2):
        reseal(tmp_path, [*lines[:number], line, *lines[number + 1 :]])
        with pytest.raises(EstuneError, match=f"{WHERE[number]} is no line that estune wrote") as caught:
            Journal.read(tmp_path)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("tensors", [{"nowhere": []}, {"model.norm.weight": ["lm_head.weight"]}])
def test_tensors_that_the_base_has_not(tmp_path: Path, model: Path, tensors: Any) -> None:
    from estune.weights.checkpoint import Checkpoint

    there = header(tensors=tensors, base_hash=Checkpoint(model).content_hash())
    with pytest.raises(EstuneError, match="as one tensor of .*, which they are not"):
        base_checkpoint(there, str(model))
