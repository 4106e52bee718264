"""What the analyses found, as files: JSON, Markdown tables, plots, and prompts with their words coloured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diptych.reports import figures
from diptych.reports.figures import COLOURS
from diptych.reports.markdown import table
from diptych.reports.page import render

TINT = {"object": "59,91,219", "position": "217,130,43", "color": "15,153,96", "other": "114,124,140"}
"""Red, green and blue of a category's words."""
CATEGORIES = tuple(TINT)
"""As of `diptych.analysis.words`, in the order of the columns."""


# Words


def word_tables(results: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Markdown of `word_attention.summary` by model, the baseline first where there are two."""
    names = list(results)
    first = results[names[0]]
    lines = [
        "# Attention to the words of a prompt",
        "",
        f"Mean of {first['prompts']} prompts, the first {first['steps']} steps of sampling, all layers and heads. "
        "Shares of the attention that the image's latents give to the prompt (Yu et al., Semantic Generative Tuning, "
        "App. 7.5, Fig. 12).",
        "",
    ]
    rows = [[name, *(f"{results[name]['overall'][c]:.4f}" for c in CATEGORIES)] for name in names]
    if len(names) == 2:
        before, after = (results[name]["overall"] for name in names)
        rows.append(["change", *(f"{after[c] - before[c]:+.4f}" for c in CATEGORIES)])
    lines += [*table(["model", *CATEGORIES], rows), ""]
    for name in names:
        lines.append(f"- {name}: {results[name]['unworded']:.4f} goes to no word (template, markers), within `other`.")
    for name in names:
        each = results[name]
        lines += ["", f"## {name}: by layer", ""]
        rows = [
            [str(at), *(f"{row[c]:.4f}" for c in CATEGORIES), f"{each['text_by_layer'][at]:.4f}"]
            for at, row in enumerate(each["by_layer"])
        ]
        lines += table(["layer", *CATEGORIES, "prompt, of all attention"], rows)
        lines += ["", f"## {name}: by layer and group of heads", ""]
        rows = [
            [str(at), str(group), *(f"{row[c]:.4f}" for c in CATEGORIES)]
            for at, groups in enumerate(each["by_group"])
            for group, row in enumerate(groups)
        ]
        lines += table(["layer", "group", *CATEGORIES], rows)
    return lines


def word_plots(results: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """A bar for each category and model, and each category along the layers."""
    made, panels = figures.figure(3, wide=5.2)
    bars, lines, heads = panels[0]
    for number, (name, each) in enumerate(results.items()):
        offsets = np.arange(len(CATEGORIES)) + (number - (len(results) - 1) / 2) * 0.38
        values = [each["overall"][c] for c in CATEGORIES]
        errors = [each["deviation"][c] for c in CATEGORIES]
        bars.bar(offsets, values, 0.36, yerr=errors, capsize=3, color=COLOURS[number % len(COLOURS)], label=name)
        for at, category in enumerate(CATEGORIES):
            line = [row[category] for row in each["by_layer"]]
            lines.plot(line, "-o" if number else "--o", color=COLOURS[at], markersize=3, label=f"{category}, {name}")
    last = list(results.values())[-1]
    keywords = np.array([[1 - group["other"] for group in groups] for groups in last["by_group"]])  # (layers, G)
    shown = heads.imshow(keywords.T, aspect="auto", cmap="viridis", origin="lower")
    made.colorbar(shown, ax=heads, label="share of objects, positions and colors")
    heads.set(xlabel="layer", ylabel="group of heads", title=f"keywords, {list(results)[-1]}")
    bars.set_xticks(range(len(CATEGORIES)), CATEGORIES)
    bars.set(ylabel="share of the attention to the prompt", title="all layers; bars: spread over prompts")
    lines.set(xlabel="layer", ylabel="share", title="by layer")
    bars.legend(fontsize=8, frameon=False)
    lines.set_ylim(bottom=0)
    lines.legend(fontsize=6, frameon=False, ncols=len(results), loc="upper center", bbox_to_anchor=(0.5, -0.15))
    for axis in (lines.xaxis, heads.xaxis, heads.yaxis):
        axis.get_major_locator().set_params(integer=True)
    figures.write(made, path)


def prompt_page(results: Mapping[str, Mapping[str, Any]]) -> str:
    """Each prompt with its words coloured by category, the deeper the more attention; as HTML."""
    greatest = max(word["share"] for each in results.values() for row in each["words"] for word in row["words"])
    names = list(results)
    rows: list[list[list[dict[str, Any]]]] = []
    for number, first in enumerate(results[names[0]]["words"]):
        rows.append([])
        for name in names:
            words: list[dict[str, Any]] = []
            for word, base in zip(results[name]["words"][number]["words"], first["words"], strict=True):
                share = word["share"]
                words.append(
                    {
                        "word": word["word"],
                        "category": word["category"],
                        "percent": 100 * share,
                        "change": None if name == names[0] else 100 * (share - base["share"]),
                        "strength": 0.08 + 0.82 * share / greatest if greatest > 0 else 0.08,
                    }
                )
            rows[-1].append(words)
    return render("words.html", names=names, rows=rows, tints=TINT)


# Images


def looking_tables(results: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Markdown of `looking.summary` by model."""
    names = list(results)
    lines = [
        "# Attention to the image in understanding",
        "",
        f"Share of the attention of the text after the image that goes to vision tokens; mean of "
        f"{results[names[0]]['questions']} questions, heads and text tokens (Yu et al., Semantic Generative Tuning, "
        "Sec. 4.4, Fig. 8(a)).",
        "",
    ]
    depth = max(len(results[name]["by_layer"]) for name in names)
    rows = []
    for at in range(depth):
        values = [results[name]["by_layer"][at] if at < len(results[name]["by_layer"]) else None for name in names]
        cells = ["-" if value is None else f"{value:.4f}" for value in values]
        if len(names) == 2:
            first, two = values
            cells.append("-" if first is None or two is None else f"{two - first:+.4f}")
        rows.append([str(at), *cells])
    return [*lines, *table(["layer", *names, *(["change"] if len(names) == 2 else [])], rows)]


def looking_plot(results: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """A line for each model along the layers, its spread over questions as a band."""
    made, panels = figures.figure(1, wide=5.6)
    panel = panels[0, 0]
    for colour, (name, each) in zip(COLOURS, results.items(), strict=False):
        layers, mean, spread = range(len(each["by_layer"])), np.array(each["by_layer"]), np.array(each["deviation"])
        panel.plot(layers, mean, "-o", color=colour, markersize=3, label=name)
        panel.fill_between(layers, mean - spread, mean + spread, color=colour, alpha=0.15, linewidth=0)
    panel.set(xlabel="layer", ylabel="attention to vision tokens", title="band: spread over questions")
    panel.xaxis.get_major_locator().set_params(integer=True)
    panel.legend(fontsize=8, frameon=False)
    figures.write(made, path)


# Features


def feature_tables(results: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Markdown of the probes by model."""
    first = next(iter(results.values()))
    rows = [
        [name, f"{each['probe']['mean']:.3f}", f"{each['probe']['deviation']:.3f}", f"{each['probe']['chance']:.3f}"]
        for name, each in results.items()
    ]
    return [
        "# Vision features",
        "",
        f"{first['images']} images of {len(first['classes'])} classes ({', '.join(first['classes'])}). Accuracy of a "
        "linear classifier on vision tokens (flattened, PCA to 50), five folds; the map is t-SNE of perplexity 30 (Yu "
        "et al., Semantic Generative Tuning, App. 7.5, Fig. 11).",
        "",
        *table(["model", "linear probe", "sd of folds", "largest class"], rows),
    ]


def feature_plot(
    results: Mapping[str, Mapping[str, Any]],
    planes: Mapping[str, NDArray[np.floating]],
    labels: Sequence[str],
    path: Path,
) -> None:
    """The maps side by side, classes in colours."""
    made, panels = figures.figure(len(planes))
    names = sorted(set(labels))
    for panel, (model, points) in zip(panels[0], planes.items(), strict=True):
        for number, name in enumerate(names):
            rows = [row for row, label in enumerate(labels) if label == name]
            panel.scatter(points[rows, 0], points[rows, 1], s=12, color=COLOURS[number % len(COLOURS)], label=name)
        panel.set(xticks=[], yticks=[], title=f"{model}\nlinear probe {results[model]['probe']['mean']:.3f}")
    panels[0, 0].legend(fontsize=8, frameon=False)
    figures.write(made, path)
