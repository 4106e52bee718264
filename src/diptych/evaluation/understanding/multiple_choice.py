"""Benchmarks of multiple-choice questions: accuracy, MMBench's rotations, MMVP's pairs, CV-Bench's halves."""

from __future__ import annotations

import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from diptych.core.errors import UserError
from diptych.evaluation.understanding.letters import Choices, kit_letter
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

Reader = Callable[[str, Choices], str | None]

ROTATION = 1_000_000
"""Rotation r of MMBench's question q has index r * ROTATION + q."""
ABILITIES = {
    "coarse_perception": "CP",
    "finegrained_perception (instance-level)": "FP-S",
    "finegrained_perception (cross-instance)": "FP-C",
    "logic_reasoning": "LR",
    "relation_reasoning": "RR",
    "attribute_reasoning": "AR",
}
"""MMBench's l2-categories, as tables print them."""
ONE_SPLIT = "none"
_READ_BY = "letter by VLMEvalKit's rules, no judge; a reply without a letter is wrong"


def choices(row: Row) -> dict[str, str]:
    """Option texts by letter; empty ones are no options."""
    return {letter: str(row[letter]) for letter in string.ascii_uppercase if row.get(letter) not in (None, "")}


def accuracy(rows: Sequence[Row], replies: Replies, *, reader: Reader = kit_letter) -> Scored:
    """Share of right letters, over all rows and by `split`, `category` and `l2-category`."""
    read, values = read_letters(rows, replies, reader)
    figures = {
        column: means for column in ("split", "category", "l2-category") if (means := by_column(rows, values, column))
    }
    return Scored(
        convention=f"accuracy; {_READ_BY}",
        figures=figures,
        values=values,
        read=read,
        counts=each(values),
        combine=ratio,
        by=grouped(rows, each(values)),
    )


OTHER = "Other Answers"
"""The second option of an open question, as VLMEvalKit turns it into a choice."""


def mmmu(rows: Sequence[Row], replies: Replies) -> Scored:
    """MMMU (Yue et al. 2023): `accuracy`, open questions as VLMEvalKit scores them: the answer is option A, and B is
    `OTHER`; a reply is right where the answer's text, or an A, is read from it."""
    closed = [row if choices(row) else {**row, "A": row.get("answer"), "B": OTHER, "answer": "A"} for row in rows]
    return replace(accuracy(closed, replies), convention=f"accuracy, open questions as two options; {_READ_BY}")


def read_letters(
    rows: Sequence[Row], replies: Replies, reader: Reader = kit_letter
) -> tuple[tuple[str | None, ...], tuple[float, ...]]:
    """What each reply was read as, and 1 where that is the answer.

    Raises:
        UserError: a row has no answer, as in files whose answers are not published.
    """
    read: list[str | None] = []
    values: list[float] = []
    for row, reply in zip(rows, replies, strict=True):
        if row.get("answer") in (None, ""):
            raise UserError(
                f"row {row.get('index')}: no answer in the file, so it cannot be scored here; "
                "its publisher's server scores the replies, which stand in submission.xlsx beside them"
            )
        letter = None if reply is None else reader(reply, choices(row))
        read.append(letter)
        values.append(float(letter is not None and letter == row["answer"]))
    return tuple(read), tuple(values)


def circular(rows: Sequence[Row], replies: Replies) -> Scored:
    """MMBench: a question counts when every rotation of its options got its right letter (Liu et al. 2024, Sec. 4).

    The headline figure is that share over all questions; `circular` holds it for each split, with MMBench's abilities
    and categories; `first_rotation` the same over the questions as first asked.
    """
    read, values = read_letters(rows, replies)
    questions: dict[int, list[int]] = {}
    for at, row in enumerate(rows):
        questions.setdefault(int(row["index"]) % ROTATION, []).append(at)
    heads = {
        base: next((at for at in group if int(rows[at]["index"]) == base), group[0])
        for base, group in questions.items()
    }
    hits = {base: min(values[at] for at in group) for base, group in questions.items()}
    first = {base: values[heads[base]] for base in questions}
    asked = [rows[heads[base]] for base in questions]
    return Scored(
        convention=f"circular: right in every rotation; {_READ_BY}",
        figures={
            "circular": _abilities(asked, list(hits.values())),
            "first_rotation": _abilities(asked, list(first.values())),
            "circular_hits": {str(base): int(hit) for base, hit in hits.items()},
            "first_rotation_hits": {str(base): int(hit) for base, hit in first.items()},
        },
        values=values,
        read=read,
        counts=each(hits.values()),
        combine=ratio,
        by=grouped(asked, each(hits.values())),
        units=tuple((heads[base], *(at for at in group if at != heads[base])) for base, group in questions.items()),
        worth=min,
    )


