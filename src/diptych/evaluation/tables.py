"""Results as tables and pages: results.md, and report.html with a gallery of each benchmark."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from diptych.core.files import write_text
from diptych.evaluation import cards, report
from diptych.evaluation.results import TaskResult, categories

SHOWN, SIDE = 16, 160
"""Pictures of a gallery, and their longer side."""


def figure(value: Any) -> str:
    """A score as tables print it; a dash where there is none."""
    if value is None:
        return "-"
    return f"{value:.3f}" if abs(value) < 20 else f"{value:.2f}"


def rows_of(scores: Mapping[str, Any]) -> list[list[str]]:
    """Name, score, interval and count of a task's categories and overall."""
    found: list[list[str]] = []
    for name, each in categories(scores).items():
        found.append([name, figure(each["score"]), spread(each["interval"]), str(each["count"])])
    samples = scores.get("images", scores.get("questions", ""))
    found.append(["overall", figure(scores["overall"]), spread(scores.get("interval")), str(samples)])
    return found


def spread(interval: Sequence[float] | None) -> str:
    return "-" if interval is None else f"{figure(interval[0])} to {figure(interval[1])}"


def convention(scores: Mapping[str, Any]) -> str:
    """What a score rests on, in one line."""
    about = scores.get("about", {})
    return "; ".join(f"{name}={value}" for name, value in about.items() if name != "overall_is")


def markdown(found: Mapping[str, Any]) -> str:
    """All tasks of results.json as Markdown, each with its convention, warnings and the papers' rows."""
    lines = [f"# {found['model']}", ""]
    for task, scores in found["tasks"].items():
        lines += [f"## {task}", ""]
        lines += [f"**{note}**" for note in scores.get("notes", ())] + ([""] if scores.get("notes") else [])
        lines += ["| | score | 95% interval | samples |", "|---|---:|---:|---:|"]
        lines += [f"| {' | '.join(row)} |" for row in rows_of(scores)] + [""]
        if convention(scores):
            lines += [convention(scores), ""]
        header, rows = cards.card(task, scores, found["model"])
        if rows:
            lines += ["Beside what papers print:", "", f"| {' | '.join(header)} |", f"|{'---|' * len(header)}"]
            lines += [f"| {' | '.join(row)} |" for row in rows] + [""]
    return "\n".join(lines)


def page(found: Mapping[str, Any], results: Sequence[TaskResult]) -> str:
    """The same as one HTML file, with pictures."""
    done = {result.task: result for result in results}
    sections: list[tuple[str, list[str]]] = []
    for task, scores in found["tasks"].items():
        blocks = [report.text(note) for note in scores.get("notes", ())]
        blocks.append(report.table(["", "score", "95% interval", "samples"], rows_of(scores), total=True))
        if convention(scores):
            blocks.append(report.text(convention(scores)))
        header, rows = cards.card(task, scores, found["model"])
        if rows:
            blocks.append(report.table(header, rows))
        if task in done:
            blocks += gallery(done[task])
        sections.append((task, blocks))
    footer = f"{found['date']}; " + ", ".join(f"{name} {value}" for name, value in found["versions"].items())
    return report.page(found["model"], "Scores, what they rest on, and some of the pictures.", sections, footer)


def gallery(result: TaskResult) -> list[str]:
    """Some pictures from all over the benchmark (of the last seed), with prompt and score."""
    known = [row for row in result.rows if row["key"] in result.pictures]
    chosen = known[:: max(1, -(-len(known) // SHOWN))][:SHOWN]
    images: list[Image.Image] = []
    captions: list[str] = []
    for row in chosen:
        picture = result.pictures[row["key"]]
        try:
            image = picture.copy() if isinstance(picture, Image.Image) else Image.open(picture)
            image.thumbnail((SIDE, SIDE))
            images.append(image.convert("RGB"))
        except OSError:
            continue
        captions.append(f"{row['prompt'][:80]} ({row['failure'] or figure(row['score'])})")
    return [report.gallery(images, captions)] if images else []


def write(folder: Path, found: Mapping[str, Any], results: Sequence[TaskResult]) -> None:
    """results.md and report.html."""
    write_text(folder / "results.md", markdown(found))
    report.save(folder / "report.html", page(found, results))
