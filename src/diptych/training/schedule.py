"""Learning rate as a function of the step alone."""

from __future__ import annotations

import math

from diptych.training.config import ScheduleConfig


def factor(schedule: ScheduleConfig, step: int, steps: int) -> float:
    """Share of the peak learning rate at `step` of `steps` (0-based)."""
    if step < schedule.warmup:
        return schedule.start + (1 - schedule.start) * (step + 1) / schedule.warmup
    if schedule.kind == "constant":
        return 1.0
    done = (step - schedule.warmup) / max(1, steps - 1 - schedule.warmup)
    return schedule.end + (1 - schedule.end) * (1 + math.cos(math.pi * min(done, 1.0))) / 2
