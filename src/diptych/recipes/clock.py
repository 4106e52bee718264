"""Training time of a run over all its sessions."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from diptych.core.errors import UserError
from diptych.core.files import make_folder, write_text
from diptych.core.reading import read_object
from diptych.training import state

CLOCK = "seconds.json"


@contextmanager
def clock(folder: Path) -> Iterator[None]:
    """Add the time of this block to a run's training time."""
    before, since = seconds(folder), time.time()
    make_folder(folder)
    path = folder / CLOCK
    write_text(path, json.dumps({"seconds": before, "since": since}) + "\n")
    try:
        yield
    finally:
        write_text(path, json.dumps({"seconds": before + time.time() - since, "since": None}) + "\n")


def seconds(folder: Path) -> float:
    """Training time of a run in all; of a session that was killed, the part up to its last checkpoint."""
    path = folder / CLOCK
    if not path.is_file():
        return 0.0
    record = read_object(path)
    if not {"since", "seconds"} <= {*record}:
        raise UserError(f"{path}: not a run's clock; remove it")
    if record["since"] is None:
        return record["seconds"]
    kept = state.checkpoints(folder / "checkpoints")
    last = (kept[-1] / "progress.json").stat().st_mtime if kept else record["since"]
    return record["seconds"] + max(0.0, last - record["since"])
