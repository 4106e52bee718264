"""Groups of tasks by one name, and their average as leaderboards print it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from diptych.evaluation import intervals

OPENCOMPASS = {
    "mmbench_dev_en_v11": 1.0,
    "mmstar": 1.0,
    "mmmu_val": 1.0,
    "mathvista": 1.0,
    "hallusion_bench": 1.0,
    "ai2d": 1.0,
    "ocrbench": 1000.0,
    "mmvet": 1.0,
}
"""The eight benchmarks of OpenCompass's multimodal academic leaderboard, and what each one's `overall` is out of. Its
MMBench is the mean of the test splits in two languages, whose answers are not published; here it is the English
development split."""
GROUPS: dict[str, Mapping[str, float]] = {"opencompass": OPENCOMPASS}


def expanded(tasks: Sequence[str]) -> list[str]:
    """Tasks with the members of groups in their place, each once."""
    return list(dict.fromkeys(member for task in tasks for member in GROUPS.get(task, (task,))))


def averages(tasks: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The average of each group of which a member was scored, in percent.

    Args:
        tasks: entries of results.json by task.

    Returns:
        By group `average` with its `interval` (None while a member is missing), `of` the members in percent, `missing`,
        and `comparable`, whether all of them are.
    """
    means: dict[str, Any] = {}
    for name, members in GROUPS.items():
        scored = {task: tasks[task] for task in members if tasks.get(task, {}).get("overall") is not None}
        if not scored:
            continue
        percent = {task: 100 * scores["overall"] / members[task] for task, scores in scored.items()}
        missing = [task for task in members if task not in scored]
        edges = [
            None if scores.get("interval") is None else [100 * edge / members[task] for edge in scores["interval"]]
            for task, scores in scored.items()
        ]
        share = 1 / len(members)
        means[name] = {
            "average": None if missing else sum(percent.values()) * share,
            "interval": None if missing else intervals.combined(list(percent.values()), edges, [share] * len(percent)),
            "of": percent,
            "missing": missing,
            "comparable": not missing and all(scores.get("comparable", False) for scores in scored.values()),
        }
    return means
