"""Questions about toy scenes, answered from the image, by kind of question."""

from __future__ import annotations

from diptych.core.errors import UserError
from diptych.core.sample import IMAGE_PLACEHOLDER
from diptych.evaluation.results import Judged, Progress, TaskResult, shares
from diptych.inference.engine import Engine, to_pil
from diptych.toyworld.language import QUESTION_KINDS
from diptych.toyworld.samples import ToyWorld

NAME = "toyvqa"
COUNT = 256
SEED = 900_002
LARGEST = 64
"""Scenes are drawn at the model's own size up to this, else at 32 px."""


def run(
    engine: Engine, *, limit: int | None = None, batch_size: int = 64, progress: Progress | None = None
) -> TaskResult:
    """The first question of `COUNT` (or `limit`) scenes; an answer counts when it is the true one, word for word
    (case, spaces around it and a full stop aside)."""
    count = COUNT if limit is None else limit
    if count < 1:
        raise UserError(f"limit must be at least 1, not {count}")
    side = engine.sampling.size[0] if engine.sampling.size[0] <= LARGEST else 32
    world = ToyWorld(SEED, side, text_only=0.0, captions=0.0)
    outcomes: dict[str, list[bool]] = {kind: [] for kind in QUESTION_KINDS}
    samples: list[Judged] = []
    if progress is not None:
        progress(0, count)
    for start in range(0, count, batch_size):
        asked = [world.sample("understand", index) for index in range(start, min(start + batch_size, count))]
        images = [to_pil(sample.context_images[0]) for sample in asked]
        questions = [sample.messages[0].text.replace(IMAGE_PLACEHOLDER, "").strip() for sample in asked]
        answers = engine.ask(images, questions, max_new_tokens=16)
        for sample, question, answer in zip(asked, questions, answers, strict=True):
            truth, kind = sample.messages[1].text, sample.extra["question_kinds"][0]
            correct = plain(answer) == plain(truth)
            outcomes[kind].append(correct)
            row = {"id": sample.id, "category": kind, "prompt": question, "answer": answer, "truth": truth}
            samples.append(Judged(row=row, correct=correct))
        if progress is not None:
            progress(len(samples), count)
    scores = shares({kind: values for kind, values in outcomes.items() if values})
    return TaskResult(task=NAME, scores={**scores, "questions": count}, samples=samples)


def plain(answer: str) -> str:
    return answer.strip().lower().removesuffix(".").strip()
