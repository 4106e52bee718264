"""Figures: one function makes them, one writes them, one puts them into a page; all with matplotlib."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from diptych.core.errors import UserError
from diptych.core.files import write_figure
from diptych.reports import page

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Points = Sequence[tuple[float, float]]
COLOURS = ("#3b5bdb", "#d9822b", "#2e9e5b", "#b4508c", "#0d9aa8", "#8a6d3b", "#c23030", "#1c2330")
INK, SOFT, LINE = "#1c2330", "#5c6675", "#e1e5eb"
VARIABLES = {SOFT: "var(--soft)", LINE: "var(--line)", **{COLOURS[n]: f"var(--s{n})" for n in range(6)}}
"""Colours that a page draws in its own, light or dark."""


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A value with its interval."""

    value: float
    low: float
    high: float


def figure(columns: int = 1, rows: int = 1, wide: float = 4.6, tall: float = 3.8, **options: Any) -> tuple[Figure, Any]:
    """A figure and its panels (rows, columns), each `wide` by `tall` inches; `options` are those of `subplots`."""
    from matplotlib.figure import Figure

    made = Figure(figsize=(wide * columns, tall * rows), layout="constrained")
    return made, made.subplots(rows, columns, squeeze=False, **options)


def write(made: Figure, path: Path, dpi: int = 150) -> None:
    """Write a figure whole or not at all, in the format that the name ends in; UserError for one that is not known."""
    known = made.canvas.get_supported_filetypes()
    if path.suffix[1:].lower() not in known:
        raise UserError(f"{path}: not a picture that can be written; choices: {', '.join(sorted(known))}")
    write_figure(made, path, dpi)


def plain(panel: Axes) -> None:
    """A panel without a box: grid lines along its values, soft letters."""
    panel.spines[["top", "right", "left", "bottom"]].set_visible(False)
    panel.tick_params(colors=SOFT, length=0)
    panel.xaxis.label.set_color(SOFT)
    panel.yaxis.label.set_color(SOFT)


def line_figure(series: Mapping[str, Points], *, x: str, y: str) -> Figure | None:
    """Curves over one axis; long noisy ones are drawn faint, with a smoothed line over them. None of nothing finite."""
    curves = {name: [(a, b) for a, b in points if math.isfinite(b)] for name, points in series.items()}
    curves = {name: points for name, points in curves.items() if points}
    if not curves:
        return None
    made, panels = figure(wide=7.2, tall=3.0)
    panel = panels[0, 0]
    for number, (name, points) in enumerate(curves.items()):
        colour = COLOURS[number % 6]
        if len(points) > 40:
            panel.plot(*zip(*points, strict=True), color=colour, linewidth=1, alpha=0.3)
            points = smoothed(points, max(5, len(points) // 15))
        panel.plot(*zip(*points, strict=True), "o" if len(points) == 1 else "-", color=colour, linewidth=2, label=name)
    low, high = panel.get_ylim()
    if 0 < low < high / 2:
        panel.set_ylim(bottom=0)
    panel.set(xlabel=x, ylabel=y)
    panel.grid(axis="y", color=LINE)
    panel.legend(frameon=False, labelcolor=SOFT, ncols=4, loc="lower left", bbox_to_anchor=(0, 1))
    plain(panel)
    return made


def interval_figure(rows: Mapping[str, Mapping[str, Interval]]) -> Figure:
    """Values in [0, 1] with their intervals, a line per row and a colour per series."""
    names = list(dict.fromkeys(name for row in rows.values() for name in row))
    made, panels = figure(wide=7.2, tall=0.7 + len(rows) * (0.1 + 0.16 * len(names)))
    panel = panels[0, 0]
    for number, name in enumerate(names):
        offset = 0.6 * (number - (len(names) - 1) / 2) / max(len(names), 1)
        shown = [(at + offset, row[name]) for at, row in enumerate(rows.values()) if name in row]
        colour = COLOURS[number % 6]
        for at, interval in shown:
            ends = [interval.low, interval.high]
            panel.plot(ends, [at, at], color=colour, linewidth=5, alpha=0.35, solid_capstyle="round")
        panel.plot([interval.value for _, interval in shown], [at for at, _ in shown], "o", color=colour, label=name)
    panel.set_yticks(range(len(rows)), list(rows))
    panel.set(xlim=(-0.02, 1.02), ylim=(len(rows) - 0.5, -0.5), xticks=(0, 0.25, 0.5, 0.75, 1))
    panel.grid(axis="x", color=LINE)
    panel.legend(frameon=False, labelcolor=SOFT, ncols=4, loc="lower left", bbox_to_anchor=(0, 1))
    plain(panel)
    return made


def line_chart(series: Mapping[str, Points], *, x: str, y: str, title: str) -> Markup:
    """`line_figure` as a block of a page."""
    made = line_figure(series, x=x, y=y)
    return page.text(f"{title}: nothing was measured.") if made is None else page.chart(svg(made, title), title)


def interval_chart(rows: Mapping[str, Mapping[str, Interval]], *, title: str) -> Markup:
    """`interval_figure` as a block of a page."""
    return page.chart(svg(interval_figure(rows), title), title)


def svg(made: Figure, title: str) -> Markup:
    """A figure as part of a document: letters stay letters, and colours follow the page."""
    import matplotlib

    drawn = io.StringIO()
    settings: Any = {"svg.fonttype": "none", "svg.hashsalt": title, "font.family": "sans-serif", "font.size": 9.0}
    with matplotlib.rc_context(settings):
        made.savefig(drawn, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = drawn.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL).rstrip()
    for colour, variable in VARIABLES.items():
        text = text.replace(colour, variable)
    head, rest = text.split(">", 1)
    label = Markup("<title>{}</title>").format(title)
    return Markup(f'{head} role="img">{label}{rest}')  # matplotlib escapes the texts of a figure


def smoothed(points: Points, window: int) -> list[tuple[float, float]]:
    """Means over up to `window` points on both sides together."""
    half = window // 2
    out: list[tuple[float, float]] = []
    for at, (x, _) in enumerate(points):
        near = [y for _, y in points[max(0, at - half) : at + half + 1]]
        out.append((x, sum(near) / len(near)))
    return out
