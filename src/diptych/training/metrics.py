"""Metrics: one JSON object a line, and Accelerate's trackers beside it."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, TextIO

import numpy as np
from PIL import Image

from diptych.core.errors import UserError
from diptych.core.files import write_text
from diptych.core.reading import read_text

log = logging.getLogger(__name__)

Tracker = Literal["wandb", "mlflow"]
"""Trackers beside TensorBoard; the extra `trackers`."""


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """What a run draws on its way. sheets: captioned pictures by their file. values: their scores, by name."""

    sheets: Mapping[Path, Image.Image] = field(default_factory=dict[Path, Image.Image])
    values: Mapping[str, float] = field(default_factory=dict[str, float])


def check_trackers(trackers: Sequence[str]) -> None:
    """UserError for a tracker whose package is not installed."""
    for name in trackers:
        if find_spec(name) is None:
            raise UserError(f"run.trackers: {name} is not installed; pip install 'diptych[trackers]'")


class Metrics:
    """Appends to `metrics.jsonl`, and to the trackers.

    Rows after step `start` are cut off, so that the file of a resumed run reads as that of an unbroken one. Only the
    `main` process writes. TensorBoard writes below `tensorboard/`. W&B is offline, below `wandb/`, unless
    WANDB_MODE says otherwise, and MLflow writes below `mlruns/`, unless MLFLOW_TRACKING_URI does.

    Args:
        recipe: what W&B and MLflow show as the run's configuration.
    """

    def __init__(
        self,
        folder: Path,
        *,
        start: int = 0,
        tensorboard: bool = True,
        trackers: Sequence[Tracker] = (),
        recipe: Mapping[str, Any] | None = None,
        main: bool = True,
    ) -> None:
        self.file: TextIO | None = None
        self.trackers: list[Any] = []
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
        made: dict[str, Callable[[Path], Any]] = {"wandb": wandb, "mlflow": mlflow}
        if tensorboard:
            from accelerate.tracking import TensorBoardTracker

            self.trackers.append(TensorBoardTracker("", folder / "tensorboard", purge_step=start + 1))
        self.trackers += [made[name](folder) for name in trackers]
        for tracker in self.trackers:
            tracker.start()
            if tracker.name != "tensorboard" and not start:
                tracker.store_init_configuration(flat(recipe or {}))

    def write(self, step: int, stage: str, values: Mapping[str, float]) -> None:
        """One row: the run's step (counted over all stages), the stage, and named values."""
        if self.file is not None:
            self.file.write(json.dumps({"step": step, "stage": stage, **values}) + "\n")
            self.file.flush()
        for tracker in self.trackers:
            tracker.log(dict(values), step=step)

    def draw(self, step: int, stage: str, drawn: Drawn) -> None:
        """Pictures to the trackers, and their scores as a row."""
        for tracker in self.trackers:
            for path, sheet in drawn.sheets.items():
                if tracker.name == "mlflow":
                    tracker.log_artifact(str(path), "samples")
                elif tracker.name == "wandb":
                    tracker.log_images({_kind(path): [sheet]}, step=step)
                else:
                    levels = np.asarray(sheet)[None]  # (1, H, W, 3)
                    tracker.log_images({_kind(path): levels}, step=step, dataformats="NHWC")
        if drawn.values:
            self.write(step, stage, drawn.values)

    def sync(self) -> None:
        """Have the rows on the disk: a checkpoint that outlasts a power cut must not outlast the rows before it."""
        if self.file is not None:
            os.fsync(self.file.fileno())

    def close(self) -> None:
        if self.file is not None:
            self.file.close()
        for tracker in self.trackers:
            tracker.finish()


def wandb(folder: Path) -> Any:
    """W&B's tracker of a run folder; a resumed run goes on with the same id."""
    from accelerate.tracking import WandBTracker

    given: dict[str, Any] = {
        "name": folder.resolve().name,
        "id": hashlib.blake2b(str(folder.resolve()).encode(), digest_size=8).hexdigest(),
        "dir": str(folder),
        "mode": os.environ.get("WANDB_MODE", "offline"),
        "settings": import_module("wandb").Settings(console="off", silent=True),
    }
    return WandBTracker("diptych", **given)


def mlflow(folder: Path) -> Any:
    """MLflow's tracker of a run folder; a resumed run goes on with the run that the folder has begun."""
    from accelerate.tracking import MLflowTracker

    package: Any = import_module("mlflow")
    if "MLFLOW_TRACKING_URI" not in os.environ:
        # A folder needs no database; MLflow 3.17 refuses it unless told that it is wanted.
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        package.set_tracking_uri((folder / "mlruns").resolve().as_uri())
    name = str(folder.resolve())
    wanted = {"experiment_names": ["diptych"], "filter_string": f"tags.folder = '{name}'", "max_results": 1}
    known = package.get_experiment_by_name("diptych") is not None
    begun = package.search_runs(**wanted, output_format="list") if known else []
    run_id = begun[0].info.run_id if begun else None
    return MLflowTracker("diptych", run_id=run_id, run_name=folder.resolve().name, tags={"folder": name})


def flat(values: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """Nested values by dotted names; lists as text."""
    made: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{above}{key}"
        if isinstance(value, Mapping):
            made |= flat(value, f"{name}.")
        else:
            made[name] = value if isinstance(value, str | int | float | bool) else str(value)
    return made


def _kind(path: Path) -> str:
    """ "samples" of samples/step-00000500.png, "samples-edits" of samples/step-00000500-edits.png."""
    _, _, *kind = path.stem.split("-")
    return "-".join(["samples", *kind])


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
