"""The page of measurements, built from the results in the repository."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

pytest.importorskip("matplotlib")
from bench.common import RESULTS, fit_line
from bench.exactness.families import table
from bench.page import build, newest
from bench.study import page as study_page


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
    shutil.copy("docs/study.md", tmp_path / "study.md")  # for its last section, which is written by hand
    study_page.page(RESULTS, tmp_path / "study.md")
    assert (tmp_path / "study.md").read_text() == Path("docs/study.md").read_text()
    pictures = re.findall(r"\]\((images/.+?)\)", (tmp_path / "study.md").read_text())
    assert len(pictures) == 2
    assert all((tmp_path / picture).is_file() for picture in pictures)


def test_the_table_of_families_is_of_these_results() -> None:
    results = json.loads((RESULTS / "families.json").read_text())
    assert table(results) in Path("docs/models.md").read_text()
    assert len([name for name, of in results["families"].items() if "trained" in of and of["experts"]]) > 50
