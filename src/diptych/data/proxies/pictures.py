"""Pictures for proxies that need few annotations: a folder of images, ready pairs, and the toy world with its truth."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from diptych.core.draws import key
from diptych.core.errors import UserError
from diptych.data.folder import FolderSource
from diptych.data.imaging import UNREADABLE, image_size, read_image, to_pil
from diptych.data.proxies.annotated import Annotated, Known, Pictures, Segment
from diptych.data.source import BadItem, Size, file_stamp
from diptych.toyworld.render import depth, masks, render
from diptych.toyworld.samples import ToyWorld
from diptych.toyworld.scene import BACKGROUNDS, COLOURS, Scene
from diptych.toyworld.shapes import SHAPES

MAPS = (".png", ".npy", ".tif", ".tiff")
TARGETS = (".png", ".jpg", ".jpeg", ".webp")
"""Endings of ready targets, in order of preference."""


class DepthMaps:
    """A folder of depth maps named as their pictures: 8- or 16-bit PNG, TIFF, or .npy (H, W); nearer is greater."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder).expanduser()
        if not self.folder.is_dir():
            raise UserError(f"{self.folder}: no such folder of depth maps")

    def path(self, picture: str) -> Path | None:
        """The map of a picture, by its path without suffix; None where there is none."""
        stem = self.folder / Path(picture).with_suffix("")
        return next((path for suffix in MAPS if (path := stem.parent / (stem.name + suffix)).is_file()), None)

    def read(self, picture: str, id: str) -> NDArray[np.float32]:
        """(H, W) float32; BadItem when there is none, or when it is no map."""
        path = self.path(picture)
        if path is None:
            raise BadItem(id, f"no depth map ({self.folder / Path(picture).with_suffix('.png')})")
        try:
            if path.suffix == ".npy":
                plane = np.load(path, allow_pickle=False)
            else:
                with Image.open(path) as image:
                    plane = np.asarray(image)
        except UNREADABLE as error:
            raise BadItem(id, f"unreadable depth map ({path})") from error
        if plane.ndim != 2 or plane.dtype.kind not in "biuf" or not np.isfinite(plane).all():
            raise BadItem(id, f"depth map must be one finite number per pixel ({path})")
        return np.asarray(plane, dtype=np.float32)


class FolderPictures(Pictures):
    """The images under a folder.

    Args:
        depth: a folder with their depth maps; pictures without one are listed as dropped.
    """

    def __init__(self, folder: str | Path, *, depth: str | Path | None = None, name: str = "proxies") -> None:
        listed = FolderSource(folder, task="image", name=name)
        self.folder = listed.folder
        self.depth = None if depth is None else DepthMaps(depth)
        self.dropped = dict(listed.dropped)
        self.paths: list[str] = []
        for path in listed.paths:
            if self.depth is not None and self.depth.path(path) is None:
                self.dropped[f"{name}/{path}"] = "no depth map"
            else:
                self.paths.append(path)
        if not self.paths:
            raise UserError(f"{self.folder}: no picture with a depth map in {depth}")
        self.known: frozenset[Known] = frozenset({"depth"} if self.depth else set())
        self.name = name

    def __len__(self) -> int:
        return len(self.paths)

    def id(self, index: int) -> str:
        return self.paths[index]

    def load(self, index: int, size: Size, whole: bool = False) -> Annotated:
        path, id = self.paths[index], f"{self.name}/{self.paths[index]}"
        smallest = (
            size if self.depth is None and not whole else None
        )  # a picture of reduced scale would not fit its map
        plane = None if self.depth is None else self.depth.read(path, id)
        return Annotated(image=read_image(self.folder / path, id, smallest), depth=plane)

    def sizes(self) -> Sequence[Size | None]:
        return [_size(self.folder / path) for path in self.paths]

    def stamp(self, index: int) -> str:
        path = self.paths[index]
        plane = self.depth.path(path) if self.depth else None
        return file_stamp(self.folder / path) + (file_stamp(plane) if plane else "")


def _size(path: Path) -> Size | None:
    try:
        return image_size(path, str(path))
    except BadItem:
        return None


