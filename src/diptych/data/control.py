"""Pixel-level control: a captioned image and the map, drawn from it, that the image is to follow (Ovis-U1, Sec. 3.1).

Edges, and images with a part left out, are made from the image that is read; depth comes as maps in a folder. Data sets
that bring their own maps (MultiGen-20M) are plain `edit` rows instead: the map is the `source`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from types import MappingProxyType

import numpy as np
from PIL import Image
from torch import Tensor

from diptych.core.draws import key
from diptych.core.errors import UserError, unknown
from diptych.core.sample import Sample
from diptych.data.imaging import FitMode, check_fit, fit, to_pil, to_tensor
from diptych.data.proxies.annotated import Pixels
from diptych.data.proxies.degradations import holed
from diptych.data.proxies.perception import canny
from diptych.data.proxies.pictures import DepthMaps
from diptych.data.source import BadItem, ItemDraws, Size, Source, describe

Make = Callable[[Pixels, np.random.Generator], Pixels]
"""An image (H, W, 3) uint8 to its map, of the same size."""

KEPT = (0.35, 0.75)
"""Share of each side that outpainting shows."""
GREY = 127
"""Of what outpainting leaves out."""


def drawn_edges(image: Pixels, rng: np.random.Generator) -> Pixels:
    """Canny's edges, white on black."""
    return canny(image)


def cut_out(image: Pixels, rng: np.random.Generator) -> Pixels:
    """A rectangle of the picture, at its place on grey."""
    out = np.full_like(image, GREY)
    spans: list[slice] = []
    for side in image.shape[:2]:
        length = max(1, round(side * float(rng.uniform(*KEPT))))
        start = int(rng.integers(side - length + 1))
        spans.append(slice(start, start + length))
    out[spans[0], spans[1]] = image[spans[0], spans[1]]
    return out


@dataclass(frozen=True, kw_only=True)
class Control:
    """make: None where the map comes from a folder. instructions: ways to ask, `{text}` being the caption."""

    make: Make | None
    instructions: tuple[str, ...]


CONTROLS: Mapping[str, Control] = MappingProxyType(
    {
        "canny": Control(
            make=drawn_edges,
            instructions=(
                "Generate an image that follows these edges: {text}",
                "Use this edge map as the outline. {text}",
                "Turn the canny edges into a picture: {text}",
            ),
        ),
        "depth": Control(
            make=None,
            instructions=(
                "Generate an image with this depth map: {text}",
                "Follow the depth shown here. {text}",
                "Turn the depth map into a picture: {text}",
            ),
        ),
        "inpainting": Control(
            make=holed,
            instructions=(
                "Fill in the missing parts of this image: {text}",
                "Inpaint the covered regions. {text}",
                "Complete the damaged picture: {text}",
            ),
        ),
        "outpainting": Control(
            make=cut_out,
            instructions=(
                "Extend this image beyond its borders: {text}",
                "Outpaint the grey area. {text}",
                "Draw what surrounds this part of the picture: {text}",
            ),
        ),
    }
)


class ControlSource(Source):
    """Captioned images as edits of their maps.

    What is drawn at random (holes, the part that is shown) is a function of (seed, id of the image); of the
    instructions each visit draws one.

    Args:
        pairs: of task `text_to_image`. control: one of `CONTROLS`.
        maps: depth maps named as the images of a folder source, for `depth` alone. fit_mode: that of `pairs`.

    Raises:
        UserError: another control, another task, or `maps` missing or out of place.
    """

    def __init__(
        self,
        pairs: Source,
        control: str,
        *,
        maps: DepthMaps | None = None,
        fit_mode: str = "crop",
        seed: int = 0,
    ) -> None:
        if control not in CONTROLS:
            raise unknown("control", control, CONTROLS, pairs.name)
        if pairs.task != "text_to_image":
            raise UserError(f"{pairs.name}: controls are made of captioned images, not of task {pairs.task!r}")
        self.control = CONTROLS[control]
        if (self.control.make is None) != (maps is not None):
            raise UserError(f"{pairs.name}: depth maps belong to control 'depth', and that needs them")
        self.pairs = pairs
        self.kind = control
        self.maps = maps
        self.fit: FitMode = check_fit(fit_mode, pairs.name)
        self.seed = seed
        self.name = pairs.name
        self.task = "edit"
        self.dropped: Mapping[str, str] = pairs.dropped

    def __len__(self) -> int:
        return len(self.pairs)

    def load(self, index: int, draws: ItemDraws, size: Size) -> Sample:
        pair = self.pairs.load(index, draws, size)
        assert pair.image is not None, "a captioned image is there"
        texts = self.control.instructions
        return Sample(
            id=pair.id,
            task="edit",
            image=pair.image,
            text=texts[draws.integer("control", len(texts))].replace("{text}", pair.text),
            context_images=(self._map(pair.id, pair.image, size),),
            loss_mask=pair.loss_mask,
            extra={"control": self.kind},
        )

    def sizes(self) -> Sequence[Size | None] | np.ndarray | None:
        return self.pairs.sizes()

    def fingerprint(self, index: int) -> str:
        return self.pairs.fingerprint(index)

    def describe(self) -> str:
        return f"{describe(self)}, from {self.kind}"

    def _map(self, id: str, image: Tensor, size: Size) -> Tensor:
        if self.control.make is not None:
            rng = np.random.Generator(np.random.PCG64(key(self.seed, id, self.kind)))
            return to_tensor(Image.fromarray(self.control.make(np.asarray(to_pil(image)), rng)))
        assert self.maps is not None
        path = PurePath(id.removeprefix(f"{self.name}/"))
        plane = self.maps.read(str(path), id)
        low, high = float(plane.min()), float(plane.max())
        if not high > low:
            raise BadItem(id, "depth map is flat")
        grey = np.rint((plane - low) / (high - low) * 255).astype(np.uint8)
        return fit(Image.fromarray(grey).convert("RGB"), size, self.fit)
