"""Metrics: one JSON object a line, and TensorBoard beside it."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any, TextIO

from diptych.core.files import write_text
from diptych.core.reading import read_text

log = logging.getLogger(__name__)


class Metrics:
    """Appends to `metrics.jsonl` and to `tensorboard/`.

    Rows after step `start` are cut off, so that the file of a resumed run reads as that of an unbroken one. Only the
    `main` process writes.
    """

    def __init__(self, folder: Path, *, start: int = 0, tensorboard: bool = True, main: bool = True) -> None:
        self.file: TextIO | None = None
        self.board: Any = None
        if not main:
            return
        path = folder / "metrics.jsonl"
        if start and not path.exists():
            log.warning("%s is not there any more: the rows of the %d steps before are lost", path, start)
        kept = (
            [row for row in read_metrics(path) if isinstance(row.get("step"), int) and row["step"] <= start]
            if path.exists()
            else []
        )
        write_text(path, "".join(json.dumps(row) + "\n" for row in kept))
        self.file = path.open("a", encoding="utf-8")
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(str(folder / "tensorboard"), purge_step=start + 1)

    def write(self, step: int, stage: str, values: dict[str, float]) -> None:
        """One row: the run's step (counted over all stages), the stage, and named values."""
        if self.file is not None:
            self.file.write(json.dumps({"step": step, "stage": stage, **values}) + "\n")
            self.file.flush()
        if self.board is not None:
            for name, value in values.items():
                self.board.add_scalar(name, value, step)

    def sync(self) -> None:
        """Have the rows on the disk: a checkpoint that outlasts a power cut must not outlast the rows before it."""
        if self.file is not None:
            os.fsync(self.file.fileno())

    def close(self) -> None:
        if self.file is not None:
            self.file.close()
        if self.board is not None:
            self.board.close()


def _is_row(row: dict[str, Any]) -> bool:
    """Whether an object is what `Metrics.write` writes: a step, a stage and numbers."""
    step, *others = (row.get("step"), *(value for name, value in row.items() if name not in ("step", "stage")))
    whole = isinstance(step, int) and not isinstance(step, bool) and 0 <= step < 2**53
    numbers = all(isinstance(value, int | float) and not isinstance(value, bool) for value in others)
    small = numbers and not any(isinstance(value, int) and abs(value) >= 2**53 for value in others)
    return whole and isinstance(row.get("stage"), str) and small


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics file. Lines that are no row are left out, with a warning: a disk that was full, or a last
    line that was cut off while being written."""
    rows: list[dict[str, Any]] = []
    broken: list[int] = []
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        try:
            row = json.loads(line) if line.strip() else None
        except (ValueError, RecursionError):
            row = number
        if isinstance(row, dict) and _is_row(row):
            rows.append(row)
        elif row is not None or line.strip():
            broken.append(number)
    if broken:
        log.warning("%s: %d lines are no rows and are left out, the first is line %d", path, len(broken), broken[0])
    return rows
