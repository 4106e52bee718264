"""Two of scikit-image's photographs with hand-drawn annotations in COCO's formats, and a depth map."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import skimage.data
from PIL import Image

CATEGORIES = [
    {"id": 1, "name": "person", "isthing": 1},
    {"id": 17, "name": "cat", "isthing": 1},
    {"id": 91, "name": "backdrop", "isthing": 0},
]
POLYGONS = {
    "astronaut.png": (1, [[170, 40, 270, 40, 290, 150, 380, 230, 400, 500, 60, 500, 100, 220, 170, 170]]),
    "chelsea.png": (17, [[60, 20, 330, 20, 400, 120, 380, 290, 60, 290, 30, 150]]),
}


@pytest.fixture(scope="session")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures in images/, instances.json, panoptic.json with its masks, depth/."""
    folder = tmp_path_factory.mktemp("photographs")
    for name in ("images", "panoptic", "depth"):
        (folder / name).mkdir()
    images: list[dict[str, Any]] = []
    instances: list[dict[str, Any]] = []
    panoptic: list[dict[str, Any]] = []
    for number, (name, pixels) in enumerate(
        {"astronaut.png": skimage.data.astronaut(), "chelsea.png": skimage.data.chelsea()}.items(), 1
    ):
        height, width = pixels.shape[:2]
        Image.fromarray(pixels).save(folder / "images" / name)
        images.append({"id": number, "file_name": name, "height": height, "width": width})
        category, polygons = POLYGONS[name]
        mask = Image.new("L", (width, height))
        from PIL import ImageDraw

        ImageDraw.Draw(mask).polygon(polygons[0], fill=1)
        inside = np.asarray(mask).astype(bool)
        instances.append({"id": number, "image_id": number, "category_id": category, "segmentation": polygons})
        flat = np.asfortranarray(~inside).ravel(order="F")
        runs = np.flatnonzero(np.diff(np.concatenate([[False], flat, [False]])))
        counts = np.diff(np.concatenate([[0], runs, [flat.size]])).tolist()
        instances.append(
            {"id": 10 + number, "image_id": number, "category_id": 91, "iscrowd": 1,
             "segmentation": {"size": [height, width], "counts": counts}}
        )  # fmt: skip
        colours = np.zeros((height, width, 3), dtype=np.uint8)
        colours[inside], colours[~inside] = (5, 1, 0), (7, 0, 0)  # segments 261 and 7
        Image.fromarray(colours).save(folder / "panoptic" / name)
        listed = [{"id": 261, "category_id": category}, {"id": 7, "category_id": 91}]
        panoptic.append({"image_id": number, "file_name": name, "segments_info": listed})
        slope = np.linspace(0, 60000, height)[:, None] * np.ones((1, width))
        Image.fromarray(slope.astype(np.uint16)).save(folder / "depth" / name)
    for name, rows in (("instances", instances), ("panoptic", panoptic)):
        plain = {"images": images, "annotations": rows, "categories": CATEGORIES}
        (folder / f"{name}.json").write_text(json.dumps(plain))
    return folder
