"""Small imitations of the layouts of docs/datasets.md go through `diptych check` and ten steps by its recipe lines."""

from __future__ import annotations

import io
import json
import re
import shutil
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import yaml
from PIL import Image
from pycocotools import mask as coco_mask

from diptych.recipes.check import check_data, check_system
from diptych.recipes.recipe import parse
from diptych.recipes.run import train_recipe

PAGE = Path(__file__).parent.parent / "docs" / "datasets.md"
SECTIONS = {
    title: yaml.safe_load(re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)[0])["sources"]
    for title, text in re.findall(r"\n## ([^\n]+)\n(.*?)(?=\n## |\Z)", PAGE.read_text(encoding="utf-8"), re.DOTALL)
}
COUNT = 4


def picture(number: int, kind: str = "JPEG") -> bytes:
    pixels = np.random.default_rng(number).integers(0, 255, (40 + 4 * number, 44, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def shard(path: Path, members: dict[str, bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def file(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def table(path: Path, columns: dict[str, list[Any]], images: tuple[str, ...] = ()) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = datasets.Dataset.from_dict(columns)
    for name in images:
        rows = rows.cast_column(name, datasets.Image(decode=False))
    rows.to_parquet(path)


def bytes_of(kind: str) -> list[dict[str, Any]]:
    return [{"bytes": picture(number, kind), "path": None} for number in range(COUNT)]


def megalith(here: Path) -> None:
    """As img2dataset writes it: a .json with URL and key beside each picture; captions in a second file."""
    keys = [f"0000{number // 2}{number:04d}" for number in range(COUNT)]
    for part in range(2):
        members: dict[str, bytes] = {}
        for number in (2 * part, 2 * part + 1):
            said = {"url": f"https://live.staticflickr.com/{number}.jpg", "key": keys[number], "status": "success"}
            members |= {f"{keys[number]}.jpg": picture(number), f"{keys[number]}.json": json.dumps(said).encode()}
        shard(here / f"megalith/shards/0000{part}.tar", members)
    table(here / "megalith/captions.parquet", {"key": keys, "caption": [f"a circle {key}" for key in keys]})


def text_to_image_2m(here: Path) -> None:
    members: dict[str, bytes] = {}
    for number in range(COUNT):
        members[f"{number:06d}.jpg"] = picture(number)
        members[f"{number:06d}.json"] = json.dumps({"prompt": "a red circle"}).encode()
    shard(here / "t2i2m/data_512_2M/data_000000.tar", members)


def blip3o(here: Path) -> None:
    for name in ("dalle3", "journeyDB"):
        members: dict[str, bytes] = {}
        for number in range(2):
            members |= {f"{name}_{number}.jpg": picture(number), f"{name}_{number}.txt": b"a blue square"}
        shard(here / f"blip3o/{name}.tar", members)


def echo4o(here: Path) -> None:
    folder = "Instruction-Following-Image/images"
    for number in range(COUNT):
        file(here / f"echo4o/{folder}/{number}.jpg", picture(number))
    images = [f"{folder}/{number}.jpg" for number in range(COUNT)]
    lines(here / "echo4o/pairs.jsonl", [{"image": image, "text": "three crosses"} for image in images])
    edits = [{"sources": images[:2], "image": image, "instruction": "put them together"} for image in images]
    lines(here / "echo4o/references.jsonl", edits)


def share4o(here: Path) -> None:
    for number in range(COUNT):
        file(here / f"share4o/image/{number}.png", picture(number, "PNG"))
    images = [f"image/{number}.png" for number in range(COUNT)]
    lines(here / "share4o/pairs.jsonl", [{"image": image, "text": "a red circle"} for image in images])
    edits = [{"sources": [images[0]], "image": image, "instruction": "make it blue"} for image in images]
    lines(here / "share4o/edits.jsonl", edits)


def omniedit(here: Path) -> None:
    columns = {"omni_edit_id": list("abcd"), "src_img": bytes_of("JPEG"), "edited_img": bytes_of("JPEG")}
    prompts = [["remove the circle", "take the circle away"]] * COUNT
    path = here / "omniedit/data/train-00000-of-00001.parquet"
    table(path, {**columns, "edited_prompt_list": prompts}, ("src_img", "edited_img"))


def ultraedit(here: Path) -> None:
    columns = {"source_image": bytes_of("PNG"), "edited_image": bytes_of("PNG"), "edit_prompt": ["a blue one"] * COUNT}
    table(here / "ultraedit/data/FreeForm_0-00000.parquet", columns, ("source_image", "edited_image"))


def seed(here: Path) -> None:
    folder = here / "seed/multi_turn_editing"
    for number in range(COUNT + 1):
        file(folder / f"images/{number}.jpg", picture(number))
    edits = [
        {"source": f"images/{number}.jpg", "image": f"images/{number + 1}.jpg", "instruction": "add a cross"}
        for number in range(COUNT)
    ]
    lines(folder / "edits.jsonl", edits)


def coco(here: Path) -> None:
    images: list[dict[str, Any]] = []
    instances: list[dict[str, Any]] = []
    panoptic: list[dict[str, Any]] = []
    for number in range(COUNT):
        name = f"{number:012d}"
        file(here / f"coco/train2017/{name}.jpg", picture(number))
        height, width = 40 + 4 * number, 44
        images.append({"id": number, "file_name": f"{name}.jpg", "height": height, "width": width})
        polygon = [5, 5, 30, 5, 30, 30, 5, 30]
        instances.append({"id": number, "image_id": number, "category_id": 1, "segmentation": [polygon], "iscrowd": 0})
        colours = np.full((height, width, 3), (7, 0, 0), np.uint8)
        colours[5:30, 5:30] = (5, 0, 0)
        buffer = io.BytesIO()
        Image.fromarray(colours).save(buffer, "PNG")
        file(here / f"coco/annotations/panoptic_train2017/{name}.png", buffer.getvalue())
        segments = [{"id": 5, "category_id": 1}, {"id": 7, "category_id": 91}]
        panoptic.append({"image_id": number, "file_name": f"{name}.png", "segments_info": segments})
    categories = [{"id": 1, "name": "person", "isthing": 1}, {"id": 91, "name": "grass", "isthing": 0}]
    for name, rows in (("instances", instances), ("panoptic", panoptic)):
        path = here / f"coco/annotations/{name}_train2017.json"
        path.write_text(json.dumps({"images": images, "categories": categories, "annotations": rows}))


def sa1b(here: Path) -> None:
    members: dict[str, bytes] = {}
    for number in range(COUNT):
        mask = np.zeros((40 + 4 * number, 44), np.uint8)
        mask[5:30, 5:30] = 1
        rle = coco_mask.encode(np.asfortranarray(mask))
        row = {"id": number, "segmentation": {"size": list(mask.shape), "counts": rle["counts"].decode()}}
        members[f"sa_{number}.jpg"] = picture(number)
        members[f"sa_{number}.json"] = json.dumps({"annotations": [row]}).encode()
    shard(here / "sa_000000.tar", members)
    for name, data in members.items():
        file(here / "sa1b" / name, data)


def sam_sgt(here: Path) -> None:
    for number in range(COUNT):
        file(here / f"samsgt/sam_selection/sa_{number}.jpg", picture(number))
        file(here / f"samsgt/sam_mask/sa_{number}.png", picture(number, "PNG"))


def onevision(here: Path) -> None:
    turns = [{"from": "human", "value": "<image>\nHow many?"}, {"from": "gpt", "value": "two"}]
    columns = {
        "id": list("abcd"),
        "image": bytes_of("JPEG"),
        "conversations": [turns] * COUNT,
        "data_source": ["x"] * COUNT,
    }
    table(here / "onevision/ai2d(gpt4v)/train-00000-of-00001.parquet", columns, ("image",))


def mjhq(here: Path) -> None:
    for number in range(COUNT):
        file(here / f"mjhq/animals/{number}.jpg", picture(number))
    rows = [{"image": f"animals/{number}.jpg", "text": "a cat"} for number in range(COUNT)]
    lines(here / "mjhq/pairs.jsonl", rows)


LAYOUTS: dict[str, Callable[[Path], None]] = {
    "Megalith-10M": megalith,
    "text-to-image-2M": text_to_image_2m,
    "BLIP3o-60k": blip3o,
    "Echo-4o-Image": echo4o,
    "ShareGPT-4o-Image": share4o,
    "OmniEdit": omniedit,
    "UltraEdit": ultraedit,
    "SEED-Data-Edit": seed,
    "COCO": coco,
    "SA-1B": sa1b,
    "SAM-SGT": sam_sgt,
    "LLaVA-OneVision": onevision,
    "MJHQ-30K": mjhq,
}


MADE: dict[str, tuple[dict[str, str], dict[str, list[dict[str, Any]]]]] = {
    "Echo-4o-Image": (
        {
            "echo4o/Instruction-Following-Image/a.jsonl": (
                '{"instruction": "two", "output_image": "/Echo-4o-Image/I/1.jpg"}'
            ),
            "echo4o/Surrel-Fantasy-Image/b.jsonl": '{"instruction": "odd", "output_image": "Echo-4o-Image/S/2.jpg"}',
        },
        {"echo4o/pairs.jsonl": [{"image": "I/1.jpg", "text": "two"}, {"image": "S/2.jpg", "text": "odd"}]},
    ),
    "ShareGPT-4o-Image": (
        {
            "share4o/text_to_image.json": '[{"input_prompt": "a", "output_image": "o/1.png"}]',
            "share4o/text_and_image_to_image.json": (
                '[{"input_prompt": "b", "input_image": "i.png", "output_image": "o/2.png"},'
                ' {"input_prompt": "c", "input_image": ["i.png", "j.png"], "output_image": "o/3.png"}]'
            ),
        },
        {
            "share4o/pairs.jsonl": [{"image": "o/1.png", "text": "a"}],
            "share4o/edits.jsonl": [
                {"sources": ["i.png"], "image": "o/2.png", "instruction": "b"},
                {"sources": ["i.png", "j.png"], "image": "o/3.png", "instruction": "c"},
            ],
        },
    ),
    "SEED-Data-Edit": (
        {
            "seed/multi_turn_editing/annotations/a.jsonl": (
                '{"source_image": "1.jpg", "target_image": "2.jpg", "instruction": "add", "other": 1}'
            )
        },
        {
            "seed/multi_turn_editing/edits.jsonl": [
                {"source": "images/1.jpg", "image": "images/2.jpg", "instruction": "add"}
            ]
        },
    ),
    "MJHQ-30K": (
        {"mjhq/meta_data.json": '{"ab12": {"category": "animals", "prompt": "a cat"}}'},
        {"mjhq/pairs.jsonl": [{"image": "animals/ab12.jpg", "text": "a cat"}]},
    ),
}
"""Files as they are published, and the rows that the page's jq commands make of them."""


@pytest.mark.skipif(shutil.which("jq") is None, reason="jq is not installed")
@pytest.mark.parametrize("name", MADE)
def test_the_commands_make_the_rows_that_are_read(name: str, tmp_path: Path) -> None:
    text = PAGE.read_text(encoding="utf-8").partition(f"\n## {name}\n")[2].partition("\n## ")[0]
    commands = re.findall(r"^jq .*?(?<!\\)\n", text, re.DOTALL | re.MULTILINE)
    published, rows = MADE[name]
    for path, content in published.items():
        file(tmp_path / path, content.encode())
    assert len(commands) == len(rows)
    for command in commands:
        subprocess.run(["bash", "-c", command], cwd=tmp_path, check=True)
    for path, wanted in rows.items():
        assert [json.loads(line) for line in (tmp_path / path).read_text().splitlines()] == wanted


def test_every_section_has_an_imitation() -> None:
    assert list(SECTIONS) == list(LAYOUTS)


@pytest.mark.parametrize("name", LAYOUTS)
def test_check_and_ten_steps(
    name: str, tiny_plain: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    LAYOUTS[name](tmp_path)
    tiny_plain["stages"]["mix"] |= {"steps": 10, "batch_size": 2, "data": {"size": 32, "sources": SECTIONS[name]}}
    if all(source["task"] == "understand" for source in SECTIONS[name].values()):
        tiny_plain["stages"]["mix"]["train"] = ["llm"]
    recipe = parse(tiny_plain)
    checked = check_data(recipe, check_system(recipe), "mix")
    for report in checked.report.sources:
        assert (report.items, report.usable, report.dropped) == (COUNT, COUNT, {}), report
    assert train_recipe(recipe, tiny_plain, tmp_path / "run")
    assert len((tmp_path / "run/metrics.jsonl").read_text().splitlines()) >= 10
