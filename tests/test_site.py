"""The site from disk: its search, and what that runs in, where a page may start no worker."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

DOCS = Path(__file__).parents[1] / "docs"
OFFLINE = DOCS / "offline.js"
WORKER = """
self.onmessage = async (event) => {
  event.data.push(self.location === undefined ? "nowhere" : "there");
  self.postMessage(event.data);
};
"""
PAGE = """
<!DOCTYPE html><script src="offline.js"></script><body><script>
  const told = [];
  const sent = ["first"];
  const worker = new Worker("worker.js");
  worker.onmessage = (event) => {
    told.push(event.data);
    if (event.data[0] === "first") worker.postMessage(["second"]);
  };
  worker.postMessage(sent);
  const none = new Worker("none.js");
  none.onerror = () => told.push("no such worker");
</script>
"""


def test_a_page_from_disk_has_workers_that_answer(browser: Any, tmp_path: Path) -> None:
    for name, text in (("offline.js", OFFLINE.read_text()), ("worker.js", WORKER), ("page.html", PAGE)):
        (tmp_path / name).write_text(text)
    page = browser.new_page()
    page.goto((tmp_path / "page.html").as_uri())
    page.wait_for_function("told.length === 3")
    told = page.evaluate("told")
    assert [entry for entry in told if isinstance(entry, list)] == [["first", "there"], ["second", "there"]]
    assert "no such worker" in told
    assert page.evaluate("sent") == ["first"]  # as with a worker, each side has a copy
    page.evaluate("worker.terminate()")
    assert page.locator("iframe").count() == 1


def test_the_site_is_searched_from_disk(browser: Any, tmp_path: Path) -> None:
    """What stands on one page is found from another, where it stands."""
    pytest.importorskip("zensical")
    build = [sys.executable, DOCS / "generate_site.py", "-o", tmp_path]
    built = subprocess.run(build, check=False, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    page = browser.new_page()
    page.goto((tmp_path / "start.html").as_uri())
    page.get_by_role("button", name="Search").first.click()
    page.get_by_role("combobox", name="Search").fill("winsorized")
    found = page.locator("a[href*='h=winsorized']")
    found.first.wait_for()
    results = [urlsplit(address) for address in found.evaluate_all("links => links.map(link => link.href)")]
    assert "search.html" in {Path(result.path).name for result in results}
    for result in results:
        assert "winsorized" in Path(result.path).read_text().lower()
    page.get_by_role("combobox", name="Search").fill("zyzzyva")
    found.first.wait_for(state="detached")
    assert page.locator("a[href*='h=zyzzyva']").count() == 0
