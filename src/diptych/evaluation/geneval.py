"""GenEval's rules (Ghosh et al. 2023, arXiv 2310.11513): from detected boxes and colours to verdicts and scores.

Pure functions over plain numbers; the detector is in `geneval_models.py`, prompts and files in `geneval_task.py`.
Boxes are (x0, y0, x1, y1) in pixels, y growing downwards.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
Box = Sequence[float]


@dataclass(frozen=True, kw_only=True)
class Rules:
    """The official settings.

    threshold: boxes must score strictly above it; counting_threshold: the same where the prompt's tag is `counting`.
    max_objects: most boxes of a class. max_overlap: boxes that overlap a better one this much are dropped; 1 for none.
    position_threshold: share of both extents within which a centre difference counts as none.
    """

    threshold: float = 0.3
    counting_threshold: float = 0.9
    max_objects: int = 16
    max_overlap: float = 1.0
    position_threshold: float = 0.1


@dataclass(frozen=True, kw_only=True)
class Found:
    """What a detector saw of one class in one image: boxes (N, 4), scores (N,), and colours where they were asked."""

    boxes: Sequence[Box]
    scores: Sequence[float]
    colors: Sequence[str] | None = None


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """correct, each failed check with its numbers, and the boxes used: per class, positions in what was found."""

    correct: bool
    reasons: list[dict[str, Any]]
    kept: dict[str, list[int]] = field(default_factory=dict[str, list[int]])

    @property
    def text(self) -> str:
        """The reasons in words, one a line."""
        return "\n".join(describe(reason) for reason in self.reasons)


def overlap(a: Box, b: Box) -> float:
    """Intersection over union, both ends of a box counted as inside (lengths + 1)."""

    def area(box: Box) -> float:
        return max(box[2] - box[0] + 1, 0) * max(box[3] - box[1] + 1, 0)

    shared = area((max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3])))
    union = area(a) + area(b) - shared
    return shared / union if union else 0.0


def relations(a: Box, b: Box, position_threshold: float = 0.1) -> set[str]:
    """Where `a` is, seen from `b`: up to two of `left of`, `right of`, `above`, `below`; none where they are too near.

    The centre difference of each axis shrinks by `position_threshold` times both extents; what remains is divided by
    the length of the whole difference, and a side counts beyond a half.
    """
    differences, remaining = [], []
    for low, high in ((0, 2), (1, 3)):
        difference = (a[low] + a[high]) / 2 - (b[low] + b[high]) / 2
        slack = position_threshold * (abs(a[high] - a[low]) + abs(b[high] - b[low]))
        differences.append(difference)
        remaining.append(math.copysign(max(abs(difference) - slack, 0.0), difference))
    if all(abs(value) < 1e-3 for value in remaining):
        return set()
    length = math.hypot(*differences)
    across, down = (value / length for value in remaining)
    named = {"right of": across > 0.5, "left of": across < -0.5, "below": down > 0.5, "above": down < -0.5}
    return {name for name, holds in named.items() if holds}


def keep(detections: Found, threshold: float, rules: Rules) -> list[int]:
    """Positions of the boxes of a class that count, best first: threshold, sort, cut, and only then overlaps."""
    above = [position for position, score in enumerate(detections.scores) if score > threshold]
    best = sorted(above, key=lambda position: -detections.scores[position])[: rules.max_objects]
    if rules.max_overlap >= 1:
        return best
    kept: list[int] = []
    for position in best:
        box = detections.boxes[position]
        if all(overlap(box, detections.boxes[other]) < rules.max_overlap for other in kept):
            kept.append(position)
    return kept


def judge(metadata: Mapping[str, Any], detections: Mapping[str, Found], rules: Rules | None = None) -> Verdict:
    """Whether an image shows what a prompt asks for.

    Args:
        metadata: a line of GenEval's evaluation_metadata.jsonl: `tag`, `include`, `exclude`.
        detections: by class name; colours are needed for classes of which the prompt names one.
    """
    rules = rules or Rules()
    threshold = rules.counting_threshold if metadata.get("tag") == "counting" else rules.threshold
    every = {name: keep(found, threshold, rules) for name, found in detections.items()}
    kept = {name: positions for name, positions in every.items() if positions}
    reasons: list[dict[str, Any]] = []
    matched: list[tuple[str, list[int]] | None] = []
    for clause in metadata.get("include", ()):
        name, needed = clause["class"], clause["count"]
        used = kept.get(name, [])[:needed]
        before = len(reasons)
        if len(used) < needed:
            reasons.append({"category": "too_few", "class": name, "required": needed, "found": len(used)})
        else:
            reasons += _wrong_color(clause, detections[name], used)
        if len(reasons) == before and "position" in clause:
            reasons += _wrong_position(clause, detections, used, matched, rules)
        matched.append((name, used) if len(reasons) == before else None)
    for clause in metadata.get("exclude", ()):
        name, limit = clause["class"], clause["count"]
        count = len(kept.get(name, []))
        if count >= limit:
            reasons.append({"category": "too_many", "class": name, "limit": limit, "found": count})
    return Verdict(correct=not reasons, reasons=reasons, kept=kept)


def _wrong_color(clause: Mapping[str, Any], detections: Found, used: Sequence[int]) -> list[dict[str, Any]]:
    if "color" not in clause:
        return []
    assert detections.colors is not None, f"no colours are given for {clause['class']}"
    seen = Counter(detections.colors[position] for position in used)
    wanted, needed = clause["color"], clause["count"]
    if seen[wanted] >= needed:
        return []
    colors = {name: seen[name] for name in COLORS if name in seen}
    head = {"category": "wrong_color", "class": clause["class"], "color": wanted}
    return [{**head, "required": needed, "found": seen[wanted], "found_colors": colors}]


def _wrong_position(
    clause: Mapping[str, Any],
    detections: Mapping[str, Found],
    used: Sequence[int],
    matched: Sequence[tuple[str, list[int]] | None],
    rules: Rules,
) -> list[dict[str, Any]]:
    """Every box against every box of the target; the first pair that does not stand so ends the check."""
    name, (relation, target) = clause["class"], clause["position"]
    against = matched[target]
    if against is None:
        return [{"category": "no_target", "class": name, "relation": relation}]
    for position in used:
        for other in against[1]:
            boxes = detections[name].boxes[position], detections[against[0]].boxes[other]
            holding = relations(*boxes, rules.position_threshold)
            if relation not in holding:
                head = {"category": "wrong_position", "class": name, "relation": relation}
                return [{**head, "found_relations": sorted(holding)}]
    return []


def describe(reason: Mapping[str, Any]) -> str:
    """A failed check in GenEval's words."""
    kind, name = reason["category"], reason["class"]
    if kind == "too_few":
        return f"expected {name}>={reason['required']}, found {reason['found']}"
    if kind == "too_many":
        return f"expected {name}<{reason['limit']}, found {reason['found']}"
    if kind == "no_target":
        return f"no target for {name} to be {reason['relation']}"
    if kind == "wrong_position":
        seen = " and ".join(reason["found_relations"])
        return f"expected {name} {reason['relation']} target, found {seen} target"
    color = reason["color"]
    seen = ", ".join(f"{count} {other}" for other, count in reason["found_colors"].items())
    return f"expected {color} {name}>={reason['required']}, found {reason['found']} {color}; and {seen}"


def summary(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Official scores of judged images, as fractions.

    Args:
        rows: one per image: `tag`, `correct`, and `metadata`, the text that says which prompt it is.

    Returns:
        `overall`, the mean of the tags that occur; `per_tag`, image accuracies; `correct_images`; `correct_prompts`,
        where a prompt is right if any of its images is; and the totals.
    """
    by_tag: dict[str, list[bool]] = {}
    by_prompt: dict[str, bool] = {}
    for row in rows:
        by_tag.setdefault(row["tag"], []).append(bool(row["correct"]))
        by_prompt[row["metadata"]] = by_prompt.get(row["metadata"], False) or bool(row["correct"])
    per_tag = {tag: sum(values) / len(values) for tag, values in by_tag.items()}
    return {
        "overall": sum(per_tag.values()) / len(per_tag),
        "per_tag": per_tag,
        "correct_images": sum(bool(row["correct"]) for row in rows) / len(rows),
        "correct_prompts": sum(by_prompt.values()) / len(by_prompt),
        "total_images": len(rows),
        "total_prompts": len(by_prompt),
    }
