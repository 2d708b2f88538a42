"""Where lengths of completions come from."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from estune.errors import EstuneError
from estune.run.graded import write_completions
from estune.study.estimate.lengths import SPREAD, read_lengths, spread_lengths

FORMAT_1 = Path(__file__).parents[1] / "data" / "format-1"


@given(st.integers(1, 4096), st.floats(0, 1))
def test_lengths_are_spread_around_their_mean(most: int, share: float) -> None:
    mean = 1 + share * (most - 1)
    found = spread_lengths(mean, most)
    assert found.mean() == pytest.approx(mean, rel=1e-6)
    assert found.min() >= 1
    assert found.max() <= most


def test_lengths_are_log_normal() -> None:
    found = np.log(spread_lengths(300, 10**6))
    assert found.std() == pytest.approx(SPREAD, rel=0.01)
    assert np.median(found) == pytest.approx(np.log(300) - SPREAD**2 / 2, rel=0.01)
    assert (spread_lengths(1024, 1024) == 1024).all()


def test_files_of_every_kind(tmp_path: Path) -> None:
    folder = tmp_path / "run" / "completions"
    folder.mkdir(parents=True)
    for number, tokens in enumerate([[3, 5], [7]]):
        write_completions(folder / f"step-{number:05d}.parquet", [{"tokens": t, "prompt": "p"} for t in tokens])
    write_completions(folder / "watch-other-00000.parquet", [{"tokens": 99}])
    assert read_lengths(tmp_path / "run").tolist() == [3, 5, 7]
    assert read_lengths(folder / "step-00001.parquet").tolist() == [7]
    (tmp_path / "list.json").write_text("[1, 2.5]")
    assert read_lengths(tmp_path / "list.json").tolist() == [1, 2.5]
    (tmp_path / "probe.json").write_text(json.dumps({"sigma": 1, "lengths": [4]}))
    assert read_lengths(tmp_path / "probe.json").tolist() == [4]
    # Its steps' mean lengths are all that a journal knows: the last one is told, and lengths are spread around it.
    journal = FORMAT_1 / "journal.jsonl"
    last = [json.loads(line) for line in journal.read_text().splitlines() if '"kind":"step"' in line][-1]
    assert read_lengths(journal).mean() == pytest.approx(last["metrics"]["completions/mean_length"])


def test_files_without_lengths_are_one_line(tmp_path: Path) -> None:
    for name, content, message in [
        ("none.json", None, "No such file"),
        ("a.json", "{", "no lengths of completions can be read from it"),
        ("b.json", '{"sigma": 1}', "no 'lengths'"),
        ("c.json", "[1, 0]", "numbers from 1 on"),
        ("d.json", "[]", "at least one"),
        ("e.json", '["many"]', "no lengths"),
        ("deep.json", "[" * 100_000, "no lengths"),
        ("large.json", f"[{10**400}]", "no lengths"),
        ("metrics.jsonl", "{}", "is called journal.jsonl"),
        ("f.parquet", "no parquet", "no lengths"),
    ]:
        if content is not None:
            (tmp_path / name).write_text(content)
        with pytest.raises(EstuneError, match=rf"--lengths .*{name}: .*{message}"):
            read_lengths(tmp_path / name)
    with pytest.raises(EstuneError, match=r"no completions/step-\*\.parquet"):
        read_lengths(tmp_path)
