"""COCO, SA-1B and depth files; and what is wrong with them, named and counted."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image
from pycocotools import mask as coco_mask

from diptych.cli.main import main
from diptych.core.errors import UserError
from diptych.data import report
from diptych.data.proxies.annotated import view
from diptych.data.proxies.coco import CocoPictures, Sa1bPictures
from diptych.data.proxies.pictures import FolderPictures, SomePictures, ToyPictures
from diptych.data.proxies.source import ProxySource
from diptych.data.source import BadItem


def coco(
    folder: Path, plain: Any | None = None, *, file: str = "instances.json", tmp: Path | None = None
) -> CocoPictures:
    path = folder / file
    if plain is not None:
        assert tmp is not None
        path = tmp / file
        path.write_text(json.dumps(plain))
    masks = folder / "panoptic" if file == "panoptic.json" else None
    return CocoPictures(path, images=folder / "images", masks=masks, name="coco")


def test_coco(photographs: Path) -> None:
    instances, panoptic = coco(photographs), coco(photographs, file="panoptic.json")
    assert instances.known == {"segments", "categories"}
    assert panoptic.known == {"segments", "categories", "panoptic"}
    assert instances.sizes()[0] == (512, 512)
    for index in range(2):
        objects, all_of_it = instances.load(index, (1, 1)), panoptic.load(index, (1, 1))
        person, rest = all_of_it.segments
        assert (person.thing, rest.thing) == (True, False)
        assert (person.mask ^ rest.mask).all()
        drawn, crowd = objects.segments
        assert crowd.crowd
        assert (drawn.mask != person.mask).mean() < 0.01  # two ways to fill one polygon
        assert np.array_equal(crowd.mask, rest.mask)


CASES: list[tuple[str, Callable[[dict[str, Any]], object], str]] = [
    ("outside", lambda row: row.update(segmentation=[[10, 10, 900, 10, 10, 90]]), "polygon outside the picture"),
    ("short", lambda row: row.update(segmentation=[[10, 10, 20, 20]]), "polygon of 4 numbers"),
    ("rle", lambda row: row.update(segmentation={"size": [4, 5], "counts": [20]}), "RLE of another size (5x4 for a"),
    ("runs", lambda row: row.update(segmentation={"size": [512, 512], "counts": [20]}), "RLE of the wrong length (20"),
    ("unsized", lambda row: row.update(segmentation={"counts": [20]}), "RLE of another size (None for a"),
    ("text", lambda row: row.update(segmentation={"size": [512, 512], "counts": "!!"}), "RLE that cannot be read"),
    ("words", lambda row: row.update(segmentation={"size": [512, 512], "counts": ["a"]}), "RLE that cannot be read"),
    ("nan", lambda row: row.update(segmentation=[[10, 10, float("nan"), 9, 9, 9]]), "polygon that is no list of"),
    ("left", lambda row: row.update(segmentation=[[-9, 10, 90, 10, 10, 90]]), "polygon outside the picture"),
    ("empty", lambda row: row.update(segmentation=[]), "empty mask (annotation 1)"),
    ("nothing", lambda row: row.update(segmentation={"size": [512, 512], "counts": [512 * 512]}), "empty mask"),
    ("category", lambda row: row.update(category_id=5), "unknown category (5 of annotation 1)"),
]


@pytest.mark.parametrize(("change", "reason"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_annotations_that_do_not_fit(photographs: Path, tmp_path: Path, change: Any, reason: str) -> None:
    plain = json.loads((photographs / "instances.json").read_text())
    change(plain["annotations"][0])
    pictures = coco(photographs, plain, tmp=tmp_path)
    with pytest.raises(BadItem) as raised:
        pictures.load(0, (8, 8))
    assert raised.value.id == "coco/astronaut.png"
    assert raised.value.reason.startswith(reason)
    # counted, and never silent
    source = ProxySource(pictures, proxies="instance", name="coco")
    found = report.inspect(source, (16, 16))
    assert found.usable == 1
    assert list(found.bad) == ["coco/astronaut.png"]


def test_annotations_without_pictures(photographs: Path, tmp_path: Path) -> None:
    plain = json.loads((photographs / "instances.json").read_text())
    lost = copy.deepcopy(plain)
    lost["annotations"] = [row for row in plain["annotations"] if row["image_id"] == 1]
    lost["annotations"].append({**plain["annotations"][0], "id": 99, "image_id": 77})
    assert coco(photographs, lost, tmp=tmp_path).dropped == {
        "coco/annotation 99": "annotation without image (image_id 77)",
        "coco/chelsea.png": "image without annotation",
    }
    plain["images"][0]["file_name"] = "gone.png"
    with pytest.raises(BadItem, match="image file missing"):
        coco(photographs, plain, tmp=tmp_path).load(0, (8, 8))
    with pytest.raises(UserError, match="no picture with an annotation"):
        coco(photographs, {**plain, "annotations": []}, tmp=tmp_path)
    with pytest.raises(UserError, match="needs 'images' and 'annotations'"):
        coco(photographs, [], tmp=tmp_path)
    del lost["annotations"][-1]["image_id"]
    assert coco(photographs, lost, tmp=tmp_path).dropped["coco/annotation 99"].startswith("annotation without image")
    del lost["images"][1]["height"]
    with pytest.raises(UserError, match=r"images\[1\] has no 'height'"):
        coco(photographs, lost, tmp=tmp_path)


def test_panoptic_masks(photographs: Path, tmp_path: Path) -> None:
    plain = json.loads((photographs / "panoptic.json").read_text())
    extra = copy.deepcopy(plain)
    extra["annotations"][0]["segments_info"].append({"id": 4, "category_id": 1})
    with pytest.raises(BadItem, match=r"empty mask \(segment 4\)"):
        coco(photographs, extra, file="panoptic.json", tmp=tmp_path).load(0, (8, 8))
    plain["annotations"][0]["segments_info"].pop()
    with pytest.raises(BadItem, match=r"a segment that is not listed \(7\)"):
        coco(photographs, plain, file="panoptic.json", tmp=tmp_path).load(0, (8, 8))


def test_panoptic_masks_that_do_not_fit(photographs: Path, tmp_path: Path) -> None:
    plain = json.loads((photographs / "panoptic.json").read_text())
    twice = {**plain, "annotations": [plain["annotations"][0]] * 2}
    with pytest.raises(BadItem, match=r"several panoptic annotations \(2\)"):
        coco(photographs, twice, file="panoptic.json", tmp=tmp_path).load(0, (8, 8))
    (tmp_path / "panoptic").mkdir()
    Image.new("RGB", (5, 4)).save(tmp_path / "panoptic" / "astronaut.png")
    own = CocoPictures(photographs / "panoptic.json", images=photographs / "images", masks=tmp_path / "panoptic")
    with pytest.raises(BadItem, match=r"mask of another size \(5x4 for a picture of 512x512\)"):
        own.load(0, (8, 8))
    found = report.inspect(ProxySource(own, proxies="panoptic", name="coco"), (16, 16))
    assert found.usable == 0
    assert len(found.bad) == 2
    assert any(reason.startswith("panoptic mask missing") for reason in found.bad.values())


def test_sa1b(tmp_path: Path) -> None:
    mask = np.zeros((20, 30), dtype=np.uint8)
    mask[3:9, 4:14] = 1
    rle = coco_mask.encode(np.asfortranarray(mask))
    row = {"id": 5, "segmentation": {"size": [20, 30], "counts": rle["counts"].decode()}}
    for name in ("sa_1", "sa_2", "sa_3"):
        Image.new("RGB", (30, 20), "teal").save(tmp_path / f"{name}.jpg")
    for name, rows in (("sa_1", [row]), ("sa_2", []), ("sa_4", [row])):
        (tmp_path / f"{name}.json").write_text(json.dumps({"annotations": rows}))
    pictures = Sa1bPictures(tmp_path, name="sa")
    assert len(pictures) == 2
    assert pictures.dropped == {
        "sa/sa_3.jpg": "image without annotation",
        "sa/sa_4.json": "annotation without image",
    }
    assert np.array_equal(pictures.load(0, (8, 8)).segments[0].mask, mask.astype(bool))
    with pytest.raises(BadItem, match="image without annotation"):
        pictures.load(1, (8, 8))
    (tmp_path / "sa_2.json").write_text("{")
    with pytest.raises(BadItem, match="unreadable annotation"):
        pictures.load(1, (8, 8))
    with pytest.raises(UserError, match="'semantic' needs categories, and these pictures come with segments"):
        ProxySource(pictures, proxies="semantic")


def test_depth_maps(photographs: Path, tmp_path: Path) -> None:
    pictures = FolderPictures(photographs / "images", depth=photographs / "depth", name="photos")
    assert pictures.known == {"depth"}
    assert pictures.load(0, (8, 8)).depth is not None
    np.save(tmp_path / "astronaut.npy", np.zeros((5, 7), dtype=np.float32))
    pictures = FolderPictures(photographs / "images", depth=tmp_path, name="photos")
    assert pictures.dropped == {"photos/chelsea.png": "no depth map"}
    with pytest.raises(BadItem, match="depth map of another size \\(7x5 for a picture of 512x512\\)"):
        view(pictures.load(0, (8, 8)), (8, 8), "photos/astronaut.png")
    np.save(tmp_path / "astronaut.npy", np.zeros((5, 7, 3)))
    with pytest.raises(BadItem, match="one finite number per pixel"):
        pictures.load(0, (8, 8))


def test_coco_with_depth(photographs: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "astronaut.npy", np.zeros((512, 512), dtype=np.float32))
    file = photographs / "panoptic.json"
    pictures = CocoPictures(file, images=photographs / "images", depth=tmp_path, name="coco")
    assert [pictures.id(at) for at in range(len(pictures))] == ["astronaut.png"]
    assert pictures.dropped == {"coco/chelsea.png": "no depth map"}


def test_some_pictures(photographs: Path) -> None:
    toys = ToyPictures(count=50, seed=2)
    few, more = SomePictures(toys, 7, seed=1), SomePictures(toys, 20, seed=1)
    names = [{some.id(at) for at in range(len(some))} for some in (few, more)]
    assert len(names[0]) == 7
    assert names[0] < names[1] < {toys.id(at) for at in range(50)}
    assert names[0] != {SomePictures(toys, 7, seed=3).id(at) for at in range(7)}
    one = SomePictures(coco(photographs), 1)
    whole = coco(photographs)
    place = next(at for at in range(2) if whole.id(at) == one.id(0))
    assert one.sizes() == [whole.sizes()[place]]
    assert one.stamp(0) == whole.stamp(place)
    with pytest.raises(UserError, match="photos: count must be from 1 to the 50 pictures there are, not 51"):
        SomePictures(toys, 51, name="photos")


def recipe(tiny_plain: dict[str, Any], source: dict[str, Any], path: Path) -> Path:
    tiny_plain["stages"]["mix"]["data"]["sources"] = {"proxies": {"kind": "proxies", "task": "edit", **source}}
    path.write_text("# Proxies.\n" + yaml.safe_dump(tiny_plain))
    return path


def test_check_draws_a_sheet(
    tiny_plain: dict[str, Any], photographs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options: dict[str, Any] = {
        "pictures": "coco",
        "images": str(photographs / "images"),
        "masks": str(photographs / "panoptic"),
    }
    source = {
        "path": str(photographs / "panoptic.json"),
        "options": {**options, "proxies": {"panoptic": 2, "edges": 1}},
    }
    file = recipe(tiny_plain, source, tmp_path / "r.yaml")
    assert main(["check", str(file), "--preview", "--output", str(tmp_path / "sheets")]) == 0
    said = capsys.readouterr().out
    assert "proxies (edit): 2 items" in said
    with Image.open(tmp_path / "sheets" / "mix.png") as sheet:
        assert sheet.width > 200


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (
            {"options": {"pictures": "cocoa", "proxies": "edges"}},
            "unknown kind of pictures 'cocoa'. Did you mean",
        ),
        ({"options": {"pictures": "toyworld"}}, "'proxies' is missing"),
        ({"options": {"pictures": "toyworld", "proxies": "edge"}}, "unknown proxy 'edge'. Did you mean 'edges'"),
        ({"options": {"pictures": "toyworld", "proxies": "edges", "depth": "x"}}, "unknown key 'depth'"),
        ({"path": "x", "options": {"pictures": "coco", "proxies": "edges"}}, "'images' is missing"),
    ],
)
def test_wrong_recipes(
    tiny_plain: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str], source: Any, message: str
) -> None:
    assert main(["check", str(recipe(tiny_plain, source, tmp_path / "r.yaml"))]) == 2
    assert message in capsys.readouterr().err


def test_training_on_toy_proxies(tiny_plain: dict[str, Any], tmp_path: Path) -> None:
    source = {"count": 32, "options": {"pictures": "toyworld", "proxies": {"mixed": 1, "restoration": 1}}}
    file = recipe(tiny_plain, source, tmp_path / "r.yaml")
    assert main(["train", str(file), "--out", str(tmp_path / "run")]) == 0
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert any("flow.edit" in json.dumps(row) for row in rows)
