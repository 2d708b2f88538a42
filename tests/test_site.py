"""The site from disk: what its search runs in, where a page may start no worker."""

from __future__ import annotations

from pathlib import Path
from typing import Any

OFFLINE = Path(__file__).parents[1] / "docs" / "offline.js"
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