class PairPictures(Pictures):
    """Pictures with ready targets: every picture of a folder that has a target of its name in another, such as
    SAM-SGT's `sam_selection/1/a.jpg` and `sam_mask/1/a.png`. Pictures without a target are listed as dropped.

    Args:
        targets: their folder. listed: a text file with a picture's path (below `folder`) on each line, where only these
            are wanted; a path may begin with folders that `folder` ends with.
    """

    known: frozenset[Known] = frozenset({"target"})

    def __init__(
        self, folder: str | Path, *, targets: str | Path, listed: str | Path | None = None, name: str = "proxies"
    ) -> None:
        self.folder, self.targets, self.name = Path(folder).expanduser(), Path(targets).expanduser(), name
        if not self.targets.is_dir():
            raise UserError(f"{self.targets}: no such folder of targets")
        source = FolderSource(self.folder, task="image", name=name)
        self.dropped = dict(source.dropped)
        paths = source.paths if listed is None else self._wanted(Path(listed).expanduser(), source.paths)
        self.pairs: list[tuple[str, Path]] = []
        for path in paths:
            target = self._target(path)
            if target is None:
                self.dropped[f"{name}/{path}"] = "picture without a target"
            else:
                self.pairs.append((path, target))
        if not self.pairs:
            raise UserError(f"{self.folder}: no picture with a target of its name in {self.targets}")

    def _wanted(self, file: Path, paths: Sequence[str]) -> list[str]:
        """The paths that a list names, in its order."""
        if not file.is_file():
            raise UserError(f"{file}: no such list of pictures")
        there, wanted = set(paths), []
        for line in file.read_text(encoding="utf-8").splitlines():
            parts = Path(line.strip()).parts
            inside = next((p for k in range(len(parts)) if (p := Path(*parts[k:]).as_posix()) in there), None)
            if inside is not None:
                wanted.append(inside)
            elif parts:
                self.dropped[f"{self.name}/{line.strip()}"] = "listed, but there is no such picture"
        return list(dict.fromkeys(wanted))

    def _target(self, path: str) -> Path | None:
        stem = self.targets / Path(path).with_suffix("")
        return next((target for suffix in TARGETS if (target := stem.parent / (stem.name + suffix)).is_file()), None)

    def __len__(self) -> int:
        return len(self.pairs)

    def id(self, index: int) -> str:
        return self.pairs[index][0]

    def load(self, index: int, size: Size, whole: bool = False) -> Annotated:
        path, target = self.pairs[index]
        id = f"{self.name}/{path}"
        return Annotated(image=read_image(self.folder / path, id), target=read_image(target, id))

    def sizes(self) -> Sequence[Size | None]:
        return [_size(self.folder / path) for path, _ in self.pairs]

    def stamp(self, index: int) -> str:
        path, target = self.pairs[index]
        return file_stamp(self.folder / path) + file_stamp(target)


class SomePictures(Pictures):
    """`count` of other pictures, drawn by seed and name: a smaller draw is part of a larger one, and two annotations of
    the same pictures give nearly the same draw.

    Raises:
        UserError: there are not as many.
    """

    def __init__(self, pictures: Pictures, count: int, *, seed: int = 0, name: str = "proxies") -> None:
        if not 1 <= count <= len(pictures):
            raise UserError(f"{name}: count must be from 1 to the {len(pictures):,} pictures there are, not {count:,}")
        self.pictures = pictures
        self.known: frozenset[Known] = pictures.known
        self.dropped = pictures.dropped
        drawn = sorted(range(len(pictures)), key=lambda index: key(seed, pictures.id(index)))
        self.rows = sorted(drawn[:count])

    def __len__(self) -> int:
        return len(self.rows)

    def id(self, index: int) -> str:
        return self.pictures.id(self.rows[index])

    def load(self, index: int, size: Size, whole: bool = False) -> Annotated:
        return self.pictures.load(self.rows[index], size, whole)

    def sizes(self) -> Sequence[Size | None] | None:
        sizes = self.pictures.sizes()
        return None if sizes is None else [sizes[row] for row in self.rows]

    def stamp(self, index: int) -> str:
        return self.pictures.stamp(self.rows[index])


class ToyPictures(Pictures):
    """Scenes of the toy world, with all that proxies need: shapes are things, the background is stuff."""

    known: frozenset[Known] = frozenset({"segments", "categories", "panoptic", "depth"})

    def __init__(self, *, count: int, seed: int = 0) -> None:
        if count < 1:
            raise UserError(f"toyworld: count must be at least 1, not {count}")
        self.count, self.seed = count, seed
        self.world = ToyWorld(seed)
        self.dropped: dict[str, str] = {}

    def __len__(self) -> int:
        return self.count

    def id(self, index: int) -> str:
        return f"toyworld:{self.seed}:{index}"

    def load(self, index: int, size: Size, whole: bool = False) -> Annotated:
        if size[0] != size[1]:
            raise UserError(f"toyworld draws squares, not {size[0]}x{size[1]}")
        return annotated(Scene.from_dict(self.world.sample("image", index).extra["scene"]), size[0])

    def sizes(self) -> None:
        return None

    def stamp(self, index: int) -> str:
        return self.id(index)


def annotated(scene: Scene, size: int) -> Annotated:
    """A scene drawn, with a segment per object and one for the background; categories are shape and colour."""
    planes = masks(scene, size).numpy()
    segments = [
        Segment(
            mask=plane,
            category=1 + SHAPES.index(obj.shape) * len(COLOURS) + list(COLOURS).index(obj.colour),
            name=f"{obj.colour} {obj.shape}",
        )
        for plane, obj in zip(planes, scene.objects, strict=True)
    ]
    ground = Segment(
        mask=np.logical_not(planes.any(axis=0)),
        category=1 + len(SHAPES) * len(COLOURS) + list(BACKGROUNDS).index(scene.background),
        name=f"{scene.background} background",
        thing=False,
    )
    picture = to_pil(render(scene, size))
    return Annotated(image=picture, segments=(*segments, ground), depth=depth(scene, size).numpy())
