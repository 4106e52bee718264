"""What a sample is made of, and how samples become one packed row (BAGEL, arXiv 2505.14683, Sec. 2.3 and 2.4).

Text becomes [bos] ids [eos]; an image becomes [start] tokens [end]. A text takes one rotary id for each token, an image
one for all its tokens and both markers. The id goes on after an image that is read, and stays after an image to
denoise, so that the clean copy of an image starts where the noisy one did.

L tokens of a row, X text and marker tokens, V vision tokens, N latent tokens, E learned tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from diptych.core.host import upload
from diptych.core.packing import Mode, pack_mask
from diptych.core.positions import grid_ids, stretched_ids
from diptych.parts.backbones.attention import PackLayout


@dataclass(frozen=True, kw_only=True)
class Markers:
    """Ids of the tokens around texts and images."""

    bos: int
    eos: int
    start_image: int
    end_image: int


@dataclass(frozen=True, kw_only=True)
class Text:
    """ids: without bos and eos. learned: predict them, and eos. drop: leave it out, without a gap.
    end_label: what the eos token itself must predict, None for nothing."""

    ids: tuple[int, ...]
    learned: bool = False
    drop: bool = False
    end_label: int | None = None
    noised: ClassVar[bool] = False
    opens: ClassVar[bool] = True
    closes: ClassVar[bool] = True
    mode: ClassVar[int] = Mode.CAUSAL

    @property
    def cost(self) -> int:
        """Tokens in a row."""
        return 0 if self.drop else len(self.ids) + 2

    @property
    def advance(self) -> int:
        """How far the rotary id goes on to what follows."""
        return self.cost

    @property
    def targets(self) -> int:
        """Tokens that are predicted: its ids and eos."""
        return len(self.ids) + 1 if self.learned and not self.drop else 0

    def add(self, row: Row, markers: Markers, position: int, tables: Tables) -> None:
        """Its tokens at the end of a row, from rotary id `position` on."""
        start = row.length
        for offset, id in enumerate([markers.bos, *self.ids, markers.eos]):
            row.token(id, position + offset)
        if self.learned:
            targets = [*self.ids, markers.eos]
            for offset, label in enumerate(targets):
                row.learn(start + offset, label, 1 / math.sqrt(len(targets)))
        if self.end_label is not None:
            row.learn(row.length - 1, self.end_label, 1.0)


@dataclass(frozen=True, kw_only=True)
class Vision:
    """An image as the vision tower sees it: a grid of rows x columns patches. drop: leave out its tokens, not its id.
    end_label: what its end marker must predict, None for nothing."""

    rows: int
    columns: int
    drop: bool = False
    end_label: int | None = None
    noised: ClassVar[bool] = False
    opens: ClassVar[bool] = True
    closes: ClassVar[bool] = True
    mode: ClassVar[int] = Mode.FULL
    targets: ClassVar[int] = 0
    advance: ClassVar[int] = 1
    table: ClassVar[str] = "vision"

    @property
    def cost(self) -> int:
        """Tokens in a row."""
        return 0 if self.drop else self.rows * self.columns + 2

    def add(self, row: Row, markers: Markers, position: int, tables: Tables) -> None:
        """As of `Text`. UserError for a grid that is larger than the tower's table."""
        ids = tables.places(self)
        row.vision_places += row.image(len(ids), markers, position, self.end_label)
        row.vision_ids.append(ids)
        row.vision_lengths.append(len(ids))


