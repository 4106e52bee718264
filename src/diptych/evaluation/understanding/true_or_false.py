"""Benchmarks of yes/no questions: POPE, MME, HallusionBench, VSR."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from diptych.core.errors import UserError
from diptych.evaluation.understanding.scored import (
    Replies,
    Row,
    Scored,
    by_column,
    each,
    grouped,
    mean,
    positions_by,
    ratio,
)
from diptych.evaluation.understanding.yes_no import YesNo, kit_yes_no, mme_script, pope_script

Reader = Callable[[str], YesNo | None]

PERCEPTION = (
    "existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR",
)  # fmt: skip
REASONING = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")
_READ_BY = "yes or no by VLMEvalKit's rule; a reply with neither or both is wrong"


def read_answers(
    rows: Sequence[Row], replies: Replies, reader: Reader = kit_yes_no
) -> tuple[tuple[YesNo | None, ...], tuple[float, ...]]:
    """What each reply was read as, and 1 where that is the answer."""
    read: tuple[YesNo | None, ...] = tuple(None if reply is None else reader(reply) for reply in replies)
    values: list[float] = []
    for row, said in zip(rows, read, strict=True):
        values.append(float(said == truth(row)))
    return read, tuple(values)


def truth(row: Row) -> YesNo:
    """The answer of a row."""
    answer = str(row.get("answer")).strip().capitalize()
    if answer == "Yes":
        return "Yes"
    if answer == "No":
        return "No"
    raise UserError(f"row {row.get('index')}: the answer must be Yes or No, not {row.get('answer')!r}")


def accuracy(rows: Sequence[Row], replies: Replies) -> Scored:
    """Share of right answers (VSR), and by `category`."""
    read, values = read_answers(rows, replies)
    figures = {"category": by_column(rows, values, "category")}
    return Scored(
        convention=f"accuracy; {_READ_BY}",
        figures=figures,
        values=values,
        read=read,
        counts=each(values),
        combine=ratio,
        by=grouped(rows, each(values)),
    )


def pope(rows: Sequence[Row], replies: Replies) -> Scored:
    """POPE (Li et al. 2023): the headline figure is F1; accuracy, precision and recall beside it, all as shares.

    A row of several categories counts in each, and as often in the whole, as VLMEvalKit has it. A reply that is neither
    yes nor no is wrong for accuracy and a no for the others. `script` is POPE's own way: F1 by category and its mean.
    """
    read, values = read_answers(rows, replies)
    theirs: list[YesNo | None] = [None if answer is None else pope_script(answer) for answer in replies]
    groups: dict[str, list[int]] = {}
    for at, row in enumerate(rows):
        for name in str(row.get("category") or "all").split(","):
            groups.setdefault(name, []).append(at)
    repeated = [at for group in groups.values() for at in group]
    often = Counter(repeated)
    figures: dict[str, Any] = {"overall": _detection(rows, read, repeated)}
    figures |= {name: _detection(rows, read, group) for name, group in groups.items()}
    script = {name: _detection(rows, theirs, group) for name, group in groups.items()}
    counts = [
        (said and true, said, true)
        for said, true in zip((answer == "Yes" for answer in read), (truth(row) == "Yes" for row in rows), strict=True)
    ]
    return Scored(
        convention=f"F1, a row counting once per category; {_READ_BY}",
        figures={**figures, "script": {**script, "average_f1": mean(part["f1"] for part in script.values())}},
        values=values,
        read=read,
        counts=[[often[at] * count for count in row] for at, row in enumerate(counts)],
        combine=_f1,
        by={name: [counts[at] for at in group] for name, group in groups.items()},
        total=None,
    )


def _f1(sums: Sequence[float]) -> float:
    """F1 from (found, said, true)."""
    return 2 * sums[0] / (sums[1] + sums[2]) if sums[0] else 0.0


def _detection(rows: Sequence[Row], read: Sequence[YesNo | None], group: Sequence[int]) -> dict[str, float]:
    """Accuracy, precision, recall and F1 of finding the yes among the rows of a group; 0 where undefined."""
    said = [read[at] == "Yes" for at in group]
    true = [truth(rows[at]) == "Yes" for at in group]
    both = sum(said_yes and is_yes for said_yes, is_yes in zip(said, true, strict=True))
    precision = both / sum(said) if any(said) else 0.0
    recall = both / sum(true) if any(true) else 0.0
    return {
        "accuracy": mean(float(read[at] == truth(rows[at])) for at in group),
        "precision": precision,
        "recall": recall,
        "f1": 2 * precision * recall / (precision + recall) if both else 0.0,
        "yes_ratio": mean(map(float, said)),
    }


def mme(rows: Sequence[Row], replies: Replies) -> Scored:
    """MME (Fu et al. 2023): for each category 100 x (accuracy + share of images with both questions right).

    The headline figure is the sum over all categories, of 2,800 points: perception (2,000) and reasoning (800).
    `script` is the same by the reading of MME's own script.
    """
    read, values = read_answers(rows, replies)
    _, theirs = read_answers(rows, replies, mme_script)
    groups = _image_pairs(rows)
    figures = _mme_figures(rows, values, groups)
    counts = _mme_counts(rows, values, groups)
    return Scored(
        convention=f"points of 2,800, perception and reasoning; {_READ_BY}",
        unit="points",
        figures={**figures, "script": _mme_figures(rows, theirs, groups)},
        values=values,
        read=read,
        counts=counts,
        combine=_mme_points,
        by=grouped(rows, counts, units=groups),
        units=groups,
        worth=lambda earned: (mean(earned) + min(earned)) / 2,
        total="categories",
        scale=200.0 * len(figures["category"]),
        top=_mme_top,
    )


def _mme_counts(rows: Sequence[Row], values: Sequence[float], groups: Sequence[Sequence[int]]) -> list[list[float]]:
    """Of each image, for each category in turn: questions right, questions, both right, images."""
    names = PERCEPTION + REASONING
    counts: list[list[float]] = []
    for group in groups:
        earned = [values[at] for at in group]
        here = [sum(earned), float(len(group)), min(earned), 1.0]
        place = names.index(str(rows[group[0]]["category"]))
        counts.append([0.0] * 4 * place + here + [0.0] * 4 * (len(names) - place - 1))
    return counts


def _mme_points(sums: Sequence[float]) -> float:
    parts = [sums[at : at + 4] for at in range(0, len(sums), 4)]
    return sum(100 * (right / asked + both / images) for right, asked, both, images in parts if images)


def _mme_top(counts: Sequence[Sequence[float]]) -> float:
    """200 points for each category that there is."""
    images = [sum(column) for column in zip(*counts, strict=True)][3::4]
    return 200.0 * sum(number > 0 for number in images)


def _image_pairs(rows: Sequence[Row]) -> list[list[int]]:
    """Positions of the two questions of each image, which stand next to each other."""
    groups: list[list[int]] = []
    for at, row in enumerate(rows):
        last = groups[-1] if groups else None
        if last and len(last) == 1 and rows[last[0]]["category"] == row["category"]:
            last.append(at)
        else:
            groups.append([at])
    alone = [group for group in groups if len(group) == 1]
    if alone:
        raise UserError(f"row {rows[alone[0][0]].get('index')}: the other question about its image is missing")
    return groups


def _mme_figures(rows: Sequence[Row], values: Sequence[float], groups: Sequence[Sequence[int]]) -> dict[str, Any]:
    points: dict[str, float] = {}
    for category, at in positions_by(rows, "category").items():
        both = [min(values[row] for row in pair) for pair in groups if rows[pair[0]]["category"] == category]
        points[category] = 100 * (mean(values[row] for row in at) + mean(both))
    unknown = sorted(set(points) - set(PERCEPTION) - set(REASONING))
    if unknown:
        raise UserError(f"MME has no category {unknown[0]!r}. Categories: {', '.join(PERCEPTION + REASONING)}.")
    perception, reasoning = (sum(points.get(name, 0.0) for name in part) for part in (PERCEPTION, REASONING))
    return {"perception": perception, "reasoning": reasoning, "category": points}


def hallusion_bench(rows: Sequence[Row], replies: Replies) -> Scored:
    """HallusionBench (Guan et al. 2024): `aAcc` of questions, `fAcc` of figures and `qAcc` of question pairs all right.

    The headline figure is the mean of the three. Figures are told apart by (l2-category, set, figure), pairs by
    (l2-category, set, question), from the index `category_subcategory_visual_set_figure_question`.
    """
    read, values = read_answers(rows, replies)
    figures: dict[str, Any] = {"overall": _three(rows, values, range(len(rows)))}
    for column in ("category", "l2-category"):
        figures |= {name: _three(rows, values, at) for name, at in positions_by(rows, column).items()}
    sets = list(_sets(rows, range(len(rows)), (3,)).values())
    counts = [
        [count for right in _rights(rows, values, group) for count in (sum(right), float(len(right)))] for group in sets
    ]
    return Scored(
        convention=f"mean of aAcc, fAcc and qAcc; {_READ_BY}",
        figures=figures,
        values=values,
        read=read,
        counts=counts,
        combine=lambda sums: mean(ratio(sums[at : at + 2]) for at in (0, 2, 4)),
        by=grouped(rows, counts, "l2-category", sets),
        units=sets,
        total=None,
        label="l2-category",
    )


def _three(rows: Sequence[Row], values: Sequence[float], at: Sequence[int]) -> dict[str, float]:
    return dict(zip(("aAcc", "fAcc", "qAcc"), map(mean, _rights(rows, values, at)), strict=True))


def _rights(rows: Sequence[Row], values: Sequence[float], at: Sequence[int]) -> list[list[float]]:
    """Of these rows: for each question, each figure and each pair, whether all is right."""
    groups = [_sets(rows, at, fields).values() for fields in ((3, 4), (3, 5))]
    return [[values[row] for row in at], *([min(values[row] for row in group) for group in part] for part in groups)]


def _sets(rows: Sequence[Row], at: Sequence[int], fields: Sequence[int]) -> dict[tuple[str, ...], list[int]]:
    """Positions grouped by l2-category and these fields of the index."""
    groups: dict[tuple[str, ...], list[int]] = {}
    for row in at:
        parts = str(rows[row]["index"]).rsplit("_", 4)
        if len(parts) != 5:
            raise UserError(f"row {rows[row]['index']}: index must end in _visual_set_figure_question")
        named = (str(rows[row]["l2-category"]), *(parts[field - 1] for field in fields))
        groups.setdefault(named, []).append(row)
    return groups
