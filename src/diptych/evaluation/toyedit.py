"""Edits of toy scenes: was the instruction carried out, and was the rest left alone."""

from __future__ import annotations

from typing import Any

import torch

from diptych.core.errors import UserError
from diptych.evaluation.results import Judged, Progress, TaskResult, shares
from diptych.inference.engine import Engine, to_pil
from diptych.toyworld.editjudge import EditVerdict, judge_edit
from diptych.toyworld.edits import EDIT_KINDS, Edit
from diptych.toyworld.samples import ToyWorld

NAME = "toyedit"
COUNT = 120
SEED = 900_001
"""Of the evaluated stream; training uses others, and two seeds share no items."""


def run(
    engine: Engine,
    *,
    n: int = 1,
    limit: int | None = None,
    seed: int = 0,
    progress: Progress | None = None,
    **options: Any,
) -> TaskResult:
    """`COUNT` edits (or `limit`), `n` images each.

    The scores are shares of edits carried out, by kind of edit; `preserved` is the mean share of untouched pixels that
    stayed as they were. Doing nothing scores 0 and preserves all; so both must be read together.
    """
    count = COUNT if limit is None else limit
    if count < 1:
        raise UserError(f"limit must be at least 1, not {count}")
    height, width = options.get("size", engine.sampling.size)
    if height != width:
        raise UserError(f"toyedit draws squares, not {height}x{width}")
    world = ToyWorld(SEED, height)
    requests = [world.sample("edit", index) for index in range(count)]
    if progress is not None:
        progress(0, n * count)
    images = engine.tensors(requests, n=n, seed=seed, progress=progress, **options)
    outcomes: dict[str, list[bool]] = {kind: [] for kind in EDIT_KINDS}
    preserved: list[float] = []
    samples: list[Judged] = []
    failed = 0
    for number, image in enumerate(images):
        request = requests[number // n]
        edit = Edit.from_dict(request.extra["edit"])
        if torch.isfinite(image).all():
            verdict = judge_edit(image, edit)
        else:
            verdict = EditVerdict(success=False, preserved=0.0, reason="not finite")
            failed += 1
        outcomes[edit.kind].append(verdict.success)
        preserved.append(verdict.preserved)
        row = {"id": request.id, "category": edit.kind, "prompt": request.text, "reason": verdict.reason}
        row |= {"preserved": verdict.preserved}
        samples.append(Judged(row=row, correct=verdict.success, image=to_pil(torch.nan_to_num(image))))
    scores = shares({kind: values for kind, values in outcomes.items() if values})
    scores |= {"preserved": sum(preserved) / len(preserved), "images": len(images), "edits": count}
    return TaskResult(task=NAME, scores=scores, samples=samples, failed=failed, sampling=options)