def _abilities(rows: Sequence[Row], values: Sequence[float]) -> dict[str, dict[str, float | None]]:
    """By split: `Overall`, abilities and categories; None where a split has no such question."""
    groups = positions_by(rows, "split") or {ONE_SPLIT: list(range(len(rows)))}
    names = {column: sorted(positions_by(rows, column)) for column in ("l2-category", "category")}
    means: dict[str, dict[str, float | None]] = {}
    for split, group in groups.items():
        part, earned = [rows[at] for at in group], [values[at] for at in group]
        table: dict[str, float | None] = {"Overall": mean(earned)}
        for column, entries in names.items():
            shares = by_column(part, earned, column)
            table |= {ABILITIES.get(entry, entry): shares.get(entry) for entry in entries}
        means[split] = table
    return means


def pairs(rows: Sequence[Row], replies: Replies, *, reader: Reader = kit_letter) -> Scored:
    """MMVP: rows 2i and 2i + 1 are a pair (Tong et al. 2024). The headline figure is the share of pairs with both
    right; `question` that of questions."""
    read, values = read_letters(rows, replies, reader)
    place = {int(row["index"]): at for at, row in enumerate(rows)}
    groups: dict[int, list[int]] = {}
    for index, at in sorted(place.items()):
        groups.setdefault(index // 2, []).append(at)
    alone = [group for group in groups.values() if len(group) != 2]
    if alone:
        raise UserError(f"row {rows[alone[0][0]]['index']}: the other row of its pair is missing")
    both = [min(values[at] for at in group) for group in groups.values()]
    return Scored(
        convention=f"share of pairs with both right; {_READ_BY}",
        figures={"pair": mean(both), "question": mean(values)},
        values=values,
        read=read,
        counts=each(both),
        combine=ratio,
        units=tuple(groups.values()),
        worth=min,
    )


def cv_bench(rows: Sequence[Row], replies: Replies) -> Scored:
    """CV-Bench (Tong et al. 2024, Cambrian-1): 2D is the mean of ADE20K and COCO, 3D is Omni3D, the whole their mean.

    With rows of one half only, the headline figure is that half's.
    """
    read, values = read_letters(rows, replies)
    source = by_column(rows, values, "source")
    unknown = [name for name in source if _half(name) is None]
    if unknown or not source:
        raise UserError(f"CV-Bench needs a column 'source' of ADE20K, COCO and Omni3D, not {unknown or 'none'}")
    names = list(source)

    def combine(sums: Sequence[float]) -> float:
        return mean(
            _halves(dict(zip(names, sums[::2], strict=True)), dict(zip(names, sums[1::2], strict=True))).values()
        )

    halves = _halves(source, dict.fromkeys(source, 1.0))
    counts = [
        [count for name in names for count in ((value, 1.0) if str(row["source"]) == name else (0.0, 0.0))]
        for row, value in zip(rows, values, strict=True)
    ]
    peers = {name: [other for other in names if _half(other) == _half(name)] for name in names}
    return Scored(
        convention=f"mean of (ADE20K + COCO) / 2 and of Omni3D ({' and '.join(halves)} here); {_READ_BY}",
        figures={**halves, "source": source, "category": by_column(rows, values, "category")},
        values=values,
        read=read,
        counts=counts,
        combine=combine,
        by=grouped(rows, counts, "source"),
        total={name: 1 / len(halves) / len(peers[name]) for name in names},
        label="source",
    )


def _half(source: str) -> str | None:
    """ "2D" or "3D", or None for a source that CV-Bench does not have."""
    lowered = source.lower()
    return "2D" if lowered.startswith(("ade", "coco")) else "3D" if lowered.startswith("omni3d") else None


def _halves(right: Mapping[str, float], asked: Mapping[str, float]) -> dict[str, float]:
    """The share of each half, the mean of those of its sources."""
    shares = {name: right[name] / asked[name] for name in right if asked[name]}
    return {
        half: mean(share for name, share in shares.items() if _half(name) == half)
        for half in ("2D", "3D")
        if any(_half(name) == half for name in shares)
    }
