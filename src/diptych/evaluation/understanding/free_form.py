"""Benchmarks of short free answers without a judge: DocVQA, ChartQA, TextVQA, OCRBench."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from diptych.core.errors import UserError
from diptych.evaluation.understanding.scored import Replies, Row, Scored, by_column, each, grouped, positions_by, ratio
from diptych.evaluation.understanding.text import anls, answers, relaxed_accuracy, vqa_accuracy

RECOGNITION = (
    "Regular Text Recognition",
    "Irregular Text Recognition",
    "Artistic Text Recognition",
    "Handwriting Recognition",
    "Digit String Recognition",
    "Non-Semantic Text Recognition",
)
MATHEMATICS = "Handwritten Mathematical Expression Recognition"
OCR_OTHERS = ("Scene Text-centric VQA", "Doc-oriented VQA", "Key Information Extraction", MATHEMATICS)
OCR_QUESTIONS = 1000


def doc_vqa(rows: Sequence[Row], replies: Replies) -> Scored:
    """DocVQA's ANLS, the mean over questions."""
    return _each(rows, replies, lambda reply, answer: anls(reply, answers(answer)), "ANLS")


def chart_qa(rows: Sequence[Row], replies: Replies) -> Scored:
    """ChartQA's relaxed accuracy (Masry et al. 2022): numbers within 5%; over all questions and by split."""
    return _each(rows, replies, relaxed_accuracy, "relaxed accuracy (5%)")


def text_vqa(rows: Sequence[Row], replies: Replies) -> Scored:
    """TextVQA's accuracy over ten people's answers."""
    return _each(rows, replies, lambda reply, answer: vqa_accuracy(reply, answers(answer)), "VQA accuracy")


def _each(rows: Sequence[Row], replies: Replies, score: Callable[[str, Any], float], convention: str) -> Scored:
    """The mean of a score per reply, over all rows and by split."""
    pairs = zip(rows, replies, strict=True)
    values = tuple(0.0 if reply is None else score(reply, _answer(row)) for row, reply in pairs)
    figures = {"split": split} if (split := by_column(rows, values, "split")) else {}
    return Scored(
        convention=convention,
        figures=figures,
        values=values,
        read=tuple(replies),
        counts=each(values),
        combine=ratio,
        by=grouped(rows, each(values), "split"),
        label="split",
    )


def ocr_bench(rows: Sequence[Row], replies: Replies) -> Scored:
    """OCRBench (Liu et al. 2024): right when any answer occurs in the reply; the sum of right replies, of 1,000.

    `figures` has the sum of each kind; `normalised`, a tenth of the sum, is a percentage for the whole set only.
    """
    values: list[float] = []
    for row, reply in zip(rows, replies, strict=True):
        if row.get("category") not in (*RECOGNITION, *OCR_OTHERS):
            raise UserError(f"row {row.get('index')}: OCRBench has no category {row.get('category')!r}")
        formula = row["category"] == MATHEMATICS
        said = None if reply is None else _ocr_text(reply, formula)
        accepted = [_ocr_text(answer, formula) for answer in answers(_answer(row))]
        values.append(float(said is not None and any(answer in said for answer in accepted)))
    kinds = {name: sum(values[at] for at in group) for name, group in positions_by(rows, "category").items()}
    total = sum(values)
    figures = {
        "Text Recognition": sum(kinds.get(name, 0.0) for name in RECOGNITION),
        **{name: kinds.get(name, 0.0) for name in OCR_OTHERS},
        "normalised": total / 10,
    }
    return Scored(
        convention=f"right replies of {OCR_QUESTIONS:,}: an answer occurs in the reply",
        unit="points",
        figures=figures,
        values=tuple(values),
        read=tuple(replies),
        counts=each(values),
        combine=lambda sums: sums[0],
        by=grouped(rows, each(values)),
        scale=len(values),
        top=lambda counts: float(len(counts)),
    )


def _ocr_text(text: str, formula: bool) -> str:
    flat = text.strip().replace("\n", " ")
    return flat.replace(" ", "") if formula else flat.lower()


def _answer(row: Row) -> Any:
    if row.get("answer") in (None, ""):
        raise UserError(
            f"row {row.get('index')}: no answer in the file, so it cannot be scored here; "
            "its publisher's server scores the replies"
        )
    return row["answer"]
