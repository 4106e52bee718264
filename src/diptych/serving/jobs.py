"""What a request becomes in the engine: a job that is submitted, tells of its progress, and can be cancelled."""

from __future__ import annotations

import itertools
import math
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from PIL import Image

from diptych.core.sample import Message, Sample
from diptych.core.tokens import NextToken
from diptych.inference.engine import Engine
from diptych.inference.sampling import Sampling

EventKind = Literal["started", "partial", "text", "done", "failed"]
_numbers = itertools.count()


@dataclass(frozen=True, kw_only=True)
class Event:
    """What happens to a job. image: of which of its images; index: of the partial pictures; value: a picture, a piece
    of text, the results, or the error."""

    kind: EventKind
    value: Any = None
    image: int = 0
    index: int = 0


@dataclass(kw_only=True)
class Job:
    """A request that waits or runs.

    engine: the model. tell: called from the engine's thread with every event; it must return at once. cost: bytes of
    memory that it takes while it runs.
    """

    engine: Engine
    tell: Callable[[Event], None]
    cost: int = 0
    number: int = field(default_factory=lambda: next(_numbers))
    submitted: float = field(default_factory=time.monotonic)
    started: float | None = None
    _cancelled: threading.Event = field(default_factory=threading.Event)

    def cancel(self) -> None:
        """The job is dropped before the next step; from any thread."""
        self._cancelled.set()

    @property
    def cancelled(self) -> bool:
        return self._cancelled.is_set()

    @property
    def rows(self) -> int:
        """How many images or texts it makes at a time, for admission."""
        return 1


@dataclass(kw_only=True)
class DrawingJob(Job):
    """Images of one request.

    keys: of the noise of each image. settings: how they are sampled. scales: of `Engine.tensors`. partials: how many
    estimates are decoded on the way of each image. sized: whether the caller gave a size. area: of an image, in areas
    of the model's usual one.
    Its result: `Drawn`.
    """

    sample: Sample
    keys: Sequence[int]
    settings: Sampling
    scales: str = "last"
    partials: int = 0
    sized: bool = False
    area: float = 1.0

    @property
    def rows(self) -> int:
        return len(self.keys) * max(1, math.ceil(self.area))


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """images: by image, at each scale. expansions: what the model wrote before each image. size: (height, width).
    steps: solver steps of one image. tokens: latent tokens of all images."""

    images: list[list[Image.Image]]
    expansions: list[str]
    size: tuple[int, int]
    steps: int
    tokens: int


@dataclass(kw_only=True)
class TextJob(Job):
    """The next turn of a conversation.

    images: of the `<image>` placeholders, (3, H, W) in [-1, 1]. choose: the next token of one row. stop: texts that end
    the answer and are not part of it. Its result: `Written`; pieces come before as "text" events.
    """

    conversation: Sequence[Message]
    images: Sequence[Any]
    max_new_tokens: int
    choose: NextToken
    stop: Sequence[str] = ()


@dataclass(frozen=True, kw_only=True)
class Written:
    """An answer. finish: "stop" at the end of the turn or at a stop text, "length" where the tokens ran out."""

    text: str
    finish: Literal["stop", "length"]
    prompt_tokens: int
    tokens: int
