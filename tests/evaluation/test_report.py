"""Reports are whole, escaped, and need nothing from outside."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from diptych.evaluation import report
from diptych.evaluation.pictures import enlarge, grid
from diptych.evaluation.report import Interval, Strip

VOID = {"img", "meta", "line", "path", "circle", "rect", "br"}


class Nesting(HTMLParser):
    """Every tag is closed in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.images: list[dict[str, str | None]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "img":
            self.images.append(dict(attrs))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in VOID

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_a_page(tmp_path: Path) -> None:
    image = Image.new("RGB", (8, 8), "red")
    strips = [Strip(label="before", images=[image], alts=['a "red" <square>'])]
    noisy = [(float(step), 1.0 / (step + 1)) for step in range(100)]
    both = {"before": Interval(value=0.1, low=0.0, high=0.2), "after": Interval(value=0.7, low=0.6, high=0.8)}
    sections = [
        ("Pictures <1>", [report.cards([report.card("a & b", strips, "note")]), report.gallery([image], ["one"])]),
        ("Numbers", [report.facts({"score": "0.5"}), report.table(["name", "value"], [["<a>", "1"]], total=True)]),
        ("Curves", [report.line_chart({"loss": noisy, "point": [(3.0, 0.4)]}, x="step", y="loss", title="Loss")]),
        ("Ranges", [report.interval_chart({"counting": both}, title="Scores"), report.commands(["diptych --help"])]),
    ]
    html = report.page("A <title>", "lead", sections, "footer")
    report.save(tmp_path / "r.html", html)
    parser = Nesting()
    parser.feed((tmp_path / "r.html").read_text())
    assert parser.open == []
    assert [image["alt"] for image in parser.images] == ['a "red" <square>', "one"]
    assert all((image["src"] or "").startswith("data:image/png;base64,") for image in parser.images)
    assert "<a>" not in html
    assert "&lt;a&gt;" in html
    outside = re.findall(r'(?:src|href)="(?!data:)[^"]*"|url\(|@import|<script', html)
    assert not outside
    assert "prefers-color-scheme:dark" in html


def test_charts_hold_their_data() -> None:
    chart = report.line_chart({"a": [(0.0, 1.0), (10.0, 3.0)], "bad": [(0.0, float("nan"))]}, x="x", y="y", title="t")
    left, right, top, bottom = report.LEFT, report.WIDTH - report.RIGHT, report.TOP, report.HEIGHT - report.BOTTOM
    found = re.search(r'd="M([\d.]+),([\d.]+) L([\d.]+),([\d.]+)"', chart)
    assert found is not None
    x0, y0, x1, y1 = (float(value) for value in found.groups())
    assert (x0, x1, y1) == (left, right, top)
    assert top < y0 < bottom
    assert "bad" not in chart
    assert "nothing was measured" in report.line_chart({}, x="x", y="y", title="t")


@pytest.mark.parametrize(
    ("low", "high", "wanted"), [(0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1.0]), (0, 800, [0, 200, 400, 600, 800]), (3, 3, [3])]
)
def test_ticks_are_round(low: float, high: float, wanted: list[float]) -> None:
    assert report.ticks(low, high) == pytest.approx(wanted)


def test_grids() -> None:
    images = [Image.new("RGB", (32, 32), "blue")] * 5
    sheet = grid(images, columns=3, marks=[True, False, True, True, True])
    assert sheet.size == (3 * 104, 2 * 104)
    assert sheet.getpixel((2, 50)) != sheet.getpixel((106, 50))
    assert sheet.getpixel((50, 50)) == (0, 0, 255)
    assert enlarge(Image.new("RGB", (640, 480))).size == (640, 480)
