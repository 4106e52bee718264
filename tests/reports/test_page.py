"""Reports are whole, escaped, and need nothing from outside."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from diptych.core.errors import UserError
from diptych.reports import figures, markdown, page
from diptych.reports.figures import Interval
from diptych.reports.page import Strip
from diptych.reports.pictures import enlarge, grid

VOID = {"img", "meta"}
CLOSED = VOID | {"path", "use", "rect", "br", "g"}


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
        assert tag in CLOSED

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_a_page(tmp_path: Path) -> None:
    image = Image.new("RGB", (8, 8), "red")
    strips = [Strip(label="before", images=[image], alts=['a "red" <square>'])]
    noisy = [(float(step), 1.0 / (step + 1)) for step in range(100)]
    both = {"before": Interval(value=0.1, low=0.0, high=0.2), "after": Interval(value=0.7, low=0.6, high=0.8)}
    sections = [
        ("Pictures <1>", [page.cards([page.card("a & b", strips, "note")]), page.gallery([image], ["one"])]),
        ("Numbers", [page.facts({"score": "0.5"}), page.table(["name", "value"], [["<a>", "1"]], total=True)]),
        ("Curves", [figures.line_chart({"loss": noisy, "point": [(3.0, 0.4)]}, x="step", y="loss", title="Loss")]),
        ("Ranges", [figures.interval_chart({"counting": both}, title="Scores"), page.commands(["diptych --help"])]),
    ]
    html = page.page("A <title>", "lead", sections, "footer")
    page.write(tmp_path / "r.html", html)
    parser = Nesting()
    parser.feed((tmp_path / "r.html").read_text())
    assert parser.open == []
    assert [image["alt"] for image in parser.images] == ['a "red" <square>', "one"]
    assert all((image["src"] or "").startswith("data:image/png;base64,") for image in parser.images)
    assert "<a>" not in html
    assert "&lt;a&gt;" in html
    outside = re.findall(r'(?:src|href)="(?!data:|#)[^"]*"|url\((?!#)|@import|<script', html)
    assert not outside
    assert "prefers-color-scheme:dark" in html


def test_charts_hold_their_data() -> None:
    made = figures.line_figure({"a": [(0.0, 1.0), (10.0, 3.0)], "bad": [(0.0, float("nan"))]}, x="x", y="y")
    assert made is not None
    (panel,) = made.axes
    (line,) = panel.get_lines()
    assert [list(line.get_xdata()), list(line.get_ydata())] == [[0.0, 10.0], [1.0, 3.0]]
    assert line.get_label() == "a"
    assert "nothing was measured" in figures.line_chart({}, x="x", y="y", title="t")
    noisy = figures.line_figure({"a": [(float(at), float(at % 2)) for at in range(100)]}, x="x", y="y")
    assert noisy is not None
    faint, smooth = noisy.axes[0].get_lines()
    assert max(faint.get_ydata()) == 1
    assert 0.4 < min(smooth.get_ydata()[5:-5]) <= max(smooth.get_ydata()[5:-5]) < 0.6


def test_intervals_are_drawn_where_they_are() -> None:
    both = {"before": Interval(value=0.1, low=0.0, high=0.2), "after": Interval(value=0.7, low=0.6, high=0.8)}
    (panel,) = figures.interval_figure({"counting": both}).axes
    spans = [tuple(line.get_xdata()) for line in panel.get_lines() if len(line.get_xdata()) == 2]
    assert spans == [(0.0, 0.2), (0.6, 0.8)]
    assert [text.get_text() for text in panel.get_yticklabels()] == ["counting"]


def test_charts_follow_the_page_s_colours_and_escape_names() -> None:
    chart = figures.line_chart({"<b>": [(0.0, 1.0), (1.0, 2.0)]}, x="a & b", y="y", title='"t" <x>')
    assert "var(--s0)" in chart
    assert "<b>" not in chart
    assert "<x>" not in chart
    assert figures.COLOURS[0] not in chart
    assert chart == figures.line_chart({"<b>": [(0.0, 1.0), (1.0, 2.0)]}, x="a & b", y="y", title='"t" <x>')


def test_unknown_file_types_are_named(tmp_path: Path) -> None:
    made, _ = figures.figure()
    with pytest.raises(UserError, match=r"x\.docx: not a picture that can be written; choices: .*png"):
        figures.write(made, tmp_path / "x.docx")


def test_markdown_tables() -> None:
    lines = markdown.table(["name", "n"], [["a", "1"], ["longer", "12"]], names=1)
    assert lines == ["| name   |   n |", "|--------|----:|", "| a      |   1 |", "| longer |  12 |"]


def test_grids() -> None:
    images = [Image.new("RGB", (32, 32), "blue")] * 5
    sheet = grid(images, columns=3, marks=[True, False, True, True, True])
    assert sheet.size == (3 * 104, 2 * 104)
    assert sheet.getpixel((2, 50)) != sheet.getpixel((106, 50))
    assert sheet.getpixel((50, 50)) == (0, 0, 255)
    assert enlarge(Image.new("RGB", (640, 480))).size == (640, 480)
