"""Pictures annotated in COCO's formats (instances and panoptic), and in SA-1B's."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from diptych.core.errors import UserError
from diptych.core.reading import reason
from diptych.data.imaging import UNREADABLE, image_size, read_image
from diptych.data.proxies.annotated import Annotated, Known, Pictures, Segment
from diptych.data.proxies.coco_masks import decoded
from diptych.data.proxies.pictures import DepthMaps
from diptych.data.source import BadItem, Size, file_stamp


class CocoPictures(Pictures):
    """A COCO file and its pictures.

    Instances: polygons or RLE by object. Panoptic: `segments_info` by picture, masks in PNGs whose colours are segment
    numbers (R + 256 G + 65536 B). An annotation whose picture is not listed, and a picture without annotation, are
    listed as dropped, as is one without the depth map asked for; an annotation that does not fit makes its picture a
    BadItem.

    Args:
        file: instances_*.json or panoptic_*.json.
        images: folder of the pictures.
        masks: folder of the panoptic PNGs; default: the file's name without suffix, beside it.
        depth: folder of depth maps, where there are any.
    """

    def __init__(
        self,
        file: str | Path,
        *,
        images: str | Path,
        masks: str | Path | None = None,
        depth: str | Path | None = None,
        name: str = "proxies",
    ) -> None:
        self.file, self.images, self.name = Path(file).expanduser(), Path(images).expanduser(), name
        if not self.images.is_dir():
            raise UserError(f"{self.images}: no such folder of pictures")
        plain = read_json(self.file)
        if not isinstance(plain, dict) or not {"images", "annotations"} <= set(plain):
            raise UserError(f"{self.file}: needs 'images' and 'annotations', as COCO's files have them")
        listed, annotations, categories = (
            rows_of(self.file, key, plain.get(key)) for key in ("images", "annotations", "categories")
        )
        for number, row in enumerate(categories):
            if not isinstance(row.get("id"), int | str) or not isinstance(row.get("name"), str):
                raise UserError(f"{self.file}: categories[{number}] needs an 'id' and a 'name'")
        self.categories = {row["id"]: row for row in categories}
        self.panoptic = any("segments_info" in row for row in annotations)
        self.masks = self.file.with_suffix("") if masks is None else Path(masks).expanduser()
        if self.panoptic and not self.masks.is_dir():
            raise UserError(f"{self.masks}: no such folder of panoptic masks")
        self.depth = None if depth is None else DepthMaps(depth)
        known: set[Known] = {"segments"}
        if self.categories:
            known.add("categories")
        if self.panoptic:
            known.add("panoptic")
        if self.depth is not None:
            known.add("depth")
        self.known: frozenset[Known] = frozenset(known)
        self._list(listed, annotations)

    def _list(self, images: Sequence[Any], annotations: Sequence[Any]) -> None:
        for number, row in enumerate(images):
            if missing := [key for key in ("id", "file_name", "height", "width") if key not in row]:
                raise UserError(f"{self.file}: images[{number}] has no {missing[0]!r}")
            if not isinstance(row["id"], int | str) or not isinstance(row["file_name"], str) or not row["file_name"]:
                raise UserError(f"{self.file}: images[{number}]: 'id' is a number or text, and 'file_name' is text")
            for side in ("height", "width"):
                if not isinstance(row[side], int) or isinstance(row[side], bool) or not 0 < row[side] < 2**24:
                    raise UserError(f"{self.file}: images[{number}]: {side!r} is no number of pixels ({row[side]!r})")
        by_image: dict[Any, list[Any]] = {row["id"]: [] for row in images}
        if len(by_image) < len(images):
            twice = next(id for id, count in Counter(row["id"] for row in images).items() if count > 1)
            raise UserError(f"{self.file}: two pictures have the id {twice!r}")
        self.dropped: dict[str, str] = {}
        for row in annotations:
            image = row.get("image_id")
            if isinstance(image, int | str) and image in by_image:
                by_image[image].append(row)
            else:
                label = f"{self.name}/annotation {row.get('id', image)}"
                self.dropped[label] = f"annotation without image (image_id {image})"
        self.rows: list[tuple[Mapping[str, Any], list[Any]]] = []
        for row in images:
            if not by_image[row["id"]]:
                self.dropped[f"{self.name}/{row['file_name']}"] = "image without annotation"
            elif self.depth is not None and self.depth.path(str(row["file_name"])) is None:
                self.dropped[f"{self.name}/{row['file_name']}"] = "no depth map"
            else:
                self.rows.append((row, by_image[row["id"]]))
        if not self.rows:
            also = "" if self.depth is None else f" and a depth map in {self.depth.folder}"
            raise UserError(f"{self.file}: no picture with an annotation{also}")

    def __len__(self) -> int:
        return len(self.rows)

    def id(self, index: int) -> str:
        return str(self.rows[index][0]["file_name"])

    def load(self, index: int, size: Size, whole: bool = False) -> Annotated:
        row, annotations = self.rows[index]
        id = f"{self.name}/{row['file_name']}"
        image = read_image(self.images / row["file_name"], id)
        if image.size != (row["width"], row["height"]):
            listed = f"{image.width}x{image.height}, listed as {row['width']}x{row['height']}"
            raise BadItem(id, f"picture of another size than its annotation ({listed})")
        shape = (image.height, image.width)
        if self.panoptic and len(annotations) > 1:
            raise BadItem(id, f"several panoptic annotations ({len(annotations)})")
        if self.panoptic and not _is_panoptic(annotations[0]):
            raise BadItem(id, "panoptic annotation without file_name, or without segments_info that have ids")
        segments = (
            self._panoptic_segments(annotations[0], shape, id)
            if self.panoptic
            else [self._instance(annotation, shape, id) for annotation in annotations]
        )
        plane = None if self.depth is None else self.depth.read(str(row["file_name"]), id)
        return Annotated(image=image, segments=tuple(segments), depth=plane)

    def _instance(self, row: Mapping[str, Any], shape: Size, id: str) -> Segment:
        label = f"annotation {row.get('id', '?')}"
        return Segment(
            mask=decoded(row.get("segmentation"), shape, id, label),
            crowd=bool(row.get("iscrowd", 0)),
            **self._category(row, id, label),
        )

    def _panoptic_segments(self, row: Mapping[str, Any], shape: Size, id: str) -> list[Segment]:
        path = self.masks / row["file_name"]
        try:
            with Image.open(path) as image:
                colours = np.asarray(image.convert("RGB"), dtype=np.int64)
        except UNREADABLE as error:
            raise BadItem(id, f"panoptic mask missing or unreadable ({path})") from error
        if colours.shape[:2] != shape:
            size = f"{colours.shape[1]}x{colours.shape[0]} for a picture of {shape[1]}x{shape[0]}"
            raise BadItem(id, f"mask of another size ({size})")
        numbers = colours[..., 0] + 256 * colours[..., 1] + 65536 * colours[..., 2]
        segments: list[Segment] = []
        for segment in row["segments_info"]:
            label = f"segment {segment['id']}"
            mask = numbers == segment["id"]
            if not mask.any():
                raise BadItem(id, f"empty mask ({label})")
            crowd = bool(segment.get("iscrowd", 0))
            segments.append(Segment(mask=mask, crowd=crowd, **self._category(segment, id, label)))
        unlisted = set(np.unique(numbers).tolist()) - {0} - {segment["id"] for segment in row["segments_info"]}
        if unlisted:
            raise BadItem(id, f"panoptic mask holds a segment that is not listed ({min(unlisted)})")
        return segments

    def _category(self, row: Mapping[str, Any], id: str, label: str) -> dict[str, Any]:
        if not self.categories:
            return {}
        number = row.get("category_id")
        if not isinstance(number, int | str) or number not in self.categories:
            raise BadItem(id, f"unknown category ({number} of {label})")
        category = self.categories[number]
        return {"category": number, "name": str(category["name"]), "thing": bool(category.get("isthing", 1))}

    def sizes(self) -> Sequence[Size | None]:
        return [(row["height"], row["width"]) for row, _ in self.rows]

    def stamp(self, index: int) -> str:
        row, annotations = self.rows[index]
        readable = self.panoptic and _is_panoptic(annotations[0])
        planes = [self.masks / annotations[0]["file_name"]] if readable else []
        if self.depth is not None and (path := self.depth.path(str(row["file_name"]))) is not None:
            planes.append(path)
        listed = str(len(json.dumps(annotations)))
        return ":".join([file_stamp(self.images / row["file_name"]), file_stamp(self.file), listed,
                         *map(file_stamp, planes)])  # fmt: skip


class Sa1bPictures(Pictures):
    """A folder of SA-1B: sa_N.jpg beside sa_N.json, whose `annotations` hold RLE masks without categories.

    A JSON without picture and a picture without JSON are listed as dropped.
    """

    known: frozenset[Known] = frozenset({"segments"})

    def __init__(self, folder: str | Path, *, name: str = "proxies") -> None:
        self.folder, self.name = Path(folder).expanduser(), name
        if not self.folder.is_dir():
            raise UserError(f"{self.folder}: no such folder")
        pictures = {path.with_suffix("") for path in self.folder.rglob("*.jpg")}
        texts = {path.with_suffix("") for path in self.folder.rglob("*.json")}
        self.paths = sorted(pictures & texts)
        self.dropped = {f"{name}/{self._named(path)}.jpg": "image without annotation" for path in pictures - texts}
        self.dropped |= {f"{name}/{self._named(path)}.json": "annotation without image" for path in texts - pictures}
        if not self.paths:
            raise UserError(f"{self.folder}: no picture with an annotation (sa_1.jpg beside sa_1.json)")

    def _named(self, path: Path) -> str:
        return path.relative_to(self.folder).as_posix()

    def __len__(self) -> int:
        return len(self.paths)

    def id(self, index: int) -> str:
        return f"{self._named(self.paths[index])}.jpg"

    def load(self, index: int, size: Size, whole: bool = False) -> Annotated:
        path, id = self.paths[index], f"{self.name}/{self.id(index)}"
        image = read_image(path.with_suffix(".jpg"), id)
        try:
            rows = json.loads(path.with_suffix(".json").read_bytes())["annotations"]
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise BadItem(id, f"unreadable annotation ({path.name}.json)") from error
        if rows and not (isinstance(rows, list) and all(isinstance(row, dict) for row in rows)):
            raise BadItem(id, f"unreadable annotation ({path.name}.json: annotations are a list of objects)")
        if not rows:
            raise BadItem(id, "image without annotation (an empty list)")
        shape = (image.height, image.width)
        return Annotated(
            image=image,
            segments=tuple(
                Segment(mask=decoded(row.get("segmentation"), shape, id, f"annotation {row.get('id', '?')}"))
                for row in rows
            ),
        )

    def sizes(self) -> Sequence[Size | None]:
        return [self._size(path) for path in self.paths]

    def _size(self, path: Path) -> Size | None:
        try:
            return image_size(path.with_suffix(".jpg"), path.name)
        except BadItem:
            return None

    def stamp(self, index: int) -> str:
        path = self.paths[index]
        return file_stamp(path.with_suffix(".jpg")) + file_stamp(path.with_suffix(".json"))


def read_json(path: Path) -> Any:
    """A JSON file; UserError names what is wrong with it."""
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except OSError as error:
        raise UserError(f"{path}: not readable ({error.strerror or error})") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON ({reason(error)})") from error


def rows_of(file: Path, key: str, value: Any) -> list[dict[str, Any]]:
    """The objects of a list in a COCO file; UserError for what is none. `categories` may be missing."""
    if value is None and key == "categories":
        return []
    if not isinstance(value, list):
        raise UserError(f"{file}: {key!r} must be a list of objects")
    for number, row in enumerate(value):
        if not isinstance(row, dict):
            raise UserError(f"{file}: {key}[{number}] must be an object, not {row!r:.40}")
    return value


def _is_panoptic(row: Mapping[str, Any]) -> bool:
    infos = row.get("segments_info")
    listed = isinstance(infos, list) and all(
        isinstance(info, dict) and isinstance(info.get("id"), int) for info in infos
    )
    return listed and isinstance(row.get("file_name"), str)
