"""Results of an evaluation as tables and pages: results.md, and report.html with a gallery of each benchmark."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from diptych.core.files import write_text
from diptych.data.imaging import UNREADABLE
from diptych.reports import markdown as md
from diptych.reports import page

Card = tuple[Sequence[str], Sequence[Sequence[str]]]
"""Header and rows of what papers print beside a task; no rows where none does."""
Gallery = Sequence[tuple[Path | Image.Image, str]]
"""Pictures with their captions."""
SHOWN, SIDE = 16, 160
"""Pictures of a gallery, and their longer side."""


def figure(value: Any) -> str:
    """A score as tables print it; a dash where there is none."""
    if value is None:
        return "-"
    return f"{value:.3f}" if abs(value) < 20 else f"{value:.2f}"


def rows_of(scores: Mapping[str, Any]) -> list[list[str]]:
    """Name, score, interval and count of a task's categories and overall."""
    table: list[list[str]] = []
    for name, each in categories(scores).items():
        table.append([name, figure(each["score"]), spread(each["interval"]), str(each["count"])])
    samples = scores.get("images", scores.get("questions", ""))
    table.append(["overall", figure(scores["overall"]), spread(scores.get("interval")), str(samples)])
    return table


def spread(interval: Sequence[float] | None) -> str:
    return "-" if interval is None else f"{figure(interval[0])} to {figure(interval[1])}"


def convention(scores: Mapping[str, Any]) -> str:
    """What a score rests on, in one line."""
    about = scores.get("about", {})
    return "; ".join(f"{name}={value}" for name, value in about.items() if name not in ("overall_is", "bounds"))


def categories(scores: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The categories among a task's scores: the entries that have a score of their own."""
    return {name: value for name, value in scores.items() if isinstance(value, dict) and "score" in value}


def markdown(summary: Mapping[str, Any], cards: Mapping[str, Card]) -> str:
    """All tasks of results.json as Markdown, each with its convention, warnings and the papers' rows."""
    lines = [f"# {summary['model']}", ""]
    for task, scores in summary["tasks"].items():
        lines += [f"## {task}", ""]
        lines += [f"**{note}**" for note in scores.get("notes", ())] + ([""] if scores.get("notes") else [])
        lines += [*md.table(["", "score", "95% interval", "samples"], rows_of(scores), names=1), ""]
        if convention(scores):
            lines += [convention(scores), ""]
        header, rows = cards[task]
        if rows:
            lines += ["Beside what papers print:", "", *md.table(header, rows), ""]
    return "\n".join(lines)


def html(summary: Mapping[str, Any], cards: Mapping[str, Card], galleries: Mapping[str, Gallery]) -> str:
    """The same as one HTML file, with pictures."""
    sections: list[tuple[str, list[Any]]] = []
    for task, scores in summary["tasks"].items():
        blocks = [page.text(note) for note in scores.get("notes", ())]
        blocks.append(page.table(["", "score", "95% interval", "samples"], rows_of(scores), total=True))
        if convention(scores):
            blocks.append(page.text(convention(scores)))
        header, rows = cards[task]
        if rows:
            blocks.append(page.table(header, rows))
        shown = readable(galleries.get(task, ()))
        if shown:
            blocks.append(page.gallery([image for image, _ in shown], [caption for _, caption in shown]))
        sections.append((task, blocks))
    footer = f"{summary['date']}; " + ", ".join(f"{name} {value}" for name, value in summary["versions"].items())
    return page.page(summary["model"], "Scores, what they rest on, and some of the pictures.", sections, footer)


def readable(gallery: Gallery) -> list[tuple[Image.Image, str]]:
    """Some of the pictures, from all over, made small; those that cannot be read are left out."""
    shown: list[tuple[Image.Image, str]] = []
    for picture, caption in gallery[:: max(1, -(-len(gallery) // SHOWN))][:SHOWN]:
        try:
            image = picture.copy() if isinstance(picture, Image.Image) else Image.open(picture)
            image.thumbnail((SIDE, SIDE))
            shown.append((image.convert("RGB"), caption))
        except UNREADABLE:
            continue
    return shown


def write(
    folder: Path, summary: Mapping[str, Any], cards: Mapping[str, Card], galleries: Mapping[str, Gallery]
) -> None:
    """results.md and report.html.

    Args:
        summary: what results.json holds. cards, galleries: by task.
    """
    write_text(folder / "results.md", markdown(summary, cards))
    page.write(folder / "report.html", html(summary, cards, galleries))
