"""What of an item changes from visit to visit: its caption's form, and which part and side of its image is learned."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated

import numpy as np
from annotated_types import Interval

from diptych.core.draws import key
from diptych.core.errors import UserError
from diptych.core.ranges import NotNegativeInt, Share
from diptych.core.sample import Sample
from diptych.data.columns import digest
from diptych.data.source import BadItem, ItemDraws, Listed, Scored, Size, Source

_FINE = 1 << 30
_WINDOWS = 16
"""Random crops that are tried of an image whose loss mask is mostly black."""


@dataclass(frozen=True, kw_only=True)
class Variations:
    """What a source does to its items on every visit; off by default.

    trigger: a word or phrase that stands before each caption that does not hold it ("sks frog"). lines: each line of a
    caption is a caption of its own, of which one is drawn. shuffle_tags: the order of tags, which commas separate;
    keep_tags: the first so many stay. caption_dropout: share of visits without any caption, trigger included.

    flip: mirrored from left to right on half of the visits, the images of an edit together; captions that say "left" or
    "right" become wrong. crop: the image is read larger by this share, and a window at a random place is learned.
    """

    trigger: str = ""
    lines: bool = False
    shuffle_tags: bool = False
    keep_tags: NotNegativeInt = 0
    caption_dropout: Share = 0.0
    flip: bool = False
    crop: Annotated[float, Interval(ge=0, le=1)] = 0.0

    def __post_init__(self) -> None:
        if self.trigger and (not self.trigger.strip() or not self.trigger.isprintable() or "<image>" in self.trigger):
            raise UserError(f"trigger {self.trigger!r}: needs visible characters on one line, and no <image>")
        if self.keep_tags and not self.shuffle_tags:
            raise UserError("keep_tags goes with shuffle_tags")

    @property
    def of_images(self) -> bool:
        """Whether a visit changes images, so that their latents cannot be kept."""
        return self.flip or self.crop > 0

    @property
    def of_captions(self) -> bool:
        """Whether a visit changes captions."""
        return self.texts != Variations()

    @property
    def texts(self) -> Variations:
        """Those of captions alone."""
        return replace(self, flip=False, crop=0.0)

    def held_out(self) -> Variations:
        """What held-out items keep: nothing that is drawn but a caption's line."""
        return Variations(trigger=self.trigger, lines=self.lines)


class Varied(Source, Scored, Listed):
    """A source whose items vary.

    Raises:
        UserError: variations that its task has no use for.
    """

    def __init__(self, source: Source, variations: Variations) -> None:
        if source.task == "understand":
            raise UserError(f"{source.name}: vary changes captions and images to make; conversations have none")
        if source.task == "image" and variations.of_captions:
            raise UserError(f"{source.name}: task image has no captions that could vary")
        self.source, self.variations = source, variations
        self.name, self.task, self.dropped = source.name, source.task, source.dropped

    def __len__(self) -> int:
        return len(self.source)

    def load(self, index: int, draws: ItemDraws, size: Size) -> Sample:
        wanted = self.variations
        if not wanted.crop:
            sample = self.source.load(index, draws, size)
        else:
            larger = (math.ceil(size[0] * (1 + wanted.crop)), math.ceil(size[1] * (1 + wanted.crop)))
            sample = _window(self.source.load(index, draws, larger), larger, size, draws)
        if wanted.flip and draws.integer("flip", 2):
            sample = sample.mapped(lambda image: image.flip(-1))
        return replace(sample, text=varied_text(sample.text, wanted, draws)) if wanted.of_captions else sample

    def sizes(self) -> Sequence[Size | None] | np.ndarray | None:
        return self.source.sizes()

    def column(self, index: int, name: str) -> object:
        return self.source.column(index, name) if isinstance(self.source, Scored) else None

    def identity(self) -> str | None:
        inner = self.source.identity() if isinstance(self.source, Listed) else None
        return None if inner is None else digest(inner, repr(self.variations))

    def fingerprint(self, index: int) -> str:
        return self.source.fingerprint(index)

    def describe(self) -> str:
        return self.source.describe()


def _window(sample: Sample, larger: Size, size: Size, draws: ItemDraws) -> Sample:
    """A sample of `larger` images cut to a window of `size` at a random place, where its loss mask is not all black.

    BadItem where no such place is found.
    """
    for attempt in range(_WINDOWS):
        again = f" again {attempt}" if attempt else ""
        top, left = (draws.integer(f"crop {axis}{again}", larger[axis] - size[axis] + 1) for axis in (0, 1))
        rows, columns = slice(top, top + size[0]), slice(left, left + size[1])
        windowed = sample.mapped(lambda image, rows=rows, columns=columns: image[:, rows, columns])
        if windowed.loss_mask is None or windowed.loss_mask.any():
            return windowed
    raise BadItem(sample.id, f"loss mask is black in {_WINDOWS} random crops of the image")


def possible_texts(texts: Sequence[str], wanted: Variations) -> list[str]:
    """Every caption that `varied_text` can make of an item's texts.

    Raises:
        UserError: shuffled tags, of which there are too many orders.
    """
    if wanted.shuffle_tags:
        raise UserError("vary.shuffle_tags gives a caption too many forms; leave it out")
    if wanted.lines:
        texts = [line for text in texts for line in [x.strip() for x in text.splitlines() if x.strip()] or [""]]
    fixed = Variations(trigger=wanted.trigger)
    made = [varied_text(text, fixed, ItemDraws(0)) for text in texts]
    return list(dict.fromkeys([*made, *([""] if wanted.caption_dropout else [])]))


def varied_text(text: str, wanted: Variations, draws: ItemDraws) -> str:
    """The caption of a visit."""
    if wanted.caption_dropout and draws.integer("caption dropout", _FINE) < wanted.caption_dropout * _FINE:
        return ""
    if wanted.lines:
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        text = lines[draws.integer("line", len(lines))] if lines else ""
    if wanted.shuffle_tags:
        tags = [tag.strip() for tag in text.split(",") if tag.strip()]
        first, rest = tags[: wanted.keep_tags], tags[wanted.keep_tags :]
        rest.sort(key=lambda tag: key(draws.key, "tag", tag))
        text = ", ".join([*first, *rest])
    if wanted.trigger and wanted.trigger.casefold() not in text.casefold():
        text = f"{wanted.trigger}, {text}" if text else wanted.trigger
    return text