@dataclass(frozen=True, kw_only=True)
class Latent:
    """An image as latent tokens, rows x columns of them; to denoise (`noised`) or to read.

    opens, closes: whether it is the first and the last frame of its split; a video's frames share a split and its time.
    step: how far the rotary id goes on to the next frame, in place of the usual rule.
    """

    rows: int
    columns: int
    noised: bool = False
    drop: bool = False
    opens: bool = True
    closes: bool = True
    step: int | None = None
    end_label: int | None = None
    targets: ClassVar[int] = 0
    table: ClassVar[str] = "latent"

    @property
    def cost(self) -> int:
        """Tokens in a row."""
        return 0 if self.drop else self.rows * self.columns + 2

    @property
    def mode(self) -> int:
        """Who sees its tokens."""
        return Mode.NOISE if self.noised and self.step is None else Mode.FULL

    @property
    def advance(self) -> int:
        """As of `Text`; what comes after noise stands where the noise stands, until it is read."""
        if self.drop:
            return 1
        return int(not self.noised) if self.step is None else self.step

    def add(self, row: Row, markers: Markers, position: int, tables: Tables) -> None:
        """As of `Text`. UserError for a grid that is larger than the table of latents."""
        ids = tables.places(self)
        places = row.image(len(ids), markers, position, self.end_label)
        row.latent_places += places
        row.latent_ids.append(ids)
        row.latent_grids.append((self.rows, self.columns))
        if self.noised:
            row.flow_places += places
            row.targets += self.opens
        row.latent_times.append(row.targets - 1 if self.noised else -1)


Item = Text | Vision | Latent


@dataclass(frozen=True, kw_only=True)
class Tables:
    """Sides of the position tables of latents and of vision tokens. stretched: a grid is stretched over the whole table
    instead of keeping its rows and columns."""

    latent: int
    vision: int
    stretched: bool = False

    def places(self, item: Vision | Latent) -> Tensor:
        """Places of an image's tokens in its table, (n,). UserError when it has more along a side than the table."""
        side: int = getattr(self, item.table)
        return (stretched_ids if self.stretched else grid_ids)(item.rows, item.columns, side)


@dataclass
class Row:
    """Lists that grow while a row is packed; `Pack` says what they hold."""

    length: int = 0
    text_ids: list[int] = field(default_factory=list[int])
    text_places: list[int] = field(default_factory=list[int])
    positions: list[int] = field(default_factory=list[int])
    vision_places: list[int] = field(default_factory=list[int])
    vision_ids: list[Tensor] = field(default_factory=list[Tensor])
    vision_lengths: list[int] = field(default_factory=list[int])
    latent_places: list[int] = field(default_factory=list[int])
    latent_ids: list[Tensor] = field(default_factory=list[Tensor])
    latent_grids: list[tuple[int, int]] = field(default_factory=list[tuple[int, int]])
    latent_times: list[int] = field(default_factory=list[int])
    learned_places: list[int] = field(default_factory=list[int])
    labels: list[int] = field(default_factory=list[int])
    label_weights: list[float] = field(default_factory=list[float])
    flow_places: list[int] = field(default_factory=list[int])
    sample_lengths: list[int] = field(default_factory=list[int])
    split_lengths: list[int] = field(default_factory=list[int])
    modes: list[int] = field(default_factory=list[int])
    targets: int = 0

    def token(self, id: int, position: int) -> None:
        self.text_ids.append(id)
        self.text_places.append(self.length)
        self.positions.append(position)
        self.length += 1

    def image(self, count: int, markers: Markers, position: int, end_label: int | None) -> range:
        """An image of `count` tokens between its markers, all at one rotary id; the places of its tokens."""
        self.token(markers.start_image, position)
        places = range(self.length, self.length + count)
        self.positions += [position] * count
        self.length += count
        self.token(markers.end_image, position)
        if end_label is not None:
            self.learn(self.length - 1, end_label, 1.0)
        return places

    def learn(self, place: int, label: int, weight: float) -> None:
        self.learned_places.append(place)
        self.labels.append(label)
        self.label_weights.append(weight)


