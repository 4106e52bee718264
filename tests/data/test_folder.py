from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from skimage import data as pictures

from diptych.core.errors import UserError
from diptych.data.folder import FolderSource
from diptych.data.source import BadItem, ItemDraws

DRAWS = ItemDraws(0)


def write(path: Path, size: tuple[int, int] = (40, 30), colour: str = "red") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)
    return path


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    write(folder / "b.png")
    write(folder / "trip" / "a.JPG", (20, 50))
    write(folder / "trip" / "day 2" / "c.webp")
    (folder / "b.txt").write_text(" a red card \n")
    (folder / "trip" / "a.txt").write_text("ein roter Turm, größer", encoding="utf-8")
    (folder / "trip" / "day 2" / "c.txt").write_text("a tent")
    write(folder / ".thumbnails" / "b.png")
    return folder


def test_nested_images_in_order_of_path(photos: Path) -> None:
    source = FolderSource(photos)
    ids = [source.load(index, DRAWS, (16, 16)).id for index in range(len(source))]
    assert ids == ["photos/b.png", "photos/trip/a.JPG", "photos/trip/day 2/c.webp"]
    sample = source.load(0, DRAWS, (16, 24))
    assert sample.task == "image"
    assert sample.text == ""
    assert sample.image is not None
    assert sample.image.shape == (3, 16, 24)
    assert source.sizes().tolist() == [[30, 40], [50, 20], [30, 40]]
    assert not source.dropped


def test_captions(photos: Path) -> None:
    source = FolderSource(photos, task="text_to_image", name="pairs")
    texts = [source.load(index, DRAWS, (16, 16)).text for index in range(len(source))]
    assert texts == ["a red card", "ein roter Turm, größer", "a tent"]
    assert source.describe() == "pairs: 3 items, task text_to_image"


def test_images_without_caption_are_dropped_and_counted(photos: Path) -> None:
    (photos / "b.txt").unlink()
    (photos / "list.csv").write_text("1,2")
    source = FolderSource(photos, task="text_to_image")
    assert len(source) == 2
    assert source.dropped == {"photos/list.csv": "not an image file", "photos/b.png": "no caption"}
    assert "2 dropped" in source.describe()


def test_caption_without_image(photos: Path) -> None:
    (photos / "b.png").unlink()
    (photos / "read me.txt").write_text("about these photos")
    source = FolderSource(photos, task="text_to_image")
    assert source.dropped == {"photos/b.txt": "no image of this name", "photos/read me.txt": "no image of this name"}
    assert len(source) == len(FolderSource(photos, task="image")) == 2


def test_metadata_of_an_imagefolder(photos: Path) -> None:
    (photos / "b.txt").unlink()
    rows = [{"file_name": "b.png", "text": "from a row", "short": ["s", "t"]}, {"file_name": "gone.png", "text": "?"}]
    (photos / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (photos / "trip" / "metadata.csv").write_text("file_name,text\na.JPG,twice\n")
    source = FolderSource(photos, task="text_to_image")
    assert [source.load(index, DRAWS, (8, 8)).text for index in range(len(source))] == ["from a row", "a tent"]
    assert source.dropped == {
        "photos/gone.png": "no image of this name",
        "photos/trip/a.JPG": "two captions (a .txt and metadata)",
    }
    (photos / "trip" / "a.txt").unlink()
    assert FolderSource(photos, task="text_to_image").load(1, DRAWS, (8, 8)).text == "twice"
    weighted = FolderSource(photos, task="text_to_image", text={"text": 1, "short": 3})
    texts = Counter(weighted.load(0, ItemDraws(key), (8, 8)).text for key in range(400))
    assert texts["from a row"] == pytest.approx(100, abs=30)
    assert texts["s"] == pytest.approx(150, abs=35)
    with pytest.raises(BadItem, match=r"photos/trip/a.JPG: .*metadata.csv:2: 'short' is missing"):
        FolderSource(photos, task="text_to_image", text="short").load(1, DRAWS, (8, 8))
    assert len(FolderSource(photos)) == 3
    assert not FolderSource(photos).dropped
    with pytest.raises(
        UserError, match=r"text names keys of a metadata\.jsonl or metadata\.csv, and task image reads no"
    ):
        FolderSource(photos, task="image", text="short")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{oops", "metadata.jsonl:1: not JSON"),
        ('{"text": "x"}', "metadata.jsonl:1: 'file_name' must name an image"),
        ('{"file_name": "b.png"}\n\n{"file_name": "./b.png"}', "metadata.jsonl:3: ./b.png has a row already"),
        ("[]", "metadata.jsonl:1: a row must be an object"),
    ],
)
def test_malformed_metadata(text: str, message: str, photos: Path) -> None:
    (photos / "metadata.jsonl").write_text(text)
    with pytest.raises(UserError, match=message):
        FolderSource(photos, task="text_to_image")


