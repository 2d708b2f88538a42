"""Completions on the report's page: all that have room, those of two steps side by side, and which are right."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from estune.run.graded import write_completions
from tests.reports import HOSTILE, Parsed, make_run, report


def test_without_the_completions_no_interval_is_shown(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    shutil.rmtree(run / "completions")
    _, page = report(run)
    assert list(page.chart("accuracy-0")) == ["held-out accuracy"]
    assert page.all("p").count("Not shown: no completions were kept.") == 1


def completions(page: Parsed) -> list[tuple[str, str, str, float, int]]:
    """Table, prompt, answer, reward and member of all completions that the page of one run holds."""
    (kept,) = page.kept()
    return [
        (table["name"], kept["opening"] + kept["prompts"][p] + kept["ending"], kept["answers"][a], reward, member)
        for table in kept["tables"]
        for p, a, reward, _, member in table["rows"]
    ]


def test_all_completions_are_on_the_page(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    for name, more in (("step-00002", {"member": 3}), ("watch-math-00004", {})):
        rows = [{"prompt": f"{name} {i}", "completion": f"answer {i % 2}", "reward": i / 8, **more} for i in range(3)]
        write_completions(run / "completions" / f"{name}.parquet", rows)
    (run / "completions" / "step-00003.parquet").write_bytes(b"torn")
    _, page = report(run)
    safe = HOSTILE.replace("\x00", "\u2400").replace("\u202e", "\ufffd")
    expected = []
    for step in (0, 2, 4, 6):
        for i in range(8):
            score = float(i == 1 or (i == 0 and step == 0) or (1 < i <= step))
            expected.append((f"held out, after step {step}", f"p{i} {safe}", f"c{i} at {step} {safe}", score + 0.1, -1))
    expected += [("training, step 2", f"step-00002 {i}", f"answer {i % 2}", i / 8, 3) for i in range(3)]
    expected += [("math, after step 4", f"watch-math-00004 {i}", f"answer {i % 2}", i / 8, -1) for i in range(3)]
    assert completions(page) == expected
    assert any(text.startswith("38 completions") and "step-00003.parquet" in text for text in page.all("p"))


def test_what_has_no_room_is_left_out_by_prompt_and_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(tmp_path / "run")
    rows = [{"prompt": "p", "completion": "c" * 4000, "reward": 0.0}]
    write_completions(run / "completions" / "step-00001.parquet", rows)
    monkeypatch.setattr("estune.study.report.page.MOST_TEXT", 2400)  # a prompt and its four answers take 600
    _, page = report(run)
    shown = completions(page)
    steps: dict[str, list[str]] = {}
    for name, prompt, *_ in shown:
        steps.setdefault(prompt, []).append(name)
    assert len(steps) == 3
    assert all(names == [f"held out, after step {step}" for step in (0, 2, 4, 6)] for names in steps.values())
    assert any("12 completions" in text and "Another 21 are there and left out" in text for text in page.all("p"))
    monkeypatch.setattr("estune.study.report.page.MOST_TEXT", 10)
    assert "Not shown: the page has no room for its completions." in report(run)[1].all("p")


def counts(page: Parsed) -> dict[str, int]:
    """How many prompts turned, stayed, gained or lost."""
    texts = [
        text for text in page.all("li") if re.fullmatch(r"((turned|stayed) \w+|gained|lost|unchanged, \w+) \d+", text)
    ]
    return {name: int(count) for name, count in (text.rsplit(" ", 1) for text in texts)}


@pytest.mark.parametrize(
    ("before", "after", "found"),
    [
        ([0.0] * 3, [0.0] * 3, {"stayed wrong": 3}),
        ([1.0] * 3, [1.0] * 3, {"stayed right": 3}),
        ([0.0, 1.0, 0.0], [0.0, 1.0, 1.0], {"stayed wrong": 1, "stayed right": 1, "turned right": 1}),
        ([0.0, 0.0, 0.0], [0.0, 0.0, 0.1], {"unchanged, low": 2, "gained": 1}),
        ([0.0, 0.0, 0.1, 1.0], [0.0, 0.0, 0.0, 1.0], {"unchanged, low": 2, "lost": 1, "unchanged, high": 1}),
        ([-1.0, -1.0, 1.0], [-1.0, -1.0, 1.0], {"unchanged, low": 2, "unchanged, high": 1}),
    ],
)
def test_only_full_marks_are_right(
    before: list[float], after: list[float], found: dict[str, int], tmp_path: Path
) -> None:
    _, page = report(make_run(tmp_path / "run", scores=lambda step: after if step else before))
    assert {name: count for name, count in counts(page).items() if count} == found


def test_completions_are_compared_prompt_by_prompt(tmp_path: Path) -> None:
    _, page = report(make_run(tmp_path / "run"))
    assert counts(page) == {"turned right": 5, "stayed right": 1, "stayed wrong": 1, "turned wrong": 1}
    shown = " ".join(page.all("pre"))
    assert "c0 at 0" in shown
    assert "c0 at 6" in shown  # the best evaluation
    assert "c0 at 4" not in shown


def test_hostile_text_stays_text_and_nothing_is_fetched(tmp_path: Path) -> None:
    name = "<script>alert(2)<" + "\N{DIVISION SLASH}script>"
    runs = [
        make_run(tmp_path / name, trained_on=HOSTILE, train_parameters=HOSTILE, more={"eval_</script><b>": 1.0}),
        make_run(tmp_path / "other", seed=1, trained_on=HOSTILE),
    ]
    for given in ([runs[0]], runs):
        page, parsed = report(*given)
        scripts = [(a, text) for tag, a, text in parsed.elements if tag == "script"]
        assert [text for a, text in scripts if a.get("type") != "application/json"] == [scripts[-1][1]]
        assert scripts[-1][1].startswith('"use strict"')
        assert "\x00" not in page
        assert not [a for tag, a, _ in parsed.elements if tag in ("img", "iframe", "object", "base", "form")]
        ids = [a["id"] for _, a, _ in parsed.elements if "id" in a]
        assert len(ids) == len(set(ids))
        for _, attributes, _ in parsed.elements:
            assert not any(key.startswith("on") for key in attributes)
            address = attributes.get("href", "data:,")
            assert address == "data:," or address[1:] in ids
            assert "src" not in attributes
        style = "".join(parsed.all("style"))
        assert "url(" not in style
        assert "@import" not in style
        visible = HOSTILE.replace("\x00", "\u2400").replace("\u202e", "\ufffd")
        assert any(visible in text for text in parsed.all("pre"))
        assert any(visible in text for kept in parsed.kept() for text in kept["answers"])
