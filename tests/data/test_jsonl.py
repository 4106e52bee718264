from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from diptych.core.errors import UserError
from diptych.core.sample import Message
from diptych.data.jsonl import JsonlSource
from diptych.data.source import BadItem, ItemDraws

DRAWS = ItemDraws(0)
TALK = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A card."}]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "images").mkdir()
    for name, size in (("a", (40, 30)), ("b", (20, 60))):
        Image.new("RGB", size, "red" if name == "a" else "blue").save(tmp_path / "images" / f"{name}.png")
    return tmp_path


def rows(folder: Path, *values: Any, name: str = "pairs.jsonl") -> Path:
    path = folder / name
    path.write_text("".join((value if isinstance(value, str) else json.dumps(value)) + "\n" for value in values))
    return path


def test_pairs_with_blank_lines_and_several_captions(folder: Path) -> None:
    file = rows(folder, {"image": "images/a.png", "text": "red"}, "", {"image": "images/b.png", "text": ["x", "y"]})
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes().replace(b"\n", b"\r\n"))
    source = JsonlSource(file)
    assert len(source) == 2
    first = source.load(0, DRAWS, (8, 8))
    assert (first.id, first.text, first.task) == ("pairs.jsonl:1", "red", "text_to_image")
    assert {source.load(1, ItemDraws(key), (8, 8)).text for key in range(20)} == {"x", "y"}
    assert source.load(1, ItemDraws(5), (8, 8)).id == "pairs.jsonl:3"
    assert source.sizes().tolist() == [[30, 40], [60, 20]]


def test_sizes_from_the_row_spare_the_header(folder: Path) -> None:
    source = JsonlSource(rows(folder, {"image": "images/none.png", "text": "x", "width": 7, "height": 9}))
    assert source.sizes().tolist() == [[9, 7]]


def test_edits_fit_sources_and_target_alike(folder: Path) -> None:
    file = rows(
        folder,
        {"image": "images/a.png", "instruction": "make it red", "source": "images/b.png"},
        {"image": "images/a.png", "instruction": "join", "sources": ["images/b.png", "images/a.png"]},
    )
    source = JsonlSource(file, task="edit")
    first, second = (source.load(index, DRAWS, (16, 8)) for index in range(2))
    assert first.text == "make it red"
    assert [tuple(image.shape) for image in second.context_images] == [(3, 16, 8), (3, 16, 8)]
    assert first.context_images[0][2].min() == 1  # blue
    assert first.image is not None
    assert first.image[2].max() == -1


@pytest.mark.parametrize("array", [False, True])
def test_conversations(folder: Path, array: bool) -> None:
    values = [
        {"id": 7, "image": "images/a.png", "conversations": TALK},
        {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]},
        {
            "images": ["images/a.png", "images/b.png"],
            "messages": [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "Same?"}]},
                {"role": "assistant", "content": "No."},
            ],
        },
    ]
    if array:
        file = folder / "llava.json"
        file.write_text(json.dumps(values, indent=1))
    else:
        file = rows(folder, *values, name="llava.json")
    source = JsonlSource(file, task="understand")
    samples = [source.load(index, DRAWS, (30, 30)) for index in range(3)]
    assert [sample.id for sample in samples] == ["llava.json:1", "llava.json:2", "llava.json:3"]
    assert samples[0].messages == (
        Message(role="user", text="<image>\nWhat is it?"),
        Message(role="assistant", text="A card."),
    )
    assert samples[0].image is None
    assert [tuple(image.shape) for image in samples[0].context_images] == [
        (3, 30, 40)
    ]  # as it is, whatever the step's size
    assert samples[1].context_images == ()
    assert samples[2].messages[1].text == "<image>\n<image>\nSame?"
    assert source.sizes() is None


@pytest.mark.parametrize(
    ("task", "row", "message"),
    [
        ("text_to_image", '{"image": "a.png", "text": ', "malformed JSON"),
        ("text_to_image", "[1]", "must be an object"),
        ("text_to_image", {"image": "a.png", "txt": "x"}, "unknown key 'txt'. Did you mean 'text'"),
        ("text_to_image", {"image": "a.png"}, "'text' is missing"),
        ("text_to_image", {"image": "a.png", "text": 3}, "'text' must be a string or a list of strings, not int"),
        ("text_to_image", {"image": "a.png", "text": " "}, "'text' is empty"),
        ("text_to_image", {"image": ["a.png"], "text": "x"}, "'image' must be an image (str), not a list"),
        ("text_to_image", {"text": "x"}, "'image' is missing"),
        ("text_to_image", {"image": "a.png", "text": "x", "width": "7"}, "'width' must be a whole number"),
        ("edit", {"image": "a.png", "instruction": "x"}, "'source' is missing"),
        ("edit", {"image": "a.png", "instruction": "x", "sources": []}, "'sources' is empty"),
        ("edit", {"image": "a.png", "instruction": "x", "source": "a", "sources": ["b"]}, "has both"),
        ("understand", {"image": "a.png"}, "needs 'conversations' or 'messages'"),
        ("understand", {"conversations": TALK}, "1 <image> placeholders for 0 images"),
        ("understand", {"conversations": TALK[:1], "image": "a.png"}, "no assistant turn"),
        ("understand", {"conversations": [{"from": "robot", "value": "x"}]}, "unknown role 'robot'"),
        ("understand", {"conversations": [{"from": "gpt", "value": 5}]}, "turn 1: text must be a string"),
    ],
)
def test_malformed_rows_name_file_and_row(folder: Path, task: str, row: Any, message: str) -> None:
    good = {
        "text_to_image": {"image": "a.png", "text": "x"},
        "edit": {"image": "a.png", "instruction": "x", "source": "b.png"},
        "understand": {"image": "a.png", "conversations": TALK},
    }[task]
    with pytest.raises(UserError) as caught:
        JsonlSource(rows(folder, good, row), task=task)
    assert str(caught.value).startswith(f"{folder / 'pairs.jsonl'}:2")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_ignored_keys(folder: Path) -> None:
    file = rows(folder, {"image": "images/a.png", "text": "x", "score": 1})
    with pytest.raises(UserError, match="`ignore`"):
        JsonlSource(file)
    assert len(JsonlSource(file, ignore=["score"])) == 1


def test_missing_image_names_the_row(folder: Path) -> None:
    source = JsonlSource(rows(folder, {"image": "images/none.png", "text": "x"}))
    with pytest.raises(BadItem, match=r"pairs.jsonl:1: image file missing \(.*none.png\)"):
        source.load(0, DRAWS, (8, 8))
    assert source.sizes().tolist() == [[0, 0]]


def test_missing_and_empty_files(folder: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        JsonlSource(folder / "none.jsonl")
    with pytest.raises(UserError, match="no rows"):
        JsonlSource(rows(folder))
    file = folder / "latin.jsonl"
    file.write_bytes(b'{"image": "a.png", "text": "\xe9"}\n')
    with pytest.raises(UserError, match="not UTF-8"):
        JsonlSource(file)


def test_fingerprint_follows_row_and_file(folder: Path) -> None:
    source = JsonlSource(rows(folder, {"image": "images/a.png", "text": "x"}))
    before = source.fingerprint(0)
    Image.new("RGB", (41, 30)).save(folder / "images" / "a.png")
    assert source.fingerprint(0) != before
