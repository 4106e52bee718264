"""Reports as one HTML file that needs nothing else: styles, pictures and charts are all inside.

Each block function gives a piece of HTML; `page` puts pieces together. All texts given are plain and are escaped.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from PIL import Image

from diptych.core.files import write_text

Points = Sequence[tuple[float, float]]
Place = Callable[[float, float], tuple[float, float]]
"""Data coordinates to those of the drawing."""
WIDTH, HEIGHT = 720, 300
LEFT, RIGHT, TOP, BOTTOM = 60, 16, 38, 42

STYLE = """
:root{color-scheme:light dark;--ink:#1c2330;--soft:#5c6675;--line:#e1e5eb;--paper:#fbfbfa;--card:#fff;--accent:#3b5bdb;
--s0:#3b5bdb;--s1:#d9822b;--s2:#2e9e5b;--s3:#b4508c;--s4:#0d9aa8;--s5:#8a6d3b}
@media(prefers-color-scheme:dark){:root{--ink:#e8eaee;--soft:#9aa4b2;--line:#2c333e;--paper:#12161c;--card:#1a2029;
--accent:#8ea6ff;--s0:#8ea6ff;--s1:#f0aa60;--s2:#6fcf97;--s3:#e58cc0;--s4:#5fd3de;--s5:#c8ab78}}
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);font:16px/1.6 system-ui,-apple-system,"Segoe UI",sans-serif}
main{max-width:60rem;margin:0 auto;padding:3rem 1.25rem 4rem}
h1{font-size:2.1rem;line-height:1.2;margin:0 0 .6rem;letter-spacing:-.02em}
h2{font-size:1.25rem;margin:3rem 0 .6rem;letter-spacing:-.01em}
p{margin:.5rem 0 1rem;max-width:44rem}.lead{font-size:1.12rem;color:var(--soft)}
.facts{display:flex;flex-wrap:wrap;gap:.9rem;margin:1.6rem 0}
.fact{background:var(--card);border:1px solid var(--line);border-radius:12px;padding:.9rem 1.2rem;flex:1 1 10rem}
.fact b{display:block;font-size:1.75rem;line-height:1.25;font-variant-numeric:tabular-nums}
.fact span{color:var(--soft);font-size:.9rem}
.cards{display:grid;grid-template-columns:repeat(auto-fill,minmax(17rem,1fr));gap:1rem}
.card{background:var(--card);border:1px solid var(--line);border-radius:12px;padding:.9rem;margin:0}
.card h3{font-size:.95rem;font-weight:600;margin:0 0 .6rem}
.strip{display:flex;align-items:center;gap:.4rem;margin:.35rem 0}.strip>span{width:3.6rem;flex:none;color:var(--soft);
font-size:.82rem}.strip img{flex:1 1 0;min-width:0;max-width:8rem}
img{display:block;width:100%;border-radius:6px;image-rendering:pixelated}
figure{margin:0}figcaption{color:var(--soft);font-size:.86rem;margin-top:.4rem}
.grid{display:grid;grid-template-columns:repeat(auto-fill,minmax(6.5rem,1fr));gap:.8rem}
.wide{background:var(--card);border:1px solid var(--line);border-radius:12px;padding:.8rem;margin:.8rem 0;
overflow-x:auto}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums;font-size:.95rem}
th,td{text-align:right;padding:.4rem .7rem;border-bottom:1px solid var(--line)}
th:first-child,td:first-child{text-align:left}
thead th{color:var(--soft);font-weight:500}tr:last-child td{border-bottom:0}tr.total td{font-weight:650}
pre{background:var(--card);border:1px solid var(--line);border-radius:12px;padding:.9rem 1.1rem;overflow-x:auto;
font:.9rem/1.7 ui-monospace,SFMono-Regular,Menlo,monospace}
svg{display:block;width:100%;height:auto;min-width:30rem;font:12px system-ui,sans-serif}
svg text{fill:var(--soft)}svg .axis{stroke:var(--line);stroke-width:1}
footer{margin-top:3.5rem;padding-top:1rem;border-top:1px solid var(--line);color:var(--soft);font-size:.86rem}
"""


@dataclass(frozen=True, kw_only=True)
class Strip:
    """A labelled row of pictures, each with its words for those who do not see it."""

    label: str
    images: Sequence[Image.Image]
    alts: Sequence[str]


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A value with its interval."""

    value: float
    low: float
    high: float


