"""ToyEval on a model: images for held-out prompts of the toy world, judged by the exact detector."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest
from typing import Any

import torch

from diptych.core.errors import UserError
from diptych.core.sample import Sample
from diptych.evaluation.results import Judged, Progress, TaskResult
from diptych.inference.engine import Engine, to_pil
from diptych.toyworld import toyeval
from diptych.toyworld.toyeval import ToyPrompt, Verdict

NAME = "toyeval"


def run(
    engine: Engine,
    *,
    n: int = 4,
    limit: int | None = None,
    seed: int = 0,
    progress: Progress | None = None,
    **options: Any,
) -> TaskResult:
    """ToyEval with `n` images per prompt.

    Args:
        limit: at most this many prompts, taken from the categories in turn.
        seed: of the noise; the prompts are always the same.
        options: fields of `Sampling` that replace the model's defaults.
    """
    prompts = choose(limit)
    requests = [Sample(id=prompt.id, task="text_to_image", text=prompt.text) for prompt in prompts]
    if progress is not None:
        progress(0, n * len(prompts))
    expansions: list[str] = []
    images = engine.tensors(requests, n=n, seed=seed, progress=progress, expansions=expansions, **options)
    verdicts: list[Verdict] = []
    samples: list[Judged] = []
    failed = 0
    for number, image in enumerate(images):
        prompt = prompts[number // n]
        if torch.isfinite(image).all():
            verdict = toyeval.judge(image, prompt)
        else:
            verdict = Verdict(prompt=prompt.id, category=prompt.category, correct=False, reason="not finite")
            failed += 1
        verdicts.append(verdict)
        row = {"id": prompt.id, "category": prompt.category, "prompt": prompt.text, "reason": verdict.reason}
        if expansions:
            row["expansion"] = expansions[number]
        samples.append(Judged(row=row, correct=verdict.correct, image=to_pil(torch.nan_to_num(image))))
    return TaskResult(task=NAME, scores=scores(verdicts), samples=samples, failed=failed, sampling=options)


def choose(limit: int | None) -> list[ToyPrompt]:
    """The prompts, category by category; with `limit`, so many, taken from the categories in turn."""
    every = toyeval.prompts()
    if limit is None or limit >= len(every):
        return every
    if limit < 1:
        raise UserError(f"limit must be at least 1, not {limit}")
    by_category: dict[str, list[ToyPrompt]] = {}
    for prompt in every:
        by_category.setdefault(prompt.category, []).append(prompt)
    turns = [prompt for row in zip_longest(*by_category.values()) for prompt in row if prompt is not None]
    kept = {prompt.id for prompt in turns[:limit]}
    return [prompt for prompt in every if prompt.id in kept]


def scores(verdicts: Sequence[Verdict]) -> dict[str, Any]:
    """Verdicts as plain values: `overall`, `interval`, each category, and how much was judged."""
    total = toyeval.aggregate(verdicts)
    each = {
        name: {"score": score.value, "interval": [score.low, score.high], "count": score.images}
        for name, score in total.categories.items()
    }
    return {
        "overall": total.overall.value,
        "interval": [total.overall.low, total.overall.high],
        **each,
        "images": total.overall.images,
        "prompts": total.overall.prompts,
        "image_accuracy": total.images,
        "prompt_accuracy": total.prompts,
    }
