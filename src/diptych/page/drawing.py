"""Pictures on their way on the page: estimates while they are drawn, and the files at the end."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from diptych.page.shelf import Shelf
from diptych.serving.service import DrawCall, Made, Service


@dataclass
class Progress:
    """Where a request stands. shown: (picture or path, caption) of each image so far. thoughts: what the model wrote
    before each. paths: of the files, once all are whole."""

    words: str
    shown: list[tuple[Any, str]] = field(default_factory=list[tuple[Any, str]])
    thoughts: str = ""
    paths: list[str] = field(default_factory=list[str])


async def drawn(service: Service, shelf: Shelf, call: DrawCall) -> AsyncGenerator[Progress]:
    """The states of a request from the queue to its files."""
    begun = time.monotonic()
    estimates: dict[int, tuple[Image.Image, str]] = {}
    thoughts: dict[int, str] = {}
    yield Progress("Waiting for the model.")
    async with aclosing(service.draw(call)) as events:
        async for event in events:
            written = numbered(thoughts)
            if event.kind == "started":
                yield Progress("Drawing.")
            elif event.kind == "text":
                thoughts[event.image] = event.value
                yield Progress("Drawing.", list(estimates.values()), numbered(thoughts))
            elif event.kind == "partial":
                estimates[event.image] = (event.value, f"estimate {event.index + 1} of {call.partials}")
                shown = [estimates[place] for place in sorted(estimates)]
                yield Progress("Drawing; what you see is an estimate.", shown, written)
            elif event.kind == "done":
                made: Made = event.value
                paths = shelf.keep_all(made)
                shown = [(path, f"seed {seed}") for path, seed in zip(paths, made.seeds, strict=True)]
                count = "1 picture" if len(paths) == 1 else f"{len(paths)} pictures"
                yield Progress(f"{count} in {time.monotonic() - begun:.1f} s.", shown, written, paths)


def numbered(thoughts: dict[int, str]) -> str:
    """What was written before each picture, a paragraph each."""
    if len(thoughts) == 1:
        return next(iter(thoughts.values()))
    return "\n\n".join(f"{place + 1}. {thoughts[place]}" for place in sorted(thoughts))
