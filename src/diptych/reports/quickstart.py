"""The quick start's page: what was done, in words, pictures and numbers of this very run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup
from PIL import Image

from diptych.reports import figures, page
from diptych.reports.evaluation import categories
from diptych.reports.figures import Interval
from diptych.reports.page import Strip

TITLES = {
    "single": "one object",
    "two_object": "two objects",
    "counting": "counting",
    "colors": "colours",
    "position": "position",
    "color_attribution": "whose colour",
}


@dataclass(frozen=True, kw_only=True)
class Shown:
    """A picture, whether it shows what it was asked to, and what the model wrote about it before ("" for nothing)."""

    image: Image.Image
    correct: bool
    expansion: str = ""


@dataclass(frozen=True, kw_only=True)
class Answer:
    image: Image.Image
    question: str
    given: str
    truth: str


@dataclass(frozen=True, kw_only=True)
class EditShown:
    """before, after: pictures. done: whether the detector finds the instruction carried out."""

    before: Image.Image
    after: Image.Image
    instruction: str
    done: bool


@dataclass(frozen=True, kw_only=True)
class Story:
    """All that the report says.

    results: what results.json holds. rows: of metrics.jsonl. batch_size, trained, mixture: of the stage that was run;
    the mixture is its sources in words.
    """

    folder: Path
    results: dict[str, Any]
    prompts: Sequence[str]
    before: Sequence[Sequence[Shown]]
    after: Sequence[Sequence[Shown]]
    rows: Sequence[dict[str, Any]]
    answers: Sequence[Answer]
    edits: Sequence[EditShown]
    batch_size: int
    trained: Sequence[str]
    mixture: Sequence[str]


def write(story: Story, path: Path) -> None:
    """Write page.html."""
    page.write(path, html(story))


def html(story: Story) -> str:
    """The report as one document."""
    results = story.results
    before, after = results["before"]["toyeval"], results["after"]["toyeval"]
    facts = {
        "ToyEval before": f"{before['overall']:.2f}",
        "ToyEval after": f"{after['overall']:.2f}",
        "training steps": f"{results['steps']:,}",
        "for everything": duration(results["seconds"]),
    }
    sections: list[tuple[str, Sequence[Markup]]] = [
        ("", [page.facts(facts)]),
        ("What happened", [page.text(words) for words in explained(story)]),
        ("The same prompts, before and after", [pictures(story)]),
        ("Scores", [*scores(before, after), page.text(judged(results, before))]),
        ("Learning", loss_charts(story.rows)),
        ("Asked about a picture", [answered(story.answers)]),
        ("Asked to edit one", [page.text(EDITING), edited(story.edits)]),
        ("Try next", [page.commands(next_commands(story.folder))]),
    ]
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    parts = ", ".join(f"{name} {duration(value)}" for name, value in results["seconds_of"].items() if name != "total")
    footer = f"{results['hardware']}. {parts}. {versions}. Recipe {results['recipe']}, seed {results['seed']}."
    lead = "A generator that learned from images alone is taught to follow text with a few hundred captions."
    return page.page("Diptych quick start", lead, sections, footer)


EDITING = (
    "No training step showed an edit. The instruction and the image are simply read together as the condition; how "
    "far that carries is for you to judge."
)


def explained(story: Story) -> list[str]:
    """What was done, from the recipe that was run."""
    results = story.results
    first = story.after[0][0].expansion if story.after and story.after[0] else ""
    thinking = (
        [
            "Before each picture the language model wrote out what the prompt leaves open, and that was drawn: "
            f"'{story.prompts[0]}' became '{first}'. This is not part of IOMM; 'diptych generate' and "
            "'diptych eval' leave it out with --prompt-expansion 0."
        ]
        if first
        else []
    )
    return [
        f"The starting point, {results['model']}, joins a frozen multimodal language model to a small diffusion "
        "transformer. Until now the transformer was trained on unlabelled pictures only: it drew what the language "
        "model saw in a partly hidden picture. It has never met a caption.",
        f"This run continued for {results['steps']:,} steps of {story.batch_size} samples: {', '.join(story.mixture)}. "
        "The language "
        f"model stayed frozen; what learned was: {', '.join(story.trained)}.",
        "Both models then drew the same prompts from the same noise. No prompt below was in the training captions.",
        *thinking,
    ]


def judged(results: dict[str, Any], scores: dict[str, Any]) -> str:
    """How the scores came about."""
    return (
        f"ToyEval has GenEval's six categories: {scores['prompts']} prompts, {scores['images']} images. A detector "
        "reads shapes, colours and boxes off each picture; a picture is right or wrong. Ranges are 95% intervals. "
        "To be quick, this draws fewer pictures per prompt than 'diptych eval', in "
        f"{results['sampling']['steps']} steps."
    )


def pictures(story: Story) -> Markup:
    """A card for each prompt."""
    made: list[Markup] = []
    for prompt, before, after in zip(story.prompts, story.before, story.after, strict=True):
        strips = [_strip("before", prompt, before), _strip("after", prompt, after)]
        right = [sum(shown.correct for shown in row) for row in (before, after)]
        made.append(page.card(prompt, strips, f"right: {right[0]} of {len(before)}, then {right[1]} of {len(after)}"))
    return page.cards(made)


def _strip(label: str, prompt: str, row: Sequence[Shown]) -> Strip:
    said = [f"{prompt}: {shown.expansion}" if shown.expansion else prompt for shown in row]
    alts = [f"{label}: {text} ({'right' if shown.correct else 'wrong'})" for text, shown in zip(said, row, strict=True)]
    return Strip(label=label, images=[shown.image for shown in row], alts=alts)


def scores(before: dict[str, Any], after: dict[str, Any]) -> list[Markup]:
    """A chart and a table of both sides."""
    rows: list[list[str]] = []
    chart: dict[str, dict[str, Interval]] = {}
    sides = {"before": before, "after": after}
    for name, first in categories(before).items():
        second = after[name]
        chart[TITLES.get(name, name)] = {
            label: Interval(value=side[name]["score"], low=side[name]["interval"][0], high=side[name]["interval"][1])
            for label, side in sides.items()
        }
        rows.append([TITLES.get(name, name), _ranged(first, "score"), _ranged(second, "score")])
    chart["overall"] = {
        label: Interval(value=side["overall"], low=side["interval"][0], high=side["interval"][1])
        for label, side in sides.items()
    }
    rows.append(["overall", _ranged(before, "overall"), _ranged(after, "overall")])
    drawing = figures.interval_chart(chart, title="Share of right pictures by category, with 95% intervals")
    return [drawing, page.table(["category", "before", "after"], rows, total=True)]


def _ranged(score: dict[str, Any], key: str) -> str:
    low, high = score["interval"]
    return f"{score[key]:.2f}  ({low:.2f}-{high:.2f})"


def curves(rows: Sequence[dict[str, Any]], prefix: str) -> dict[str, list[tuple[float, float]]]:
    """The columns of metrics.jsonl whose names begin with `prefix`, as (step, value)."""
    series: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        for name, value in row.items():
            if name.startswith(prefix):
                series.setdefault(name.removeprefix(prefix), []).append((float(row["step"]), float(value)))
    return series


def loss_charts(rows: Sequence[dict[str, Any]]) -> list[Markup]:
    """Training and held-out losses."""
    charts = [figures.line_chart(curves(rows, "loss/"), x="step", y="loss", title="Training loss by kind of data")]
    held_out = curves(rows, "held_out/")
    if held_out:
        title = "Held-out loss: samples that are never trained on"
        charts.append(figures.line_chart(held_out, x="step", y="loss", title=title))
    return charts


def write_curves(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """The training losses as a picture of its own."""
    made = figures.line_figure(curves(rows, "loss/"), x="step", y="loss")
    if made is not None:
        made.suptitle("Training loss by kind of data", fontsize=10)
        figures.write(made, path)


def answered(answers: Sequence[Answer]) -> Markup:
    """Questions with the answers given, and the true ones where they differ."""
    captions = [
        f"{answer.question} — {answer.given.strip() or '(nothing)'}"
        + ("" if answer.given.strip() == answer.truth else f" (true: {answer.truth})")
        for answer in answers
    ]
    return page.gallery([answer.image for answer in answers], captions)


def edited(edits: Sequence[EditShown]) -> Markup:
    """A card for each edit."""
    return page.cards(
        [
            page.card(
                edit.instruction,
                [
                    Strip(
                        label="",
                        images=[edit.before, edit.after],
                        alts=["before the edit", f"after: {edit.instruction}"],
                    )
                ],
                "carried out" if edit.done else "not carried out",
            )
            for edit in edits
        ]
    )


def next_commands(folder: Path) -> list[str]:
    """Three commands to try next."""
    return [
        f'diptych generate {folder} "a red circle left of a blue square" --n 4 -o {folder / "pictures"}',
        f"diptych eval {folder} --tasks toyeval,toyedit,toyvqa --output {folder / 'scores'}",
        "diptych recipes",
    ]


def duration(seconds: float) -> str:
    """Seconds in words."""
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.1f} min"
