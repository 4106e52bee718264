"""What requests of each kind take in memory, measured on a loaded model, so that no more is begun than fits."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import psutil
import torch
from PIL import Image

from diptych.core.sample import Batch, Sample
from diptych.inference.engine import Engine
from diptych.inference.sampling import Sampling

log = logging.getLogger(__name__)
FLOOR = 1 << 20
"""Bytes that every request is counted with at least."""
TOKENS = 8
"""Tokens of the text that is written to measure."""


@dataclass(frozen=True, kw_only=True)
class Costs:
    """Bytes of one request: of a branch of guidance of an image of the model's usual size (`image`), of one that is
    edited (`edit`), and of a text with a picture (`text`)."""

    image: int = FLOOR
    edit: int = FLOOR
    text: int = FLOOR

    def drawing(self, settings: Sampling, sample: Sample, n: int, area: float) -> int:
        """Of n images of this area, in areas of the usual one, with all branches that their guidance compares."""
        each = self.edit if sample.task == "edit" else self.image
        return int(n * area * branches(settings, sample) * each)

    def writing(self, pictures: int, tokens: int) -> int:
        """Of an answer to this many pictures and of this many tokens."""
        return int(self.text * max(1, pictures) * max(1.0, tokens / 1024))


def branches(settings: Sampling, sample: Sample) -> int:
    """How many versions of a request its guidance compares."""
    return len(settings.guide().branches(Batch((sample,))))


def measured(engine: Engine) -> Costs:
    """The costs of a model: one and three requests of each kind are run, and half of the difference is of one."""
    peak(engine, lambda: None)  # the watch itself
    height, width = engine.sampling.size
    # Unlike pictures, as what requests have in common is read once.
    pictures = [Image.new("RGB", (width, height), (shade, shade, shade)) for shade in (64, 128, 192)]
    tasks = engine.system.tasks
    options: dict[str, Any] = {"steps": 2, "prompt_expansion": 0}
    costs: dict[str, int] = {}

    def measure(name: str, rows: int, run: Callable[[int], Any]) -> None:
        run(1)  # what is made once is no part of a request
        single, three = peak(engine, lambda: run(1)), peak(engine, lambda: run(3))
        costs[name] = max((three - single) // 2 // rows, FLOOR)

    if "text_to_image" in tasks:
        drawn = Sample(id="a", task="text_to_image", text="a")
        rows = branches(engine.settings(options), drawn)
        measure("image", rows, lambda n: engine.generate("a", n=n, batch_size=3, **options))
    if "edit" in tasks:
        edited = Sample(id="a", task="edit", text="a")
        rows = branches(engine.settings(options, edits=True), edited)
        measure("edit", rows, lambda n: engine.edit(pictures[:n], ["a"] * n, batch_size=3, **options))
    if "understand" in tasks:
        measure("text", 1, lambda n: engine.ask(pictures[:n], ["a"] * n, max_new_tokens=TOKENS))
    made = Costs(**costs)
    words = ", ".join(f"{name} {value / 1e6:.1f} MB" for name, value in costs.items())
    log.info("%s takes for a request: %s", engine.name, words)
    return made


def free(engine: Engine) -> int:
    """Bytes that are free where a model runs."""
    if engine.system.device.type == "cuda":
        return torch.cuda.mem_get_info()[0]
    return psutil.virtual_memory().available


def peak(engine: Engine, run: Callable[[], Any]) -> int:
    """The most memory during a call, in bytes: what the device holds, or the process where that is the host's."""
    if engine.system.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        run()
        return torch.cuda.max_memory_allocated()
    process = psutil.Process()
    highest, over = process.memory_info().rss, threading.Event()

    def watch() -> None:
        nonlocal highest
        while not over.wait(0.002):
            highest = max(highest, process.memory_info().rss)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        run()
    finally:
        over.set()
        thread.join()
    return highest
