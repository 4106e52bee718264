"""The toy world as a source of a fixed number of items."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from diptych.core.errors import UserError
from diptych.core.sample import TASKS, Sample, Task
from diptych.data.source import ItemDraws, Size, Source, check_task, describe
from diptych.toyworld.edits import EditKind
from diptych.toyworld.language import QuestionKind
from diptych.toyworld.samples import ToyWorld


class ToyWorldSource(Source):
    """Items `start` to `start + count` of a toy world, drawn when asked for.

    Args:
        count: number of items, after which they repeat.
        seed: of the world; another seed is another stream of items.
        size: side of its images in pixels.
        start: first item, so that held-out items can follow those of training.
        text_only, short_captions, asked, turns, full, captions, placed, edited, imagined, listed, edits: as of
            `ToyWorld`.
    """

    def __init__(
        self,
        *,
        task: str,
        count: int,
        seed: int = 0,
        size: int = 32,
        start: int = 0,
        text_only: float = 0.3,
        short_captions: float = 0.5,
        asked: Sequence[QuestionKind] | None = None,
        turns: int = 5,
        full: float = 0.25,
        captions: float = 0.15,
        placed: float = 0.5,
        edited: float = 0.0,
        imagined: float = 0.0,
        listed: float = 0.0,
        edits: Sequence[EditKind] | None = None,
        name: str | None = None,
    ) -> None:
        self.name = name or "toyworld"
        served: tuple[Task, ...] = ("image", "text_to_image", "edit", "understand")
        assert set(served) == set(TASKS)
        self.task = check_task(task, served, self.name)
        if count < 1 or start < 0:
            raise UserError(f"{self.name}: count {count} must be at least 1 and start {start} at least 0")
        self.world = ToyWorld(
            seed,
            size,
            text_only=text_only,
            short_captions=short_captions,
            asked=asked,
            turns=turns,
            full=full,
            captions=captions,
            placed=placed,
            edited=edited,
            imagined=imagined,
            listed=listed,
            edits=edits,
        )
        self.seed, self.size, self.start, self.count = seed, size, start, count
        self.dropped: Mapping[str, str] = {}

    def __len__(self) -> int:
        return self.count

    def load(self, index: int, draws: ItemDraws, size: Size) -> Sample:
        if size != (self.size, self.size) and self.task != "understand":
            raise UserError(f"{self.name}: draws {self.size}x{self.size}, but the batch is {size[0]}x{size[1]}")
        return self.world.sample(self.task, self.start + index)

    def sizes(self) -> None:
        return None

    def fingerprint(self, index: int) -> str:
        return f"toyworld:{self.seed}:{self.size}:{self.task}:{self.start + index}"

    def describe(self) -> str:
        return f"{describe(self)}, {self.size} px, seed {self.seed}"
