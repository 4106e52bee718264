"""One server with its page, and one browser, for all tests of the page."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from serving_process import Running, ended, started

CHROMIUM = ("chromium", "chromium-browser", "google-chrome")
"""Names of browsers that Playwright drives; DIPTYCH_CHROMIUM may name another."""


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run of a few steps."""
    folder = tmp_path_factory.mktemp("runs", numbered=False)
    run = folder / "first"
    (run / "samples").mkdir(parents=True)
    rows = [
        {"step": step, "stage": "main", "loss/flow": 1 / step, "held_out/flow": 1.2 / step} for step in (1, 2, 4, 8)
    ]
    (run / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    Image.new("RGB", (64, 32), (200, 30, 30)).save(run / "samples" / "step-00000008.png")
    (run / "report.html").write_text("<h1>What was learned</h1><script>parent.document.title = 'taken'</script>")
    return folder


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory, runs: Path) -> Iterator[Running]:
    """toy/iomm and toy/ovis-u1 with their page."""
    pytest.importorskip("gradio")
    folder = tmp_path_factory.mktemp("page")
    words = ["toy/iomm", "toy/ovis-u1", "--runs", str(runs), "--no-tools", "--rows", "12"]
    made = started(folder / "log.txt", *words, TMPDIR=str(folder))
    yield made
    ended(made)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Chromium, driven by Playwright, whose loop of events keeps any other out of this thread until it is closed."""
    playwright = pytest.importorskip("playwright.sync_api", reason="the page's tests need playwright")
    named = os.environ.get("DIPTYCH_CHROMIUM")
    path = named or next((found for name in CHROMIUM if (found := shutil.which(name))), None)
    if path is None:
        pytest.skip("the page's tests need Chromium; install it, or set DIPTYCH_CHROMIUM")
    with playwright.sync_playwright() as driver:
        made = driver.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield made
        made.close()