def page(title: str, lead: str, sections: Sequence[tuple[str, Sequence[str]]], footer: str = "") -> str:
    """The whole document: a heading, a lead, sections of (heading, blocks), and a footer."""
    parts = [f"<h1>{escape(title)}</h1>", f'<p class="lead">{escape(lead)}</p>']
    for heading, blocks in sections:
        parts.append(f"<section>{f'<h2>{escape(heading)}</h2>' if heading else ''}{''.join(blocks)}</section>")
    parts.append(f"<footer>{escape(footer)}</footer>" if footer else "")
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head>\n<body><main>\n"
        + "\n".join(filter(None, parts))
        + "\n</main></body></html>\n"
    )


def save(path: Path, html: str) -> None:
    """Write the document whole or not at all."""
    write_text(path, html)


def text(words: str) -> str:
    """A paragraph."""
    return f"<p>{escape(words)}</p>"


def commands(lines: Sequence[str]) -> str:
    """Commands to copy."""
    return f"<pre>{escape(chr(10).join(lines))}</pre>"


def facts(values: Mapping[str, str]) -> str:
    """Large figures with what they are."""
    cells = [
        f'<div class="fact"><b>{escape(value)}</b><span>{escape(name)}</span></div>' for name, value in values.items()
    ]
    return f'<div class="facts">{"".join(cells)}</div>'


def table(header: Sequence[str], rows: Sequence[Sequence[str]], *, total: bool = False) -> str:
    """A table; the first column holds names. With `total`, the last row stands out."""
    head = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in header)
    body: list[str] = []
    for number, row in enumerate(rows):
        mark = ' class="total"' if total and number == len(rows) - 1 else ""
        body.append(f"<tr{mark}>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>")
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{"".join(body)}</tbody></table></div>'


def picture(image: Image.Image, alt: str) -> str:
    """A picture as part of the document."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    data = base64.b64encode(buffer.getvalue()).decode("ascii")
    size = f'width="{image.width}" height="{image.height}"'
    return f'<img {size} style="height:auto" alt="{escape(alt, quote=True)}" src="data:image/png;base64,{data}">'


def gallery(images: Sequence[Image.Image], captions: Sequence[str]) -> str:
    """Pictures with captions, as many in a row as fit."""
    cells = [
        f"<figure>{picture(image, caption)}<figcaption>{escape(caption)}</figcaption></figure>"
        for image, caption in zip(images, captions, strict=True)
    ]
    return f'<div class="grid">{"".join(cells)}</div>'


def card(title: str, strips: Sequence[Strip], note: str = "") -> str:
    """A titled card of picture rows, say before and after."""
    rows = [
        f'<div class="strip"><span>{escape(strip.label)}</span>'
        + "".join(picture(image, alt) for image, alt in zip(strip.images, strip.alts, strict=True))
        + "</div>"
        for strip in strips
    ]
    caption = f"<figcaption>{escape(note)}</figcaption>" if note else ""
    return f'<figure class="card"><h3>{escape(title)}</h3>{"".join(rows)}{caption}</figure>'


def cards(each: Sequence[str]) -> str:
    """Cards side by side."""
    return f'<div class="cards">{"".join(each)}</div>'


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers from about `low` to about `high`."""
    span = high - low or abs(high) or 1.0
    rough = span / count
    unit = 10 ** math.floor(math.log10(rough))
    step = next(unit * factor for factor in (1, 2, 5, 10) if unit * factor >= rough)
    first = math.ceil(low / step - 1e-9)
    return [n * step for n in range(first, math.floor(high / step + 1e-9) + 1)]


def smoothed(points: Points, window: int) -> list[tuple[float, float]]:
    """Means over up to `window` points on both sides together."""
    half = window // 2
    out: list[tuple[float, float]] = []
    for at, (x, _) in enumerate(points):
        near = [y for _, y in points[max(0, at - half) : at + half + 1]]
        out.append((x, sum(near) / len(near)))
    return out


