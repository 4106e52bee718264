"""What an evaluation leaves behind: scores with intervals, one row per sample, pictures, and where they are written."""

from __future__ import annotations

import dataclasses
import datetime
import importlib.metadata
import json
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from diptych.core.files import write_text
from diptych.evaluation.pictures import grid
from diptych.inference.engine import Engine

Progress = Callable[[int, int], None]
"""Told (samples done, samples in all)."""

RESAMPLES = 1000
GRID_IMAGES = 96
"""Most pictures on the overview of a task."""


@dataclass(frozen=True, kw_only=True)
class Judged:
    """One sample: what was asked, what came of it, and its picture where there is one."""

    row: dict[str, Any]
    correct: bool
    image: Image.Image | None = None


@dataclass(frozen=True, kw_only=True)
class TaskResult:
    """scores: `overall`, its 95% `interval`, and {"score", "interval", "count"} for each category.

    failed: samples that could not be judged; they count as wrong.
    """

    task: str
    scores: dict[str, Any]
    samples: Sequence[Judged]
    failed: int = 0
    sampling: dict[str, Any] = field(default_factory=dict[str, Any])


def shares(outcomes: Mapping[str, Sequence[bool]], seed: int = 0) -> dict[str, Any]:
    """Share of True in each category and their mean, with bootstrapped 95% intervals (`RESAMPLES` resamples)."""
    rng = np.random.default_rng(seed)
    categories: dict[str, Any] = {}
    resampled: list[np.ndarray] = []
    for name, values in outcomes.items():
        right = np.array(values, dtype=float)
        resampled.append(rng.choice(right, (RESAMPLES, len(right))).mean(1))
        categories[name] = {"score": float(right.mean()), "interval": _interval(resampled[-1]), "count": len(right)}
    mean = float(np.mean([category["score"] for category in categories.values()]))
    return {"overall": mean, "interval": _interval(np.mean(resampled, axis=0)), **categories}


def _interval(resampled: np.ndarray) -> list[float]:
    return [float(edge) for edge in np.percentile(resampled, [2.5, 97.5])]


def categories(scores: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The categories among a task's scores: the entries that have a score of their own."""
    return {name: value for name, value in scores.items() if isinstance(value, dict) and "score" in value}


def versions() -> dict[str, str]:
    """Of what a result depends on."""
    names = ("diptych", "torch", "transformers", "diffusers", "numpy")
    return {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in names}}


def commit() -> str | None:
    """The revision of the checkout that this code runs from; None where it is installed as a package."""
    folder = Path(__file__).parents[3] / ".git"
    try:
        head = (folder / "HEAD").read_text(encoding="utf-8").strip()
        if not head.startswith("ref: "):
            return head
        name = head.removeprefix("ref: ")
        if (folder / name).is_file():
            return (folder / name).read_text(encoding="utf-8").strip()
        packed = (folder / "packed-refs").read_text(encoding="utf-8").splitlines()
        return next((line.split()[0] for line in packed if line.endswith(f" {name}")), None)
    except OSError:
        return None


def summary(
    engine: Engine | None, results: Sequence[TaskResult], *, seed: int, seconds: float, name: str | None = None
) -> dict[str, Any]:
    """results.json as a dict."""
    parameter = None if engine is None else next(engine.system.parameters())
    sampling = {} if engine is None else dataclasses.asdict(engine.sampling)
    return {
        "model": name or (engine.name if engine is not None else ""),
        "tasks": {result.task: result.scores for result in results},
        "failed": sum(result.failed for result in results),
        "seed": seed,
        "sampling": {**sampling, **{k: v for r in results for k, v in r.sampling.items()}},
        "device": None if parameter is None else str(parameter.device),
        "dtype": None if parameter is None else str(parameter.dtype).removeprefix("torch."),
        "seconds": round(seconds, 2),
        "versions": versions(),
        "commit": commit(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def write(folder: Path, results: Sequence[TaskResult], summary: dict[str, Any], *, samples: bool = False) -> None:
    """Each task's rows (TASK.jsonl), pictures (images/TASK-*.png) and overview (TASK.png); results.json comes last."""
    folder.mkdir(parents=True, exist_ok=True)
    for result in results:
        rows: list[str] = []
        for number, judged in enumerate(result.samples):
            file = None
            if judged.image is not None:
                file = f"images/{result.task}-{number:05d}.png"
                (folder / "images").mkdir(exist_ok=True)
                judged.image.save(folder / file)
            rows.append(json.dumps({**judged.row, "correct": judged.correct, "file": file}) + "\n")
        write_text(folder / f"{result.task}.jsonl", "".join(rows))
        if samples:
            write_text(folder / f"samples_{result.task}.jsonl", "".join(rows))
        overview = [judged for judged in result.samples if judged.image is not None]
        step = max(1, -(-len(overview) // GRID_IMAGES))
        shown = [(one.image, one.correct) for one in overview[::step] if one.image is not None]
        if shown:
            sheet = grid([image for image, _ in shown], columns=12, marks=[correct for _, correct in shown])
            sheet.save(folder / f"{result.task}.png")
    write_text(folder / "results.json", json.dumps(summary, indent=1) + "\n")
