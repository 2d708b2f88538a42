"""The page of measurements, built from the results in the repository."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("matplotlib")
from bench.common import RESULTS, fit_line
from bench.exactness.families import table
from bench.page import build, newest
from bench.study import page as study_page
from bench.study import real


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With the page and its pictures."""
    found = tmp_path_factory.mktemp("page")
    build(RESULTS, found / "performance.md")
    return found


def test_the_page_shows_every_newest_result_with_its_command(folder: Path) -> None:
    page = (folder / "performance.md").read_text()
    results = newest(RESULTS)
    assert results
    for result in results.values():
        assert f"`{result['command']}`" in page
    pictures = re.findall(r"\]\((images/.+?)\)", page)
    assert pictures
    for picture in pictures:
        assert (folder / picture).read_text().endswith("</svg>\n")


def test_the_page_in_the_documentation_is_of_these_results(folder: Path) -> None:
    assert (folder / "performance.md").read_text() == Path("docs/performance.md").read_text()


def test_the_same_results_give_the_same_page(folder: Path, tmp_path: Path) -> None:
    build(RESULTS, tmp_path / "performance.md")
    one, two = (
        {p.relative_to(place): p.read_bytes() for p in place.rglob("*") if p.is_file()} for place in (folder, tmp_path)
    )
    assert one == two


def test_the_newest_result_of_a_name_counts(tmp_path: Path) -> None:
    for day in ("2026-01-02", "2026-01-10", "2026-01-09"):
        (tmp_path / f"step-25M-{day}.json").write_text(json.dumps({"date": f"{day}T00:00:00+00:00"}))
    (tmp_path / "notes.json").write_text("{}")
    assert newest(tmp_path) == {"step-25M": {"date": "2026-01-10T00:00:00+00:00"}}


def test_a_line_of_least_squares() -> None:
    assert fit_line([1, 2, 3], [3, 5, 7]) == pytest.approx({"slope": 2, "intercept": 1, "r2": 1})
    assert fit_line([0, 1, 2, 3], [0, 1, 1, 0])["r2"] == pytest.approx(0)
    assert fit_line([1, 2], [3, 5])["r2"] is None


def test_the_study_s_page_is_what_its_results_give(tmp_path: Path) -> None:
    page = tmp_path / "study-tables.md"
    study_page.page(RESULTS, page)
    assert page.read_text() == Path("docs/study-tables.md").read_text()
    pictures = re.findall(r"\]\((images/.+?)\)", page.read_text())
    assert len(pictures) == 2
    assert all((tmp_path / picture).is_file() for picture in pictures)


def a_run(method: str, curve: list[tuple[float, float]], **changes: Any) -> dict[str, Any]:
    """A result of the real model: of a method, with a learning curve of processor seconds and accuracies."""
    points = [{"cpu_seconds": seconds, "accuracy": accuracy} for seconds, accuracy in curve]
    job = {"method": method, "seed": 0, "rate": None if method == "es" else 3e-6, "trial": False}
    found = {"job": job, "curve": points, "base_accuracy": curve[0][1], "accuracy": curve[-1][1]}
    return found | {"eval_pass@1": 0.25, "eval_pass@16": 0.75, "short_but_wrong": 0.125} | changes


def test_accuracy_at_equal_time_is_read_off_the_curves_when_a_row_of_es_is_over() -> None:
    """Between two points it goes evenly; a run that is over has its end's; two seeds have a mean."""
    rows = {
        "ES": [a_run("es", [(0, 0.4), (50, 0.5), (100, 0.7)]), a_run("es", [(0, 0.4), (100, 0.5)])],
        "ES, many": [a_run("es", [(0, 0.4), (40, 0.6)])],
        "GRPO": [a_run("grpo", [(0, 0.4), (200, 0.8), (400, 0.6)])],
        "without a curve": [{"accuracy": 0.1}],
    }
    head, *body = real.at_equal_time(rows)
    assert head == ["", "runs", "after 40 s", "after 100 s", "at the end", "seconds"]
    assert body == [
        ["ES", "2", "46.0 ± 2.8", "60.0 ± 14.1", "60.0 ± 14.1", "100"],
        ["ES, many", "1", "60.0", "60.0", "60.0", "40"],
        ["GRPO", "1", "48.0", "60.0", "60.0", "400"],
    ]


def test_the_real_model_s_section_says_what_was_sampled_and_what_was_hacked(tmp_path: Path) -> None:
    trial = {"method": "grpo", "seed": 1000, "rate": 1e-5, "trial": True}
    lines = [
        {"job": {"method": "base"}, "eval_pass@1": 0.125, "eval_pass@16": 0.5},
        a_run("es", [(0, 0.4), (10, 0.6)]),
        a_run("grpo", [(0, 0.4), (20, 0.5)], short_but_wrong=0.5),
        a_run("grpo", [(0, 0.4), (20, 0.0)], job=trial),
        {"job": {"method": "grpo", "seed": 1, "rate": 3e-6, "trial": False}, "error": "cut off"},
    ]
    lines = [{"machine": {"cpu": "one"}, **line} for line in lines]
    # Another processor's seconds are not to be compared: of this run all counts but them.
    lines.append(a_run("es", [(0, 0.4), (900, 0.8)], cpu_seconds=900.0, machine={"cpu": "another"}))
    lines[1] |= {"cpu_seconds": 10.0}
    (tmp_path / "real-conciseness.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    *_, heading, greedy, sampled, in_time = real.section(tmp_path)
    assert heading == "### conciseness, 80,000 tokens a run"
    tables = [
        [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]
        for text in (greedy, sampled, in_time)
    ]
    head, _, *body = tables[0]
    found = {row[0]: dict(zip(head, row, strict=True)) for row in body}
    assert [(name, row["greedy %"], row["short, wrong %"], row["seconds"]) for name, row in found.items()] == [
        ("before", "40.0", "", ""), ("ES", "70.0 ± 14.1", "12.5 ± 0.0", "10"), ("GRPO, 3e-06", "50.0", "50.0", ""),
    ]  # fmt: skip
    head, _, *body = tables[1]
    assert head == ["", "runs", *(f"pass@{k} %" for k in (1, 2, 4, 8, 16))]
    assert body == [
        ["before", "", "12.5", "", "", "", "50.0"],
        ["ES", "2", "25.0 ± 0.0", "", "", "", "75.0 ± 0.0"],
        ["GRPO, 3e-06", "1", "25.0", "", "", "", "75.0"],
    ]
    assert [row[2] for row in tables[2][2:]] == ["60.0", "45.0"]


def test_the_table_of_families_is_of_these_results() -> None:
    results = json.loads((RESULTS / "families.json").read_text())
    assert table(results) in Path("docs/models.md").read_text()
    assert len([name for name, of in results["families"].items() if "trained" in of and of["experts"]]) > 50