def line_chart(series: Mapping[str, Points], *, x: str, y: str, title: str) -> str:
    """Curves over one axis, as SVG. Long noisy ones are drawn faint, with a smoothed line over them."""
    curves = {name: [(a, b) for a, b in points if math.isfinite(b)] for name, points in series.items()}
    curves = {name: points for name, points in curves.items() if points}
    if not curves:
        return text(f"{title}: nothing was measured.")
    every = [point for points in curves.values() for point in points]
    low_x, high_x = min(a for a, _ in every), max(a for a, _ in every)
    low_y, high_y = min(b for _, b in every), max(b for _, b in every)
    low_y = 0.0 if 0 < low_y < high_y / 2 else low_y
    span_x, span_y = (high_x - low_x) or 1.0, (high_y - low_y) or 1.0

    def place(a: float, b: float) -> tuple[float, float]:
        left = LEFT + (a - low_x) / span_x * (WIDTH - LEFT - RIGHT)
        return left, TOP + (1 - (b - low_y) / span_y) * (HEIGHT - TOP - BOTTOM)

    def path(points: Points) -> str:
        return " ".join(f"{'L' if n else 'M'}{a:.1f},{b:.1f}" for n, (a, b) in enumerate(place(*p) for p in points))

    parts = _frame(ticks(low_x, high_x), ticks(low_y, high_y), place, x, y)
    for number, (name, points) in enumerate(curves.items()):
        colour = f"var(--s{number % 6})"
        style = f'fill="none" stroke="{colour}" stroke-linejoin="round"'
        if len(points) > 40:
            parts.append(f'<path d="{path(points)}" {style} stroke-width="1" opacity=".3"/>')
            points = smoothed(points, max(5, len(points) // 15))
        parts.append(f'<path d="{path(points)}" {style} stroke-width="2"/>')
        if len(points) == 1:
            a, b = place(*points[0])
            parts.append(f'<circle cx="{a:.1f}" cy="{b:.1f}" r="3" fill="{colour}"/>')
        parts.append(_legend(number, name, colour))
    return _svg(title, parts, HEIGHT)


def interval_chart(rows: Mapping[str, Mapping[str, Interval]], *, title: str) -> str:
    """Values in [0, 1] with their intervals, a line per row and a colour per series."""
    names = list(dict.fromkeys(name for row in rows.values() for name in row))
    pitch = 16 * max(len(names), 1) + 10
    height = TOP + pitch * len(rows) + 24
    left = 130

    def place(value: float) -> float:
        return left + value * (WIDTH - left - RIGHT)

    parts: list[str] = []
    for tick in (0.0, 0.25, 0.5, 0.75, 1.0):
        a = place(tick)
        parts.append(f'<line class="axis" x1="{a:.1f}" x2="{a:.1f}" y1="{TOP - 8}" y2="{height - 22}"/>')
        parts.append(f'<text x="{a:.1f}" y="{height - 6}" text-anchor="middle">{tick:g}</text>')
    for line, (label, row) in enumerate(rows.items()):
        top = TOP + line * pitch
        middle = top + 8 * len(names)
        parts.append(f'<text x="{left - 12}" y="{middle:.1f}" text-anchor="end">{escape(label)}</text>')
        for number, name in enumerate(names):
            if name not in row:
                continue
            found, b, colour = row[name], top + 4 + 16 * number, f"var(--s{number % 6})"
            parts.append(
                f'<line x1="{place(found.low):.1f}" x2="{place(found.high):.1f}" y1="{b}" y2="{b}" stroke="{colour}" '
                f'stroke-width="5" stroke-linecap="round" opacity=".35"/>'
                f'<circle cx="{place(found.value):.1f}" cy="{b}" r="5" fill="{colour}"/>'
            )
    parts += [_legend(number, name, f"var(--s{number % 6})") for number, name in enumerate(names)]
    return _svg(title, parts, height)


def _frame(xs: Sequence[float], ys: Sequence[float], place: Place, x: str, y: str) -> list[str]:
    parts: list[str] = []
    for tick in ys:
        _, b = place(0, tick)
        parts.append(f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{b:.1f}" y2="{b:.1f}"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{b + 4:.1f}" text-anchor="end">{tick:g}</text>')
    for tick in xs:
        a, _ = place(tick, 0)
        parts.append(f'<text x="{a:.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{tick:g}</text>')
    parts.append(f'<text x="{(LEFT + WIDTH) / 2:.0f}" y="{HEIGHT - 6}" text-anchor="middle">{escape(x)}</text>')
    middle = (TOP + HEIGHT - BOTTOM) / 2
    turn = f'transform="rotate(-90 14 {middle:.0f})"'
    parts.append(f'<text x="14" y="{middle:.0f}" text-anchor="middle" {turn}>{escape(y)}</text>')
    return parts


def _legend(number: int, name: str, colour: str) -> str:
    left, top = LEFT + 160 * (number % 4), 14 + 16 * (number // 4)
    return (
        f'<rect x="{left}" y="{top - 7}" width="14" height="4" rx="2" fill="{colour}"/>'
        f'<text x="{left + 20}" y="{top}">{escape(name)}</text>'
    )


def _svg(title: str, parts: Sequence[str], height: int) -> str:
    inner = f"<title>{escape(title)}</title>{''.join(parts)}"
    drawing = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img" '
        f'aria-label="{escape(title, quote=True)}">{inner}</svg>'
    )
    return f'<figure class="wide">{drawing}<figcaption>{escape(title)}</figcaption></figure>'