@pytest.mark.parametrize("weights", [{"text": 0}, {"text": float("nan")}, {"text": True}, {}, []])
def test_weights_of_texts(weights: Any, photos: Path) -> None:
    with pytest.raises(UserError, match=r"photos: text: "):
        FolderSource(photos, task="text_to_image", text=weights)


def test_missing_and_empty_folders(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere: no such folder"):
        FolderSource(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"no image found \(the folder is empty\)"):
        FolderSource(tmp_path)
    with pytest.raises(UserError, match="is a file"):
        FolderSource(write(tmp_path / "x.png"))
    with pytest.raises(UserError, match=r"no image found .*1: no caption"):
        FolderSource(tmp_path, task="text_to_image")


def test_wrong_task_and_fit(photos: Path) -> None:
    with pytest.raises(UserError, match="'text_to_image'"):
        FolderSource(photos, task="text_to_imgae")
    with pytest.raises(UserError, match="cannot serve task 'edit'"):
        FolderSource(photos, task="edit")
    with pytest.raises(UserError, match="crop"):
        FolderSource(photos, fit="corp")


def test_bad_items_are_named(photos: Path) -> None:
    photo = photos / "d.jpg"
    Image.fromarray(pictures.astronaut()).save(photo)
    photo.write_bytes(photo.read_bytes()[:9000])
    (photos / "e.png").write_bytes(b"")
    (photos / "e.txt").write_bytes(b"\xff\xfe caption")
    write(photos / "f.png")
    (photos / "f.txt").write_text("  \n")
    (photos / "d.txt").write_text("an astronaut")
    source = FolderSource(photos, task="text_to_image")
    assert source.sizes()[2].tolist() == [0, 0]
    faults: dict[str, str] = {}
    for index in range(len(source)):
        try:
            source.load(index, DRAWS, (8, 8))
        except BadItem as bad:
            faults[bad.id] = bad.reason.split(" (")[0]
    assert faults == {
        "photos/d.jpg": "truncated or corrupt image",
        "photos/e.png": "caption is not UTF-8",
        "photos/f.png": "empty caption",
    }


def test_fingerprint_follows_the_file(photos: Path) -> None:
    source = FolderSource(photos)
    before = [source.fingerprint(index) for index in range(3)]
    assert len(set(before)) == 3
    write(photos / "b.png", (41, 30))
    after = [source.fingerprint(index) for index in range(3)]
    assert after[0] != before[0]
    assert after[1:] == before[1:]
    assert FolderSource(photos, fit="letterbox").fingerprint(1) != after[1]


def test_linked_folders_are_followed_once(photos: Path) -> None:
    (photos / "loop").symlink_to(photos)
    other = photos.parent / "other"
    write(other / "z.png")
    (photos / "zz").symlink_to(other)
    source = FolderSource(photos)
    assert source.paths == ["b.png", "trip/a.JPG", "trip/day 2/c.webp", "zz/z.png"]
