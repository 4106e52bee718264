"""What a data set holds before a run trusts it: every item read once, and a sheet of what the model will see."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from diptych.core.draws import Draws
from diptych.core.errors import UserError
from diptych.core.prepared import Preparer
from diptych.core.sample import Sample
from diptych.data.imaging import to_pil
from diptych.data.lettering import lettering, wrapped
from diptych.data.mixture import accepted
from diptych.data.rows import PROFILES
from diptych.data.source import BadItem, ItemDraws, Size, Source


class Undropped(Draws):
    """Draws that are just below one, so that nothing is left out of a sample by chance, which could hide a fault."""

    def uniform(self, name: str, *shape: int) -> Tensor:
        return torch.full((len(self.keys), *shape), 1 - 2**-24, device=self.device)


@dataclass
class SourceReport:
    """One source.

    items: how many it lists. read: how many were tried. usable: how many of those load.
    dropped: left out when listing, id to reason. bad: unreadable, id to reason. profiles: how many items have images in
    another colour space than sRGB, by the profile that they are converted from.
    """

    name: str
    task: str
    items: int
    read: int = 0
    usable: int = 0
    dropped: dict[str, str] = field(default_factory=dict[str, str])
    bad: dict[str, str] = field(default_factory=dict[str, str])
    profiles: Counter[str] = field(default_factory=Counter[str])

    def reasons(self) -> Counter[str]:
        """How many items each kind of fault costs; details in brackets are left off."""
        return Counter(reason.split(" (")[0] for reason in (*self.dropped.values(), *self.bad.values()))


@dataclass(frozen=True)
class DataReport:
    """All sources of a recipe."""

    sources: list[SourceReport]

    @property
    def usable(self) -> int:
        return sum(source.usable for source in self.sources)

    @property
    def bad(self) -> dict[str, str]:
        """Unreadable items of all sources, id to reason."""
        return {id: reason for source in self.sources for id, reason in source.bad.items()}

    def reasons(self) -> Counter[str]:
        return sum((source.reasons() for source in self.sources), Counter[str]())

    def lines(self, named: int = 20) -> list[str]:
        """The report as text: a line per source, one per kind of fault, and up to `named` items of each source."""
        lines: list[str] = []
        for source in self.sources:
            extent = "" if source.read == source.items else f" of the {source.read:,} read"
            lines.append(f"{source.name} ({source.task}): {source.items:,} items, {source.usable:,}{extent} usable")
            lines += [f"  {count:,} dropped: {reason}" for reason, count in source.reasons().most_common()]
            lines += [f"  {count:,} converted to sRGB from {name}" for name, count in source.profiles.most_common()]
            faults = {**source.dropped, **source.bad}
            lines += [f"    {id}: {reason}" for id, reason in list(faults.items())[:named]]
            if len(faults) > named:
                lines.append(f"    and {len(faults) - named:,} more")
        return lines


def inspect(
    sources: Source | Sequence[Source],
    size: Size,
    *,
    limit: int | None = None,
    preparer: Preparer | None = None,
    progress: Callable[[int], None] | None = None,
) -> DataReport:
    """Loads every item once, at `size`.

    Args:
        preparer: of the system that is to be trained; what it refuses is bad, as it is in training.
        limit: most items to read of each source, spread evenly over it.
        progress: called after each item with the number read.
    """
    reports: list[SourceReport] = []
    done = 0
    for source in [sources] if isinstance(sources, Source) else sources:
        report = SourceReport(source.name, source.task, len(source), dropped=dict(source.dropped))
        count = len(source) if limit is None else min(limit, len(source))
        for place in range(count):
            try:
                sample = source.load(place * len(source) // count, ItemDraws(0), size)
                if preparer is not None:
                    accepted(lambda sample, key: preparer.prepare(sample, Undropped([key])), sample, 0)
                report.profiles.update(set(sample.extra.get(PROFILES, ())))
                report.usable += 1
            except BadItem as bad:
                report.bad[bad.id] = bad.reason
            report.read += 1
            done += 1
            if progress is not None:
                progress(done)
        reports.append(report)
    return DataReport(reports)


def sheet(samples: Sequence[Sample], *, columns: int = 4, cell: int = 224) -> Image.Image:
    """A contact sheet: the images a model reads, an arrow, the image it makes; id and text beneath.

    Args:
        columns: cells in a row.
        cell: width of a cell in pixels.

    Raises:
        UserError: no samples.
    """
    if not samples:
        raise UserError("a sheet needs at least one sample")
    drawn = [_cell(sample, cell) for sample in samples]
    columns = min(columns, len(drawn))
    rows = [drawn[start : start + columns] for start in range(0, len(drawn), columns)]
    heights = [max(image.height for image in row) for row in rows]
    page = Image.new("RGB", (columns * cell, sum(heights)), "white")
    top = 0
    for row, height in zip(rows, heights, strict=True):
        for column, image in enumerate(row):
            page.paste(image, (column * cell, top))
        top += height
    return page


_MARGIN = 6
_LETTERS = 11
_LINE = 14
_LINES = 9
_ARROW = 12


def _cell(sample: Sample, width: int) -> Image.Image:
    inner = width - 2 * _MARGIN
    strip = _strip(sample, inner)
    text = sample.text or "\n".join(f"{message.role}: {message.text}" for message in sample.messages)
    letters = max(8, inner // 6)
    name, _ = lettering(sample.id, _LETTERS)
    lines = [name if len(name) <= letters else "..." + name[3 - letters :]]
    for paragraph in text.splitlines():
        lines += wrapped(paragraph, letters) or [""]
    if len(lines) > _LINES:
        lines = [*lines[: _LINES - 1], "..."]
    image = Image.new("RGB", (width, strip.height + _LINE * len(lines) + 3 * _MARGIN), "white")
    image.paste(strip, (_MARGIN, _MARGIN))
    pen = ImageDraw.Draw(image)
    for number, line in enumerate(lines):
        colour = "#777777" if number == 0 else "black"
        words, font = lettering(line, _LETTERS)
        pen.text((_MARGIN, strip.height + 2 * _MARGIN + _LINE * number), words, fill=colour, font=font)
    return image


def _strip(sample: Sample, width: int) -> Image.Image:
    """Images read, an arrow, the image made and its loss mask, side by side in `width` pixels."""
    pictures = [to_pil(image) for image in sample.context_images]
    arrow = bool(pictures) and sample.image is not None
    made = len(pictures)
    if sample.image is not None:
        pictures.append(to_pil(sample.image))
    if sample.loss_mask is not None:
        pictures.append(to_pil(2 * sample.loss_mask.expand(3, -1, -1) - 1))
    if not pictures:
        return Image.new("RGB", (width, 1), "white")
    side = max(1, (width - (_ARROW if arrow else 0)) // len(pictures))
    scaled = [_within(picture, side) for picture in pictures]
    height = max(picture.height for picture in scaled)
    strip = Image.new("RGB", (width, height), "white")
    left = 0
    for number, picture in enumerate(scaled):
        if arrow and number == made:
            middle = height // 2
            ImageDraw.Draw(strip).polygon([(left + 3, middle - 5), (left + 3, middle + 5), (left + 9, middle)], "black")
            left += _ARROW
        strip.paste(picture, (left, (height - picture.height) // 2))
        left += side
    return strip


def _within(picture: Image.Image, side: int) -> Image.Image:
    """Resized to fit into a square of `side`; small pictures are enlarged by whole pixels, as they are."""
    scale = side / max(picture.size)
    scale = int(scale) if scale >= 1 else scale
    way = Image.Resampling.NEAREST if scale >= 1 else Image.Resampling.LANCZOS
    return picture.resize((max(1, round(picture.width * scale)), max(1, round(picture.height * scale))), way)
