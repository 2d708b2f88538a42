"""The report's page in a real browser: no errors, no requests, no overflow, and its buttons and keys do what they say.

Needs a Chromium, which the system has or playwright brings (`playwright install chromium`); skipped without.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pytest

from estune.study.report import write_report
from tests.reports import make_run


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("runs")
    more = {"eval_" + "a_very_long_name_of_a_metric" * 3: 1.0}
    runs = [make_run(folder / "first", more=more), make_run(folder / "second", seed=1)]
    runs.append(make_run(folder / "third", population=7, train_parameters="*" * 60))
    write_report(runs[:1], folder / "one.html")
    write_report(runs, folder / "many.html")
    return {name: folder / f"{name}.html" for name in ("one", "many")}


@pytest.fixture
def open_page(browser: Any, pages: dict[str, Path]) -> Iterator[Any]:
    """Opens a page; afterwards nothing may have gone wrong, and nothing may have been asked for but the page."""
    troubles: list[str] = []
    contexts = []

    def open_one(name: str, width: int = 1440, **options: Any) -> Any:
        context = browser.new_context(viewport={"width": width, "height": 900}, **options)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: troubles.append(message.text))
        page.on("pageerror", lambda error: troubles.append(str(error)))
        page.on("dialog", lambda dialog: troubles.append(dialog.message))
        address = pages[name].as_uri()
        page.on("request", lambda r: None if r.url in (address, "data:,") else troubles.append(r.url))
        page.goto(address)
        return page

    yield open_one
    for context in contexts:
        context.close()
    assert not troubles


@pytest.mark.parametrize("width", [390, 1440])
@pytest.mark.parametrize("name", ["one", "many"])
def test_the_page_fits_its_window(open_page: Any, name: str, width: int) -> None:
    page = open_page(name, width)
    page.evaluate("for (const details of document.querySelectorAll('details')) details.open = true")
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        ink, paper = page.evaluate(
            "[getComputedStyle(document.body).color, getComputedStyle(document.documentElement).backgroundColor]"
        )
        brightness = [sum(map(int, c.removeprefix("rgb(").removesuffix(")").split(","))) for c in (ink, paper)]
        assert (brightness[0] > brightness[1]) == (scheme == "dark")


def test_buttons_show_and_hide_runs(open_page: Any) -> None:
    page = open_page("many")
    parts = page.locator('path[data-owner="run-1"], tr[data-owner="run-1"]')
    shown = parts.count()
    assert shown >= 3
    button = page.locator('button[data-owner="run-1"]')
    button.click()
    assert button.get_attribute("aria-pressed") == "false"
    assert not any(part.is_visible() for part in parts.all())
    assert page.locator('path[data-owner="run-0"]').first.is_visible()
    plot = page.locator('figure[data-chart="all-accuracy"] .plot')
    plot.hover()
    assert "first" in plot.locator(".tip").inner_text()
    assert "second" not in plot.locator(".tip").inner_text()
    button.press("Enter")
    assert button.get_attribute("aria-pressed") == "true"
    assert parts.first.is_visible()


def test_a_table_that_is_wider_than_its_place_shows_where_there_is_more(open_page: Any, tmp_path: Path) -> None:
    page = open_page("many", 390, color_scheme="light")
    table = page.locator(".scroll:has(table.results)").first
    assert table.evaluate("table => table.scrollWidth - table.clientWidth") > 100

    def edges(file: Path) -> tuple[float, float]:
        """How bright the table is at its left and at its right, as a share of what it is in the middle."""
        table.screenshot(path=file)
        columns = np.median(plt.imread(file)[..., :3].mean(axis=2), axis=0)
        return columns[3] / np.median(columns), columns[-4] / np.median(columns)

    left, right = edges(tmp_path / "begin.png")
    assert right < 0.95 < left
    table.evaluate("table => { table.scrollLeft = table.scrollWidth }")
    left, right = edges(tmp_path / "end.png")
    assert left < 0.95 < right


def test_values_under_pointer_and_keys(open_page: Any) -> None:
    page = open_page("one")
    plot = page.locator('figure[data-chart="accuracy-0"] .plot')
    tip = plot.locator(".tip")
    assert not tip.is_visible()
    plot.focus()
    page.keyboard.press("End")
    assert tip.inner_text().splitlines() == [
        "step 6",
        "held-out accuracy: 75.0%",
        "95% interval, held-out accuracy: 40.9% to 92.9%",
    ]
    page.keyboard.press("ArrowLeft")
    assert tip.inner_text().startswith("step 4")
    page.keyboard.press("Escape")
    assert not tip.is_visible()
    box = plot.bounding_box()
    page.mouse.move(box["x"] + box["width"] / 3, box["y"] + 20)
    assert tip.inner_text().startswith("step 2")


def test_completions_are_searched_and_a_prompt_is_followed(open_page: Any) -> None:
    page = open_page("one")
    count = page.locator(".count")
    assert count.inner_text() == "32 of 32 completions"
    page.get_by_label("Search", exact=True).fill("C3 at 4")
    assert count.inner_text() == "1 of 32 completions"
    hit = page.locator(".hit")
    assert hit.locator("mark").all_inner_texts() == ["c3 at 4"]
    assert "held out, after step 4" in hit.inner_text()
    hit.get_by_role("button", name="Follow this prompt").press("Enter")
    follower = page.locator(".follower")
    assert follower.locator("pre.prompt").inner_text().startswith("p3")
    answers = follower.locator(".answer")
    said = [text.split() for text in answers.locator(".when").all_inner_texts()]
    assert said == [
        ["step", str(k), "reward", reward] for k, reward in ((0, "0.1"), (2, "0.1"), (4, "1.1"), (6, "1.1"))
    ]
    assert all(f"c3 at {2 * i}" in text for i, text in enumerate(answers.locator("pre").all_inner_texts()))
    assert answers.nth(2).get_attribute("class") == "answer better"
    follower.get_by_role("button", name="Next").click()
    assert follower.locator("pre.prompt").inner_text().startswith("p4")
    page.locator("select.by").select_option("-1")
    page.locator('input[type="search"]').fill("")
    assert "reward 1.1" in page.locator(".hit").first.inner_text()
    page.locator('input[type="search"]').fill("is nowhere")
    assert count.inner_text() == "0 of 32 completions"
    assert page.locator(".hit").count() == 0


def test_links_of_the_contents_open_what_they_lead_to(open_page: Any) -> None:
    page = open_page("many")
    heading = page.locator("#part-again-1")
    assert not heading.is_visible()
    page.locator('nav a[href="#run-1"]').click()
    page.locator('nav a[href="#part-again-1"]').click()
    assert heading.is_visible()


def test_what_is_copied_can_be_pasted(open_page: Any, pages: dict[str, Path]) -> None:
    page = open_page("one")
    button = page.locator("code.copied + .copy")
    button.click()
    page.wait_for_function("document.querySelector('code.copied + .copy').textContent === 'Copied'")
    page.locator('input[type="search"]').press("ControlOrMeta+V")
    assert page.locator('input[type="search"]').input_value() == str(pages["one"].parent / "first" / "journal.jsonl")
    assert page.locator("pre.command + .copy").count() == page.locator("pre.command").count() >= 4


def test_the_page_can_be_read_without_script_and_on_paper(open_page: Any) -> None:
    page = open_page("one", java_script_enabled=False)
    assert page.locator('figure[data-chart="reward-0"] svg path.line').count() == 1
    assert len(page.pdf()) > 10_000
