"""What processes do that tests of `diptych prepare` start: they prepare data, and SIGKILL ends them on the way."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

from diptych.core import files
from diptych.recipes import prepare as job


def prepare_and_die(options: dict[str, Any], place: str, shard: int) -> None:
    """Prepare, and die at shard number `shard` of this process (from 1): when it is `made`, with `half` of its file
    written, or `after` it has its name."""
    begun = named = 0
    make, replace = job.make_shard, os.replace

    def making(*given: Any) -> Any:
        nonlocal begun
        begun += 1
        values = make(*given)
        if place == "made" and begun == shard:
            die()
        return values

    def naming(source: Any, target: Any) -> None:
        nonlocal named
        mine = str(target).endswith(".safetensors")
        named += mine
        if mine and named == shard and place == "half":
            os.truncate(source, Path(source).stat().st_size // 2)
        if mine and named == shard and place != "after":
            die()
        replace(source, target)
        if mine and named == shard:
            die()

    job.make_shard = making
    if place != "made":
        files.os.replace = naming  # type: ignore[assignment]
    job.prepare(job.Options(**options))


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
