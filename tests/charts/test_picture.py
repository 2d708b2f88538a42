"""Pictures: what is drawn is where its values say, and labels are text and nothing else."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from estune.charts.chart import Plot, Series
from estune.charts.picture import draw
from estune.errors import EstuneError

SVG = "{http://www.w3.org/2000/svg}"


def plot(x: list[float], y: list[float], **more: Any) -> Plot:
    return Plot("name", "metric", [Series("runs", x, y, "points")], "metric, %", **more)


@pytest.mark.parametrize("log", [False, True])
def test_points_stand_where_the_labels_say(log: bool) -> None:
    chart = plot([1.0, 10.0, 100.0], [0.2, 0.8, 0.5], log=log)
    (path,) = re.findall(r'class="dot points c0"[^>]* d="([^"]*)"', chart.svg)
    points = [tuple(map(float, p.split())) for p in re.findall(r"M([\d. ]+)h0", path)]
    ticks = {float(t.text): 10 * t.at for t in chart.x_ticks}
    if log:
        assert [x for x, _ in points] == pytest.approx([ticks[v] for v in (1.0, 10.0, 100.0)], abs=0.1)
    else:
        assert points[2][0] == pytest.approx(ticks[100.0], abs=0.1)
        assert points[1][0] - points[0][0] == pytest.approx((points[2][0] - points[0][0]) * 9 / 99, abs=0.1)
    levels = {float(t.text): 1000 - 10 * t.at for t in chart.y_ticks}
    assert points[2][1] == pytest.approx(levels[0.5], abs=0.1)
    assert "L" not in path  # no line through them


def test_close_values_on_a_logarithm_have_labels() -> None:
    assert len(plot([2.0, 2.5], [0.0, 1.0], log=True).x_ticks) > 1


def test_labels_are_text(tmp_path: Path) -> None:
    hostile = "</text><script>alert(1)</script>"
    draw([plot([0.0], [1.0], along=hostile, labels={0.0: hostile})] * 2, tmp_path / "new" / "x.svg")
    drawn = ElementTree.fromstring((tmp_path / "new" / "x.svg").read_text())
    assert drawn.find(f".//{SVG}script") is None
    texts = [text.text for text in drawn.iter(f"{SVG}text")]
    assert texts.count(hostile) == 2
    assert texts.count("metric, %") == 2
    assert texts.count(f"\u2026{hostile[-13:]}") == 2
    assert [panel.get("x") for panel in drawn.findall(f"{SVG}svg")] == ["74", "434"]


def test_a_picture_is_an_svg(tmp_path: Path) -> None:
    with pytest.raises(EstuneError, match=r"x\.png: pictures are drawn as SVG"):
        draw([plot([0.0], [1.0])], tmp_path / "x.png")