@dataclass(frozen=True, kw_only=True)
class Pack:
    """A packed row; all places are those in the row, all tensors int64 where not said otherwise.

    text_ids, text_places: (X,) text tokens and image markers. positions: (L,) rotary ids.
    vision_places, vision_ids: (V,) places in the row and in the vision tower's table; vision_lengths: tokens per image.
    latent_places, latent_ids: (N,) places in the row and in the latent table; latent_grids: (rows, columns) per image.
    latent_times: for each latent image which of the row's times is its own, -1 for time 0 (an image that is read).
    learned_places, labels, label_weights (float32): (E,) tokens with a text loss, what they predict, 1 / sqrt(targets
    of the item). flow_places: latent tokens with a velocity loss.
    samples, splits, modes: as of `diptych.core.packing.pack_mask`. targets: times that the row needs.
    """

    text_ids: Tensor
    text_places: Tensor
    positions: Tensor
    vision_places: Tensor
    vision_ids: Tensor
    vision_lengths: tuple[int, ...]
    latent_places: Tensor
    latent_ids: Tensor
    latent_grids: tuple[tuple[int, int], ...]
    latent_times: tuple[int, ...]
    learned_places: Tensor
    labels: Tensor
    label_weights: Tensor
    flow_places: Tensor
    samples: tuple[int, ...]
    splits: tuple[int, ...]
    modes: tuple[int, ...]
    targets: int

    @property
    def length(self) -> int:
        """L."""
        return len(self.positions)

    def mask(self) -> Tensor:
        """(L, L) bool, True where the row's token may see the column's."""
        return pack_mask(self.samples, self.splits, self.modes)

    def layout(self) -> PackLayout:
        """For attention: text and vision tokens are understanding, in this order; latent tokens are generation."""
        und = torch.cat([self.text_places, self.vision_places])
        return PackLayout(self.samples, self.splits, self.modes, und, self.latent_places)

    def token_times(self, times: Tensor) -> Tensor:
        """Time of each latent token, (N,): that of its image among `times` (targets,), 0 where it is read."""
        every = torch.cat([times, times.new_zeros(1)])  # the last stands for -1
        counts = torch.tensor([rows * columns for rows, columns in self.latent_grids], dtype=torch.long)
        of_token = torch.repeat_interleave(torch.tensor(self.latent_times, dtype=torch.long), counts)
        return every[upload(of_token, times.device)]


def pack(
    samples: Sequence[Sequence[Item]],
    markers: Markers,
    tables: Tables,
    *,
    starts: Sequence[int] | None = None,
) -> Pack:
    """Samples, each a list of items in reading order, as one row.

    Args:
        starts: rotary id at which each sample begins (it continues a cache); 0 where None.

    Raises:
        UserError: an image with more tokens along a side than its table.
    """
    row = Row()
    for number, items in enumerate(samples):
        begun = opened = row.length
        position = starts[number] if starts else 0
        for item in items:
            if not item.drop:
                if item.opens:
                    opened = row.length
                    row.modes.append(item.mode)
                item.add(row, markers, position, tables)
                if item.closes:
                    row.split_lengths.append(row.length - opened)
            position += item.advance
        row.sample_lengths.append(row.length - begun)
    return _frozen(row)


def next_position(items: Sequence[Item], start: int = 0) -> int:
    """Rotary id of what follows these items."""
    return start + sum(item.advance for item in items)


def _frozen(row: Row) -> Pack:
    def whole(values: Sequence[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.long)

    none = torch.zeros(0, dtype=torch.long)
    return Pack(
        text_ids=whole(row.text_ids),
        text_places=whole(row.text_places),
        positions=whole(row.positions),
        vision_places=whole(row.vision_places),
        vision_ids=torch.cat(row.vision_ids) if row.vision_ids else none,
        vision_lengths=tuple(row.vision_lengths),
        latent_places=whole(row.latent_places),
        latent_ids=torch.cat(row.latent_ids) if row.latent_ids else none,
        latent_grids=tuple(row.latent_grids),
        latent_times=tuple(row.latent_times),
        learned_places=whole(row.learned_places),
        labels=whole(row.labels),
        label_weights=torch.tensor(row.label_weights, dtype=torch.float32),
        flow_places=whole(row.flow_places),
        samples=tuple(row.sample_lengths),
        splits=tuple(row.split_lengths),
        modes=tuple(row.modes),
        targets=row.targets,
    )
