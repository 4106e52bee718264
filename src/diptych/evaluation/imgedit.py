"""ImgEdit-Bench's rules (Ye et al. 2025, arXiv 2505.20275): a judge's three scores from 1 to 5 to means by type."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

TYPES = ("add", "adjust", "extract", "replace", "remove", "background", "style", "compose", "action")
SCORES = 3
LOW, HIGH = 1, 5


def scores(reply: object) -> list[int]:
    """The numbers that the official parser takes from a reply.

    A line counts if it has one ": " only, with nothing but digits after it. So `4/5`, `4.5` or `**4**` are lost, and
    `Total: 12` is taken.

    Raises:
        AttributeError, ValueError: where the official program stops: a reply that is no text, a superscript digit.
    """
    numbers: list[int] = []
    for line in reply.splitlines():  # type: ignore[attr-defined]
        parts = line.strip().split(": ")
        if len(parts) == 2 and parts[1].isdigit():
            numbers.append(int(parts[1]))
    return numbers


def average(reply: object, rounded: bool = True) -> float | None:
    """Mean of a reply's scores, to two decimals as officially; None where there are none."""
    numbers = scores(reply)
    if not numbers:
        return None
    mean = sum(numbers) / len(numbers)
    return round(mean, 2) if rounded else mean


def problem(reply: str) -> str | None:
    """Why a reply is not an answer to the question that was asked, or None: three scores from 1 to 5 are."""
    try:
        numbers = scores(reply)
    except ValueError:
        return "a score that is not a number"
    if not numbers:
        return "no score"
    if any(not LOW <= value <= HIGH for value in numbers):
        return f"a score out of range ({next(value for value in numbers if not LOW <= value <= HIGH)})"
    if len(numbers) != SCORES:
        return f"{len(numbers)} scores instead of {SCORES}"
    return None


def clamped(numbers: Sequence[int]) -> list[int]:
    """The second and third score no higher than the first, which the judge is asked for and nothing enforces."""
    return [numbers[0], *(min(value, numbers[0]) for value in numbers[1:])]


def summary(items: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Official means of replies, and both ways in which papers sum them up.

    Args:
        items: by key, `edit_type` (may be None) and `reply`.

    Returns:
        `item_averages`, `dropped_items` (no score found; left out of every mean), `type_averages`, `type_counts`;
        `overall_per_item`, mean over items (GPT-4o's and Ovis-U1's rows); `overall_per_type`, mean of the types (all
        other rows). Each in the roundings in use: see the keys.
    """
    averages = {key: average(item["reply"]) for key, item in items.items()}
    plain = {key: average(item["reply"], rounded=False) for key, item in items.items()}
    kinds = {key: item.get("edit_type") for key, item in items.items()}
    return summarise(averages, plain, kinds)


def summarise(
    averages: Mapping[str, float | None], plain: Mapping[str, float | None], kinds: Mapping[str, str | None]
) -> dict[str, Any]:
    """As `summary`, from rounded and plain item averages."""
    kept = {key: value for key, value in averages.items() if value is not None}
    if not kept:
        return {"item_averages": {}, "dropped_items": list(averages), "type_averages": {}, "type_counts": {}}
    typed = [key for key in kept if kinds[key]]
    types = list(dict.fromkeys(str(kinds[key]) for key in typed))
    by_type = {name: [key for key in typed if kinds[key] == name] for name in types}
    reported = {name: round(mean([kept[key] for key in keys]), 2) for name, keys in by_type.items()}
    exact = {key: value for key, value in plain.items() if value is not None}
    return {
        "item_averages": kept,
        "dropped_items": [key for key in averages if key not in kept],
        "type_averages": reported,
        "type_counts": {name: len(keys) for name, keys in by_type.items()},
        "overall_per_item": {
            "reported": round(mean(list(kept.values())), 2),
            "unrounded_end": mean([kept[key] for key in typed]),
            "no_rounding": mean([exact[key] for key in typed]),
        },
        "overall_per_type": {
            "of_reported_types": mean(list(reported.values())),
            "of_item_averages": mean([mean([kept[key] for key in keys]) for keys in by_type.values()]),
            "no_rounding": mean([mean([exact[key] for key in keys]) for keys in by_type.values()]),
        },
        "understanding_grounding_suite_average": round(mean(list(kept.values())), 2),
    }


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
