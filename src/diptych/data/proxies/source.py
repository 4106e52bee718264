"""Proxy tasks as a source of ordinary edits: a picture, a short instruction, and the picture wanted.

What is supervised is always the target. (Releases of SGT before 2026-06-30 supervised the input picture in ten of their
data sets.)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image

from diptych.core.draws import key
from diptych.core.errors import UserError, unknown
from diptych.core.sample import Sample
from diptych.data.imaging import to_tensor
from diptych.data.proxies.annotated import Annotated, Pictures, crop_box, own_view, view
from diptych.data.proxies.tasks import PROXIES, Make, Proxy, Style, check_colours, check_style, maker, shares
from diptych.data.source import ItemDraws, Size, Source, check_task, describe

RESAMPLING = {"bicubic": Image.Resampling.BICUBIC, "lanczos": Image.Resampling.LANCZOS}
"""Filters for targets that are resized after they were made: BAGEL's and OmniGen2's."""


class ProxySource(Source):
    """One sample per picture.

    Which proxy a picture is used for, its colours and what is done to it are functions of (seed, id of the picture)
    alone; of the instructions each visit draws one.

    In style `released` the model is given the picture at its own size, damaged there where the task is a restoration,
    and the target is made at that size and then resized; so it is with ready targets. In style `paper` both are of the
    size of the step.

    Args:
        pictures: where they come from.
        proxies: a proxy, a mixture, or weights by name. Of pictures with ready targets, it says what is asked for.
        style, colours: as of `tasks.maker`.
        stretch: the whole picture is brought to the size of the step instead of being cut to it.
        resample: filter of targets in style `released` and of ready ones: `bicubic` or `lanczos`.
        task: `edit`; no other can be served.

    Raises:
        UserError: a proxy needs what is not known of these pictures, or a style, colouring or filter is unknown.
    """

    def __init__(
        self, pictures: Pictures, *, proxies: str | Mapping[str, float], seed: int = 0, task: str = "edit",
        style: str = "paper", colours: Mapping[str, str] | None = None, stretch: bool = False,
        resample: str = "bicubic", name: str = "proxies",
    ) -> None:  # fmt: skip
        self.name = name
        self.task = check_task(task, ("edit",), name)
        self.pictures = pictures
        self.seed = seed
        self.shares = shares(proxies, name)
        self.style: Style = check_style(style, f"{name}.style")
        self.colours = check_colours(colours or {}, f"{name}.colours")
        if resample not in RESAMPLING:
            raise unknown("filter", resample, RESAMPLING, f"{name}.resample")
        self.stretch, self.resample = stretch, resample
        self.dropped: Mapping[str, str] = pictures.dropped
        self.ready = "target" in pictures.known
        for proxy in self.shares:
            missing = set() if self.ready else PROXIES[proxy].needs - pictures.known
            if missing:
                raise UserError(
                    f"{name}: {proxy!r} needs {', '.join(sorted(missing))}, and these pictures come with "
                    f"{', '.join(sorted(pictures.known)) or 'nothing but themselves'}"
                )

    def __len__(self) -> int:
        return len(self.pictures)

    def load(self, index: int, draws: ItemDraws, size: Size) -> Sample:
        id, proxy = self._id(index), self.proxy(index)
        whole = self.style == "released"
        known = self.pictures.load(index, size, whole=whole or self.ready)
        if known.target is not None:
            # A ready pair: the target is brought to the size of its picture first, as the release does.
            source = known.image if whole else self._resized(known.image, size)
            target = self._resized(known.target.resize(known.image.size, Image.Resampling.BICUBIC), size)
        else:
            make = maker(proxy, self.style, self.colours)
            source, target = self._made(make, known, size, key(self.seed, id, proxy.name), id)
        return Sample(
            id=id,
            task=self.task,
            image=to_tensor(target),
            text=proxy.instructions[draws.integer("text", len(proxy.instructions))],
            context_images=(to_tensor(source),),
            extra={"proxy": proxy.name},
        )

    def _made(self, make: Make, known: Annotated, size: Size, seed: int, id: str) -> tuple[Image.Image, Image.Image]:
        """A proxy's pair: what is read, what is wanted."""
        rng = np.random.Generator(np.random.PCG64(seed))
        if self.style == "released":
            source, target = make(own_view(known, id), rng)
            return Image.fromarray(source), self._resized(Image.fromarray(target), size)
        source, target = make(view(known, size, id, self.stretch), rng)
        return Image.fromarray(source), Image.fromarray(target)

    def _resized(self, image: Image.Image, size: Size) -> Image.Image:
        return resized(image, size, stretch=self.stretch, resample=self.resample)

    def proxy(self, index: int) -> Proxy:
        """The task that picture `index` is used for."""
        place = key(self.seed, self._id(index), "proxy") / 2**63
        for name, share in self.shares.items():
            place -= share
            if place < 0:
                return PROXIES[name]
        return PROXIES[next(reversed(self.shares))]  # rounding

    def sizes(self) -> Sequence[Size | None] | None:
        return self.pictures.sizes()

    def fingerprint(self, index: int) -> str:
        name = self.proxy(index).name
        how = (self.style, self.colours.get(name, ""), "stretch" if self.stretch else "crop", self.resample)
        return f"{name}:{':'.join(how)}:{self.seed}:{self.pictures.stamp(index)}"

    def describe(self) -> str:
        parts = ", ".join(f"{name} {share:.0%}" for name, share in self.shares.items())
        how = "ready targets" if self.ready else f"style {self.style}"
        return f"{describe(self)}, {parts}, {how}, seed {self.seed}"

    def _id(self, index: int) -> str:
        return f"{self.name}/{self.pictures.id(index)}"


def resized(image: Image.Image, size: Size, *, stretch: bool, resample: str = "bicubic") -> Image.Image:
    """An image at `size` (H, W): stretched to it, or its middle, the short side fitted."""
    box = None if stretch else crop_box(image.size, size)
    return image.resize((size[1], size[0]), RESAMPLING[resample], box=box)
