"""What several tests start from, made once for all workers of a test run."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock


def made_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """A folder that `make` has filled; the first worker that asks for it makes it, and the others wait.

    Nobody may change what lies in it. A folder that `make` did not finish is made again elsewhere.
    """
    base = factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    mark = base / f"{name}.made"
    with FileLock(base / f"{name}.lock"):
        if not mark.is_file():
            folder = factory.mktemp(name)
            make(folder)
            mark.write_text(str(folder))
    return Path(mark.read_text())
